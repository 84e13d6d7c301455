"""decode: adapted linears for a few tokens, unmerged: base weights and experts in one launch and one pass over memory.

`decode` computes all linears that share an input. Its first programs compute h = scale * A x (`ranks`); the others stream the rows of W,
and add B h at the end, when h is there. A base linear whose weights it cannot read (quantised, transposed, with a bias) is for `beside`.

What decides the time is how little happens while memory is idle, since each group of linears needs the whole output of the one
before it:

* Programmatic dependent launch (PDL) lets a kernel start before the one ahead of it has ended. Programs first ask for the weights
  they will need, which nothing writes, and only then wait for their input. What makes this safe: every program waits before it
  reads an activation or writes anything; and a kernel that follows the one which wrote `Chosen` lets its dependents start after its own
  wait only (`after_plan`), so that nobody reads an unfinished plan.
* A program holds whole rows in registers, so that 20 MB are on their way to the processors or there when the wait ends. With PDL it
  asks for them a quarter at a time: all at once, the input would queue behind them (4.18 ms instead of 4.24 ms for the linears of
  Llama-2-7B, on an H100). Without PDL the input is there, and the last programs of a launch, with nobody behind them, take four
  waits instead of one: all at once is right there (Llama-3.1-8B among ordinary kernels 4.81 ms instead of 5.03, with r 16 5.13
  instead of 5.24).
* Programs learn that h is there from h itself: it is EMPTY until written. What looks at it is not cached near the processor, and looks
  at one cache line queue up (6.9 ms instead of 4.5 ms in two launches, with 32 active ranks). So there are copies of h, each read
  by some of the programs, and no two threads of a program look at the same rank.
* The programs that start first compute the products of a second tile before they need h, so that memory works meanwhile. They
  ask for its rows, and for its piece of B, all at once (4.48 ms without this, 4.34 ms with it).
* Several tokens are multiplied by tensor cores, whose operands come from memory straight into the registers where they are needed
  (`fragments`): 368 instructions for 4 rows of 4096 features and 8 tokens, where multiply-adds take 2400 at best and memory allows 2450.
  h is computed a token at a time all the same: all tokens at once by tensor cores, which reads A only once, comes later than the first
  tiles want it, since its programs load the whole input, as those do (4 tokens of r 16 took 4.97 ms so instead of 4.70).
* A tile reads a piece of 8 bytes of each row of B, which memory is slow at. The programs that compute h ask for those rows whole, into
  the L2 cache (4.59 ms without this, 4.54 ms with it, with 128 active ranks).

T tokens, K experts a token, J active ranks a token, R ranks in all, I and O features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from adafuse.ops.checks import aligned_rows, check, check_h, padded
from adafuse.ops.chosen import Chosen
from adafuse.ops.fragments import STEP, fragment_products, fragment_sum, held_fragments
from adafuse.ops.launch import cdiv, has_mma, launch_options, next_power_of_2, processors, since_hopper
from adafuse.ops.ranks import (
    expand_ref,
    held_rows,
    look,
    once_written,
    pick_part,
    products_of,
    rank_rows,
    shrink_block,
    shrink_ref,
)

REGISTERS = 65536  # of a processor
WARP_BYTES = 8192  # of W that a warp holds: 64 registers a thread
HELD_B = 32  # numbers of B that a thread holds for several tokens


def decode_ref(x, base_weights, banks_a=(), banks_b=(), chosen: Chosen | None = None):
    """`decode` in plain PyTorch, in the dtype of x."""
    ys = [x @ w.T for w in base_weights]
    if chosen is not None:
        h = shrink_ref(x, banks_a, chosen)
        ys = [y + expand_ref(h[:, m], b, chosen) for m, (y, b) in enumerate(zip(ys, banks_b, strict=True))]
    return torch.cat(ys, dim=-1)


# --- kernels -----------------------------------------------------------------------------------------------------------


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
        return (products_of(held, x, I, CHUNK),)
    else:
        tokens = tl.arange(0, BLOCK_T)
        total = tl.zeros([BLOCK_T, held[0].shape[0]], tl.float32)
        for t in tl.range(0, T, loop_unroll_factor=1):
            of_token = tl.sum(products_of(held, x + t * stride_x, I, CHUNK), 1)
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
def tile_of(pid, base_weights, widths: tl.constexpr, BLOCK_O: tl.constexpr):
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
    rows = rank_rows(experts, token, shared_row, j, K, r, S)
    pointers = b + rows.to(tl.int64)[:, None] * width + column[None, :]
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 2 * BLOCK_O)), (1, BLOCK_O))
    return tl.load(pointers, mask=there[:, None], other=0.0)


@triton.jit
def _expanded(tile, bits, h, mask, BLOCK_T: tl.constexpr, THREADS: tl.constexpr):
    """B times h, as soon as that is there: [BLOCK_T, BLOCK_O]. bits: the first look at h."""
    hs = once_written(bits, h, mask)
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
    PATIENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    AFTER_PLAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first SHRINKS programs compute h, BLOCK_SHRINK ranks of a token each; the others a tile of BLOCK_O outputs of a linear, all
    tokens. The first `seconds` of these compute another tile. STEPS > 0: by tensor cores (`fragments`). AHEAD: B is asked for before h
    is there."""
    J: tl.constexpr = K * r + S
    pid = tl.program_id(0)
    if PDL and AFTER_PLAN:
        tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if J > 0:  # noqa: SIM102 - nested, so that the first is decided by the compiler
        if pid < SHRINKS:
            shrink_block(
                x, banks_a, experts, weights, h, stride_x, shared_row, shared_scale, zero,
                pid % (SHRINKS // T), pid // (SHRINKS // T),
                T, I, K, r, S, BLOCK_SHRINK, CHUNK, ALIGNED, COPIES, PDL and not AFTER_PLAN,
                banks_b, widths, THREADS if PREFETCH else 0,
            )  # fmt: skip
            return
    tile = pid - SHRINKS
    w, linear, block, column, width = tile_of(tile, base_weights, widths, BLOCK_O)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.minimum(o, width - 1)  # outputs past the last are computed from the last row, and not stored
    if STEPS > 0:
        held = held_fragments(w, block * BLOCK_O, width - 1, zero, I, PARTS, STEPS, CHUNKS, THREADS // 32)
    else:
        held = held_rows(w, row, zero, I, CHUNK, ALIGNED, PATIENT)
    b_tiles = ()
    if J > 0:
        b = pick_part(banks_b, linear)
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
            bits = bits + (look(h + token * (len(base_weights) * J) + j, there),)  # noqa: RUF005 - Triton's tuples
    tokens = tl.arange(0, BLOCK_T)
    sums = _sums_of_all(products, T, PARTS, STEPS, BLOCK_T, THREADS // 32)
    if J > 0 and T == 1:  # noqa: SIM102 - nested, so that the first is decided by the compiler
        if tile < seconds:
            w2, linear2, block2, column2, width2 = tile_of(
                tl.num_programs(0) - SHRINKS + tile, base_weights, widths, BLOCK_O
            )
            o2 = block2 * BLOCK_O + tl.arange(0, BLOCK_O)
            row2 = tl.minimum(o2, width2 - 1)
            held = held_rows(w2, row2, zero, I, CHUNK, ALIGNED, False)
            token, j, there = _ranks(0, 0, T, J, BLOCK_T, BLOCK_J, THREADS)
            b2 = pick_part(banks_b, linear2)
            b_tile2 = _b_of(b2, experts, shared_row, token, j, there, row2, width2, K, r, S, BLOCK_O, ALIGNED)
            products2 = products_of(held, x, I, CHUNK)
            h_at = h + (linear2 - linear) * J + j
            bits2 = look(h_at, there)
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
                acc += _expanded(b_tile, look(h_at, there), h_at, there, BLOCK_T, THREADS)
        where = y + (first + tokens)[:, None] * stride_y + column + o[None, :]
        tl.store(where, acc.to(y.dtype.element_ty), mask=(first + tokens < T)[:, None] & (o < width)[None, :])


# --- launchers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How `decode` cuts the work. A program holds block_o whole rows of W, asked for in `chunks` parts, or block_j rows of an A.

    patient: whether a part is asked for when the one before has come; None: with PDL (tensor cores go by `chunks`). resident: how
    many programs a processor is taken to hold at once; so many start with rows that h is not ready for.
    """

    block_o: int
    num_warps: int
    chunks: int = 4
    block_j: int = 1
    resident: int = 5
    patient: bool | None = None

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
        tiles = (cls(rows, num_warps, chunks=1, block_j=2, resident=16 // num_warps) for rows, num_warps in shapes)
        return next((tile for tile in tiles if tile.steps(features) <= 16), cls(1, 16, chunks=1, block_j=2, resident=1))

    @classmethod
    def default(cls, features: int, itemsize: int) -> Tile:
        """As many rows as fit into the registers."""
        columns = padded(features)
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
    in the stream is the one that writes `chosen`.
    No host sync, no allocation: safe inside a CUDA graph.
    """
    check(x, chosen, base_weights=base_weights, banks_a=banks_a, banks_b=banks_b, out=(out,))
    if chosen:
        check_h("h", h, ("C", x.shape[0], len(base_weights), chosen.active))
    tokens, features = x.shape
    widths = tuple(w.shape[0] for w in base_weights)
    base_aligned = aligned_rows(features, *base_weights)
    tensor_cores = base_aligned and _for_tensor_cores(x) and (tile is None or tile.block_o <= 8)
    tile = tile or (Tile.of_fragments(features) if tensor_cores else Tile.default(features, x.element_size()))
    adapted = chosen is not None
    cut = _cut(tile, tokens, features, widths, chosen.active if adapted else 0, tensor_cores, pdl, processors(x))
    aligned = base_aligned and cut.even and aligned_rows(features, *banks_a, *banks_b)
    with torch.cuda.device_of(x):
        _decode_kernel[cut.grid](
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
            cut.seconds,
            0,
            K=chosen.experts.shape[1] if adapted else 0,
            r=chosen.r if adapted else 1,
            S=chosen.shared_rank if adapted else 0,
            COPIES=h.shape[0] if adapted else 1,
            PREFETCH=aligned and since_hopper(x),
            ALIGNED=aligned,
            AFTER_PLAN=after_plan,
            **cut.constants,
            **launch_options(pdl, maxnreg=tile.maxnreg if tokens == 1 or tensor_cores else None),
        )
    return out


class _Cut(NamedTuple):
    """Of one launch. seconds: programs that compute two tiles. even: no tile of any linear goes past its last row."""

    grid: tuple[int]
    seconds: int
    even: bool
    constants: dict


@lru_cache(maxsize=4096)
def _cut(tile: Tile, tokens, features, widths, active, tensor_cores, pdl, num_processors) -> _Cut:
    """Kept: to find it takes the host longer than the launch. active: ranks of a token, 0 for the base alone."""
    shrinks = tokens * len(widths) * cdiv(active, tile.block_j)
    tiles = sum(cdiv(width, tile.block_o) for width in widths)
    places = max(0, num_processors * tile.resident - shrinks)
    seconds = max(0, min(places, tiles - places)) if active and tokens == 1 else 0
    threads, block_t, block_j = 32 * tile.num_warps, next_power_of_2(tokens), 1
    if tensor_cores:
        block_t = min(block_t, 2 * tile.block_o)
    ahead = active > 0
    if active:
        block_j, held = next_power_of_2(active), HELD_B * threads // tile.block_o
        ahead = tokens == 1 or next_power_of_2(tokens) * block_j <= held
        block_j = max(threads // block_t, block_j if ahead else min(block_j, held // block_t))
    constants = {
        "widths": widths,
        "T": tokens,
        "I": features,
        "SHRINKS": shrinks,
        "BLOCK_T": block_t,
        "BLOCK_O": tile.block_o,
        "BLOCK_J": block_j,
        "BLOCK_SHRINK": tile.block_j,
        "CHUNK": padded(features) // tile.chunks,
        "PARTS": 8 // tile.block_o if tensor_cores else 1,
        "STEPS": tile.steps(features) if tensor_cores else 0,
        "CHUNKS": tile.chunks,
        "AHEAD": ahead,
        "PATIENT": pdl if tile.patient is None else tile.patient,
        "THREADS": threads,
        "num_warps": tile.num_warps,
    }
    even = all(width % max(8, tile.block_o) == 0 for width in widths)
    return _Cut((shrinks + tiles - seconds,), seconds, even, constants)


def _for_tensor_cores(x):
    """Whether `fragments` can multiply tokens, by rows on 16 bytes: several, of 16-bit numbers, on 16 bytes too."""
    rows = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x.shape[0] > 1 and x.element_size() == 2 and rows and has_mma(x)
