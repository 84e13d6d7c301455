"""What a token's time is made of: launches, Python, attention, what lies between the linears, adapters, and the rest. They add up to it.

Time in which a kernel runs is told from the rest by a trace of one step. Without graphs a step launches kernels one by one, and the
device waits: for the launches, each as long as this host takes for one, and for what Python does besides. A graph's kernels leave gaps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

# Attention in HuggingFace's forward, by whatever library PyTorch takes. Not what inductor names after its inputs.
ATTENTION = re.compile(r"^(?!triton_).*(flash|fmha|sdpa|attention)", re.IGNORECASE)
EAGER = re.compile(r"hf/eager|published/")
# The bare model that runs as a row does: what is above it are the adapters.
BARE = {
    "published/": "hf/eager",
    "graphed/layerwise_ours": "engine/backbone",
    "graphed/": "hf/compiled",
    "engine/": "engine/backbone",
}


class Kernel(NamedTuple):
    """A kernel or a copy on the device. start, end: ms."""

    name: str
    start: float
    end: float


def kernels_of(step) -> list[Kernel]:
    """Those of one step, traced; on a CPU there are none."""
    if not torch.cuda.is_available():
        return []
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    found = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [Kernel(event.name, event.time_range.start / 1e3, event.time_range.end / 1e3) for event in found]


def busy(kernels) -> float:
    """Milliseconds in which at least one of them runs: those that start early, and wait, lie in others' time."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(kernels, key=lambda each: each.start):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


def bare_of(name) -> str | None:
    """The row of the bare model that runs in the same way; None for one that is bare itself."""
    bare = next((bare for start, bare in BARE.items() if name.startswith(start)), None)
    return None if bare == name else bare


@dataclass
class Token:
    """A row: ms of a token, its kernels, and what a step is shorter without some of its launches (ms, by part), if that was measured."""

    name: str
    ms: float
    kernels: list[Kernel]
    left_out: dict = field(default_factory=dict)

    @property
    def idle(self) -> float:
        """No kernel runs. (A trace may slow a step down, so that its kernels take longer than a step without it.)"""
        return max(self.ms - busy(self.kernels), 0.0)

    def attention(self) -> dict:
        """Of HuggingFace's forward by the names of its kernels, empty if they have others: then it is not split."""
        found = [kernel for kernel in self.kernels if ATTENTION.match(kernel.name)]
        return {"attention": busy(found)} if found else {}

    def waiting(self, launch) -> dict:
        """What no kernel runs for. launch: microseconds of one."""
        if not EAGER.match(self.name):
            return {"launching": self.idle}
        launching = min(len(self.kernels) * launch / 1e3, self.idle)
        return {"launching": launching, "python": self.idle - launching}

    def parts(self, launch, bare: Token | None) -> dict:
        """Milliseconds by part. launch: microseconds of one. What is not split for want of that (None), or of the row of the bare model,
        is left out.

        The engine's kernels wait inside each other's time, so what they take is what a step is shorter without them. That of a bare
        model holds for what runs the same blocks.
        """
        if launch is None:
            return {}
        parts = self.waiting(launch)
        if bare_of(self.name) is not None and bare is None:
            return parts
        own = self.left_out or (bare.left_out if bare is not None else {})
        parts |= own or self.attention()
        if bare is not None:
            parts["adapters"] = (self.ms - self.idle) - (bare.ms - bare.idle)
        return parts | {"rest": self.ms - sum(parts.values())}
