"""matmul: the base's matmul and the experts' expand in one kernel, for many tokens (prefill).

    y[order[t], column(m) + o] = sum_i W_m[o, i] x[order[t], i] + sum_rank b_m[rank, o] h[m, t, rank]

`batch` adds what the experts give in a pass of its own over y, and y is by far the largest of what it reads and writes. Here a tile
of y stays in registers: after the steps over the features come those over the ranks that its tokens need. The tokens are those of
`batch`'s layout, sorted by their experts, so that these are few; rows of x are gathered and rows of y scattered by it.

With b transposed, [O, R], the ranks are steps like those of the features, and all steps of all tiles of a program are one loop, so that
operands are fetched ahead from one tile to the next. Compiled, not timed: nothing takes it.

Each of as many programs as the device has processors computes tiles in turn. W, B and h come by tensor descriptors (TMA on a Hopper
GPU). On an H100 the matmul alone takes 1.05 times the vendor's (2048 tokens, 4096 to 12288 features: 272 us to 259; tokens not gathered,
269 us), and with fewer tokens more: 1.2 times at 256, where it does not fill the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from adafuse.ops.batch import check_expand, check_tiles, expand_tiles_ref
from adafuse.ops.checks import aligned_rows
from adafuse.ops.flags import waited_until
from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, dot, next_power_of_2, processors
from adafuse.ops.layout import ROUTING, Tiles

MOST_LINEARS = 3  # of a group: a kernel takes descriptors one by one, not as a tuple


def matmul_tiles_ref(x, base_weights, h, b, tiles, out):
    """`matmul_tiles` in PyTorch, for an h whose unneeded parts are 0."""
    widths = [len(w) for w in base_weights]
    for part, w in zip(out.split(widths, dim=1), base_weights, strict=True):
        part.copy_(x.float() @ w.float().T)
    expand_tiles_ref(h, b, tiles, out.split(widths, dim=1))


# --- kernel ---------------------------------------------------------------------------------------------------------------


@triton.jit
def columns_of(place, weights, b, widths: tl.constexpr, BLOCK_O: tl.constexpr):
    """What block of columns `place` of all the linears' belongs to: W, B, linear, block, first column of y, width."""
    w, part, linear, block, column, width = weights[0], b[0], 0, place, 0, widths[0]
    before, start = 0, 0
    for m in tl.static_range(1, len(widths)):
        before += (widths[m - 1] + BLOCK_O - 1) // BLOCK_O
        start += widths[m - 1]
        if place >= before:
            w, part, linear, block, column, width = weights[m], b[m], m, place - before, start, widths[m]
    return w, part, linear, block, column, width


@triton.jit
def tile_at(place, token_tiles, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Tile of tokens and block of columns: token tile by token tile within GROUP blocks of outputs, so that programs which run at once
    share rows of W and x."""
    first = place // (GROUP * token_tiles) * GROUP
    group = tl.minimum(COLUMNS - first, GROUP)
    inside = place % (GROUP * token_tiles)
    return inside // group, first + inside % group


@triton.jit
def base_products(
    x_row, w, block, first, end, I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_T, BLOCK_O]: features from `first` to before `end` of the rows of x at `x_row`, times block `block` of w's rows."""
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in tl.range(first, end, BLOCK_I, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK_I)
        if I % BLOCK_I == 0:
            x_tile = tl.load(x_row[:, None] + i[None, :])
        else:
            x_tile = tl.load(x_row[:, None] + i[None, :], mask=(i < I)[None, :], other=0.0)
        acc = dot(x_tile, w.load([block * BLOCK_O, start]).T, acc)
    return acc


@triton.jit
def store_outputs(acc, y, token, in_t, block, column, width, stride_y, BLOCK_O: tl.constexpr):
    """acc [tokens, BLOCK_O] as block `block` of the `width` columns of y from `column` on, in the rows of those tokens that are `in_t`."""
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    y_at = y + token.to(tl.int64)[:, None] * stride_y + column + o[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=in_t[:, None] & (o < width)[None, :])


@triton.jit
def store_tile(
    acc, y, place, order, T, stride_y, weights, b, token_tiles, widths: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, columns = tile_at(place, token_tiles, COLUMNS, GROUP)
    _w, _part, _linear, block, column, width = columns_of(columns, weights, b, widths, BLOCK_O)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(order + t, mask=t < T, other=0)
    store_outputs(acc, y, token, t < T, block, column, width, stride_y, BLOCK_O)


@triton.jit
def tiles_in_one_loop(
    x, weights, b, h, flags, wanted, y, order, counts, blocks, T, stride_x, stride_y,
    widths: tl.constexpr, COLUMNS: tl.constexpr, I: tl.constexpr, NUM_BLOCKS: tl.constexpr, LISTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A program's tiles with all their steps in one loop, BLOCK_I features or ranks each, so that a tile's operands are on their way while
    the one before is stored, and h while its last features are summed. b is [O, R], read as W is: it is [x, h] times [W, b]. WAIT: for h,
    until `flags` is `wanted`."""
    I_STEPS: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    pid, running = tl.program_id(0), tl.num_programs(0)
    token_tiles = (T + BLOCK_T - 1) // BLOCK_T
    total = 0
    for place in range(pid, token_tiles * COLUMNS, running):
        tile, columns = tile_at(place, token_tiles, COLUMNS, GROUP)
        total += I_STEPS + tl.load(counts + tile)
    inside, i, slot = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_I), tl.arange(0, LISTED)
    place, step, steps, linear, block, h_tile = pid - running, 0, 1, 0, 0, 0
    token, listed = tl.zeros([BLOCK_T], tl.int32), tl.zeros([LISTED], tl.int32)
    done = pid
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for _ in tl.range(0, total, num_stages=STAGES):
        # Counted here, not at the end: else Triton waits for what it has just asked for.
        step += 1
        if step == steps:  # the next tile
            place += running
            tile, columns = tile_at(place, token_tiles, COLUMNS, GROUP)
            _w, _part, linear, block, _column, _width = columns_of(columns, weights, b, widths, BLOCK_O)
            t = tile * BLOCK_T + inside
            token = tl.load(order + t, mask=t < T, other=0)
            listed = tl.load(blocks + tile * NUM_BLOCKS + slot, mask=slot < NUM_BLOCKS, other=0)
            h_tile, step, steps = (linear * token_tiles + tile) * BLOCK_T, 0, I_STEPS + tl.load(counts + tile)
        w, row, start = weights[0], x + token.to(tl.int64) * stride_x, step * BLOCK_I
        for m in tl.static_range(1, len(widths)):
            if linear == m:
                w = weights[m]
        if step >= I_STEPS:
            w, start = b[0], tl.sum(tl.where(slot == step - I_STEPS, listed, 0), 0) * BLOCK_I
            for m in tl.static_range(1, len(widths)):
                if linear == m:
                    w = b[m]
            if WAIT:  # noqa: SIM102 - nested, so that the first is decided by the compiler
                if (step == I_STEPS) & (place == pid):
                    h_tile += waited_until(flags, wanted)
            row = h + (h_tile + inside).to(tl.int64) * (NUM_BLOCKS * BLOCK_I)
        at = row[:, None] + (start + i)[None, :]
        if ALIGNED:
            at = tl.max_contiguous(tl.multiple_of(at, (1, 16)), (1, 16))
        inside_x = (step >= I_STEPS) | (start + i < I)
        left = tl.load(at) if I % BLOCK_I == 0 else tl.load(at, mask=inside_x[None, :], other=0.0)
        acc = dot(left, w.load([block * BLOCK_O, start]).T, acc)
        if step == steps - 1:
            store_tile(
                acc, y, done, order, T, stride_y, weights, b, token_tiles, widths, COLUMNS, BLOCK_T, BLOCK_O, GROUP
            )
            acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
            done += running


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=ROUTING)
def _matmul_kernel(
    x, w0, w1, w2, h, b0, b1, b2, y, order, counts, blocks, T, stride_x, stride_y,
    widths: tl.constexpr, COLUMNS: tl.constexpr, I: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr,
    STAGES: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A tile: BLOCK_T tokens by BLOCK_O outputs of a linear; COLUMNS blocks of outputs in all, in the order of `tile_at`."""
    if len(widths) == 1:
        weights, b = (w0,), (b0,)
    elif len(widths) == 2:
        weights, b = (w0, w1), (b0, b1)
    else:
        weights, b = (w0, w1, w2), (b0, b1, b2)
    if TRANSPOSED:
        tiles_in_one_loop(
            x, weights, b, h, None, 0, y, order, counts, blocks, T, stride_x, stride_y,
            widths, COLUMNS, I, NUM_BLOCKS, LISTED, BLOCK_T, BLOCK_O, BLOCK_I, GROUP, STAGES, ALIGNED, False,
        )  # fmt: skip
    else:
        token_tiles = (T + BLOCK_T - 1) // BLOCK_T
        for place in range(tl.program_id(0), token_tiles * COLUMNS, tl.num_programs(0)):
            tile, columns = tile_at(place, token_tiles, COLUMNS, GROUP)
            w, part, linear, block, column, width = columns_of(columns, weights, b, widths, BLOCK_O)
            t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
            token = tl.load(order + t, mask=t < T, other=0)
            # Asked for here, since the sum over the ranks waits for them.
            needed, n = tl.load(counts + tile), tl.arange(0, LISTED)
            listed = tl.load(blocks + tile * NUM_BLOCKS + n, mask=n < NUM_BLOCKS, other=0)
            x_row = x + token.to(tl.int64) * stride_x
            acc = base_products(x_row, w, block, 0, I, I, BLOCK_T, BLOCK_O, BLOCK_I, STAGES)
            for step in tl.range(0, needed, num_stages=STAGES):
                rank = tl.sum(tl.where(n == step, listed, 0), 0) * BLOCK_R
                h_tile = h.load([(linear * token_tiles + tile) * BLOCK_T, rank])
                acc = dot(h_tile, part.load([rank, block * BLOCK_O]), acc)
            store_outputs(acc, y, token, t < T, block, column, width, stride_y, BLOCK_O)


# --- launcher -------------------------------------------------------------------------------------------------------------


def matmul_tiles(
    x, base_weights, h, b, tiles: Tiles, out, *, block_o=None, group=4, num_stages=3, transposed=False, known: dict | None = None
):  # fmt: skip
    """out[order[t], column(m) + o] = sum_i base_weights[m][o, i] x[order[t], i] + sum_rank b[m][rank, o] h[m, t, rank].

    x [T, I], its last axis contiguous; base_weights: for each linear of the group, three at most, [O_m, I], the rows a multiple of
    16 bytes (`readable`); h from `shrink_tiles` of the same x and tiles; b: for each linear [R, O_m], readable too; all of one dtype:
    bf16, fp16 or fp32. out [T, O_1 + ... + O_M], rows may lie apart, written whole. Summed in fp32 and rounded once. known: what earlier
    calls with these base_weights and b found out, kept by the caller; nothing is checked again. The remaining keywords are block
    sizes, which default by dtype. transposed: each b is [O_m, R], readable, and the routing's block_r 64 (fp32: 32), which is a step over
    features; all steps of all tiles of a program are one loop then. No host sync, no allocation: safe inside a CUDA graph.
    """
    refuse_gradients(x, h, *base_weights, *b)
    outputs, block_i = default_blocks(x.dtype)
    block_o = block_o or outputs
    known, key = {} if known is None else known, ("matmul", tiles.block_r, block_o, transposed)
    if key not in known:
        base_weights, b = tuple(base_weights), tuple(b)
        if transposed:
            check_transposed(x, base_weights, h, b, tiles, out, block_i)
        else:
            check_matmul(x, base_weights, h, b, tiles, out)
        b_tile = [block_o, block_i] if transposed else [tiles.block_r, block_o]
        w_tiles, b_tiles = described(base_weights, [block_o, block_i]), described(b, b_tile)
        known[key] = tuple(w.shape[0] for w in base_weights), w_tiles, b_tiles
    widths, w_tiles, b_tiles = known[key]
    columns = sum(cdiv(width, block_o) for width in widths)
    block = {"BLOCK_T": tiles.block_t, "BLOCK_O": block_o, "BLOCK_I": block_i, "BLOCK_R": tiles.block_r}
    # One loop chooses between rows of x and of h, by their addresses.
    h_tiles = h if transposed else TensorDescriptor.from_tensor(h.view(-1, h.shape[-1]), [tiles.block_t, tiles.block_r])
    with torch.cuda.device_of(x):
        _matmul_kernel[(min(processors(x), tiles.num_tiles * columns),)](
            x, *w_tiles, h_tiles, *b_tiles, out,
            tiles.order, tiles.counts, tiles.blocks, tiles.tokens, x.stride(0), out.stride(0),
            widths=widths, COLUMNS=columns, I=x.shape[1], NUM_BLOCKS=tiles.num_blocks, LISTED=next_power_of_2(tiles.num_blocks),
            GROUP=group, STAGES=num_stages, TRANSPOSED=transposed, ALIGNED=transposed and aligned_rows(x.stride(0), x, h), **block,
            num_warps=8, num_stages=num_stages,
        )  # fmt: skip
    return out


def default_blocks(dtype) -> tuple[int, int]:
    """Outputs of a tile, and features of a step. fp32 has no tensor cores: small tiles."""
    return (64, 32) if dtype == torch.float32 else (256, 64)


def described(matrices, block) -> tuple:
    """Descriptors of tiles of matrices, and None for each linear that is missing to MOST_LINEARS."""
    found = tuple(TensorDescriptor.from_tensor(matrix, block) for matrix in matrices)
    return found + (None,) * (MOST_LINEARS - len(found))


def can_be_described(features, widths, dtype) -> bool:
    """Whether tensor descriptors can read the matrices of linears of these sizes, if each begins on 16 bytes: so does each row then."""
    return len(widths) <= MOST_LINEARS and not any(dtype.itemsize * row % 16 for row in (features, *widths))


def readable(weight) -> bool:
    """Whether tensor descriptors can read this matrix: contiguous, every row on a 16-byte boundary."""
    return weight.is_contiguous() and weight.data_ptr() % 16 == 0 and weight.shape[1] * weight.element_size() % 16 == 0


def check_base(x, base_weights, h, tiles, out):
    """ValueError for what `matmul_tiles` does not take, but for b."""
    if not 1 <= len(base_weights) <= MOST_LINEARS:
        raise ValueError(f"{len(base_weights)} base weights were given; one launch takes 1 to {MOST_LINEARS}")
    if x.dim() != 2 or x.shape[0] != tiles.tokens or x.stride(1) != 1:
        raise ValueError(
            f"x is {list(x.shape)} with strides {x.stride()}, needs [{tiles.tokens}, I] (the tokens of the routing) with "
            "contiguous rows"
        )
    for w in base_weights:
        if w.dim() != 2 or w.shape[1] != x.shape[1] or w.dtype != x.dtype or not readable(w):
            raise ValueError(
                f"a base weight is {w.dtype} {list(w.shape)} with strides {w.stride()}; needs contiguous {x.dtype} "
                f"[O, {x.shape[1]}], rows a multiple of 16 bytes"
            )
    width = sum(w.shape[0] for w in base_weights)
    if h.dtype != x.dtype or out.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, h {h.dtype} and out {out.dtype}: they must agree")
    if out.shape != (tiles.tokens, width) or out.stride(1) != 1:
        raise ValueError(
            f"out is {list(out.shape)} with strides {out.stride()}, needs [{tiles.tokens}, {width}] with contiguous rows"
        )


def check_transposed(x, base_weights, h, b, tiles, out, block_i):
    """The same with b transposed, whose ranks are taken as many at once as features."""
    check_base(x, base_weights, h, tiles, out)
    check_tiles(tiles)
    refuse_gradients(out)
    if tiles.block_r != block_i:
        raise ValueError(
            f"with b transposed, ranks are taken {block_i} at once: lay the routing out with block_r={block_i}"
        )
    if h.shape != tiles.h_shape(len(base_weights)) or not h.is_contiguous():
        raise ValueError(f"h is {list(h.shape)}, needs contiguous {list(tiles.h_shape(len(base_weights)))}")
    if len(b) != len(base_weights):
        raise ValueError(f"{len(b)} tensors b for {len(base_weights)} base weights")
    for part, w in zip(b, base_weights, strict=True):
        if part.shape != (len(w), tiles.rank) or part.dtype != x.dtype or not readable(part):
            raise ValueError(
                f"a b is {part.dtype} {list(part.shape)} with strides {part.stride()}; needs, transposed, contiguous {x.dtype} "
                f"[{len(w)}, {tiles.rank}], rows a multiple of 16 bytes"
            )


def check_matmul(x, base_weights, h, b, tiles, out):
    """ValueError for what `matmul_tiles` does not take."""
    check_base(x, base_weights, h, tiles, out)
    for part in b:
        if not readable(part):
            raise ValueError(
                f"a b is {part.dtype} {list(part.shape)} with strides {part.stride()}; its rows must be contiguous and a multiple "
                "of 16 bytes"
            )
    check_expand(h, b, tiles, out.split([w.shape[0] for w in base_weights], dim=1))
