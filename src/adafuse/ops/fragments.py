"""A few rows of a matrix times a few tokens by tensor cores, operands straight from memory into the registers where they are needed.

    mma.m16n8k16 of a warp:  C [16, 8] += A [16, 16] B [16, 8]     (PTX ISA, "Matrix fragments for mma.m16n8k16")

Lane 4 g + q holds, of A, rows g and g + 8, of B, column g, and of both the k of quarter q. Which columns of W and x are the k of a
quarter is free, as long as both agree: a lane takes 8 consecutive ones, a load of 16 bytes that serves two mma.

So, in `decode`, B is 8 rows of W, and A is 16 tokens. (In `pair` A is 16 rows, and B 8 tokens.) With fewer tokens than that, 8 / PARTS
rows are cut into PARTS parts each, and so is x:

    column n of B: part n // ROWS of row n % ROWS            ROWS = 8 / PARTS
    row m of A:    part m // TOKENS of token m % TOKENS      TOKENS = 16 / PARTS

Of C only what is of one part counts; summed over the parts and the warps, which share the columns, it is the product. More tokens
than TOKENS are further groups, which multiply the same rows.

The tensors here are [THREADS, 4], int32 for two numbers of 16 bits: what each thread holds. This is the layout that a load of 16 bytes by
each thread has in Triton, and it holds for what is computed from such loads element by element; nothing else may be done to them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adafuse.ops.launch import INTERPRETED

COLUMNS = tl.constexpr(8)  # of a lane, in one load
QUARTERS = tl.constexpr(4)
STEP = COLUMNS * QUARTERS  # columns of a warp, in one load


@triton.jit
def lane(WARPS: tl.constexpr):
    """warp, g, q of each thread."""
    thread = tl.arange(0, 32 * WARPS)
    return thread // 32, thread % 32 // 4, thread % 4


@triton.jit
def _load(
    pointers,
    column,
    step,
    PART: tl.constexpr,
    I: tl.constexpr,
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
    ONCE: tl.constexpr,
    there=None,
):
    """A step of the fragments whose first is at `pointers` [THREADS, 4], column `column` [THREADS]. ONCE: nobody reads it again.

    there [THREADS]: who is to load, where all columns exist; what others hold then is not defined.
    """
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    pointers += step * (STEP // 2 * WARPS)
    pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, 4))  # bytes, numbers
    if PART * PARTS == I:
        if there is not None:
            return tl.load(pointers, mask=tl.broadcast_to(there[:, None], pointers.shape), eviction_policy=POLICY)
        else:  # noqa: RET505 - what is not taken must not be compiled
            return tl.load(pointers, eviction_policy=POLICY)
    inside = (column + step * (STEP * WARPS) < I)[:, None]
    return tl.load(pointers, mask=inside, other=0, eviction_policy=POLICY)


@triton.jit
def first_part(matrix, row, part, stride, PART: tl.constexpr, WARPS: tl.constexpr):
    """Pointers to the first 8 columns that each thread holds of its part of its row, and which column they begin with."""
    warp, _, q = lane(WARPS)
    column = part * PART + warp * STEP + q * COLUMNS
    where = row.to(tl.int64) * (stride // 2) + column // 2
    return matrix.to(tl.pointer_type(tl.int32), bitcast=True) + where[:, None] + tl.arange(0, 4)[None, :], column


@triton.jit
def held_fragments(
    w, first_row, last_row, zero, I: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """8 / PARTS whole rows of w, from first_row on: a tuple of STEPS fragments. Rows past last_row are that one again.

    They are asked for in CHUNKS parts, each when the one before has come. (`zero` is 0, which the compiler does not know.)
    """
    ROWS: tl.constexpr = 8 // PARTS
    PART: tl.constexpr = STEPS * STEP * WARPS
    _, g, _ = lane(WARPS)
    pointers, column = first_part(w, tl.minimum(first_row + g % ROWS, last_row), g // ROWS, I, PART, WARPS)
    held = ()
    for step in tl.static_range(STEPS):
        if step > 0 and step % ((STEPS + CHUNKS - 1) // CHUNKS) == 0:
            pointers += held[step - 1] & zero
        held = held + (_load(pointers, column, step, PART, I, PARTS, WARPS, True),)  # noqa: RUF005 - Triton's tuples
    return held


@triton.jit
def fragment_products(
    held, x, stride_x, first_token, T: tl.constexpr, I: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr
):
    """C of held rows of W and the x of 16 / PARTS tokens from first_token on, not yet summed over parts and warps: [THREADS, 4] fp32."""
    TOKENS: tl.constexpr = 16 // PARTS
    PART: tl.constexpr = len(held) * STEP * WARPS
    _, g, _ = lane(WARPS)
    row = tl.minimum(first_token + g % TOKENS, T - 1)  # tokens past the last: the last again, not stored
    there = None
    if T % TOKENS != 0:  # nor loaded: every program loads all of x (4 tokens: 4.50 ms so, 4.60 with the last again)
        there = first_token + g % TOKENS < T
    first, column = first_part(x, row, g // TOKENS, stride_x, PART, WARPS)
    row = tl.minimum(first_token + (g + 8) % TOKENS, T - 1)
    second, column_2 = first_part(x, row, (g + 8) // TOKENS, stride_x, PART, WARPS)
    # Two sums in turn: an mma takes some 30 clocks, and one that adds to it waits for it (8 tokens: 5.06 ms so, 5.13 with one sum).
    c, d = tl.zeros([32 * WARPS, 4], tl.float32), tl.zeros([32 * WARPS, 4], tl.float32)
    for step in tl.static_range(len(held)):
        a = _load(first, column, step, PART, I, PARTS, WARPS, False, there)
        a_2 = tl.zeros_like(a)
        if PARTS > 1:  # else rows 8 to 15 of A are no token: there are 8 at most
            a_2 = _load(second, column_2, step, PART, I, PARTS, WARPS, False, there)
        c, d = two_mma(held[step], a, a_2, c, d, x.dtype.element_ty, WARPS)
    return c + d


@triton.jit
def two_mma(b, a, a_2, c, d, DTYPE: tl.constexpr, WARPS: tl.constexpr):
    """c and d plus the products of 8 columns a lane, of half of them each. b: B. a, a_2: rows g and g + 8 of A."""
    if INTERPRETED:
        return c + _in_words(b, a, a_2, DTYPE, WARPS), d
    NAME: tl.constexpr = "f16" if DTYPE.is_fp16() else "bf16"
    MMA: tl.constexpr = "mma.sync.aligned.m16n8k16.row.col.f32." + NAME + "." + NAME + ".f32 "
    C: tl.constexpr = "{$0, $1, $2, $3}"
    D: tl.constexpr = "{$4, $5, $6, $7}"
    return tl.inline_asm_elementwise(
        MMA + C + ", {$12, $16, $13, $17}, {$8, $9}, " + C + ";\n" + MMA + D + ", {$14, $18, $15, $19}, {$10, $11}, " + D + ";",
        "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,0,1,2,3,4,5,6,7",
        [b, a, a_2, c, d],
        dtype=(tl.float32, tl.float32),
        is_pure=False,  # else it may be computed again in another layout
        pack=4,
    )  # fmt: skip


@triton.jit
def two_mma_in_turn(b, a, a_2, c, DTYPE: tl.constexpr, WARPS: tl.constexpr):
    """c plus the products of 8 columns a lane. The second waits for the first: for whoever has other sums to go on with."""
    if INTERPRETED:
        return c + _in_words(b, a, a_2, DTYPE, WARPS)
    NAME: tl.constexpr = "f16" if DTYPE.is_fp16() else "bf16"
    MMA: tl.constexpr = "mma.sync.aligned.m16n8k16.row.col.f32." + NAME + "." + NAME + ".f32 "
    C: tl.constexpr = "{$0, $1, $2, $3}"
    return tl.inline_asm_elementwise(
        MMA + C + ", {$8, $12, $9, $13}, {$4, $5}, " + C + ";\n" + MMA + C + ", {$10, $14, $11, $15}, {$6, $7}, " + C + ";",
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,0,1,2,3",
        [b, a, a_2, c],
        dtype=tl.float32,
        is_pure=False,
        pack=4,
    )  # fmt: skip


@triton.jit
def _in_words(b, a, a_2, DTYPE: tl.constexpr, WARPS: tl.constexpr):
    """What two mma add to C, by sums over the lanes' numbers."""
    rows = (
        tl.join(_numbers(a, DTYPE, WARPS), _numbers(a_2, DTYPE, WARPS)).permute(0, 3, 1, 2).reshape(WARPS, 16, 1, STEP)
    )
    c = tl.sum(rows * _numbers(b, DTYPE, WARPS).reshape(WARPS, 1, 8, STEP), 3)
    return c.reshape(WARPS, 2, 8, 4, 2).permute(0, 2, 3, 1, 4).reshape(32 * WARPS, 4)


@triton.jit
def _numbers(fragment, DTYPE: tl.constexpr, WARPS: tl.constexpr):
    """[WARPS, 8, STEP] fp32: of each g, its quarters side by side."""
    low = (fragment & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    high = ((fragment >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.join(low, high).to(tl.float32).reshape(WARPS, 8, STEP)


@triton.jit
def fragment_sum(c, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr):
    """What `fragment_products` found of the first BLOCK_T <= 8 tokens, summed over parts and warps: [BLOCK_T, 8 / PARTS rows].

    One axis after another, each of neighbouring lanes: Triton 3.6 adds the wrong ones where lanes of an axis have others between them.
    """
    ROWS: tl.constexpr = 8 // PARTS
    TOKENS: tl.constexpr = 16 // PARTS
    PAIRS: tl.constexpr = (ROWS + 1) // 2
    _, g, q = lane(WARPS)
    register = tl.arange(0, 4)[None, :]
    m, n = register // 2 * 8 + g[:, None], q[:, None] * 2 + register % 2
    c = tl.where((m // TOKENS == n // ROWS) & (m % TOKENS < BLOCK_T), c, 0.0)
    c = c.reshape(WARPS, 8 // BLOCK_T, BLOCK_T, 4 // PAIRS, PAIRS, 2, 2)  # g in two axes, q in two, m // 8, n % 2
    c = tl.sum(c, 5)
    if ROWS == 1:
        c = tl.sum(c, 5, keep_dims=True)
    c = tl.sum(tl.sum(c, 3), 1)
    return tl.sum(c, 0).reshape(BLOCK_T, ROWS)
