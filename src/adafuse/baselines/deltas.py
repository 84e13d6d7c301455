"""What the chosen experts add, in two executions of one formula:

    y[t] + scale * sum_k weights[t, k] * b[e_k] @ activation(a[e_k] @ x[t]),    e_k = experts[t, k]

y [..., O], x [..., I] of as many tokens; a [E*r, I], b [E*r, O] as a bank lays them out; routing: experts and weights [..., K].
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from adafuse.ops.delta import add_delta


def rank_mask(experts, weights, num_experts, r, dtype) -> torch.Tensor:
    """[..., E*r]: an expert's weight over its r ranks where it was chosen, 0 elsewhere. experts, weights [..., K]."""
    dense = weights.new_zeros(*weights.shape[:-1], num_experts).scatter(-1, experts, weights)
    return dense.to(dtype).repeat_interleave(r, dim=-1)


def add_all_experts(y, x, a, b, routing, *, num_experts, scale, activation=None):
    """Graph-friendly: all experts computed, those not chosen masked out in rank space. Two matmuls.

    Differentiable. No host sync, no shape that depends on the data: safe inside a CUDA graph.
    """
    mask = rank_mask(routing.experts, routing.weights * scale, num_experts, len(a) // num_experts, x.dtype)
    return add_delta(y, x, a, b, rank_mask=mask, activation=activation)


def add_expert_by_expert(y, x, a, b, routing, *, num_experts, scale, activation=None):
    """As published: a loop over the experts, the tokens of each found with torch.where and put back with index_add.

    Differentiable. Waits for the device at every expert, so no CUDA graph can hold it.
    """
    r = len(a) // num_experts
    rows = x.reshape(-1, x.shape[-1])
    experts, weights = (part.reshape(len(rows), -1) for part in (routing.experts, routing.weights))
    delta = rows.new_zeros(len(rows), b.shape[1])
    for expert in range(num_experts):
        token, slot = torch.where(experts == expert)
        if len(token) == 0:
            continue
        own = slice(expert * r, (expert + 1) * r)
        h = linear(rows[token], a[own])
        h = h if activation is None else activation(h)
        weight = (scale * weights[token, slot, None]).to(h.dtype)
        delta.index_add_(0, token, (h @ b[own]) * weight)
    return y + delta.to(y.dtype).view(y.shape)


ADD = {"graph": add_all_experts, "published": add_expert_by_expert}
