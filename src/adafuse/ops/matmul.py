"""matmul: the base's matmul and the experts' expand in one kernel, for many tokens (prefill).

    y[order[t], column(m) + o] = sum_i W_m[o, i] x[order[t], i] + sum_rank b_m[rank, o] h[m, t, rank]

`batch` adds what the experts give in a pass of its own over y, and y is by far the largest of what it reads and writes. Here a tile
of y stays in registers: after the steps over the features come those over the ranks that its tokens need. The tokens are those of
`batch`'s layout, sorted by their experts, so that these are few; rows of x are gathered and rows of y scattered by it.

Each of as many programs as the device has processors computes tiles in turn. W, B and h come by tensor descriptors (TMA on a Hopper
GPU). On an H100 the matmul alone takes 1.05 times the vendor's (2048 tokens, 4096 to 12288 features: 272 us to 259; tokens not gathered,
269 us), and with fewer tokens more: 1.2 times at 256, where it does not fill the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from adafuse.ops.batch import check_expand, expand_tiles_ref
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


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=ROUTING)
def _matmul_kernel(
    x, w0, w1, w2, h, b0, b1, b2, y, order, counts, blocks, T, stride_x, stride_y,
    widths: tl.constexpr, COLUMNS: tl.constexpr, I: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile: BLOCK_T tokens by BLOCK_O outputs of a linear; COLUMNS blocks of outputs in all.

    Tiles run token tile by token tile within GROUP blocks of outputs, so that programs which run at once share rows of W and x.
    """
    if len(widths) == 1:
        weights, b = (w0,), (b0,)
    elif len(widths) == 2:
        weights, b = (w0, w1), (b0, b1)
    else:
        weights, b = (w0, w1, w2), (b0, b1, b2)
    token_tiles = (T + BLOCK_T - 1) // BLOCK_T
    for place in range(tl.program_id(0), token_tiles * COLUMNS, tl.num_programs(0)):
        first = place // (GROUP * token_tiles) * GROUP
        group = tl.minimum(COLUMNS - first, GROUP)
        inside = place % (GROUP * token_tiles)
        tile = inside // group
        w, part, linear, block, column, width = columns_of(first + inside % group, weights, b, widths, BLOCK_O)
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        token = tl.load(order + t, mask=t < T, other=0)
        # Asked for here, since the sum over the ranks waits for them.
        needed, n = tl.load(counts + tile), tl.arange(0, LISTED)
        listed = tl.load(blocks + tile * NUM_BLOCKS + n, mask=n < NUM_BLOCKS, other=0)
        x_row = x + token.to(tl.int64) * stride_x
        acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
        for start in tl.range(0, I, BLOCK_I, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_I)
            if I % BLOCK_I == 0:
                x_tile = tl.load(x_row[:, None] + i[None, :])
            else:
                x_tile = tl.load(x_row[:, None] + i[None, :], mask=(i < I)[None, :], other=0.0)
            acc = dot(x_tile, w.load([block * BLOCK_O, start]).T, acc)
        for step in tl.range(0, needed, num_stages=STAGES):
            rank = tl.sum(tl.where(n == step, listed, 0), 0) * BLOCK_R
            h_tile = h.load([(linear * token_tiles + tile) * BLOCK_T, rank])
            acc = dot(h_tile, part.load([rank, block * BLOCK_O]), acc)
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        y_at = y + token.to(tl.int64)[:, None] * stride_y + column + o[None, :]
        tl.store(y_at, acc.to(y.dtype.element_ty), mask=(t < T)[:, None] & (o < width)[None, :])


# --- launcher -------------------------------------------------------------------------------------------------------------


def matmul_tiles(
    x, base_weights, h, b, tiles: Tiles, out, *, block_o=None, group=4, num_stages=3, known: dict | None = None
):
    """out[order[t], column(m) + o] = sum_i base_weights[m][o, i] x[order[t], i] + sum_rank b[m][rank, o] h[m, t, rank].

    x [T, I], its last axis contiguous; base_weights: for each linear of the group, three at most, [O_m, I], the rows a multiple of
    16 bytes (`readable`); h from `shrink_tiles` of the same x and tiles; b: for each linear [R, O_m], readable too; all of one dtype:
    bf16, fp16 or fp32. out [T, O_1 + ... + O_M], rows may lie apart, written whole. Summed in fp32 and rounded once. known: what earlier
    calls with these base_weights and b found out, kept by the caller; nothing is checked again. The remaining keywords are block
    sizes, which default by dtype. No host sync, no allocation: safe inside a CUDA graph.
    """
    refuse_gradients(x, h, *base_weights, *b)
    exact = x.dtype == torch.float32  # no tensor cores: small tiles
    block_o, block_i = block_o or (64 if exact else 256), 32 if exact else 64
    known, key = {} if known is None else known, ("matmul", tiles.block_r, block_o)
    if key not in known:
        base_weights, b = tuple(base_weights), tuple(b)
        _check(x, base_weights, h, b, tiles, out)
        w_tiles, b_tiles = described(base_weights, [block_o, block_i]), described(b, [tiles.block_r, block_o])
        known[key] = tuple(w.shape[0] for w in base_weights), w_tiles, b_tiles
    widths, w_tiles, b_tiles = known[key]
    columns = sum(cdiv(width, block_o) for width in widths)
    block = {"BLOCK_T": tiles.block_t, "BLOCK_O": block_o, "BLOCK_I": block_i, "BLOCK_R": tiles.block_r}
    h_tiles = TensorDescriptor.from_tensor(h.view(-1, h.shape[-1]), [tiles.block_t, tiles.block_r])
    with torch.cuda.device_of(x):
        _matmul_kernel[(min(processors(x), tiles.num_tiles * columns),)](
            x, *w_tiles, h_tiles, *b_tiles, out,
            tiles.order, tiles.counts, tiles.blocks, tiles.tokens, x.stride(0), out.stride(0),
            widths=widths, COLUMNS=columns, I=x.shape[1], NUM_BLOCKS=tiles.num_blocks, LISTED=next_power_of_2(tiles.num_blocks),
            GROUP=group, STAGES=num_stages, **block, num_warps=8, num_stages=num_stages,
        )  # fmt: skip
    return out


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


def _check(x, base_weights, h, b, tiles, out):
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
    for part in b:
        if not readable(part):
            raise ValueError(
                f"a b is {part.dtype} {list(part.shape)} with strides {part.stride()}; its rows must be contiguous and a multiple "
                "of 16 bytes"
            )
    widths = [w.shape[0] for w in base_weights]
    width = sum(widths)
    if h.dtype != x.dtype or out.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, h {h.dtype} and out {out.dtype}: they must agree")
    if out.shape != (tiles.tokens, width) or out.stride(1) != 1:
        raise ValueError(
            f"out is {list(out.shape)} with strides {out.stride()}, needs [{tiles.tokens}, {width}] with contiguous rows"
        )
    check_expand(h, b, tiles, out.split(widths, dim=1))
