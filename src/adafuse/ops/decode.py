"""decode: adapted linears for a few tokens, unmerged: base weights and experts in one launch and one pass over memory.

`decode` computes all linears that share an input. Its first programs compute h = scale * A x, a rank each; the others stream
the rows of W, and add B h at the end, when h is there. For a base linear whose weights it cannot read (quantised, transposed, with a
bias), `shrink` computes h and `expand` adds B h to the output of the base's own kernel.

What decides the time is how little happens while memory is idle, since each group of linears needs the whole output of the one
before it:

* Programmatic dependent launch (PDL) lets a kernel start before the one ahead of it has ended. Programs first ask for the weights
  they will need, which nothing writes, and only then wait for their input. What makes this safe: every program waits before it
  reads an activation or writes anything; and a kernel that follows the one which wrote `Chosen` lets its dependents start after its own
  wait only (`after_plan`), so that nobody reads an unfinished plan.
* A program holds whole rows in registers, so that 20 MB are on their way to the processors or there when the wait ends. It
  asks for them a quarter at a time: all at once, the input would queue behind them (4.18 ms instead of 4.24 ms for the linears of
  Llama-2-7B, on an H100).
* Programs learn that h is there from h itself: it is EMPTY until written. What looks at it is not cached near the processor, and looks
  at one cache line queue up (6.9 ms instead of 4.5 ms in two launches, with 32 active ranks). So there are copies of h, each read
  by some of the programs, and no two threads of a program look at the same rank.
* The programs that start first compute the products of a second tile before they need h, so that memory works meanwhile. They
  ask for its rows, and for its piece of B, all at once (4.48 ms without this, 4.34 ms with it).
* Several tokens are multiplied by tensor cores, whose operands come from memory straight into the registers where they are needed
  (`fragments`): 368 instructions for 4 rows of 4096 features and 8 tokens, where multiply-adds take 2400 at best and memory allows 2450.
  The programs that compute h then take some ranks of an expert for all tokens that chose it. A rank of a token each would be 768 programs for 4
  tokens of 128 ranks and 3 linears: more than a device holds at once, so that no rows of W would be asked for while the input is not there.
* A tile reads a piece of 8 bytes of each row of B, which memory is slow at. The programs that compute h ask for those rows whole, into
  the L2 cache (4.59 ms without this, 4.54 ms with it, with 128 active ranks).

T tokens, K experts a token, J active ranks a token, R ranks in all, I and O features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from adafuse.ops.chosen import Chosen
from adafuse.ops.fragments import STEP, fragment_products, fragment_sum, held_fragments
from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import (
    INTERPRETED,
    cdiv,
    has_mma,
    launch_options,
    next_power_of_2,
    processors,
    since_hopper,
    wait_for_inputs,
)

MAX_TOKENS = 8
MAX_FEATURES = 65536
REGISTERS = 65536  # of a processor
WARP_BYTES = 8192  # of W that a warp holds: 64 registers a thread
HELD_B = 32  # numbers of B that a thread holds for several tokens
EMPTY = tl.constexpr(-1)  # the bits of a NaN that no computation makes
QUIET_NAN = tl.constexpr(0x7FC00000)


def copies_of_h(active: int) -> int:
    """How many copies of h serve `decode` best. More are more to write: with 128 active ranks 16 took 4.54 ms and 8 4.49, with 32 ranks
    4.347 and 4.363 (the linears of Llama-2-7B, H100)."""
    return 8 if active > 64 else 16


# --- references --------------------------------------------------------------------------------------------------------


def shrink_ref(x, banks_a, chosen: Chosen):
    """`shrink` in plain PyTorch, in the dtype of x."""
    rows, scales = chosen.rows(), chosen.scales()
    return torch.stack([torch.einsum("tji,ti->tj", a[rows], x) * scales for a in banks_a], dim=1)


def expand_ref(h, b, chosen: Chosen):
    """What `expand` adds, in plain PyTorch: sum_j b[row(t, j)] h[t, j], for one linear. h [T, J] -> [T, O]."""
    return torch.einsum("tjo,tj->to", b[chosen.rows()], h)


def decode_ref(x, base_weights, banks_a=(), banks_b=(), chosen: Chosen | None = None):
    """`decode` in plain PyTorch, in the dtype of x."""
    ys = [x @ w.T for w in base_weights]
    if chosen is not None:
        h = shrink_ref(x, banks_a, chosen)
        ys = [y + expand_ref(h[:, m], b, chosen) for m, (y, b) in enumerate(zip(ys, banks_b, strict=True))]
    return torch.cat(ys, dim=-1)


# --- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(experts, token, shared_row, j, K: tl.constexpr, r: tl.constexpr, S: tl.constexpr):
    """Row of A and B of each active rank j of a token. A j past the last gets some row that exists."""
    slot = tl.minimum(j // r, K - 1)
    routed = tl.load(experts + token * K + slot) * r + j % r
    if S == 0:
        return routed
    return tl.where(j < K * r, routed, shared_row + tl.minimum(tl.maximum(j - K * r, 0), S - 1))


@triton.jit
def _pick(parts, index):
    """parts[index] of a tuple of pointers, for an index known on the device only."""
    part = parts[0]
    for m in tl.static_range(1, len(parts)):
        if index == m:
            part = parts[m]
    return part


@triton.jit
def _bits(tile):
    """A tensor's bits as integers."""
    SAME: tl.constexpr = tl.int16 if tile.dtype.primitive_bitwidth == 16 else tl.int32
    return tile.to(SAME, bitcast=True).to(tl.int32)


@triton.jit
def _held_rows(matrix, row, zero, I: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr, PATIENT: tl.constexpr):
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
                pointers += _bits(held[c // CHUNK - 1]) & zero
        if ALIGNED:  # the compiler cannot see it through a choice of pointers
            pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, 16))
        chunk = tl.load(pointers, mask=(c + i < I)[None, :], other=0.0, eviction_policy="evict_first")
        held = held + (chunk,)  # noqa: RUF005 - Triton's tuples
    return held


@triton.jit
def _prefetch(pointers, num_bytes):
    """Asks for so many bytes (a multiple of 16; 0: none) from each pointer into the L2 cache: a thread, a pointer."""
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
def _products(held, x, I: tl.constexpr, CHUNK: tl.constexpr):
    """Products of held rows and a token's x, summed over the chunks: [rows, CHUNK]."""
    i = tl.arange(0, CHUNK)
    products = tl.zeros([held[0].shape[0], CHUNK], tl.float32)
    for c in tl.static_range(0, I, CHUNK):
        xs = tl.load(x + c + i, mask=c + i < I, other=0.0)
        products += held[c // CHUNK].to(tl.float32) * xs.to(tl.float32)[None, :]
    return products


@triton.jit
def _products_of_all(
    held, x, stride_x, T: tl.constexpr, I: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Held rows times the x of each BLOCK_T tokens, as a tuple. One token, or by tensor cores (STEPS > 0): summed within threads only."""
    if STEPS > 0:
        products = ()
        for first in tl.static_range(0, T, BLOCK_T):
            c = fragment_products(held, x, stride_x, first, T, I, PARTS, WARPS)
            products = products + (c,)  # noqa: RUF005 - Triton's tuples
        return products
    elif T == 1:  # noqa: RET505 - what is not taken must not be compiled
        return (_products(held, x, I, CHUNK),)
    else:
        tokens = tl.arange(0, BLOCK_T)
        total = tl.zeros([BLOCK_T, held[0].shape[0]], tl.float32)
        for t in tl.range(0, T, loop_unroll_factor=1):
            of_token = tl.sum(_products(held, x + t * stride_x, I, CHUNK), 1)
            total += tl.where(tokens[:, None] == t, of_token[None, :], 0.0)
        return (total,)


@triton.jit
def _sums_of_all(
    products, T: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, WARPS: tl.constexpr
):
    """The outputs that `_products_of_all` found: of each BLOCK_T tokens [BLOCK_T, rows]."""
    if STEPS > 0:
        sums = ()
        for n in tl.static_range(len(products)):
            sums = sums + (fragment_sum(products[n], BLOCK_T, PARTS, WARPS),)  # noqa: RUF005 - Triton's tuples
        return sums
    elif T == 1:  # noqa: RET505 - what is not taken must not be compiled
        return (tl.sum(products[0], 1)[None, :],)
    else:
        return products


@triton.jit
def _shrink_block(
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
    rows = _rows(experts, token, shared_row, j, K, r, S)
    held = _held_rows(_pick(banks_a, linear), rows, zero, I, CHUNK, ALIGNED, False)
    if THREADS > 0:
        thread = tl.arange(0, THREADS)
        rank = pid % BLOCKS * BLOCK_J + thread
        b, width = _pick(banks_b, linear), _pick(widths, linear)
        where = b + _rows(experts, token, shared_row, rank, K, r, S).to(tl.int64) * width
        _prefetch(
            where, tl.where((thread < BLOCK_J) & (rank < J), width * (b.dtype.element_ty.primitive_bitwidth // 8), 0)
        )
    scale = tl.load(weights + token * K + tl.minimum(j // r, K - 1))
    scale = tl.where(j < K * r, scale, shared_scale)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    total = tl.sum(_products(held, x + token * stride_x, I, CHUNK), 1) * scale
    where = h + (token * len(banks_a) + linear) * J + j
    _store_copies(where, total, j < J, T * len(banks_a) * J, COPIES)


@triton.jit
def _shrink_expert(
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
    the same expert. The shared expert's blocks, which are every token's, come last.
    """
    J: tl.constexpr = K * r + S
    ROWS: tl.constexpr = 8 // PARTS
    N: tl.constexpr = BLOCK_T * ROWS
    BLOCKS: tl.constexpr = (r + ROWS - 1) // ROWS
    ROUTED: tl.constexpr = SLOTS * BLOCKS
    OF_LINEAR: tl.constexpr = ROUTED + (S + ROWS - 1) // ROWS
    CHOICES: tl.constexpr = 128 if T * K > 64 else 64 if T * K > 32 else 32
    linear, n = pid // OF_LINEAR, pid % OF_LINEAR
    slot, block = n // BLOCKS, n % BLOCKS
    choice = tl.arange(0, CHOICES)
    chosen = tl.load(experts + choice, mask=choice < T * K, other=-1)
    expert = slot
    if not BY_EXPERT:
        expert = tl.load(experts + tl.minimum(slot, T * K - 1))
    same = (chosen == expert).to(tl.int32)
    wanted = tl.sum(same, 0) > 0
    if not BY_EXPERT:
        wanted = tl.sum(tl.where(choice < slot, same, 0), 0) == 0
    begin, ranks, at, shared = expert * r, r, block * ROWS, False
    if S > 0:
        shared = n >= ROUTED
        at = tl.where(shared, (n - ROUTED) * ROWS, at)
        begin, ranks = tl.where(shared, shared_row, begin), tl.where(shared, S, ranks)
        wanted = wanted | shared
    if wanted:
        first_row, last_row = begin + at, begin + ranks - 1
        held = held_fragments(_pick(banks_a, linear), first_row, last_row, zero, I, PARTS, STEPS, CHUNKS, WARPS)
        if PREFETCH:
            thread = tl.arange(0, 32 * WARPS)
            b, width = _pick(banks_b, linear), _pick(widths, linear)
            row = tl.minimum(first_row + thread, last_row)
            there = (thread < ROWS) & (first_row + thread <= last_row)
            _prefetch(
                b + row.to(tl.int64) * width, tl.where(there, width * (b.dtype.element_ty.primitive_bitwidth // 8), 0)
            )
        if WAIT:
            tl.extra.cuda.gdc_wait()
        rank = at + tl.arange(0, ROWS)
        for first in tl.static_range(0, T, BLOCK_T):
            token = first + tl.arange(0, BLOCK_T)
            j0, scale, there = _place_of(experts, weights, token, expert, T, K, r)
            if S > 0:
                j0, scale = tl.where(shared, J - S, j0), tl.where(shared, shared_scale, scale)
                there = there | (shared & (token < T))
            c = fragment_products(held, x, stride_x, first, T, I, PARTS, WARPS)
            total = fragment_sum(c, BLOCK_T, PARTS, WARPS) * scale[:, None]
            where = h + (token * len(banks_a) + linear)[:, None] * J + j0[:, None] + rank[None, :]
            mask = there[:, None] & (rank < ranks)[None, :]
            _store_copies(where.reshape(N), total.reshape(N), mask.reshape(N), T * len(banks_a) * J, COPIES)


@triton.jit
def _place_of(experts, weights, token, expert, T: tl.constexpr, K: tl.constexpr, r: tl.constexpr):
    """Of tokens: their first active rank of an expert, its scaled weight, and whether they chose it at all."""
    j0, scale = tl.zeros_like(token), tl.zeros(token.shape, tl.float32)
    there = token < 0
    for k in tl.static_range(K):
        at = token * K + k
        mine = tl.load(experts + at, mask=token < T, other=-1) == expert
        j0 = tl.where(mine, k * r, j0)
        scale = tl.where(mine, tl.load(weights + at, mask=mine, other=0.0), scale)
        there = there | mine
    return j0, scale, there


@triton.jit
def _store_copies(where, total, mask, stride, COPIES: tl.constexpr):
    """Numbers of h [N], as bits that are never EMPTY, into each copy."""
    bits = total.to(tl.int32, bitcast=True)
    bits = tl.where(bits == EMPTY, QUIET_NAN, bits)
    copy = tl.arange(0, COPIES) * stride
    tl.store(
        where[None, :] + copy[:, None], tl.broadcast_to(bits[None, :], [COPIES, bits.shape[0]]), mask=mask[None, :]
    )


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
    _shrink_block(
        x, banks_a, experts, weights, h, stride_x, shared_row, shared_scale, zero, pid, token,
        0, I, K, r, S, BLOCK_J, CHUNK, ALIGNED, 1, False,
    )  # fmt: skip


@triton.jit
def _tile_of(pid, base_weights, widths: tl.constexpr, BLOCK_O: tl.constexpr):
    """Which linear a program belongs to: its weights, its index, the block of rows, where its outputs start, how many it has."""
    w, linear, block, column, width = base_weights[0], 0, pid, 0, widths[0]
    first, start = 0, 0
    for m in tl.static_range(1, len(base_weights)):
        first += (widths[m - 1] + BLOCK_O - 1) // BLOCK_O
        start += widths[m - 1]
        if pid >= first:
            w, linear, block, column, width = base_weights[m], m, pid - first, start, widths[m]
    return w, linear, block, column, width


@triton.jit
def _look(h, mask):
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
def _once_written(bits, h, mask):
    """The values of h, as soon as none of them is EMPTY; `bits` is the first look at them. Each thread waits for its own."""
    if INTERPRETED:
        while tl.max((bits == EMPTY).to(tl.int32), 0) != 0:
            bits = _look(h, mask)
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


@triton.jit
def _ranks(
    first, start, T: tl.constexpr, J: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, THREADS: tl.constexpr
):
    """Token and active rank of each place of [BLOCK_T * BLOCK_J], the tokens from `first` on, the ranks from `start` on; and whether there
    are such.

    Place n is thread n % THREADS: a thread has ranks of one token. BLOCK_J is at least THREADS / BLOCK_T, so that no two threads
    look at the same rank: what is looked at is not cached near them.
    """
    LANES: tl.constexpr = THREADS // BLOCK_T
    n = tl.arange(0, BLOCK_T * BLOCK_J)
    token, j = first + n % THREADS // LANES, start + n // THREADS * LANES + n % LANES
    return tl.minimum(token, T - 1), j, (token < T) & (j < J)


@triton.jit
def _b_of(
    b, experts, shared_row, token, j, there, column, width,
    K: tl.constexpr, r: tl.constexpr, S: tl.constexpr, BLOCK_O: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """B of the ranks at `column`: [places, BLOCK_O], 0 where there is none."""
    rows = _rows(experts, token, shared_row, j, K, r, S)
    pointers = b + rows.to(tl.int64)[:, None] * width + column[None, :]
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 2 * BLOCK_O)), (1, BLOCK_O))
    return tl.load(pointers, mask=there[:, None], other=0.0)


@triton.jit
def _expanded(tile, bits, h, mask, BLOCK_T: tl.constexpr, THREADS: tl.constexpr):
    """B times h, as soon as that is there: [BLOCK_T, BLOCK_O]. bits: the first look at h."""
    hs = _once_written(bits, h, mask)
    # A sum of one number: without it the compiler looks at h once for each layout that the product might have.
    hs = tl.sum(hs.reshape(1, tile.shape[0]), 0)
    # An fma, which cannot be merged with the sum's first addition: of two threads that add each other's product, each would round the
    # other's only, and several copies of an element would differ in the last bit.
    products = tl.fma(tile.to(tl.float32), tl.broadcast_to(hs[:, None], tile.shape), tl.zeros(tile.shape, tl.float32))
    of_threads = tl.sum(products.reshape(tile.shape[0] // THREADS, THREADS, tile.shape[1]), 0)
    return tl.sum(of_threads.reshape(BLOCK_T, THREADS // BLOCK_T, tile.shape[1]), 1)


@triton.jit(do_not_specialize=["zero", "seconds"])
def _decode_kernel(
    x,
    base_weights,
    banks_a,
    banks_b,
    experts,
    weights,
    h,
    y,
    stride_x,
    stride_y,
    shared_row,
    shared_scale,
    seconds,
    zero,
    widths: tl.constexpr,
    T: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    r: tl.constexpr,
    S: tl.constexpr,
    SHRINKS: tl.constexpr,
    SLOTS: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_SHRINK: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    AFTER_PLAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first SHRINKS programs compute h, BLOCK_SHRINK ranks of a token each; the others a tile of BLOCK_O outputs of a linear, all
    tokens. The first `seconds` of these compute another tile. STEPS > 0: by tensor cores (`fragments`), and h by BLOCK_O ranks of an
    expert. AHEAD: B is asked for before h is there."""
    J: tl.constexpr = K * r + S
    pid = tl.program_id(0)
    if PDL and AFTER_PLAN:
        tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if J > 0:  # noqa: SIM102 - nested, so that the first is decided by the compiler
        if pid < SHRINKS:
            if STEPS > 0:
                _shrink_expert(
                    x, banks_a, banks_b, experts, weights, h, stride_x, shared_row, shared_scale, zero, pid, widths,
                    T, I, K, r, S, SLOTS, BY_EXPERT, PARTS, STEPS, CHUNKS, BLOCK_T, COPIES, PDL and not AFTER_PLAN,
                    PREFETCH, THREADS // 32,
                )  # fmt: skip
            else:
                _shrink_block(
                    x, banks_a, experts, weights, h, stride_x, shared_row, shared_scale, zero,
                    pid % (SHRINKS // T), pid // (SHRINKS // T),
                    T, I, K, r, S, BLOCK_SHRINK, CHUNK, ALIGNED, COPIES, PDL and not AFTER_PLAN,
                    banks_b, widths, THREADS if PREFETCH else 0,
                )  # fmt: skip
            return
    tile = pid - SHRINKS
    w, linear, block, column, width = _tile_of(tile, base_weights, widths, BLOCK_O)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.minimum(o, width - 1)  # outputs past the last are computed from the last row, and not stored
    if STEPS > 0:
        held = held_fragments(w, block * BLOCK_O, width - 1, zero, I, PARTS, STEPS, CHUNKS, THREADS // 32)
    else:
        held = _held_rows(w, row, zero, I, CHUNK, ALIGNED, True)
    b_tiles = ()
    if J > 0:
        b = _pick(banks_b, linear)
        h += pid % COPIES * (T * len(base_weights) * J) + linear * J
        if AHEAD:
            for first in tl.static_range(0, T, BLOCK_T):
                token, j, there = _ranks(first, 0, T, J, BLOCK_T, BLOCK_J, THREADS)
                b_tile = _b_of(b, experts, shared_row, token, j, there, row, width, K, r, S, BLOCK_O, ALIGNED)
                b_tiles = b_tiles + (b_tile,)  # noqa: RUF005 - Triton's tuples
    if PDL and not AFTER_PLAN:
        tl.extra.cuda.gdc_wait()
    products = _products_of_all(held, x, stride_x, T, I, CHUNK, PARTS, STEPS, BLOCK_T, THREADS // 32)
    bits = ()
    if J > 0 and AHEAD:
        # In all but the first programs h is there by now, and comes while sums go from thread to thread.
        for first in tl.static_range(0, T, BLOCK_T):
            token, j, there = _ranks(first, 0, T, J, BLOCK_T, BLOCK_J, THREADS)
            bits = bits + (_look(h + token * (len(base_weights) * J) + j, there),)  # noqa: RUF005 - Triton's tuples
    tokens = tl.arange(0, BLOCK_T)
    sums = _sums_of_all(products, T, PARTS, STEPS, BLOCK_T, THREADS // 32)
    if J > 0 and T == 1:  # noqa: SIM102 - nested, so that the first is decided by the compiler
        if tile < seconds:
            w2, linear2, block2, column2, width2 = _tile_of(
                tl.num_programs(0) - SHRINKS + tile, base_weights, widths, BLOCK_O
            )
            o2 = block2 * BLOCK_O + tl.arange(0, BLOCK_O)
            row2 = tl.minimum(o2, width2 - 1)
            held = _held_rows(w2, row2, zero, I, CHUNK, ALIGNED, False)
            token, j, there = _ranks(0, 0, T, J, BLOCK_T, BLOCK_J, THREADS)
            b2 = _pick(banks_b, linear2)
            b_tile2 = _b_of(b2, experts, shared_row, token, j, there, row2, width2, K, r, S, BLOCK_O, ALIGNED)
            products2 = _products(held, x, I, CHUNK)
            h_at = h + (linear2 - linear) * J + j
            bits2 = _look(h_at, there)
            acc2 = tl.sum(products2, 1)[None, :]
            acc2 += _expanded(b_tile2, bits2, h_at, there, BLOCK_T, THREADS)
            where = y + tokens[:, None] * stride_y + column2 + o2[None, :]
            tl.store(where, acc2.to(y.dtype.element_ty), mask=(o2 < width2)[None, :])
    for first in tl.static_range(0, T, BLOCK_T):
        acc = sums[first // BLOCK_T]
        for start in tl.static_range(0, J, BLOCK_J):
            token, j, there = _ranks(first, start, T, J, BLOCK_T, BLOCK_J, THREADS)
            h_at = h + token * (len(base_weights) * J) + j
            if AHEAD:
                acc += _expanded(b_tiles[first // BLOCK_T], bits[first // BLOCK_T], h_at, there, BLOCK_T, THREADS)
            else:
                b_tile = _b_of(b, experts, shared_row, token, j, there, row, width, K, r, S, BLOCK_O, ALIGNED)
                acc += _expanded(b_tile, _look(h_at, there), h_at, there, BLOCK_T, THREADS)
        where = y + (first + tokens)[:, None] * stride_y + column + o[None, :]
        tl.store(where, acc.to(y.dtype.element_ty), mask=(first + tokens < T)[:, None] & (o < width)[None, :])


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
        rows = _rows(experts, token, shared_row, j, K, r, S)
        mask = (j < J)[:, None] & (o < O)[None, :]
        tile = tl.load(b + rows.to(tl.int64)[:, None] * O + o[None, :], mask=mask, other=0.0)
        hs = tl.load(h + token * stride_h + j, mask=j < J, other=0).to(tl.float32, bitcast=True)
        acc += tl.sum(tile.to(tl.float32) * hs[:, None], 0)
    tl.store(where, acc.to(y.dtype.element_ty), mask=o < O)


# --- launchers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How `decode` cuts the work. A program holds block_o whole rows of W, asked for in `chunks` parts, or block_j rows of an A.

    resident: how many programs a processor is taken to hold at once; so many start with rows that h is not ready for.
    """

    block_o: int
    num_warps: int
    chunks: int = 4
    block_j: int = 1
    resident: int = 5

    @property
    def maxnreg(self) -> int | None:
        """The most registers of a thread that leave room for `resident` programs."""
        return REGISTERS // (32 * self.num_warps * self.resident) // 8 * 8 if self.resident else None

    def steps(self, features: int) -> int:
        """Loads of 16 bytes by each thread for a tile of rows of 16-bit numbers, as `fragments` holds them."""
        return cdiv(features * self.block_o, 8 * STEP.value * self.num_warps)

    @classmethod
    def of_fragments(cls, features: int) -> Tile:
        """For several tokens by tensor cores: the fewest warps that hold two rows, or more, in 64 registers a thread.

        All rows at once: 2, 4 and 8 tokens of rank 16 took 4.58, 4.65 and 5.78 ms so, 4.78, 4.95 and 6.29 a quarter at a time (the linears
        of Llama-2-7B, H100).
        """
        shapes = ((rows, num_warps) for num_warps in (4, 8, 16) for rows in (8, 4, 2))
        tiles = (cls(rows, num_warps, chunks=1, resident=16 // num_warps) for rows, num_warps in shapes)
        return next((tile for tile in tiles if tile.steps(features) <= 16), cls(1, 16, chunks=1, resident=1))

    @classmethod
    def default(cls, features: int, itemsize: int) -> Tile:
        """As many rows as fit into the registers."""
        columns = _columns(features)
        num_warps = 4 if columns <= 4096 else 8 if columns <= 16384 else 16
        block_o = max(1, min(16, WARP_BYTES * num_warps // (itemsize * columns)))
        return cls(block_o, num_warps, resident={4: 5, 8: 3, 16: 1}[num_warps])


def decode(
    x,
    base_weights,
    out,
    *,
    banks_a=(),
    banks_b=(),
    chosen: Chosen | None = None,
    h=None,
    after_plan=False,
    pdl=False,
    tile: Tile | None = None,
):
    """out[t, column(m) + o] = sum_i base_weights[m][o, i] x[t, i] + sum_j banks_b[m][row(t, j), o] h[t, m, j], with

    h[t, m, j] = scale(t, j) * sum_i banks_a[m][row(t, j), i] x[t, i]. One launch. Without `chosen`: the base linears alone.

    x [T <= 8, I], its last axis contiguous; base_weights: for each linear of the group [O_m, I]; banks_a [R, I], banks_b [R, O_m],
    all of the dtype of x. h [C, T, M, J] int32: C (`copies_of_h`) copies,
    filled with EMPTY before each call: programs read it when it is no longer so.
    out [T, O_1 + ... + O_M], written whole, the linears' outputs side by side. Summed in fp32. after_plan: the kernel ahead
    in the stream is the one that writes `chosen`. No host sync, no allocation: safe inside a CUDA graph.
    """
    _check(x, chosen, base_weights=base_weights, banks_a=banks_a, banks_b=banks_b, out=(out,))
    if chosen:
        _check_h("h", h, ("C", len(x), len(base_weights), chosen.active))
    tokens, features = x.shape
    widths = tuple(len(w) for w in base_weights)
    tensor_cores = _for_tensor_cores(x, *base_weights, *banks_a) and (tile is None or tile.block_o <= 8)
    tile = tile or (Tile.of_fragments(features) if tensor_cores else Tile.default(features, x.element_size()))
    adapted = chosen is not None
    slots = min(chosen.num_experts, chosen.experts.numel()) if adapted else 0
    shrinks = len(widths) * _shrinks_of_a_linear(chosen, slots, tile, tensor_cores) if adapted else 0
    tiles = sum(cdiv(width, tile.block_o) for width in widths)
    places = max(0, processors(x) * tile.resident - shrinks)
    seconds = max(0, min(places, tiles - places)) if adapted and tokens == 1 else 0
    aligned = _aligned(features, *base_weights, *banks_a, *banks_b) and all(
        width % max(8, tile.block_o) == 0 for width in widths
    )
    grid = (shrinks + tiles - seconds,)
    threads, block_t, block_j = 32 * tile.num_warps, next_power_of_2(tokens), 1
    if tensor_cores:
        block_t = min(block_t, 2 * tile.block_o)
    ahead = adapted
    if adapted:
        block_j, held = next_power_of_2(chosen.active), HELD_B * threads // tile.block_o
        ahead = tokens == 1 or next_power_of_2(tokens) * block_j <= held
        block_j = max(threads // block_t, block_j if ahead else min(block_j, held // block_t))
    with torch.cuda.device_of(x):
        _decode_kernel[grid](
            x,
            tuple(base_weights),
            tuple(banks_a) if adapted else None,
            tuple(banks_b) if adapted else None,
            chosen.experts if adapted else None,
            chosen.weights if adapted else None,
            h,
            out,
            x.stride(0),
            out.stride(0),
            chosen.num_experts * chosen.r if adapted else 0,
            chosen.shared_scale if adapted else 0.0,
            seconds,
            0,
            widths=widths,
            T=tokens,
            I=features,
            K=chosen.experts.shape[1] if adapted else 0,
            r=chosen.r if adapted else 1,
            S=chosen.shared_rank if adapted else 0,
            SHRINKS=shrinks,
            SLOTS=slots,
            BY_EXPERT=adapted and slots == chosen.num_experts,
            COPIES=len(h) if adapted else 1,
            BLOCK_T=block_t,
            BLOCK_O=tile.block_o,
            BLOCK_J=block_j,
            BLOCK_SHRINK=tile.block_j,
            CHUNK=_columns(features) // tile.chunks,
            PARTS=8 // tile.block_o if tensor_cores else 1,
            STEPS=tile.steps(features) if tensor_cores else 0,
            CHUNKS=tile.chunks,
            AHEAD=ahead,
            PREFETCH=aligned and since_hopper(x),
            THREADS=threads,
            ALIGNED=aligned,
            AFTER_PLAN=after_plan,
            num_warps=tile.num_warps,
            **launch_options(pdl, maxnreg=tile.maxnreg if tokens == 1 or tensor_cores else None),
        )
    return out


def _shrinks_of_a_linear(chosen, slots, tile, tensor_cores):
    """Programs that compute h: of some ranks of a token, or of an expert, or, where there are more experts than choices, of a choice."""
    if not tensor_cores:
        return len(chosen.experts) * cdiv(chosen.active, tile.block_j)
    return slots * cdiv(chosen.r, tile.block_o) + cdiv(chosen.shared_rank, tile.block_o)


def shrink(x, banks_a, chosen: Chosen, out, *, pdl=False, num_warps=4):
    """out[t, m, j] = scale(t, j) * sum_i banks_a[m][row(t, j), i] * x[t, i].

    x [T, I], its last axis contiguous; banks_a: for each linear of the group [R, I], the dtype of x; out [T, M, J] int32: the bits of
    fp32 numbers, written whole. Summed in fp32. No host sync, no allocation: safe inside a CUDA graph.
    """
    _check(x, chosen, banks_a=banks_a)
    _check_h("out", out, (len(x), len(banks_a), chosen.active))
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
            CHUNK=_columns(features),
            ALIGNED=_aligned(features, *banks_a),
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
    _check_chosen(y, chosen)
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


def _check(x, chosen, **matrices):
    """ValueError for what the kernels cannot read. `matrices`: by name, tuples of one each linear."""
    refuse_gradients(x, *(m for group in matrices.values() for m in group), *([chosen.weights] if chosen else []))
    if x.dim() != 2 or not 1 <= len(x) <= MAX_TOKENS or x.shape[1] > MAX_FEATURES or x.stride(1) != 1:
        raise ValueError(
            f"x must be [T, I] of 1 to {MAX_TOKENS} tokens and up to {MAX_FEATURES} features, its last axis contiguous; got "
            f"{list(x.shape)} with strides {x.stride()}"
        )
    for name, group in matrices.items():
        for m in group:
            if m.dtype != x.dtype or m.device != x.device:
                raise ValueError(f"{name} is {m.dtype} on {m.device}, x is {x.dtype} on {x.device}; they must agree")
            if m.dim() != 2 or m.stride(1) != 1 or (name != "out" and not m.is_contiguous()):
                raise ValueError(
                    f"{name} has shape {list(m.shape)} and strides {m.stride()}; it must be a contiguous matrix"
                )
            if name in ("base_weights", "banks_a") and m.shape[1] != x.shape[1]:
                raise ValueError(f"{name} has shape {list(m.shape)}, but x has {x.shape[1]} features")
            if chosen and name.startswith("banks") and len(m) != chosen.ranks:
                raise ValueError(f"{name} has {len(m)} rows, but the routing is of {chosen.ranks} ranks")
    if "base_weights" in matrices:
        _check_group(x, chosen, **matrices)
    if chosen:
        _check_chosen(x, chosen)


def _check_group(x, chosen, base_weights, banks_a, banks_b, out):
    widths = [len(w) for w in base_weights]
    if out[0].shape != (len(x), sum(widths)):
        raise ValueError(f"out is {list(out[0].shape)}, but {len(x)} token(s) of linears of {widths} features come out")
    if chosen and (len(banks_a) != len(widths) or [b.shape[1] for b in banks_b] != widths):
        raise ValueError(
            f"{len(banks_a)} banks_a, and banks_b of {[b.shape[1] for b in banks_b]} features, for linears of {widths}"
        )


def _check_h(name, h, shape):
    """shape: "C" stands for any power of two."""
    found = () if h is None else h.shape
    good = len(found) == len(shape) and all(
        n == of or (of == "C" and n & (n - 1) == 0 < n) for n, of in zip(found, shape, strict=False)
    )
    if not good or h.dtype != torch.int32 or not h.is_contiguous():
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be contiguous int32 [{wanted}] (C a power of two), got {list(found)}")


def _check_chosen(x, chosen):
    for name, tensor, dtype in (("experts", chosen.experts, torch.int32), ("weights", chosen.weights, torch.float32)):
        if (
            tensor.shape != chosen.experts.shape
            or len(tensor) != len(x)
            or tensor.dtype != dtype
            or tensor.device != x.device
        ):
            raise ValueError(
                f"{name} must be {dtype} [{len(x)}, K] on {x.device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")


def _for_tensor_cores(x, *matrices):
    """Whether `fragments` can multiply them: several tokens, 16-bit numbers, whole loads of 16 bytes."""
    rows = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return len(x) > 1 and x.element_size() == 2 and rows and _aligned(x.shape[1], *matrices) and has_mma(x)


def _columns(features):
    """A row of W, padded to what a program can hold."""
    return max(next_power_of_2(features), 128)


def _aligned(features, *matrices):
    """Whether every row of these contiguous matrices starts on a 16-byte boundary."""
    return all(features * m.element_size() % 16 == 0 and m.data_ptr() % 16 == 0 for m in matrices)
