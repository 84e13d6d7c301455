"""The experts of a few tokens beside a base linear whose weights the kernels cannot read (quantised, transposed, with a bias).

`shrink` computes h = scale * A x, `expand` adds B h to what the base's own kernel has found. Two launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adafuse.ops.checks import aligned_rows, check, check_chosen, check_h, padded
from adafuse.ops.chosen import Chosen
from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, launch_options, next_power_of_2, wait_for_inputs
from adafuse.ops.ranks import rank_rows, shrink_block


@triton.jit(do_not_specialize=["zero"])
def _shrink_kernel(
    x,
    banks_a,
    experts,
    weights,
    h,
    stride_x,
    shared_row,
    shared_scale,
    zero,
    I: tl.constexpr,
    K: tl.constexpr,
    r: tl.constexpr,
    S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (linears * blocks of J, T)."""
    wait_for_inputs(PDL)
    pid, token = tl.program_id(0), tl.program_id(1)
    shrink_block(
        x, banks_a, experts, weights, h, stride_x, shared_row, shared_scale, zero, pid, token,
        0, I, K, r, S, BLOCK_J, CHUNK, ALIGNED, 1, False,
    )  # fmt: skip


@triton.jit
def _expand_kernel(
    h,
    b,
    experts,
    y,
    stride_h,
    stride_y,
    shared_row,
    O: tl.constexpr,
    K: tl.constexpr,
    r: tl.constexpr,
    S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: BLOCK_O outputs for one token. Grid (blocks of O, T)."""
    wait_for_inputs(PDL)
    J: tl.constexpr = K * r + S
    token = tl.program_id(1)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    where = y + token * stride_y + o
    acc = tl.load(where, mask=o < O, other=0.0).to(tl.float32)
    for start in range(0, J, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        rows = rank_rows(experts, token, shared_row, j, K, r, S)
        mask = (j < J)[:, None] & (o < O)[None, :]
        tile = tl.load(b + rows.to(tl.int64)[:, None] * O + o[None, :], mask=mask, other=0.0)
        hs = tl.load(h + token * stride_h + j, mask=j < J, other=0).to(tl.float32, bitcast=True)
        acc += tl.sum(tile.to(tl.float32) * hs[:, None], 0)
    tl.store(where, acc.to(y.dtype.element_ty), mask=o < O)


def shrink(x, banks_a, chosen: Chosen, out, *, pdl=False, num_warps=4):
    """out[t, m, j] = scale(t, j) * sum_i banks_a[m][row(t, j), i] * x[t, i].

    x [T, I], its last axis contiguous; banks_a: for each linear of the group [R, I], the dtype of x; out [T, M, J] int32: the bits of
    fp32 numbers, written whole. Summed in fp32. No host sync, no allocation: safe inside a CUDA graph.
    """
    check(x, chosen, banks_a=banks_a)
    check_h("out", out, (len(x), len(banks_a), chosen.active))
    tokens, features = x.shape
    with torch.cuda.device_of(x):
        _shrink_kernel[(len(banks_a) * chosen.active, tokens)](
            x,
            tuple(banks_a),
            chosen.experts,
            chosen.weights,
            out,
            x.stride(0),
            chosen.num_experts * chosen.r,
            chosen.shared_scale,
            0,
            I=features,
            K=chosen.experts.shape[1],
            r=chosen.r,
            S=chosen.shared_rank,
            BLOCK_J=1,
            CHUNK=padded(features),
            ALIGNED=aligned_rows(features, *banks_a),
            num_warps=num_warps,
            **launch_options(pdl),
        )
    return out


def expand(h, b, chosen: Chosen, y, *, pdl=False, block_o=256, num_warps=4):
    """y[t, o] += sum_j b[row(t, j), o] * h[t, j], in place.

    h [T, J] int32, the bits of fp32 numbers (a linear's part of what `shrink` made; its rows may lie apart); b [R, O] and y [T, O] of one
    dtype, the last axis of y contiguous. Summed in fp32 and rounded once. No host sync, no allocation: safe inside a CUDA graph.
    """
    refuse_gradients(b, y, chosen.weights)
    check_chosen(y, chosen)
    if b.shape != (chosen.ranks, y.shape[1]) or not b.is_contiguous() or b.device != y.device or y.stride(1) != 1:
        raise ValueError(
            f"b {list(b.shape)} must be contiguous [{chosen.ranks}, {y.shape[1]}] on {y.device}, and the rows of y too"
        )
    if h.shape != (len(y), chosen.active) or h.dtype != torch.int32 or h.stride(1) != 1:
        raise ValueError(
            f"h must be int32 [{len(y)}, {chosen.active}] with contiguous rows, got {h.dtype} {list(h.shape)}"
        )
    tokens, features = y.shape
    block_j = min(32, next_power_of_2(chosen.active))
    with torch.cuda.device_of(y):
        _expand_kernel[(cdiv(features, block_o), tokens)](
            h,
            b,
            chosen.experts,
            y,
            h.stride(0),
            y.stride(0),
            chosen.num_experts * chosen.r,
            O=features,
            K=chosen.experts.shape[1],
            r=chosen.r,
            S=chosen.shared_rank,
            BLOCK_O=block_o,
            BLOCK_J=block_j,
            num_warps=num_warps,
            **launch_options(pdl),
        )
    return y
