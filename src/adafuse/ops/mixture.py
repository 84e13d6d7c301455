"""mixture: base and experts for many tokens (prefill) in one launch: `batch`'s shrink, then what `matmul` does.

    y[order[t], column(m) + o] = sum_i W_m[o, i] x[order[t], i] + sum_rank B_m[rank, o] h[m, t, rank]
    h[m, t, rank] = gate[t, expert(rank)] * sum_i A_m[rank, i] x[order[t], i]

A shrink of its own needs few products but is a launch whose last programs leave most processors idle. Here the same programs, as many as
the device has processors, first compute h and then tiles of y; what needs h waits for it by a counter within the launch.

What decides the time is how h is dealt out. A tile of y takes as long as the shrink of the same tile of tokens to as many ranks, and no
processor computes a part of one: q, k and v of Llama-2-7B with 2048 tokens are 768 tiles for 132 processors, six for 108 of them and
five for the other 24, which have room for one more. So h is cut into chunks, a tile of tokens by BLOCK_N of the ranks that it needs, and:

* The programs that compute a tile of y less take whole chunks, EACH at most: that costs nothing at all. If there are fewer chunks than
  such programs, several share one.
* The other chunks are shared by the other programs, as many a chunk as there are: each sums a part of the features. Dealt out whole they
  would cost as much as another tile for every processor: half of the time of o, which are two.

Tiles of y follow, as in `matmul`; or, with B transposed, all steps of all tiles of a program in one loop, so that nothing is waited for
between two tiles.

With few tokens the tiles of y are the problem: o of 256 tokens are 32 for 132 processors, gate and up of Llama-2-7B 172, of which the
last 40 have 132 processors for themselves. Then (`shared`) those that are left when all programs have computed as many whole ones are
shared, too, if there are two programs for each: each sums a part of the features and ranks. There nobody has time to spare, and all share h
alike.

Those who share a chunk or a tile leave their sums in `partial`, and when all have come each adds a part of the rows, always in the same
order. A program computes its sums of chunks, then waits for those of others and adds; it waits for h before the first ranks of a tile of
y, and for others' sums of tiles when its own are there. So nobody waits for ever, as long as all programs run at once. That is what one
program a processor is for: one such launch at a time on a device, and nothing beside it that holds a processor until this one ends.
By the interpreter, which runs one program after another, one does the work of all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from adafuse.ops.batch import blocks_of_a_token, check_shrink, rows_of, shrink_tiles_ref, store_units, units_from
from adafuse.ops.checks import aligned_rows
from adafuse.ops.flags import arrive, wait_until
from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import INTERPRETED, cdiv, dot, next_power_of_2, processors
from adafuse.ops.layout import ROUTING, Tiles
from adafuse.ops.matmul import (
    base_products,
    check_matmul,
    check_transposed,
    columns_of,
    default_blocks,
    described,
    matmul_tiles_ref,
    store_outputs,
    store_tile,
    tile_at,
    tiles_in_one_loop,
)

# Flags in front of the others: the counter that all look at has a line of the cache for itself.
LINE = tl.constexpr(32)
MOST_SPLITS = 16  # programs that share a chunk: their sums are asked for at once
FEWEST_STEPS = 4  # over features, of one that shares


def matmul_mixture_ref(x, base_weights, a, b, tiles, out, *, transposed=False):
    """`matmul_mixture` in PyTorch."""
    b = [part.T for part in b] if transposed else b
    matmul_tiles_ref(x, base_weights, shrink_tiles_ref(x, a, tiles), b, tiles, out)


# --- buffers --------------------------------------------------------------------------------------------------------------


class Room(NamedTuple):
    """What a launch leaves for itself. h [`tiles.h_shape`], of x's dtype, and partial, fp32, may serve one call after another; flags,
    int32, are filled with 0 before each call."""

    h: torch.Tensor
    partial: torch.Tensor
    flags: torch.Tensor

    @classmethod
    def make(cls, x, linears, tiles, *, block_o=None, block_n=None, programs=None, shared=False) -> Room:
        """For calls with these keywords."""
        block_n, programs = block_n or ranks_of_a_chunk(x, linears, tiles), programs or processors(x)
        return cls(
            x.new_empty(tiles.h_shape(linears)),
            x.new_empty(
                _sums(tiles, block_o or default_blocks(x.dtype)[0], block_n, programs, shared), dtype=torch.float32
            ),
            x.new_zeros(num_flags(linears, tiles, block_n, programs), dtype=torch.int32),
        )


def _sums(tiles, block_o, block_n, programs, shared) -> int:
    """Numbers that programs leave for others: of a chunk each, and of a tile of y if those are shared."""
    return programs * tiles.block_t * (block_n + block_o * shared)


def num_flags(linears, tiles, block_n, programs) -> int:
    """The counter of h, those of tiles that are shared, and of chunks."""
    return LINE.value + programs + tiles.num_tiles * cdiv(tiles.num_blocks * linears * tiles.block_r, block_n)


def ranks_of_a_chunk(x, linears, tiles) -> int:
    """The default block_n: the ranks of a tile, by the guess of `batch` that it needs twice the blocks of a token, but no more than
    a tile of y has outputs by default. Half of that where few ranks share a gate, since gates take registers."""
    most = 64 if x.dtype == torch.float32 else 128 if tiles.r % min(tiles.block_r, 16) else 256
    units = min(tiles.num_blocks, 2 * blocks_of_a_token(tiles)) * linears
    return max(min(next_power_of_2(units * tiles.block_r), most), tiles.block_r)


# --- kernel ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _chunks_of(counts, tile, token_tiles, LINEARS: tl.constexpr, UNITS: tl.constexpr):
    """How many chunks of UNITS units tiles of tokens have."""
    return (tl.load(counts + tile, mask=tile < token_tiles, other=0) * LINEARS + UNITS - 1) // UNITS


@triton.jit
def _all_chunks(counts, token_tiles, LINEARS: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr):
    total = 0
    for start in range(0, token_tiles, LANES):
        total += tl.sum(_chunks_of(counts, start + tl.arange(0, LANES), token_tiles, LINEARS, UNITS), 0)
    return total


@triton.jit
def _find_chunk(chunk, counts, token_tiles, LINEARS: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr):
    """Tile and first unit of a chunk: the chunks of one tile after those of another."""
    tile, first, before = 0, 0, 0
    for start in range(0, token_tiles, LANES):
        chunks = _chunks_of(counts, start + tl.arange(0, LANES), token_tiles, LINEARS, UNITS)
        ends = before + tl.cumsum(chunks, 0)
        tile += tl.sum((ends <= chunk).to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(ends <= chunk, ends, 0), 0))
        before += tl.sum(chunks, 0)
    return tile, (chunk - first) * UNITS


@triton.jit
def _chunk(
    chunk, counts, blocks, token_tiles, LINEARS: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Its tile, first unit, the tile's number of units and list of blocks, and `units_from` there."""
    tile, unit_0 = _find_chunk(chunk, counts, token_tiles, LINEARS, BLOCK_N // BLOCK_R, LANES)
    units, listed = tl.load(counts + tile) * LINEARS, blocks + tile * NUM_BLOCKS
    unit, linear, rank = units_from(unit_0, units, listed, LINEARS, BLOCK_R, BLOCK_N)
    return tile, unit_0, units, listed, unit, linear, rank


@triton.jit
def _sharers(places, programs, SHARED: tl.constexpr, MOST_SPLITS: tl.constexpr):
    """How many tiles are left when all programs have computed as many whole ones, and how many programs share each; 1: they are whole."""
    rest, splits = places % programs, 1
    if SHARED:
        splits = tl.maximum(tl.minimum(programs // tl.maximum(rest, 1), MOST_SPLITS), 1)
        splits = tl.where(rest > 0, splits, 1)
    return rest, splits


@triton.jit
def _share(program, programs, chunks, rest, sharers, EACH: tl.constexpr, MOST_SPLITS: tl.constexpr):
    """A program's share of h: the first chunk of its team, the number of the team's chunks and of its members, which of these it is, how
    many share a chunk, and the team's first program. Its pieces: index, index + members and so on, below chunks * splits.

    One team are the programs that compute a tile of y less than the others, if there are any, the others the other. Where tiles are
    shared all are one team, those first that have no part of a tile.
    """
    spare = tl.where(sharers > 1, 0, (programs - rest) % programs)
    taken = tl.minimum(chunks, spare * EACH)
    first, count, members, start = taken, chunks - taken, programs - spare, 0
    if (spare > 0) & (program >= rest):
        first, count, members, start = 0, taken, spare, rest
    splits = tl.minimum(tl.maximum(members // tl.maximum(count, 1), 1), MOST_SPLITS)
    index = tl.where(sharers > 1, programs - 1 - program, program - start)
    return first, count, members, index, splits, start


@triton.jit
def _sum_of_tile(
    place, i_0, i_1, rank_0, rank_1, wait, x, weights, b, h, flags, wanted, order, blocks, T, stride_x,
    widths: tl.constexpr, COLUMNS: tl.constexpr, I: tl.constexpr, NUM_BLOCKS: tl.constexpr, LISTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_T, BLOCK_O] of a tile of y: features i_0 to before i_1, and of the needed blocks of ranks rank_0 to before rank_1. wait:
    for h, until `flags` is `wanted`."""
    token_tiles = (T + BLOCK_T - 1) // BLOCK_T
    tile, columns = tile_at(place, token_tiles, COLUMNS, GROUP)
    w, part, linear, block, _column, _width = columns_of(columns, weights, b, widths, BLOCK_O)
    t, slot = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, LISTED)
    token = tl.load(order + t, mask=t < T, other=0)
    # Asked for here, since the sum over the ranks waits for them.
    listed = tl.load(blocks + tile * NUM_BLOCKS + slot, mask=slot < NUM_BLOCKS, other=0)
    x_row = x + token.to(tl.int64) * stride_x
    acc = base_products(x_row, w, block, i_0, i_1, I, BLOCK_T, BLOCK_O, BLOCK_I, STAGES)
    if wait:
        wait_until(flags, wanted)
    h_row = h + (linear * token_tiles * BLOCK_T + t).to(tl.int64) * (NUM_BLOCKS * BLOCK_R)
    for step in tl.range(rank_0, rank_1, num_stages=STAGES):
        rank = tl.sum(tl.where(slot == step, listed, 0), 0) * BLOCK_R
        h_tile = tl.load(h_row[:, None] + (rank + tl.arange(0, BLOCK_R))[None, :], cache_modifier=".cg")
        acc = dot(h_tile, part.load([rank, block * BLOCK_O]), acc)
    return acc


@triton.jit
def _shared_tiles(
    whole, rest, splits, partial, sums, x, weights, b, h, flags, wanted, y, order, counts, blocks, T, stride_x, stride_y, programs,
    widths: tl.constexpr, COLUMNS: tl.constexpr, I: tl.constexpr, NUM_BLOCKS: tl.constexpr, LISTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
    MOST_SPLITS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles from `whole` on, by `splits` programs each. sums: of each tile, how many have left theirs in `partial`."""
    I_STEPS: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    pid, running = tl.program_id(0), tl.num_programs(0)
    token_tiles = (T + BLOCK_T - 1) // BLOCK_T
    for program in range(pid, tl.minimum(rest * splits, programs), running):
        place, split = whole + program // splits, program % splits
        tile, _columns = tile_at(place, token_tiles, COLUMNS, GROUP)
        steps = I_STEPS + tl.load(counts + tile)
        first, end = split * steps // splits, (split + 1) * steps // splits
        acc = _sum_of_tile(
            place, tl.minimum(first, I_STEPS) * BLOCK_I, tl.minimum(end, I_STEPS) * BLOCK_I, tl.maximum(first - I_STEPS, 0),
            tl.maximum(end - I_STEPS, 0), end > I_STEPS, x, weights, b, h, flags, wanted, order, blocks, T, stride_x,
            widths, COLUMNS, I, NUM_BLOCKS, LISTED, BLOCK_T, BLOCK_O, BLOCK_I, BLOCK_R, GROUP, STAGES,
        )  # fmt: skip
        inside = tl.arange(0, BLOCK_T)[:, None] * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
        tl.store(partial + program * (BLOCK_T * BLOCK_O) + inside, acc)
        arrive(sums + program // splits, 1)

    for program in range(pid, tl.minimum(rest * splits, programs), running):
        split = program % splits
        tile, columns = tile_at(whole + program // splits, token_tiles, COLUMNS, GROUP)
        _w, _part, _linear, block, column, width = columns_of(columns, weights, b, widths, BLOCK_O)
        wait_until(sums + program // splits, splits)
        for part in range(split * ROWS, BLOCK_T, splits * ROWS):
            row = part + tl.arange(0, ROWS)
            t = tile * BLOCK_T + row
            token = tl.load(order + t, mask=t < T, other=0)
            of_first = partial + (program - split) * (BLOCK_T * BLOCK_O)
            acc = _added(of_first, row, splits, BLOCK_T, BLOCK_O, ROWS, MOST_SPLITS)
            store_outputs(acc, y, token, t < T, block, column, width, stride_y, BLOCK_O)


@triton.jit
def _added(
    partial, row, splits, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MOST_SPLITS: tl.constexpr
):
    """Rows `row` [ROWS] of the sums [BLOCK_T, WIDTH] of `splits` programs, added in their order, all asked for at once."""
    at = partial + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for other in tl.static_range(MOST_SPLITS):
        acc += tl.load(at + other * (BLOCK_T * WIDTH), mask=other < splits, other=0.0, cache_modifier=".cg")
    return acc


@triton.jit(do_not_specialize=["T", "programs"], do_not_specialize_on_alignment=ROUTING)
def _mixture_kernel(
    x, a, w0, w1, w2, b0, b1, b2, h, partial, flags, y, order, gates, counts, blocks, T, stride_x, stride_y, programs,
    widths: tl.constexpr, COLUMNS: tl.constexpr, I: tl.constexpr, R: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, LISTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, MOST_SPLITS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Grid (programs), or fewer: each then does the work of several. ROWS: that a program adds at once of those that share a chunk."""
    LINEARS: tl.constexpr = len(widths)
    UNITS: tl.constexpr = BLOCK_N // BLOCK_R
    SAME: tl.constexpr = BLOCK_R if RANK % BLOCK_R == 0 else RANK & -RANK
    I_STEPS: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    if LINEARS == 1:
        weights, b = (w0,), (b0,)
    elif LINEARS == 2:
        weights, b = (w0, w1), (b0, b1)
    else:
        weights, b = (w0, w1, w2), (b0, b1, b2)
    pid, running = tl.program_id(0), tl.num_programs(0)
    token_tiles = (T + BLOCK_T - 1) // BLOCK_T
    places, chunks = token_tiles * COLUMNS, _all_chunks(counts, token_tiles, LINEARS, UNITS, LANES)
    rest, sharers = _sharers(places, programs, SHARED, MOST_SPLITS)
    rows, sums = token_tiles * BLOCK_T, flags + LINE + programs
    n = tl.arange(0, BLOCK_N)

    for program in range(pid, programs, running):
        first, count, members, index, splits, start = _share(
            program, programs, chunks, rest, sharers, EACH, MOST_SPLITS
        )
        for piece in range(index, count * splits, members):
            chunk, split = first + piece // splits, piece % splits
            tile, unit_0, units, listed, unit, linear, rank = _chunk(
                chunk, counts, blocks, token_tiles, LINEARS, NUM_BLOCKS, BLOCK_R, BLOCK_N, LANES
            )
            a_row = rows_of(a, linear, rank, I, R)
            t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
            token = tl.load(order + t, mask=t < T, other=0)
            x_row = x + token.to(tl.int64) * stride_x
            acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            for step in tl.range(split * I_STEPS // splits, (split + 1) * I_STEPS // splits, num_stages=STAGES):
                i = step * BLOCK_I + tl.arange(0, BLOCK_I)
                if I % BLOCK_I == 0:
                    x_tile, a_tile = tl.load(x_row[:, None] + i[None, :]), tl.load(a_row[:, None] + i[None, :])
                else:
                    x_tile = tl.load(x_row[:, None] + i[None, :], mask=(i < I)[None, :], other=0.0)
                    a_tile = tl.load(a_row[:, None] + i[None, :], mask=(i < I)[None, :], other=0.0)
                acc = dot(x_tile, a_tile.T, acc)
            if splits == 1:
                store_units(
                    acc, h, gates, listed, t, t < T, token, unit, linear, rank, unit_0, units, rows,
                    LINEARS, R, E, RANK, NUM_BLOCKS, BLOCK_T, BLOCK_R, BLOCK_N, SAME,
                )  # fmt: skip
                arrive(flags, BLOCK_T // ROWS)
            else:
                inside = tl.arange(0, BLOCK_T)[:, None] * BLOCK_N + n[None, :]
                tl.store(partial + (start + piece) * (BLOCK_T * BLOCK_N) + inside, acc)
                arrive(sums + chunk, 1)

    for program in range(pid, programs, running):
        first, count, members, index, splits, start = _share(
            program, programs, chunks, rest, sharers, EACH, MOST_SPLITS
        )
        if (splits > 1) & (index < count * splits):
            chunk, split = first + index // splits, index % splits
            tile, unit_0, units, listed, unit, linear, rank = _chunk(
                chunk, counts, blocks, token_tiles, LINEARS, NUM_BLOCKS, BLOCK_R, BLOCK_N, LANES
            )
            wait_until(sums + chunk, splits)
            added = 0
            for part in range(split * ROWS, BLOCK_T, splits * ROWS):
                row = part + tl.arange(0, ROWS)
                t = tile * BLOCK_T + row
                token = tl.load(order + t, mask=t < T, other=0)
                of_first = partial + (start + index - split) * (BLOCK_T * BLOCK_N)
                acc = _added(of_first, row, splits, BLOCK_T, BLOCK_N, ROWS, MOST_SPLITS)
                store_units(
                    acc, h, gates, listed, t, t < T, token, unit, linear, rank, unit_0, units, rows,
                    LINEARS, R, E, RANK, NUM_BLOCKS, ROWS, BLOCK_R, BLOCK_N, SAME,
                )  # fmt: skip
                added += 1
            arrive(flags, added)

    wanted = chunks * (BLOCK_T // ROWS)
    if TRANSPOSED:
        tiles_in_one_loop(
            x, weights, b, h, flags, wanted, y, order, counts, blocks, T, stride_x, stride_y,
            widths, COLUMNS, I, NUM_BLOCKS, LISTED, BLOCK_T, BLOCK_O, BLOCK_I, GROUP, STAGES, ALIGNED, True,
        )  # fmt: skip
    else:
        whole = places - tl.where(sharers > 1, rest, 0)
        for place in range(pid, whole, running):
            tile, _columns = tile_at(place, token_tiles, COLUMNS, GROUP)
            # For h once: all of it is computed at the same time, and to look takes a microsecond.
            acc = _sum_of_tile(
                place, 0, I, 0, tl.load(counts + tile), place == pid, x, weights, b, h, flags, wanted, order, blocks, T, stride_x,
                widths, COLUMNS, I, NUM_BLOCKS, LISTED, BLOCK_T, BLOCK_O, BLOCK_I, BLOCK_R, GROUP, STAGES,
            )  # fmt: skip
            store_tile(
                acc, y, place, order, T, stride_y, weights, b, token_tiles, widths, COLUMNS, BLOCK_T, BLOCK_O, GROUP
            )
        if SHARED:  # noqa: SIM102 - nested, so that the first is decided by the compiler
            if sharers > 1:
                _shared_tiles(
                    whole, rest, sharers, partial + programs * (BLOCK_T * BLOCK_N), flags + LINE, x, weights, b, h, flags, wanted,
                    y, order, counts, blocks, T, stride_x, stride_y, programs,
                    widths, COLUMNS, I, NUM_BLOCKS, LISTED, BLOCK_T, BLOCK_O, BLOCK_I, BLOCK_R, GROUP, MOST_SPLITS, ROWS, STAGES,
                )  # fmt: skip


# --- launcher -------------------------------------------------------------------------------------------------------------


def matmul_mixture(
    x, base_weights, a, b, tiles: Tiles, out, room: Room, *, block_o=None, block_n=None, block_i=None, group=4, num_stages=3,
    each=None, most_splits=MOST_SPLITS, programs=None, transposed=False, shared=False, known: dict | None = None,
):  # fmt: skip
    """out[order[t], column(m) + o] = sum_i base_weights[m][o, i] x[order[t], i] + sum_rank b[m][rank, o] h[m, t, rank], with

    h[m, t, rank] = gate[t, expert(rank)] * sum_i a[m][rank, i] x[order[t], i]. One launch.

    x [T, I], its last axis contiguous; base_weights: for each linear of the group, three at most, [O_m, I], the rows a multiple of
    16 bytes (`readable`); a: for each linear [R, I], contiguous; b: for each linear [R, O_m], readable too; all of one dtype: bf16, fp16
    or fp32. out [T, O_1 + ... + O_M], rows may lie apart, written whole. Summed in fp32, in the same order every time for the same number
    of programs; h is rounded to the dtype of x, and left in room.h where a tile needs it.

    room: `Room.make` of the same x, tiles and keywords; its flags filled with 0 before each call. known: what earlier calls with
    these matrices found out, kept by the caller; of what it knows nothing is checked again. The remaining keywords are block sizes, which
    default by dtype and ranks; each: chunks at most for a program that computes a tile less than others; most_splits: programs that
    share a chunk; programs: by default as many as the device has processors, and no more may be asked for. transposed: each b is [O_m, R],
    its rows a multiple of 16 bytes, and block_r of the routing block_i: features and ranks are then summed in one loop through all tiles.
    shared, not with transposed: tiles that would leave processors idle are shared by several.
    No host sync, no allocation: safe inside a CUDA graph.
    """
    refuse_gradients(x, *base_weights, *a, *b, tiles.gates, room.h)
    if shared and transposed:
        raise ValueError("tiles can be shared, or all steps be one loop (transposed), not both")
    outputs, features = default_blocks(x.dtype)
    block_o, block_i = block_o or outputs, block_i or features
    block_n, programs = block_n or ranks_of_a_chunk(x, len(base_weights), tiles), programs or processors(x)
    known, key = {} if known is None else known, ("mixture", tiles.block_r, block_o, block_i, transposed)
    if key not in known:
        base_weights, a, b = tuple(base_weights), tuple(a), tuple(b)
        _check(x, base_weights, a, b, tiles, out, room.h, block_i, transposed)
        b_tile = [block_o, block_i] if transposed else [tiles.block_r, block_o]
        w_tiles, b_tiles = described(base_weights, [block_o, block_i]), described(b, b_tile)
        known[key] = tuple(w.shape[0] for w in base_weights), a, w_tiles, b_tiles
    widths, a, w_tiles, b_tiles = known[key]
    _check_room(x, len(widths), tiles, room, block_o, block_n, programs, shared)
    block = {
        "BLOCK_T": tiles.block_t,
        "BLOCK_O": block_o,
        "BLOCK_I": block_i,
        "BLOCK_R": tiles.block_r,
        "BLOCK_N": block_n,
    }
    most_splits = max(1, min(most_splits, cdiv(x.shape[1], block_i) // FEWEST_STEPS))
    with torch.cuda.device_of(x):
        _mixture_kernel[(1 if INTERPRETED.value else programs,)](
            x, a, *w_tiles, *b_tiles, *room, out,
            tiles.order, tiles.gates, tiles.counts, tiles.blocks, tiles.tokens, x.stride(0), out.stride(0), programs,
            widths=widths, COLUMNS=sum(cdiv(width, block_o) for width in widths), I=x.shape[1], R=tiles.rank, E=tiles.num_experts,
            RANK=tiles.r, NUM_BLOCKS=tiles.num_blocks, LISTED=next_power_of_2(tiles.num_blocks), GROUP=group,
            # Chunks of a quarter of a tile's outputs, though of a quarter of its products, are taken to need nearly half of its time.
            EACH=max(1, block_o // (2 * block_n)) if each is None else each, MOST_SPLITS=most_splits,
            ROWS=max(1, tiles.block_t // MOST_SPLITS),
            LANES=128, STAGES=num_stages, TRANSPOSED=transposed, SHARED=shared,
            ALIGNED=transposed and aligned_rows(x.stride(0), x, room.h), **block, num_warps=8, num_stages=num_stages,
        )  # fmt: skip
    return out


def _check(x, base_weights, a, b, tiles, out, h, block_i, transposed):
    if transposed:
        check_transposed(x, base_weights, h, b, tiles, out, block_i)
    else:
        check_matmul(x, base_weights, h, b, tiles, out)
    if len(a) != len(base_weights):
        raise ValueError(f"{len(a)} tensors a for {len(base_weights)} base weights")
    check_shrink(x, a, tiles, h)


def _check_room(x, linears, tiles, room, block_o, block_n, programs, shared):
    if block_n < tiles.block_r or block_n & (block_n - 1):
        raise ValueError(
            f"block_n {block_n} must be a power of two, no smaller than the blocks of {tiles.block_r} ranks"
        )
    if x.is_cuda and programs > processors(x):
        raise ValueError(f"{programs} programs for {processors(x)} processors: all have to run at once")
    if room.h.shape != tiles.h_shape(linears) or not room.h.is_contiguous():
        raise ValueError(f"room.h is {list(room.h.shape)}, needs contiguous {list(tiles.h_shape(linears))}")
    need = _sums(tiles, block_o, block_n, programs, shared)
    if room.partial.dtype != torch.float32 or room.partial.numel() < need or not room.partial.is_contiguous():
        raise ValueError(
            f"room.partial is {room.partial.dtype} {list(room.partial.shape)}, needs contiguous fp32 [{need}] at least"
        )
    flags, need = room.flags, num_flags(linears, tiles, block_n, programs)
    if flags.dtype != torch.int32 or flags.dim() != 1 or len(flags) < need or not flags.is_contiguous():
        raise ValueError(f"room.flags are {flags.dtype} {list(flags.shape)}, need int32 [{need}] at least, contiguous")
