"""execution: which way of computing the adapters a forward takes, and what each would cost in bytes and FLOPs."""

from __future__ import annotations

import importlib.util
import os
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

import torch

EXECUTIONS = ("auto", "reference", "fused", "switch")
FEW_TOKENS = 8  # up to here a program of the fused kernels takes all tokens
CROWD_TOKENS = 64  # up to here they may read the base's weights themselves
MANY_TOKENS = 512  # from here on again
# Of an H100: bytes a second from memory, FLOPs a second of a bf16 matmul, seconds from one small kernel to the next.
READ, FLOPS, LAUNCH, PROCESSORS = 3.2e12, 7e14, 2e-6, 132
MATMUL = 0.95  # of the vendor's matmul, ours (ops/matmul.py)
# The share of READ that is reached (Llama-2-7B's linears, 2 to 32 tokens): by the vendor's matmul; by ops/crowd.py. ops/decode.py reaches
# all of it with one token; as it multiplies without tensor cores, every further one adds so much of that time, without and with adapters.
VENDOR, CROWD, DECODE_MORE = 0.8, 0.78, (0.18, 0.33)
# Seconds that Python takes to launch what one adapted linear needs, on a host of 9 us a launch (benchmarks/executions.py).
HOST = {"reference": 1.1e-4, "fused": 3e-4}
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
    return cheapest(layers, config, tokens, itemsize, _in_graph.get())


@contextmanager
def in_graph():
    """Inside, "auto" chooses as for a CUDA graph, which spares the host: for a capture, and the runs before it that compile kernels."""
    token = _in_graph.set(True)
    try:
        yield
    finally:
        _in_graph.reset(token)


@lru_cache
def cheapest(layers, config, tokens, itemsize, captured) -> str:
    """Either "reference" or "fused". captured: in a CUDA graph, where the host's time does not count."""

    def seconds(cost):
        return cost.seconds if captured else max(cost.seconds, len(layers) * HOST[cost.execution])

    found = (cost for cost in costs(layers, config, tokens, itemsize) if cost.execution in HOST)
    return min(found, key=seconds).execution


class Kernel(NamedTuple):
    """What one kernel reads and writes, and computes. filled: the share of FLOPS that it reaches at most; rate: the share of READ."""

    bytes: float
    flops: float
    filled: float = 1.0
    rate: float = 1.0

    @property
    def seconds(self) -> float:
        """What an H100 would take at the rates above. To compare ways of doing the same, not to predict."""
        return max(self.bytes / (READ * self.rate), self.flops / (FLOPS * self.filled)) + LAUNCH


class Cost(NamedTuple):
    """Of one forward's adapted linears, base weights included. form: which of the kernels of `ops`, for "fused"."""

    execution: str
    how: str
    kernels: list[Kernel]
    form: str = ""

    @property
    def bytes(self) -> float:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> float:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)


def costs(layers, config, tokens, itemsize) -> list[Cost]:
    """Bytes that must move between memory and processors, and FLOPs, for each execution. Routing taken as uniform.

    layers: (in, out) features of the linears; config: of their adapters, None: the base alone. Of E experts, n tokens with K each
    reach E (1 - (1 - K/E)^n) on average. Sums over tiles of sorted tokens are taken over twice the active ranks, for neighbours that
    differ.
    """
    active, reached, ranks = _ranks(config, tokens)
    padded = min(2 * active, ranks)

    def cost(execution, how, kernels_of, form=""):
        return Cost(execution, how, [kernel for layer in layers for kernel in kernels_of(*layer)], form)

    def kernel(numbers, products, **limits):
        return Kernel(itemsize * numbers, 2 * products, **limits)

    def base(i, o):
        return kernel(i * o + tokens * (i + o), tokens * i * o, rate=VENDOR)

    def one_launch(read, computed, rate):
        return lambda i, o: [
            kernel(0, 0),  # a small fill of what is handed over
            kernel(i * o + read * (i + o) + tokens * (i + o), tokens * (i * o + computed * (i + o)), rate=rate),
        ]

    def shrink(i, o):
        return kernel(reached * i + tokens * (i + padded), tokens * padded * i)

    def tiles(i, o):
        return [base(i, o), shrink(i, o), kernel(reached * o + tokens * (padded + 2 * o), tokens * padded * o)]

    def matmul(i, o):
        read = i * o + reached * o + tokens * (i + padded + o)
        return [shrink(i, o), kernel(read, tokens * o * (i + padded), filled=_filled(tokens, o))]

    def reference(i, o):
        return [
            base(i, o),
            kernel(ranks * i + tokens * (i + ranks), tokens * ranks * i),
            kernel(2 * tokens * ranks, 0),  # the mask
            kernel(ranks * o + tokens * (ranks + o), tokens * ranks * o),
            kernel(3 * tokens * o, 0),  # the sum
        ]

    def switch():
        merge = [(2 * i * o + active * (i + o), active * i * o) for i, o in layers]  # all in one launch
        return [kernel(*map(sum, zip(*merge, strict=True))), *(base(i, o) for i, o in layers)]

    found = []
    if tokens <= FEW_TOKENS:
        decode_rate = 1 / (1 + DECODE_MORE[config is not None] * (tokens - 1))
        how, kernels = "base weights and chosen experts in one pass", one_launch(reached, active, decode_rate)
        found.append(cost("fused", how, kernels, "decode"))
    else:
        found.append(cost("fused", "base matmul, then the experts of sorted tokens", tiles, "tiles"))
        if itemsize == 2 and tokens >= MANY_TOKENS:  # fp32 has no tensor cores: the vendor's matmul is far better at it
            found.append(cost("fused", "base and experts of sorted tokens in one matmul", matmul, "matmul"))
    if 1 < tokens <= CROWD_TOKENS and (itemsize == 2 or tokens > FEW_TOKENS):
        found.append(
            cost("fused", "base weights and all experts in one pass", one_launch(ranks, ranks, CROWD), "crowd")
        )
    found.append(cost("reference", "base matmul, two matmuls over all experts", reference))
    if tokens == 1 and config is not None:
        found.append(Cost("switch", "experts merged from a copy, then the base", switch()))
    return found


def _ranks(config, tokens):
    """Of a token; of all experts that the tokens reach; of all experts."""
    if config is None:
        return 0, 0, 0
    hit = config.num_experts * (1 - (1 - config.top_k / config.num_experts) ** tokens)
    return tuple(n * config.r + config.shared_rank for n in (config.top_k, hit, config.num_experts))


def _filled(tokens, features) -> float:
    """The share of the device's processors that tiles of `ops.matmul` keep busy, times how well its loop does beside the vendor's."""
    return MATMUL * min(1, -(-tokens // 128) * -(-features // 256) / PROCESSORS)


@lru_cache
def fused_form(layer, config, tokens, itemsize) -> str:
    """The cheapest form of "fused" for one plain linear of (in, out) features: "decode", "crowd", "tiles" or "matmul".

    config: of its adapters; None: the base alone.
    """
    fused = (cost for cost in costs([layer], config, tokens, itemsize) if cost.execution == "fused")
    return min(fused, key=lambda cost: cost.seconds).form


def explain(found: list[Cost], chosen: str, tokens: int) -> str:
    """A table of the costs, the chosen one marked: of several forms of an execution the cheapest."""
    lines = [f"{tokens} token(s) a forward, adapted linears only:"]
    best = min((cost for cost in found if cost.execution == chosen), key=lambda cost: cost.seconds)
    for cost in found:
        mark = "->" if cost is best else "  "
        numbers = f"{cost.bytes / 1e9:9.3f} GB {cost.flops / 1e9:12.1f} GFLOP {len(cost.kernels):5} launches"
        lines.append(f"{mark} {cost.execution:10} {numbers}   {cost.how}")
    return "\n".join(lines)


def gradients_needed(h0, parameters) -> bool:
    """Whether autograd will ask for gradients of a forward with this h0 and these parameters."""
    return torch.is_grad_enabled() and (h0.requires_grad or any(p.requires_grad for p in parameters))
