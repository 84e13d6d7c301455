"""execution: which way of computing the adapters a forward takes, and what each would cost in bytes and FLOPs."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache

import torch

EXECUTIONS = ("auto", "reference", "fused", "switch")
FEW_TOKENS = 8  # up to here a program of the fused kernels takes all tokens
CROWD_TOKENS = 64  # up to here they may read the base's weights themselves
# Of an H100: bytes a second from memory, FLOPs a second of a bf16 matmul, seconds from one small kernel to the next.
READ, FLOPS, LAUNCH = 3.2e12, 7e14, 2e-6


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
    """What a forward of batch x seq tokens does: "reference", "fused", or "switch".

    "auto" is the reference: it does not choose the kernels yet. A prompt under "switch" runs "fused", on restored weights.
    ValueError where the execution asked for cannot do it.
    """
    if execution in ("auto", "reference"):
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


@dataclass(frozen=True)
class Cost:
    """Of one forward's adapted linears, base weights included. form: which of the kernels of `ops`, for "fused"."""

    execution: str
    how: str
    bytes: float
    flops: float
    launches: int
    form: str = ""

    @property
    def seconds(self) -> float:
        """What an H100 would take at the rates below. To compare ways of doing the same, not to predict."""
        return max(self.bytes / READ, self.flops / FLOPS) + self.launches * LAUNCH


def costs(layers, config, tokens, itemsize) -> list[Cost]:
    """Bytes that must move between memory and processors, and FLOPs, for each execution. Routing taken as uniform.

    layers: (in, out) features of the adapted linears. Of E experts, n tokens with K each reach E (1 - (1 - K/E)^n) on average.
    """
    hit = config.num_experts * (1 - (1 - config.top_k / config.num_experts) ** tokens)
    base = sum(i * o for i, o in layers)
    width = sum(i + o for i, o in layers)
    active, reached, ranks = (n * config.r + config.shared_rank for n in (config.top_k, hit, config.num_experts))
    outputs = 2 * tokens * sum(o for _, o in layers)  # written by the base, then read and written

    def cost(execution, how, ranks_read, ranks_computed, launches, more=0.0, form=""):
        moved = itemsize * (base + ranks_read * width + tokens * width + more)
        return Cost(execution, how, moved, 2 * tokens * (base + ranks_computed * width), launches * len(layers), form)

    found = []
    if tokens <= FEW_TOKENS:
        found.append(cost("fused", "base weights and chosen experts in one pass", reached, active, 2, form="decode"))
    else:
        found.append(
            cost("fused", "base matmul, then the experts of sorted tokens", reached, active, 4, outputs, "tiles")
        )
    if FEW_TOKENS < tokens <= CROWD_TOKENS:
        found.append(cost("fused", "base weights and all experts in one pass", ranks, ranks, 2, form="crowd"))
    found.append(cost("reference", "base matmul, two matmuls over all experts", ranks, ranks, 5, outputs))
    if tokens == 1:
        merge = itemsize * (3 * base + active * width)
        found.append(
            Cost("switch", "experts merged from a copy, then the base", merge, 2 * base * (1 + active), len(layers))
        )
    return found


@lru_cache
def fused_form(layer, config, tokens, itemsize) -> str:
    """The cheapest form of "fused" for one plain linear of (in, out) features: "decode", "crowd" or "tiles"."""
    fused = (cost for cost in costs([layer], config, tokens, itemsize) if cost.execution == "fused")
    return min(fused, key=lambda cost: cost.seconds).form


def explain(found: list[Cost], chosen: str, tokens: int) -> str:
    """A table of the costs, the chosen one marked: of several forms of an execution the cheapest."""
    lines = [f"{tokens} token(s) a forward, adapted linears only:"]
    best = min((cost for cost in found if cost.execution == chosen), key=lambda cost: cost.seconds)
    for cost in found:
        mark = "->" if cost is best else "  "
        numbers = f"{cost.bytes / 1e9:9.3f} GB {cost.flops / 1e9:12.1f} GFLOP {cost.launches:5} launches"
        lines.append(f"{mark} {cost.execution:10} {numbers}   {cost.how}")
    return "\n".join(lines)


def gradients_needed(h0, parameters) -> bool:
    """Whether autograd will ask for gradients of a forward with this h0 and these parameters."""
    return torch.is_grad_enabled() and (h0.requires_grad or any(p.requires_grad for p in parameters))
