"""route: the pre-gate of a decoding step in two launches: router logits, then softmax, top-k and the plan's buffers.

The same function as `adafuse.router.Router`, which it is tested against, for the few tokens of a step that is captured in a CUDA graph:
there the dozen small launches of plain PyTorch would cost as much as a linear.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, launch_options, next_power_of_2, wait_for_inputs

RMS_EPS = tl.constexpr(1e-6)
BY_DECISION = ("experts", "weights", "gates")


class Requests(NamedTuple):
    """Whose tokens a batch's are, and what each is to know of it.

    starts [requests + 1] int32: where each request's tokens begin, then the number of all; tokens behind are of none. None: no token
    is of a request. adapted [requests, or more] fp32: 1 for a request that has the adapter, else 0.

    A token's weights are multiplied by that of its request, 0 if it has none; shared [T] fp32 becomes shared_scale times it, and so does
    the last column of the gates. load [D, E] int64: grows by 1 for each expert that a token of an adapted request chose.
    """

    starts: torch.Tensor | None
    adapted: torch.Tensor
    shared: torch.Tensor
    shared_scale: float
    load: torch.Tensor


def route_ref(h0, weight, *, num_experts, top_k, scale, hidden=None):
    """`route` in plain PyTorch, in the dtype of its inputs: experts [D, T, K] int64 and weights [D, T, K]."""
    x = h0 * torch.rsqrt(h0.square().mean(-1, keepdim=True) + RMS_EPS.value)
    if hidden is not None:
        x = torch.nn.functional.silu(x @ hidden.T)
    probabilities = (x @ weight.T).unflatten(-1, (-1, num_experts)).movedim(-2, 0).softmax(-1)
    experts = probabilities.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    weights = probabilities.gather(-1, experts)
    return experts, scale * (weights / weights.sum(-1, keepdim=True) if top_k > 1 else weights)


@triton.jit
def _logits_kernel(
    x,
    weight,
    out,
    stride_x,
    rows,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: BLOCK_N rows of the weight for one token. Grid (blocks of rows, T)."""
    token = tl.program_id(1)
    wait_for_inputs(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_H)
    dot = tl.zeros([BLOCK_N], tl.float32)
    square = 0.0
    for start in range(0, H, BLOCK_H):
        xs = tl.load(x + token * stride_x + start + i, mask=start + i < H, other=0.0).to(tl.float32)
        mask = (n < rows)[:, None] & (start + i < H)[None, :]
        tile = tl.load(weight + n[:, None] * H + start + i[None, :], mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(tile * xs[None, :], 1)
        square += tl.sum(xs * xs, 0)
    if NORM:
        dot = dot * tl.rsqrt(square / H + RMS_EPS)
    if SILU:
        dot = dot * tl.sigmoid(dot)
    tl.store(out + token * rows + n, dot, mask=n < rows)


@triton.jit
def _adapted(starts, adapted, requests, token):
    """That of the token's request; 0 if it has none."""
    n = tl.arange(0, 128)
    before = 0  # requests that end at or before the token
    for first in range(0, requests, 128):
        end = tl.load(starts + 1 + first + n, mask=first + n < requests, other=2147483647)
        before += tl.sum((end <= token).to(tl.int32), 0)
    return tl.load(adapted + before, mask=before < requests, other=0.0)


@triton.jit(do_not_specialize=["requests", "stride_chosen", "stride_gates"])
def _choose_kernel(
    logits,
    experts,
    weights,
    gates,
    starts,
    adapted,
    shared,
    load,
    requests,
    stride_chosen,
    stride_gates,
    scale,
    shared_scale,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATES: tl.constexpr,
    REQUESTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: one decision for one token. Grid (D, T)."""
    decision, token = tl.program_id(0), tl.program_id(1)
    wait_for_inputs(PDL)
    if REQUESTS:
        share = _adapted(starts, adapted, requests, token)
        scale *= share
    e = tl.arange(0, BLOCK_E)
    z = tl.load(logits + (token * D + decision) * E + e, mask=e < E, other=float("-inf"))
    p = tl.exp(z - tl.max(z, 0))
    p = tl.where(e < E, p / tl.sum(p, 0), -1.0)
    k = tl.arange(0, BLOCK_K)
    chosen, kept = tl.zeros([BLOCK_K], tl.int32), tl.zeros([BLOCK_K], tl.float32)
    by_expert = tl.zeros([BLOCK_E], tl.float32)
    for step in tl.static_range(K):
        best = tl.max(p, 0)
        # Ties: the lower index. Of NaN none is the best: still an expert that exists.
        expert = tl.minimum(tl.min(tl.where(p == best, e, BLOCK_E), 0), E - 1)
        chosen, kept = tl.where(k == step, expert, chosen), tl.where(k == step, best, kept)
        by_expert = tl.where(e == expert, best, by_expert)
        p = tl.where(e == expert, -1.0, p)
    if K > 1:
        total = tl.sum(kept, 0)
        kept, by_expert = kept / total, by_expert / total
    where = decision.to(tl.int64) * stride_chosen + token * K + k
    tl.store(experts + where, chosen, mask=k < K)
    tl.store(weights + where, kept * scale, mask=k < K)
    gate = gates + decision.to(tl.int64) * stride_gates + token * (E + 1) if GATES else gates
    if GATES:
        tl.store(gate + e, by_expert * scale, mask=e < E)
    if REQUESTS:
        if GATES:
            tl.store(gate + E, shared_scale * share)
        if decision == 0:
            tl.store(shared + token, shared_scale * share)
        one = tl.full([BLOCK_K], 1, tl.int64)
        tl.atomic_add(load + decision * E + chosen, one, mask=k < tl.where(share > 0, K, 0), sem="relaxed")


def route(
    h0, weight, experts, weights, *, num_experts, scale, logits, hidden=None, hidden_out=None, gates=None, requests: Requests | None = None,
    pdl=False,
):  # fmt: skip
    """Write the routing of the tokens h0 [T, H] into experts [D, T, K] int32 and weights [D, T, K] fp32 (times `scale`), whose decisions
    may lie apart, equally far in both.

    gates [D, T, E + 1] fp32: the same by expert, 0 where not chosen; the last column, the shared expert's, is left as it is, unless there
    are requests.
    weight [D * E, H or router_hidden] and hidden [router_hidden, H]: the router's, of any dtype that a model may have been cast to;
    sums are in fp32. logits [T, D * E] and hidden_out [T, router_hidden], fp32: room to work in. No host sync, no allocation: safe
    inside a CUDA graph.
    """
    refuse_gradients(h0, weight, *([] if hidden is None else [hidden]))
    decisions, tokens, top_k = experts.shape
    _check(h0, weight, experts, weights, logits, num_experts, hidden, hidden_out, gates, requests)
    x, norm = h0, True
    if hidden is not None:
        _rows_times(x, hidden, hidden_out, norm=True, silu=True, pdl=pdl)
        x, norm = hidden_out, False
    _rows_times(x, weight, logits, norm=norm, silu=False, pdl=pdl)
    with torch.cuda.device_of(h0):
        _choose_kernel[(decisions, tokens)](
            logits,
            experts,
            weights,
            gates,
            *_of_requests(requests, experts),
            experts.stride(0),
            gates.stride(0) if gates is not None else 0,
            scale,
            requests.shared_scale if requests else 0.0,
            D=decisions,
            E=num_experts,
            K=top_k,
            BLOCK_E=next_power_of_2(num_experts),
            BLOCK_K=next_power_of_2(top_k),
            GATES=gates is not None,
            REQUESTS=requests is not None,
            num_warps=1,
            **launch_options(pdl),
        )


def _of_requests(requests, experts):
    """What the kernel takes of them, and their number. Where there is none something is named that is not read: a loop that does not run is
    compiled."""
    if requests is None:
        return None, None, None, None, 0
    starts, count = (experts, 0) if requests.starts is None else (requests.starts, requests.starts.shape[0] - 1)
    return starts, requests.adapted, requests.shared, requests.load, count


def _rows_times(x, weight, out, *, norm, silu, pdl):
    rows, features = weight.shape
    block_n = 1 if rows <= 256 else 4
    with torch.cuda.device_of(x):
        _logits_kernel[(cdiv(rows, block_n), len(x))](
            x,
            weight,
            out,
            x.stride(0),
            rows,
            H=features,
            BLOCK_N=block_n,
            BLOCK_H=min(next_power_of_2(features), 4096 // block_n),
            NORM=norm,
            SILU=silu,
            num_warps=4,
            **launch_options(pdl),
        )


def _check(h0, weight, experts, weights, logits, num_experts, hidden, hidden_out, gates, requests):
    decisions, tokens, _ = experts.shape
    inner = h0.shape[1] if hidden is None else len(hidden)
    expected = {
        "weight": (weight, (decisions * num_experts, inner), weight.dtype),
        "experts": (experts, experts.shape, torch.int32),
        "weights": (weights, experts.shape, torch.float32),
        "logits": (logits, (tokens, decisions * num_experts), torch.float32),
    }
    if gates is not None:
        expected["gates"] = (gates, (decisions, tokens, num_experts + 1), torch.float32)
    if hidden is not None:
        expected["hidden"] = (hidden, (inner, h0.shape[1]), hidden.dtype)
        expected["hidden_out"] = (hidden_out, (tokens, inner), torch.float32)
    if requests is not None:
        starts, adapted, shared, _, load = requests
        expected["shared"] = (shared, (tokens,), torch.float32)
        expected["load"] = (load, (decisions, num_experts), torch.int64)
        if starts is not None:
            expected["starts"] = (starts, (starts.numel(),), torch.int32)
            expected["adapted"] = (adapted, (max(adapted.numel(), starts.numel() - 1),), torch.float32)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != h0.device:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {h0.device}, got {tensor.dtype} {list(tensor.shape)}"
            )
        apart = name in BY_DECISION  # whose decisions may lie apart
        if not (tensor[0] if apart else tensor).is_contiguous():
            of_what = ", but for where decisions begin" if apart else ""
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous{of_what}")
    if decisions > 1 and experts.stride(0) != weights.stride(0):
        raise ValueError(
            f"experts has strides {experts.stride()} and weights {weights.stride()}; they must be the same"
        )
    if len(h0) != tokens or h0.stride(1) != 1:
        raise ValueError(
            f"h0 is {list(h0.shape)}, strides {h0.stride()}; it must be {tokens} tokens with contiguous rows"
        )
