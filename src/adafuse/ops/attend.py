"""attend: attention of a decoding step in one launch: biases, norms of heads, rotary positions, cache, softmax over the keys.

A program takes the heads that share a key-value head of one sequence, and a part of its keys ("flash-decoding"): as many parts
whatever the length, so that one CUDA graph serves all lengths; the keys are divided evenly among them on the device. The
last part to finish merges what the others found. Keys and values of earlier tokens were written in earlier steps: their first
tiles are on their way to the registers before the program waits for the queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, dot, launch_options, next_power_of_2, processors

MAX_GROUP = 16  # heads of a key-value head: rows of a tensor core's tile
MAX_HEAD_DIM = 256
MAX_PARTS = 32
PROGRAMS = 3  # of a processor, wanted
REGISTERS = 168  # of a thread, the most that leaves room for so many; none go to memory


class Heads(NamedTuple):
    """Biases [heads * head_dim] of the linears q, k, v (all or none), and weights [head_dim] of the norms of q and k, with their eps."""

    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 0.0


class Room(NamedTuple):
    """Where parts meet. partial [T, kv_heads, parts, group + 2, head_dim] fp32 and arrived [T, kv_heads] int32, 0 between calls."""

    partial: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def make(cls, cache, heads) -> Room:
        """Room for `heads` heads on such a cache: parts enough to fill the device, none without two tiles of keys."""
        _, tokens, kv_heads, length, head_dim = cache.shape
        device = cache.device
        places = PROGRAMS * processors(cache)
        parts = max(1, min(places // (tokens * kv_heads), cdiv(length, 2 * _keys(cache)), MAX_PARTS))
        partial = torch.zeros(tokens, kv_heads, parts, heads // kv_heads + 2, head_dim, device=device)
        return cls(partial, torch.zeros(tokens, kv_heads, dtype=torch.int32, device=device))


# --- reference ---------------------------------------------------------------------------------------------------------


def attend_ref(qkv, cache, positions, rotary, *, scaling, window=None, heads: Heads | None = None):
    """`attend` in plain PyTorch, token by token, in the dtype of qkv; writes into the cache as well."""
    heads = heads or Heads()
    _, tokens, kv_heads, _, dim = cache.shape
    count = qkv.shape[1] // dim - 2 * kv_heads
    out = qkv.new_empty(tokens, count, dim)
    for t in range(tokens):
        at = int(positions[t])
        parts = qkv[t].split([count * dim, kv_heads * dim, kv_heads * dim])
        biases = (heads.q_bias, heads.k_bias, heads.v_bias)
        q, k, v = ((p if b is None else p + b).view(-1, dim) for p, b in zip(parts, biases, strict=True))
        if heads.q_norm is not None:
            q, k = (
                w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + heads.eps)
                for x, w in ((q, heads.q_norm), (k, heads.k_norm))
            )
        cos, sin = rotary[:, at]
        q, k = (x * cos + torch.cat([-x[:, dim // 2 :], x[:, : dim // 2]], -1) * sin for x in (q, k))
        cache[0, t, :, at], cache[1, t, :, at] = k, v
        first = 0 if window is None else max(0, at - window + 1)
        for head in range(count):
            keys, values = cache[:, t, head // (count // kv_heads), first : at + 1]
            out[t, head] = (scaling * keys @ q[head]).softmax(-1) @ values
    return out.flatten(1)


# --- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _turned(
    x, bias, weight, d, other, inside, cos, sin, eps,
    D: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Heads of x [rows, BLOCK_D] at `d`, with bias and norm, turned to their position. other: the place of the other half."""
    own = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    across = tl.load(x + other, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        own = (own + tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        across = (across + tl.load(bias + other, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1) / D + eps)[:, None]
        place, mirror, real = d % D, other % D, inside
        own = (own * scale).to(dtype).to(tl.float32) * tl.load(weight + place, mask=real, other=0.0).to(tl.float32)
        across = (across * scale).to(dtype).to(tl.float32) * tl.load(weight + mirror, mask=real, other=0.0).to(
            tl.float32
        )
    sign = tl.where(d % D < D // 2, -1.0, 1.0)
    return (own * cos + sign * across * sin).to(dtype)


@triton.jit
def _tile(keys, values, places, there, real):
    mask = there[:, None] & real[None, :]
    return tl.load(keys + places, mask=mask, other=0.0), tl.load(values + places, mask=mask, other=0.0)


@triton.jit
def _attend_kernel(
    qkv,
    cache,
    positions,
    rotary,
    q_bias,
    k_bias,
    v_bias,
    q_norm,
    k_norm,
    partial,
    arrived,
    out,
    stride_part,
    stride_row,
    stride_sin,
    length,
    scaling,
    window,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (PARTS, KV_HEADS, T)."""
    G: tl.constexpr = HEADS // KV_HEADS
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    LOG2E: tl.constexpr = 1.4426950408889634
    part, kv, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = cache.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # What earlier steps wrote: where the token is, its angles, the keys before it.
    at = tl.load(positions + token).to(tl.int32)
    at = tl.minimum(at, length - 1)
    first = tl.maximum(at - window + 1, 0) if WINDOW else 0
    # Two tiles at least: fewer programs leave room for the linears behind them, which fetch their weights meanwhile.
    per = tl.maximum(tl.cdiv(tl.cdiv(at - first, PARTS), BLOCK_N), 2) * BLOCK_N
    active = tl.maximum(tl.cdiv(at - first, per), 1)  # parts that have something to do
    if part >= active:  # it reads and writes nothing, so it need not wait; others do
        return
    start = first + part * per
    end = tl.minimum(start + per, at)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real = d < D
    keys = cache + token.to(tl.int64) * stride_row + kv.to(tl.int64) * length * D
    values = keys + stride_part
    places = (start + n)[:, None] * D + d[None, :]
    k, v = _tile(keys, values, places, start + n < end, real)
    places += BLOCK_N * D
    next_k, next_v = _tile(keys, values, places, start + BLOCK_N + n < end, real)
    cos = tl.load(rotary + at * D + d, mask=real, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(rotary + stride_sin + at * D + d, mask=real, other=0.0).to(tl.float32)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()

    g = tl.arange(0, BLOCK_G)
    other = (d + D // 2) % D
    x = qkv + token * WIDTH
    heads = (kv * G + g)[:, None] * D
    inside = (g < G)[:, None] & real[None, :]
    q = _turned(
        x, q_bias, q_norm, heads + d[None, :], heads + other[None, :], inside, cos, sin, eps, D, BIAS, NORM, dtype
    )
    # The token's own key and value, with which the last part begins.
    ours, last = kv * D + d[None, :], part == active - 1
    own = _turned(
        x + HEADS * D, k_bias, k_norm, ours, kv * D + other[None, :], real[None, :], cos, sin, eps, D, BIAS, NORM, dtype
    )
    own_v = tl.load(x + (HEADS + KV_HEADS) * D + ours, mask=real[None, :], other=0.0)
    if BIAS:
        bias = tl.load(v_bias + ours, mask=real[None, :], other=0.0)
        own_v = (own_v.to(tl.float32) + bias.to(tl.float32)).to(dtype)
    tl.store(keys + at * D + d[None, :], own, mask=real[None, :] & last)
    tl.store(values + at * D + d[None, :], own_v, mask=real[None, :] & last)
    score = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) * (scaling * LOG2E)
    top = tl.where(last, score, float("-inf"))
    total = tl.where(last, 1.0, tl.zeros([BLOCK_G], tl.float32))
    acc = tl.where(last, own_v.to(tl.float32), tl.zeros([BLOCK_G, BLOCK_D], tl.float32))
    for now in tl.range(start, end, BLOCK_N):
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_G, BLOCK_N], tl.float32)) * (scaling * LOG2E)
        scores = tl.where((now + n < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrunk = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrunk + tl.sum(p, 1)
        acc = dot(p.to(dtype), v, acc * shrunk[:, None])
        top = higher
        k, v = next_k, next_v
        places += BLOCK_N * D
        next_k, next_v = _tile(keys, values, places, now + 2 * BLOCK_N + n < end, real)

    # Of each part: G rows of acc, then the row of the maxima and that of the sums.
    ROWS: tl.constexpr = (G + 2) * D
    mine = partial + (token * KV_HEADS + kv) * (PARTS * ROWS)
    here = mine + part * ROWS
    tl.store(here + g[:, None] * D + d[None, :], acc, mask=inside)
    tl.store(here + G * D + g, top, mask=g < G)
    tl.store(here + (G + 1) * D + g, total, mask=g < G)
    tl.debug_barrier()  # all of the program's threads have written
    if tl.atomic_add(arrived + token * KV_HEADS + kv, 1, sem="acq_rel") == active - 1:
        _merge(mine, out + token * (HEADS * D) + kv * (G * D), active, G, D, BLOCK_D, BLOCK_P, ROWS)
        tl.store(arrived + token * KV_HEADS + kv, 0)


@triton.jit
def _merge(
    partial, out, active, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The heads' outputs from what the parts found. Other programs wrote it: it is not read from the processor's own cache."""
    p, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    there = p < active
    for g in tl.static_range(G):
        top = tl.load(partial + p * ROWS + G * D + g, mask=there, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(partial + p * ROWS + (G + 1) * D + g, mask=there, other=0.0, cache_modifier=".cg")
        mask = there[:, None] & (d < D)[None, :]
        acc = tl.load(partial + p[:, None] * ROWS + g * D + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        share = tl.exp2(top - tl.max(top, 0))
        y = tl.sum(acc * share[:, None], 0) / tl.sum(total * share, 0)
        tl.store(out + g * D + d, y.to(out.dtype.element_ty), mask=d < D)


# --- launcher ------------------------------------------------------------------------------------------------------------


def attend(
    qkv, cache, positions, rotary, out, room: Room, *, scaling, window=None, heads: Heads | None = None, pdl=False
):
    """out[t, head] = softmax(scaling q K^T) V over the keys up to the token's own, the last `window` of them (None: all).

    q, k, v: the parts of qkv[t], plus their biases, q and k normed (`heads`) and turned by their position's angles. k and v are written
    into the cache at the token's position. Head h reads key-value head h // (heads / kv_heads).

    qkv [T, (heads + 2 kv_heads) head_dim], contiguous; cache [2, T, kv_heads, length, head_dim], the last three axes contiguous;
    positions [T] int64 (one past the cache counts as the last); rotary: cos and sin [2, >= length, head_dim]; out [T, heads * head_dim]
    contiguous; all but positions of one dtype. No kernel of the step may write positions, rotary, or the cache at earlier positions.
    Summed in fp32. No host sync, no allocation: safe inside a CUDA graph. ValueError for other shapes, dtypes, devices.
    """
    heads = heads or Heads()
    _check(qkv, cache, positions, rotary, out, room, heads)
    _, tokens, kv_heads, length, dim = cache.shape
    count, parts = out.shape[1] // dim, room.partial.shape[2]
    with torch.cuda.device_of(qkv):
        _attend_kernel[(parts, kv_heads, tokens)](
            qkv,
            cache,
            positions,
            rotary,
            heads.q_bias,
            heads.k_bias,
            heads.v_bias,
            heads.q_norm,
            heads.k_norm,
            room.partial,
            room.arrived,
            out,
            cache.stride(0),
            cache.stride(1),
            rotary.stride(0),
            length,
            scaling,
            window or 0,
            heads.eps,
            HEADS=count,
            KV_HEADS=kv_heads,
            D=dim,
            BLOCK_D=max(16, next_power_of_2(dim)),
            BLOCK_G=MAX_GROUP,
            BLOCK_N=_keys(cache),
            PARTS=parts,
            BLOCK_P=next_power_of_2(parts),
            BIAS=heads.q_bias is not None,
            NORM=heads.q_norm is not None,
            WINDOW=window is not None,
            num_warps=4,
            **launch_options(pdl, maxnreg=REGISTERS if cache.element_size() == 2 else None),
        )
    return out


def _keys(cache):
    """Keys of a tile: 8 KB, 64 registers of a thread for two tiles of keys and values."""
    row = next_power_of_2(cache.shape[-1]) * cache.element_size()
    return max(16, min(64, 8192 // row))


def _check(qkv, cache, positions, rotary, out, room, heads):
    refuse_gradients(qkv, cache, out, *(each for each in heads[:5] if each is not None))
    if (
        cache.dim() != 5
        or len(cache) != 2
        or cache.stride()[2:] != (cache.shape[3] * cache.shape[4], cache.shape[4], 1)
    ):
        raise ValueError(
            f"cache must be [2, T, kv_heads, length, head_dim], the last three contiguous; got {list(cache.shape)} with strides "
            f"{cache.stride()}"
        )
    _, tokens, kv_heads, length, dim = cache.shape
    count = out.shape[-1] // dim
    if count % kv_heads or count // kv_heads > MAX_GROUP or dim > MAX_HEAD_DIM or dim % 2:
        raise ValueError(
            f"{count} heads on {kv_heads} key-value heads of {dim} features; the kernel takes up to {MAX_GROUP} heads each, and an even "
            f"number of features up to {MAX_HEAD_DIM}"
        )
    group, dtype = count // kv_heads, cache.dtype
    expected = {
        "qkv": (qkv, (tokens, (count + 2 * kv_heads) * dim), dtype),
        "out": (out, (tokens, count * dim), dtype),
        "positions": (positions, (tokens,), torch.int64),
        "rotary": (rotary, (2, max(length, rotary.shape[1]), dim), dtype),
        "partial": (room.partial, (tokens, kv_heads, room.partial.shape[2], group + 2, dim), torch.float32),
        "arrived": (room.arrived, (tokens, kv_heads), torch.int32),
    }
    if heads.q_bias is not None:
        widths = {"q_bias": count * dim, "k_bias": kv_heads * dim, "v_bias": kv_heads * dim}
        expected |= {name: (getattr(heads, name), (width,), dtype) for name, width in widths.items()}
    if heads.q_norm is not None:
        expected |= {name: (getattr(heads, name), (dim,), dtype) for name in ("q_norm", "k_norm")}
    for name, (tensor, shape, wanted) in expected.items():
        if tensor is None:
            raise ValueError(f"{name} is missing; biases of q, k and v, and norms of q and k, come together")
        if tensor.shape != shape or tensor.dtype != wanted or tensor.device != cache.device:
            raise ValueError(
                f"{name} must be {wanted} {list(shape)} on {cache.device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if dim < group:
        raise ValueError(f"{group} heads a key-value head are more than their {dim} features; the kernel needs as many")
