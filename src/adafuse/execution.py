"""execution: which way of computing the adapters a forward takes."""

from __future__ import annotations

import importlib.util
import os
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

from adafuse.costs import H100, Device, costs

EXECUTIONS = ("auto", "reference", "fused", "switch")
_in_graph = ContextVar("in_graph", default=False)


def check_available(execution, device):
    """ValueError or ImportError if `execution` cannot run on this device."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution={execution!r} is unknown; allowed: {', '.join(map(repr, EXECUTIONS))}")
    if execution in ("auto", "reference"):
        return
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            f'execution="{execution}" runs Triton kernels, and Triton is not installed: pip install triton'
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'execution="{execution}" runs GPU kernels, and the model is on {device.type}; move it to a GPU, or use "reference"'
        )


def resolve(execution, batch, seq, needs_grad) -> str:
    """What a forward of batch x seq tokens does: "reference", "fused", or "switch". Of "auto" `automatic` decides.

    A prompt under "switch" runs "fused", on restored weights. ValueError where the execution asked for cannot do it.
    """
    if execution == "reference":
        return "reference"
    if needs_grad:
        raise ValueError(
            f'execution="{execution}" has no gradients, and this forward needs them; set model.execution = "reference" to train, or run '
            "under torch.no_grad()"
        )
    if execution == "switch" and batch > 1:
        raise ValueError(
            'execution="switch" merges one token\'s experts into the weights, so it runs one sequence at a time (no beams); '
            f'got a batch of {batch}: use "fused"'
        )
    return "switch" if execution == "switch" and seq == 1 else "fused"


def automatic(layers, config, tokens, itemsize, device, needs_grad) -> str:
    """Either "reference" or "fused", whichever is expected to take less time. Kernels need a GPU, and have no gradients.

    Launched one by one from Python, "fused" takes the host longer than "reference": it pays where the GPU's work is longer still, or
    `in_graph`. torch.compile fuses the reference, and cannot see into the kernels.
    """
    if (
        device.type != "cuda"
        or needs_grad
        or torch.compiler.is_compiling()
        or importlib.util.find_spec("triton") is None
    ):
        return "reference"
    return cheapest(layers, config, tokens, itemsize, _in_graph.get(), Device.of(device))


@contextmanager
def in_graph():
    """Inside, "auto" chooses as for a CUDA graph, which spares the host: for a capture, and the runs before it that compile kernels."""
    token = _in_graph.set(True)
    try:
        yield
    finally:
        _in_graph.reset(token)


@lru_cache
def cheapest(layers, config, tokens, itemsize, captured, device=H100) -> str:
    """Either "reference" or "fused". captured: in a CUDA graph, where the host's time does not count.

    Launched from Python, a forward takes the longer of the host's time and the device's: a GPU that lags behind hides the launches.
    What a model has beside the adapted linears adds to both alike, and is left out.
    """

    def seconds(cost):
        return cost.seconds if captured else max(cost.seconds, cost.host)

    found = [
        cost for cost in costs(layers, config, tokens, itemsize, device) if cost.execution in ("reference", "fused")
    ]
    return min(found, key=seconds).execution


def gradients_needed(h0, parameters) -> bool:
    """Whether autograd will ask for gradients of a forward with this h0 and these parameters."""
    return torch.is_grad_enabled() and (h0.requires_grad or any(p.requires_grad for p in parameters))
