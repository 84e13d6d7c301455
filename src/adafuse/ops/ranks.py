"""h = scale * A x of a few tokens, computed by some programs of a launch for the others, which learn from h itself that it is there.

    h[t, m, j] = scale(t, j) * sum_i banks_a[m][row(t, j), i] x[t, i]       active rank j of token t, linear m

h is EMPTY until written. What looks at it is not cached near the processor, and looks at one cache line queue up, so there are copies of it
(`copies_of_h`). T tokens, K experts a token, J active ranks a token, R ranks in all, I features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adafuse.ops.chosen import Chosen
from adafuse.ops.launch import INTERPRETED

EMPTY = tl.constexpr(-1)  # the bits of a NaN that no computation makes
QUIET_NAN = tl.constexpr(0x7FC00000)


def copies_of_h(active: int) -> int:
    """How many copies of h serve `decode` best. More are more to write: with 128 active ranks 16 took 4.54 ms and 8 4.49, with 32 ranks
    4.347 and 4.363 (the linears of Llama-2-7B, H100)."""
    return 8 if active > 64 else 16


def shrink_ref(x, banks_a, chosen: Chosen):
    """`shrink` in plain PyTorch, in the dtype of x."""
    rows, scales = chosen.rows(), chosen.scales()
    return torch.stack([torch.einsum("tji,ti->tj", a[rows], x) * scales for a in banks_a], dim=1)


def expand_ref(h, b, chosen: Chosen):
    """What `expand` adds, in plain PyTorch: sum_j b[row(t, j)] h[t, j], for one linear. h [T, J] -> [T, O]."""
    return torch.einsum("tjo,tj->to", b[chosen.rows()], h)


# --- rows of matrices, whole, in registers ---------------------------------------------------------------------------------


@triton.jit
def rank_rows(experts, token, shared_row, j, K: tl.constexpr, r: tl.constexpr, S: tl.constexpr):
    """Row of A and B of each active rank j of a token. A j past the last gets some row that exists."""
    slot = tl.minimum(j // r, K - 1)
    routed = tl.load(experts + token * K + slot) * r + j % r
    if S == 0:
        return routed
    return tl.where(j < K * r, routed, shared_row + tl.minimum(tl.maximum(j - K * r, 0), S - 1))


@triton.jit
def pick_part(parts, index):
    """parts[index] of a tuple of pointers, for an index known on the device only."""
    part = parts[0]
    for m in tl.static_range(1, len(parts)):
        if index == m:
            part = parts[m]
    return part


@triton.jit
def bits_of(tile):
    """A tensor's bits as integers."""
    SAME: tl.constexpr = tl.int16 if tile.dtype.primitive_bitwidth == 16 else tl.int32
    return tile.to(SAME, bitcast=True).to(tl.int32)


@triton.jit
def held_rows(matrix, row, zero, I: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr, PATIENT: tl.constexpr):
    """Rows of a matrix of I columns, whole, in registers: a tuple of [rows, CHUNK].

    PATIENT: a chunk is asked for when the one before has come. (`zero` is 0, which the compiler does not know.)
    """
    i = tl.arange(0, CHUNK)
    pointers = matrix + row.to(tl.int64)[:, None] * I + i[None, :]
    held = ()
    for c in tl.static_range(0, I, CHUNK):
        if c > 0:
            pointers += CHUNK
            if PATIENT:
                pointers += bits_of(held[c // CHUNK - 1]) & zero
        if ALIGNED:  # the compiler cannot see it through a choice of pointers
            pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, 16))
        chunk = tl.load(pointers, mask=(c + i < I)[None, :], other=0.0, eviction_policy="evict_first")
        held = held + (chunk,)  # noqa: RUF005 - Triton's tuples
    return held


@triton.jit
def prefetch_rows(matrix, row, width, there):
    """Asks for rows of a matrix of `width` columns, a multiple of 16 bytes, into the L2 cache: a thread, a row, if it is `there`."""
    if not INTERPRETED:
        num_bytes = tl.where(there, width * (matrix.dtype.element_ty.primitive_bitwidth // 8), 0)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; mov.b32 $0, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; }",
            "=r,l,r",
            [(matrix + row.to(tl.int64) * width).to(tl.int64), num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def products_of(held, x, I: tl.constexpr, CHUNK: tl.constexpr):
    """Products of held rows and a token's x, summed over the chunks: [rows, CHUNK]."""
    i = tl.arange(0, CHUNK)
    products = tl.zeros([held[0].shape[0], CHUNK], tl.float32)
    for c in tl.static_range(0, I, CHUNK):
        xs = tl.load(x + c + i, mask=c + i < I, other=0.0)
        products += held[c // CHUNK].to(tl.float32) * xs.to(tl.float32)[None, :]
    return products


# --- programs that compute h ---------------------------------------------------------------------------------------------


@triton.jit
def shrink_block(
    x,
    banks_a,
    experts,
    weights,
    h,
    stride_x,
    shared_row,
    shared_scale,
    zero,
    pid,
    token,
    T: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    r: tl.constexpr,
    S: tl.constexpr,
    BLOCK_J: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    COPIES: tl.constexpr,
    WAIT: tl.constexpr,
    banks_b=None,
    widths: tl.constexpr = None,
    THREADS: tl.constexpr = 0,
):
    """BLOCK_J active ranks of one linear for one token: block `pid` of the linears' blocks, one linear after another.

    With THREADS, also asks for the ranks' rows of B: others will read them, a piece each, from the L2 cache.
    """
    J: tl.constexpr = K * r + S
    BLOCKS: tl.constexpr = (J + BLOCK_J - 1) // BLOCK_J
    linear = pid // BLOCKS
    j = pid % BLOCKS * BLOCK_J + tl.arange(0, BLOCK_J)
    rows = rank_rows(experts, token, shared_row, j, K, r, S)
    held = held_rows(pick_part(banks_a, linear), rows, zero, I, CHUNK, ALIGNED, False)
    if THREADS > 0:
        thread = tl.arange(0, THREADS)
        rank = pid % BLOCKS * BLOCK_J + thread
        b, width = pick_part(banks_b, linear), pick_part(widths, linear)
        row = rank_rows(experts, token, shared_row, rank, K, r, S)
        prefetch_rows(b, row, width, (thread < BLOCK_J) & (rank < J))
    scale = tl.load(weights + token * K + tl.minimum(j // r, K - 1))
    scale = tl.where(j < K * r, scale, shared_scale)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    total = tl.sum(products_of(held, x + token * stride_x, I, CHUNK), 1) * scale
    where = h + (token * len(banks_a) + linear) * J + j
    store_copies(where, total, j < J, T * len(banks_a) * J, COPIES)


@triton.jit
def store_copies(where, total, mask, stride, COPIES: tl.constexpr):
    """Numbers of h [N], as bits that are never EMPTY, into each copy."""
    bits = total.to(tl.int32, bitcast=True)
    bits = tl.where(bits == EMPTY, QUIET_NAN, bits)
    where = where[None, :] + (tl.arange(0, COPIES) * stride)[:, None]
    tl.store(where, tl.broadcast_to(bits[None, :], where.shape), mask=mask[None, :])


# --- programs that wait for it ------------------------------------------------------------------------------------------


@triton.jit
def look(h, mask):
    """The bits of h that are there now, 0 where masked; other programs write them meanwhile. (volatile would ask the whole system.)"""
    if INTERPRETED:
        return tl.load(h, mask=mask, other=0)
    else:  # noqa: RET505 - what is not taken must not be compiled
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.relaxed.gpu.global.b32 $0, [$1]; }",
            "=&r,l,r",
            [h.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def once_written(bits, h, mask):
    """The values of h, as soon as none of them is EMPTY; `bits` is the first look at them. Each thread waits for its own."""
    if INTERPRETED:
        while tl.max((bits == EMPTY).to(tl.int32), 0) != 0:
            bits = look(h, mask)
    else:
        bits = tl.inline_asm_elementwise(
            """{
                .reg .pred there;
                mov.b32 $0, $2;
            again:
                setp.ne.s32 there, $0, -1;
                @there bra done;
                ld.relaxed.gpu.global.b32 $0, [$1];
                bra again;
            done:
            }""",
            "=&r,l,r",
            [h.to(tl.int64), bits],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return bits.to(tl.float32, bitcast=True)
