"""execution: which way of computing the adapters a forward takes, and what each would cost in bytes and FLOPs."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

EXECUTIONS = ("auto", "reference", "fused", "switch")
FEW_TOKENS = 8  # up to here the fused kernels read the base's weights themselves


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
    """Of one forward's adapted linears, base weights included."""

    execution: str
    how: str
    bytes: float
    flops: float


def costs(layers, config, tokens, itemsize) -> list[Cost]:
    """Bytes that must move between memory and processors, and FLOPs, for each execution. Routing taken as uniform.

    layers: (in, out) features of the adapted linears. Of E experts, n tokens with K each reach E (1 - (1 - K/E)^n) on average.
    """
    hit = config.num_experts * (1 - (1 - config.top_k / config.num_experts) ** tokens)
    base = sum(i * o for i, o in layers)
    width = sum(i + o for i, o in layers)
    active, reached, ranks = (n * config.r + config.shared_rank for n in (config.top_k, hit, config.num_experts))
    flops = 2 * tokens * (base + active * width)
    moved = itemsize * (base + reached * width + tokens * width)
    if tokens <= FEW_TOKENS:
        fused = Cost("fused", "base weights and chosen experts in one pass", moved, flops)
    else:
        outputs = 2 * itemsize * tokens * sum(o for _, o in layers)
        fused = Cost("fused", "base matmul, then the experts of sorted tokens", moved + outputs, flops)
    reference = itemsize * (base + ranks * width + tokens * width)
    all_ranks = 2 * tokens * (base + ranks * width)
    found = [fused, Cost("reference", "base matmul, two matmuls over all experts", reference, all_ranks)]
    if tokens == 1:
        merge = itemsize * (3 * base + active * width)
        found.append(Cost("switch", "experts merged from a copy, then the base", merge, 2 * base * (1 + active)))
    return found


def explain(found: list[Cost], chosen: str, tokens: int) -> str:
    """A table of the costs, the chosen one marked."""
    lines = [f"{tokens} token(s) a forward, adapted linears only:"]
    for cost in found:
        mark = "->" if cost.execution == chosen else "  "
        lines.append(
            f"{mark} {cost.execution:10} {cost.bytes / 1e9:9.3f} GB {cost.flops / 1e9:12.1f} GFLOP   {cost.how}"
        )
    return "\n".join(lines)


def gradients_needed(h0, parameters) -> bool:
    """Whether autograd will ask for gradients of a forward with this h0 and these parameters."""
    return torch.is_grad_enabled() and (h0.requires_grad or any(p.requires_grad for p in parameters))
