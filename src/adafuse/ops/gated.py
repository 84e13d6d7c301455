"""gated: what the experts add, from ranks that the vendor's matmul made, for some dozens to some hundreds of tokens.

    h = x @ [A_1; ...; A_M].T                                                  all experts' ranks, for every token
    out[t, column(m) + o] = y[t, column(m) + o] + sum_rank mask[t, rank] h[t, m R + rank] b_m[rank, o]

Between dozens and hundreds of tokens a shrink of our own costs mostly its launch, its wait and the sum of its splits, while the vendor's
matmul computes the ranks that a token does not need in less time. They are left out where h is read: see `batch` for the mask,
the sorted tokens and the rank blocks that a tile of tokens needs.

Where the rows of A lie behind those of the base weights in one matrix (`appended`), y and h are columns of one product: on an H100, for 256
tokens of Llama-2-7B with 8 experts, that matmul takes 3 (r 16) to 5 % (r 64) longer than the base's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adafuse.ops.appended import whole
from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, dot, next_power_of_2
from adafuse.ops.layout import ROUTING, Tiles
from adafuse.ops.matmul import MOST_LINEARS, columns_of, described, readable


def linear_gated(x, weight, a, b, tiles: Tiles, out=None, *, known: dict | None = None, **given):
    """x @ weight.T and what the experts add to it: out [T, O_1 + ... + O_M], allocated if not given.

    x [T, I], weight [O_1 + ... + O_M, I]; for each linear of the group a [R, I] and b [R, O_m]. One matmul of the vendor's if the a lie
    behind the weight (`appended`), else two. Other conditions, and keywords, as of `expand_gated`.
    """
    refuse_gradients(x, weight, *a)  # here: the matrix below is detached
    known = {} if known is None else known
    if "matrix" not in known:
        known["matrix"] = whole(weight, a)
    matrix, given = known["matrix"], {**given, "known": known}
    if matrix is None:
        return add_gated(torch.mm(x, weight.T, out=out), x, a, b, tiles, **given)
    outputs = weight.shape[0]
    y, h = torch.nn.functional.linear(x, matrix).split([outputs, matrix.shape[0] - outputs], dim=1)
    return expand_gated(y, h, b, tiles, out, **given)


def add_gated(y, x, a, b, tiles: Tiles, **given):
    """y [T, O_1 + ... + O_M], changed in place, plus what the experts add. Arguments as of `linear_gated`."""
    refuse_gradients(x, *a)
    matrix = whole(a[0], a[1:])
    h = torch.cat([x @ part.T for part in a], dim=1) if matrix is None else x @ matrix.T
    return expand_gated(y, h, b, tiles, y, **given)


def expand_gated_ref(y, h, b, tiles, out):
    """`expand_gated` in PyTorch."""
    mask = torch.empty(tiles.tokens, tiles.rank, device=h.device)
    mask[tiles.order.long()] = tiles.mask()[: tiles.tokens, : tiles.rank]
    parts = zip(h.split(tiles.rank, dim=1), b, strict=True)
    delta = torch.cat(
        [((h_part.float() * mask).to(h.dtype).float() @ b_part.float()) for h_part, b_part in parts], dim=1
    )
    return out.copy_(y.float() + delta)


# --- kernel ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _gated(h_tile, gate_row, first, R: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """h of ranks first .. first + BLOCK_R - 1, times each token's weight of their experts."""
    if RANK % BLOCK_R == 0:  # of one expert
        gate = tl.load(gate_row + tl.minimum(first // RANK, E))[:, None]
    elif BLOCK_R % RANK == 0:  # of several whole ones
        expert = first // RANK + tl.arange(0, BLOCK_R // RANK)
        few = tl.load(gate_row[:, None] + tl.minimum(expert, E)[None, :])
        shape: tl.constexpr = [h_tile.shape[0], BLOCK_R // RANK, RANK]
        gate = tl.broadcast_to(few[:, :, None], shape).reshape(h_tile.shape[0], BLOCK_R)
    else:
        expert = tl.minimum((first + tl.arange(0, BLOCK_R)) // RANK, E)
        gate = tl.load(gate_row[:, None] + expert[None, :])
    return (h_tile.to(tl.float32) * gate).to(h_tile.dtype)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=ROUTING)
def _expand_gated_kernel(
    y, h, b0, b1, b2, out, order, gates, counts, blocks, T, stride_y, stride_h, stride_out,
    widths: tl.constexpr, R: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, LISTED: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of columns, of all linears in turn; tiles of tokens). EARLY: y is asked for before the sum over the ranks.

    SORTED: tiles of sorted tokens, and the rank blocks that each needs; else of tokens as they come, and all blocks.
    """
    if len(widths) == 1:
        b = (b0,)
    elif len(widths) == 2:
        b = (b0, b1)
    else:
        b = (b0, b1, b2)
    _, part, linear, block, column, width = columns_of(tl.program_id(0), b, b, widths, BLOCK_O)
    tile = tl.program_id(1)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    if SORTED:
        token = tl.load(order + t, mask=t < T, other=0).to(tl.int64)
        # Listed here, since in the loop the addresses of h and B would wait for a load, which costs it a stage.
        count, n = tl.load(counts + tile), tl.arange(0, LISTED)
        listed = tl.load(blocks + tile * NUM_BLOCKS + n, mask=n < NUM_BLOCKS, other=0)
    else:
        token, count = tl.minimum(t, T - 1).to(tl.int64), NUM_BLOCKS
    h_row, gate_row = h + token * stride_h + linear * R, gates + token * (E + 1)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = (t < T)[:, None] & (o < width)[None, :]
    y_at = y + token[:, None] * stride_y + column + o[None, :]
    if EARLY:  # noqa: SIM108 - what is not taken must not be compiled
        acc = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for step in tl.range(0, count, num_stages=STAGES):
        block_of_step = tl.sum(tl.where(n == step, listed, 0), 0) if SORTED else step
        first = block_of_step * BLOCK_R
        rank = first + tl.arange(0, BLOCK_R)
        if R % BLOCK_R == 0:
            h_tile = tl.load(h_row[:, None] + rank[None, :])
        else:
            h_tile = tl.load(h_row[:, None] + rank[None, :], mask=(rank < R)[None, :], other=0.0)
        h_tile = _gated(h_tile, gate_row, first, R, E, RANK, BLOCK_R)
        acc = dot(h_tile, part.load([first, block * BLOCK_O]), acc)
    if not EARLY:
        acc += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token[:, None] * stride_out + column + o[None, :], acc.to(out.dtype.element_ty), mask=inside)


# --- launcher -------------------------------------------------------------------------------------------------------------


def expand_gated(
    y,
    h,
    b,
    tiles: Tiles,
    out=None,
    *,
    block_o=None,
    num_warps=None,
    num_stages=None,
    early=None,
    in_order=None,
    known: dict | None = None,
):
    """out[t, column(m) + o] = y[t, column(m) + o] + sum_rank mask[t, rank] h[t, m R + rank] b_m[rank, o].

    y [T, O_1 + ... + O_M] and h [T, M R], not masked, tokens in their own order, may be columns of one product (rows lie apart);
    b: for each linear of the group, three at most, [R, O_m], `readable`; out [T, O_1 + ... + O_M], rows may lie apart, may be y;
    allocated if not given. All of one dtype: bf16, fp16 or fp32. h times its weight is rounded to that dtype; summed in fp32 and
    rounded once. in_order: tokens as they come, all ranks; nothing of the layout is read but its gates. It and the block sizes, the
    keywords before it, default by shape. known: what earlier calls with the same matrices found out, kept by the caller; nothing is
    checked again. Safe inside a CUDA graph.
    """
    refuse_gradients(y, h, *b, tiles.gates)
    out = y.new_empty(y.shape) if out is None else out
    shape = _shape(y, tiles)
    block_o, num_warps = block_o or shape["block_o"], num_warps or shape["num_warps"]
    num_stages, early = num_stages or shape["num_stages"], shape["early"] if early is None else early
    in_order = takes_in_order(tiles.num_tiles, tiles.top_k, tiles.num_experts) if in_order is None else in_order
    known, key = {} if known is None else known, ("gated", tiles.block_r, block_o)
    if key not in known:
        b = tuple(b)
        _check(y, h, b, tiles, out)
        known[key] = tuple(part.shape[1] for part in b), described(b, [tiles.block_r, block_o])
    widths, b_tiles = known[key]
    with torch.cuda.device_of(y):
        _expand_gated_kernel[(sum(cdiv(width, block_o) for width in widths), tiles.num_tiles)](
            y, h, *b_tiles, out, tiles.order, tiles.gates, tiles.counts, tiles.blocks, tiles.tokens,
            y.stride(0), h.stride(0), out.stride(0),
            widths=widths, R=tiles.rank, E=tiles.num_experts, RANK=tiles.r, NUM_BLOCKS=tiles.num_blocks,
            BLOCK_T=tiles.block_t, BLOCK_R=tiles.block_r, BLOCK_O=block_o, LISTED=next_power_of_2(tiles.num_blocks),
            STAGES=num_stages, EARLY=early, SORTED=not in_order, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out


def takes_in_order(num_tiles, top_k, num_experts) -> bool:
    """Whether to leave tokens in their order, since a tile of sorted ones would need nearly all ranks too: 0.9 to 1.3 % less time for
    128 and 256 tokens of r 16 and 64, 2 of 8 experts (Llama-2-7B and Llama-3.1-8B, H100). With one expert a token, sorting leaves
    most out."""
    return num_tiles <= 4 and top_k > 1 and 4 * top_k >= num_experts


def _shape(y, tiles):
    if y.dtype == torch.float32:  # no tensor cores
        return {"block_o": 32, "num_warps": 4, "num_stages": 2, "early": False}
    return {"block_o": 128, "num_warps": 8 if tiles.block_t > 64 else 4, "num_stages": 3, "early": True}


def _check(y, h, b, tiles, out):
    if tiles.order.dim() != 1:
        raise ValueError(f"{list(tiles.order.shape[:-1])} routing decisions were given; choose one: tiles[d]")
    if not 1 <= len(b) <= MOST_LINEARS:
        raise ValueError(f"{len(b)} tensors b were given; one launch takes 1 to {MOST_LINEARS}")
    for part in b:
        if part.dim() != 2 or part.shape[0] != tiles.rank or part.dtype != y.dtype or not readable(part):
            raise ValueError(
                f"a b is {part.dtype} {list(part.shape)} with strides {part.stride()}; needs contiguous {y.dtype} [{tiles.rank}, O], "
                "rows a multiple of 16 bytes"
            )
    columns = sum(part.shape[1] for part in b)
    for name, tensor, width in (("y", y, columns), ("h", h, len(b) * tiles.rank), ("out", out, columns)):
        if tensor.shape != (tiles.tokens, width) or tensor.dtype != y.dtype or tensor.stride(1) != 1:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}; needs {y.dtype} "
                f"[{tiles.tokens}, {width}], its last dimension contiguous"
            )
