"""Layer-wise routing of one token in one launch for each group of linears, made of the parts of `adafuse.ops.decode`.

The first programs compute the h of all experts, since the choice is not known before, and the router's logits; the others stream the
rows of W, then choose, each for itself, and add B h of the chosen experts.
"""

import triton
import triton.language as tl

from adafuse.ops.checks import aligned_rows, padded
from adafuse.ops.decode import Tile, tile_of
from adafuse.ops.launch import cdiv, launch_options, next_power_of_2, processors
from adafuse.ops.ranks import held_rows, look, once_written, pick_part, products_of, store_copies


@triton.jit
def _choose(h, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, THREADS: tl.constexpr):
    """Experts and weights of the K best logits, as tuples; they are behind the h of all experts, and EMPTY until written."""
    e = tl.arange(0, THREADS)  # as many as threads: see `ops.decode`
    z = once_written(look(h + E * R + e, e < E), h + E * R + e, e < E)
    z = tl.where(e < E, z, float("-inf"))
    p = tl.exp(z - tl.max(z, 0))
    p = p / tl.sum(p, 0)
    experts, weights, total = (), (), 0.0
    for _ in tl.static_range(K):
        best = tl.max(p, 0)
        expert = tl.min(tl.where(p == best, e, E - 1), 0)
        p = tl.where(e == expert, -1.0, p)
        experts, weights, total = experts + (expert,), weights + (best,), total + best  # noqa: RUF005 - Triton's tuples
    return experts, weights, total if K > 1 else 1.0


@triton.jit
def _of_slot(values, j, R: tl.constexpr):
    """values[j // R] for each j."""
    found = tl.zeros_like(j).to(values[0].dtype) + values[0]
    for slot in tl.static_range(1, len(values)):
        found = tl.where(j // R == slot, values[slot], found)
    return found


@triton.jit
def _experts(
    h, b, column, width, scale, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_O: tl.constexpr,
    THREADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """What the chosen experts add to the outputs at `column`: [BLOCK_O], once logits and h are there."""
    experts, weights, total = _choose(h, E, K, R, THREADS)
    j = tl.arange(0, BLOCK_J)
    rows = _of_slot(experts, j, R) * R + j % R
    pointers = b + rows.to(tl.int64)[:, None] * width + column[None, :]
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 2 * BLOCK_O)), (1, BLOCK_O))
    tile = tl.load(pointers, mask=(j < K * R)[:, None], other=0.0)
    place = tl.arange(0, THREADS if THREADS > BLOCK_J else BLOCK_J)
    h_at, mine = h + _of_slot(experts, place, R) * R + place % R, place < K * R
    hs = tl.where(mine, once_written(look(h_at, mine), h_at, mine), 0.0)
    hs = tl.sum(hs.reshape(place.shape[0] // BLOCK_J, BLOCK_J), 0) * _of_slot(weights, j, R) * (scale / total)
    return tl.sum(tile.to(tl.float32) * hs[:, None], 0)


@triton.jit
def _base(
    w,
    row,
    x,
    zero,
    I: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PATIENT: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Products of rows of a matrix and x, not yet summed. WAIT: for x, when the rows have been asked for."""
    held = held_rows(w, row, zero, I, CHUNK, ALIGNED, PATIENT)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    return products_of(held, x, I, CHUNK)


@triton.jit(do_not_specialize=["zero", "seconds"])
def _layerwise_kernel(
    x, base_weights, inner_rows, banks_b, h, y, scale, seconds, zero, widths: tl.constexpr, inner: tl.constexpr, I: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, SHRINKS: tl.constexpr, COPIES: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr, CHUNK: tl.constexpr, THREADS: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `ops.decode._decode_kernel`, for one token: SHRINKS programs for h and logits, BLOCK_O of them each; then tiles of W.

    h [COPIES, M, E * R + E]: h of all experts, then logits, of each linear.
    """
    ROWS: tl.constexpr = E * R + E
    pid = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if pid < SHRINKS:
        w, linear, block, _, width = tile_of(pid, inner_rows, inner, BLOCK_O)
        n = block * BLOCK_O + tl.arange(0, BLOCK_O)
        total = tl.sum(_base(w, tl.minimum(n, width - 1), x, zero, I, CHUNK, ALIGNED, False, PDL), 1)
        store_copies(h + linear * ROWS + n, total, n < width, len(base_weights) * ROWS, COPIES)
        return
    h += pid % COPIES * (len(base_weights) * ROWS)
    tile = pid - SHRINKS
    w, linear, block, column, width = tile_of(tile, base_weights, widths, BLOCK_O)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.minimum(o, width - 1)
    acc = tl.sum(_base(w, row, x, zero, I, CHUNK, ALIGNED, True, PDL), 1)
    if tile < seconds:
        w2, linear2, block2, column2, width2 = tile_of(
            tl.num_programs(0) - SHRINKS + tile, base_weights, widths, BLOCK_O
        )
        o2 = block2 * BLOCK_O + tl.arange(0, BLOCK_O)
        row2 = tl.minimum(o2, width2 - 1)
        acc2 = tl.sum(_base(w2, row2, x, zero, I, CHUNK, ALIGNED, False, False), 1)
        acc2 += _experts(
            h + linear2 * ROWS,
            pick_part(banks_b, linear2),
            row2,
            width2,
            scale,
            E,
            K,
            R,
            BLOCK_J,
            BLOCK_O,
            THREADS,
            ALIGNED,
        )
        tl.store(y + column2 + o2, acc2.to(y.dtype.element_ty), mask=o2 < width2)
    acc += _experts(
        h + linear * ROWS, pick_part(banks_b, linear), row, width, scale, E, K, R, BLOCK_J, BLOCK_O, THREADS, ALIGNED
    )
    tl.store(y + column + o, acc.to(y.dtype.element_ty), mask=o < width)


def one_launch(x, base_weights, inner_rows, banks_b, h, out, config, *, pdl):
    """out [1, O_1 + ... + O_M]: base and chosen experts of linears that share x [1, I].

    inner_rows: of each linear [E * R + E, I], A of all experts and the router. h int32 [C, M, E * R + E], EMPTY.
    """
    features, widths = x.shape[1], tuple(len(w) for w in base_weights)
    tile = Tile.default(features, x.element_size())
    inner = tuple(len(each) for each in inner_rows)
    shrinks, tiles = (sum(cdiv(n, tile.block_o) for n in sizes) for sizes in (inner, widths))
    places = max(0, processors(x) * tile.resident - shrinks)
    seconds = max(0, min(places, tiles - places))
    aligned = aligned_rows(features, *base_weights, *inner_rows, *banks_b) and all(
        n % max(8, tile.block_o) == 0 for n in widths
    )
    _layerwise_kernel[(shrinks + tiles - seconds,)](
        x, tuple(base_weights), tuple(inner_rows), tuple(banks_b), h, out, config.scale, seconds, 0, widths=widths, inner=inner,
        I=features, E=config.num_experts, K=config.top_k, R=config.r, SHRINKS=shrinks, COPIES=len(h), BLOCK_O=tile.block_o,
        BLOCK_J=next_power_of_2(config.top_k * config.r), CHUNK=padded(features) // tile.chunks, THREADS=32 * tile.num_warps,
        ALIGNED=aligned, num_warps=tile.num_warps, **launch_options(pdl, maxnreg=tile.maxnreg),
    )  # fmt: skip
