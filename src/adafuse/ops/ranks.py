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
from adafuse.ops.fragments import fragment_products, fragment_sum, held_fragments
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
    pointers = matrix + row.to(tl.int64) * width
    num_bytes = tl.where(there, width * (matrix.dtype.element_ty.primitive_bitwidth // 8), 0)
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; mov.b32 $0, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; }",
            "=r,l,r",
            [pointers.to(tl.int64), num_bytes],
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
def shrink_expert(
    x,
    banks_a,
    banks_b,
    experts,
    weights,
    h,
    stride_x,
    shared_row,
    shared_scale,
    zero,
    pid,
    widths: tl.constexpr,
    T: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    r: tl.constexpr,
    S: tl.constexpr,
    CHOICES: tl.constexpr,
    SLOTS: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COPIES: tl.constexpr,
    WAIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    WARPS: tl.constexpr,
):
    """8 / PARTS ranks of one expert of one linear, by tensor cores, for all tokens that chose it: block `pid` of the linears' blocks.

    BY_EXPERT: a slot is an expert, and nothing is done if nobody chose it. Else it is a choice, and nothing is done if an earlier one is of
    the same expert. The shared expert's blocks, which are every token's, come last. CHOICES: T * K or more, a power of two.
    """
    J: tl.constexpr = K * r + S
    ROWS: tl.constexpr = 8 // PARTS
    BLOCKS: tl.constexpr = (r + ROWS - 1) // ROWS
    ROUTED: tl.constexpr = SLOTS * BLOCKS
    OF_LINEAR: tl.constexpr = ROUTED + (S + ROWS - 1) // ROWS
    linear, n = pid // OF_LINEAR, pid % OF_LINEAR
    slot, block = n // BLOCKS, n % BLOCKS
    choice = tl.arange(0, CHOICES)
    chosen = tl.load(experts + choice, mask=choice < T * K, other=-1)
    if BY_EXPERT:
        expert = slot
        wanted = tl.sum((chosen == expert).to(tl.int32), 0) > 0
    else:
        expert = tl.load(experts + tl.minimum(slot, T * K - 1))
        wanted = tl.sum(((chosen == expert) & (choice < slot)).to(tl.int32), 0) == 0
    begin, ranks, at = expert * r, r, block * ROWS
    if S > 0:
        shared = n >= ROUTED
        at = tl.where(shared, (n - ROUTED) * ROWS, at)
        begin, ranks = tl.where(shared, shared_row, begin), tl.where(shared, S, ranks)
        wanted = wanted | shared
    if wanted:
        first_row, last_row = begin + at, begin + ranks - 1
        held = held_fragments(pick_part(banks_a, linear), first_row, last_row, zero, I, PARTS, STEPS, CHUNKS, WARPS)
        if PREFETCH:
            thread = tl.arange(0, 32 * WARPS)
            b, width = pick_part(banks_b, linear), pick_part(widths, linear)
            row = tl.minimum(first_row + thread, last_row)
            there = (thread < ROWS) & (first_row + thread <= last_row)
            prefetch_rows(b, row, width, there)
        if WAIT:
            tl.extra.cuda.gdc_wait()
        rank = at + tl.arange(0, ROWS)
        for first in tl.static_range(0, T, BLOCK_T):
            c = fragment_products(held, x, stride_x, first, T, I, PARTS, WARPS)
            total = fragment_sum(c, BLOCK_T, PARTS, WARPS)
            token = first + tl.arange(0, BLOCK_T)
            where = h + (token * len(banks_a) + linear)[:, None] * J + rank[None, :]
            inside = (token < T)[:, None] & (rank < ranks)[None, :]
            # A token that has an expert twice, as one without a routing may, has two places to fill: whoever waits for one must find it.
            for k in tl.static_range(K):
                mine = tl.load(experts + token * K + k, mask=token < T, other=-1) == expert
                if S > 0:
                    mine = mine & (n < ROUTED)
                scale = tl.load(weights + token * K + k, mask=mine, other=0.0)
                store_copies(
                    where + k * r, total * scale[:, None], inside & mine[:, None], T * len(banks_a) * J, COPIES
                )
            if S > 0:
                store_copies(where + K * r, total * shared_scale, inside & (n >= ROUTED), T * len(banks_a) * J, COPIES)


@triton.jit
def store_copies(where, total, mask, stride, COPIES: tl.constexpr):
    """Numbers of h, as bits that are never EMPTY, into each copy."""
    N: tl.constexpr = total.numel
    where, mask = where.reshape(N), mask.reshape(N)
    bits = total.reshape(N).to(tl.int32, bitcast=True)
    bits = tl.where(bits == EMPTY, QUIET_NAN, bits)
    copy = tl.arange(0, COPIES) * stride
    tl.store(where[None, :] + copy[:, None], tl.broadcast_to(bits[None, :], [COPIES, N]), mask=mask[None, :])


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
