"""batch: what the experts add for many tokens that choose different experts, computed block-sparse.

    delta[t] = ((x[t] @ a.T) * mask[t]) @ b

Rank space: R = E*r + S ranks; rows e*r .. e*r + r - 1 of `a` [R, I] and `b` [R, O] are expert e's, the last S the shared
expert's. mask[t] holds each rank's weight for token t, 0 where the token did not choose its expert.

`layout` sorts the tokens once per step, cuts them into tiles of `block_t` and the ranks into blocks of `block_r`. A (tile, block) pair
that no token of the tile needs is neither computed, read nor written. Few large experts, many tiny ones (a block holds several) and
small batches (every block is needed) are all this one case.

`shrink_tiles` (x -> h) and `expand_tiles` (h -> y) run it for each adapted linear, or in one launch for a group of linears that read the
same x. Each has its plain PyTorch form beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, dot, launch_options, next_power_of_2, processors, wait_for_inputs
from adafuse.ops.layout import ROUTING

SHARED_MEMORY = 227 * 1024  # of a processor


# --- kernels --------------------------------------------------------------------------------------------------------------
# Model dimensions are constexpr: a handful of values, and loads of 16 bytes follow from them wherever they allow. Out-of-range
# ranks read the last row instead of being masked: a select costs less than a mask in the loop, and their gate is 0.


@triton.jit
def _load(rows, columns, LIMIT: tl.constexpr, WHOLE: tl.constexpr):
    """The elements rows[:, None] + columns[None, :], 0 from column LIMIT on. WHOLE: no column comes that far."""
    if WHOLE:
        return tl.load(rows[:, None] + columns[None, :])
    return tl.load(rows[:, None] + columns[None, :], mask=(columns < LIMIT)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=ROUTING)
def _shrink_kernel(
    x, a, h, order, gates, counts, blocks, T,
    I: tl.constexpr, R: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, X_ROW: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """h[split, module, t, rank] = gate * sum of x[order[t], i] * a[module][rank, i] over the split's share of i.

    A tile's work is a list of units, one per needed block and module; a program takes BLOCK_N // BLOCK_R of them, so that
    its tile of x serves BLOCK_N ranks whatever the size of the blocks and the number of modules. Grid (chunks, splits, tiles).
    """
    wait_for_inputs(PDL)
    MODULES: tl.constexpr = len(a)
    chunk, split, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    units = tl.load(counts + tile) * MODULES
    n = tl.arange(0, BLOCK_N)
    unit = chunk * (BLOCK_N // BLOCK_R) + n // BLOCK_R
    if chunk * (BLOCK_N // BLOCK_R) >= units:
        return
    block = tl.load(blocks + tile * NUM_BLOCKS + unit // MODULES, mask=unit < units, other=0)
    rank = block * BLOCK_R + n % BLOCK_R
    module = unit % MODULES

    row = tl.minimum(rank, R - 1).to(tl.int64) * I
    a_row = a[0] + row
    for m in tl.static_range(1, MODULES):
        a_row = tl.where(module == m, a[m] + row, a_row)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(order + t, mask=t < T, other=0)
    x_row = x + token.to(tl.int64) * X_ROW

    STEPS: tl.constexpr = (I + SPLITS * BLOCK_I - 1) // (SPLITS * BLOCK_I)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for step in range(STEPS):
        i = (split * STEPS + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        x_tile = _load(x_row, i, I, I % (STEPS * SPLITS * BLOCK_I) == 0)
        a_tile = _load(a_row, i, I, I % (STEPS * SPLITS * BLOCK_I) == 0)
        acc = dot(x_tile, a_tile.T, acc)

    in_t = (t < T)[:, None]
    if RANK % BLOCK_R == 0:  # a block is of one expert: one weight for all its ranks
        first = tl.arange(0, BLOCK_N // BLOCK_R) + chunk * (BLOCK_N // BLOCK_R)
        expert = tl.load(blocks + tile * NUM_BLOCKS + first // MODULES, mask=first < units, other=0) * BLOCK_R // RANK
        gate = tl.load(gates + token[:, None] * (E + 1) + tl.minimum(expert, E)[None, :], mask=in_t, other=0.0)
        gate = tl.broadcast_to(gate[:, :, None], [BLOCK_T, BLOCK_N // BLOCK_R, BLOCK_R]).reshape(BLOCK_T, BLOCK_N)
        if R % BLOCK_R != 0:
            gate = tl.where((rank < R)[None, :], gate, 0.0)
    else:
        expert = tl.minimum(rank // RANK, E)
        gate = tl.load(gates + token[:, None] * (E + 1) + expert[None, :], mask=in_t & (rank < R)[None, :], other=0.0)
    rows = tl.num_programs(2) * BLOCK_T
    column = module.to(tl.int64) * rows * (NUM_BLOCKS * BLOCK_R) + rank
    column = tl.max_contiguous(tl.multiple_of(column, BLOCK_R), BLOCK_R)
    h_row = h + (split * MODULES * rows + t).to(tl.int64) * (NUM_BLOCKS * BLOCK_R)
    tl.store(h_row[:, None] + column[None, :], (acc * gate).to(h.dtype.element_ty), mask=(unit < units)[None, :])


@triton.jit(do_not_specialize_on_alignment=ROUTING)
def _sum_kernel(
    partial, h, counts, blocks,
    NUM_BLOCKS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h = the sum of partial [splits, ...] over its splits, in their order, where h is needed. Grid (num_blocks, modules, tiles)."""
    wait_for_inputs(PDL)
    slot, module, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if slot >= tl.load(counts + tile):
        return
    rows = tl.num_programs(2) * BLOCK_T
    t = module * rows + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.load(blocks + tile * NUM_BLOCKS + slot) * BLOCK_R + tl.arange(0, BLOCK_R)
    place = t.to(tl.int64)[:, None] * (NUM_BLOCKS * BLOCK_R) + rank[None, :]
    split_size = tl.num_programs(1).to(tl.int64) * rows * (NUM_BLOCKS * BLOCK_R)
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial + split * split_size + place)
    tl.store(h + place, acc.to(h.dtype.element_ty))


@triton.jit
def _expand_strip(
    y, h, b, first, order, counts, blocks, tile, T,
    O: tl.constexpr, R: tl.constexpr, Y_ROW: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, STRIP: tl.constexpr, HELD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y[order[t], o] += sum of h[t, rank] * b[rank, o] over the tile's blocks, for the tokens of `tile` and STRIP * BLOCK_O columns.

    If the tile needs at most HELD ranks, its h is read once for all the columns, which are then fetched ahead.
    """
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    count = tl.load(counts + tile)
    token = tl.load(order + t, mask=t < T, other=0)
    y_row = y + token.to(tl.int64) * Y_ROW + first
    h_row = h + t.to(tl.int64) * (NUM_BLOCKS * BLOCK_R)
    o, in_t = tl.arange(0, BLOCK_O), (t < T)[:, None]
    end = tl.minimum(STRIP * BLOCK_O, O - first)
    if count * BLOCK_R <= HELD:
        n = tl.arange(0, HELD)
        needed = n // BLOCK_R < count
        rank = tl.load(blocks + tile * NUM_BLOCKS + n // BLOCK_R, mask=needed, other=0) * BLOCK_R + n % BLOCK_R
        column = tl.max_contiguous(tl.multiple_of(rank, BLOCK_R), BLOCK_R)
        held = tl.load(h_row[:, None] + column[None, :], mask=needed[None, :], other=0.0)
        b_row = b + tl.minimum(rank, R - 1).to(tl.int64) * O + first
        for start in tl.range(0, end, BLOCK_O, num_stages=STAGES):
            in_o = (start + o < end)[None, :]
            b_tile = tl.load(b_row[:, None] + start + o[None, :], mask=needed[:, None] & in_o, other=0.0)
            acc = tl.load(y_row[:, None] + start + o[None, :], mask=in_t & in_o, other=0.0).to(tl.float32)
            acc = dot(held, b_tile, acc)
            tl.store(y_row[:, None] + start + o[None, :], acc.to(y.dtype.element_ty), mask=in_t & in_o)
    else:
        for start in range(0, end, BLOCK_O):
            in_o = (start + o < end)[None, :]
            acc = tl.load(y_row[:, None] + start + o[None, :], mask=in_t & in_o, other=0.0).to(tl.float32)
            for slot in range(count):
                rank = tl.load(blocks + tile * NUM_BLOCKS + slot) * BLOCK_R + tl.arange(0, BLOCK_R)
                h_tile = tl.load(h_row[:, None] + rank[None, :])
                b_row = b + tl.minimum(rank, R - 1).to(tl.int64) * O + first
                acc = dot(h_tile, tl.load(b_row[:, None] + start + o[None, :], mask=in_o, other=0.0), acc)
            tl.store(y_row[:, None] + start + o[None, :], acc.to(y.dtype.element_ty), mask=in_t & in_o)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=ROUTING)
def _expand_kernel(
    y, h, b, order, counts, blocks, T,
    O: tl.constexpr, Y_ROW: tl.constexpr, R: tl.constexpr, NUM_BLOCKS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, STRIP: tl.constexpr, HELD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`_expand_strip` for every module of a group. Grid (strips of columns, of all modules in turn; tiles)."""
    wait_for_inputs(PDL)
    strip, tile = tl.program_id(0), tl.program_id(1)
    rows = tl.num_programs(1).to(tl.int64) * BLOCK_T
    for m in tl.static_range(len(y)):
        if (strip >= 0) & (strip < tl.cdiv(O[m], BLOCK_O * STRIP)):
            _expand_strip(
                y[m], h + m * rows * (NUM_BLOCKS * BLOCK_R), b[m], strip * (BLOCK_O * STRIP), order, counts, blocks, tile, T,
                O[m], R, Y_ROW[m], NUM_BLOCKS, BLOCK_T, BLOCK_R, BLOCK_O, STRIP, HELD, STAGES,
            )  # fmt: skip
        strip -= tl.cdiv(O[m], BLOCK_O * STRIP)


# --- launchers ------------------------------------------------------------------------------------------------------------


def shrink_tiles(
    x,
    a,
    tiles,
    out=None,
    *,
    pdl=False,
    block_n=None,
    block_i=None,
    splits=None,
    num_warps=None,
    num_stages=None,
    known: dict | None = None,
):
    """out[m, t] = (x[order[t]] @ a[m].T) * mask[t], where a tile needs it; the rest of `out` is left alone.

    x [T, I] (rows may lie apart), a: one [R, I] or a tuple of them, one per linear that reads this x; bf16, fp16 or fp32,
    summed in fp32. out [modules, padded T, padded R] of x's dtype (`tiles.h_shape`), allocated if not given. With `splits` > 1
    the sum over I is shared between that many programs and put together by a second launch, always in the same order.
    known: what earlier calls with these a found out, kept by the caller; nothing is checked again. The remaining keywords are the
    kernel's block sizes; they default by shape.
    """
    a = _as_tuple(a)
    refuse_gradients(x, *a, tiles.gates)
    out = x.new_empty(tiles.h_shape(len(a))) if out is None else out
    if known is None or "shrink" not in known:
        _check_shrink(x, a, tiles, out)
        if known is not None:
            known["shrink"] = "checked"
    shape = _shrink_shape(x, tiles)
    block_n, block_i = max(block_n or shape["block_n"], tiles.block_r), block_i or shape["block_i"]
    if splits is None:
        splits = _splits(x, len(a), tiles, block_n, block_i)
    target = x.new_empty(splits, *out.shape, dtype=torch.float32) if splits > 1 else out
    grid = (cdiv(tiles.num_blocks * len(a) * tiles.block_r, block_n), splits, tiles.num_tiles)
    routing = (tiles.counts, tiles.blocks)
    blocks = {"NUM_BLOCKS": tiles.num_blocks, "BLOCK_T": tiles.block_t, "BLOCK_R": tiles.block_r}
    with torch.cuda.device_of(x):
        _shrink_kernel[grid](
            x, a, target, tiles.order, tiles.gates, *routing, tiles.tokens,
            I=x.shape[1], R=tiles.rank, E=tiles.num_experts, RANK=tiles.r, X_ROW=x.stride(0),
            SPLITS=splits, BLOCK_N=block_n, BLOCK_I=block_i, **blocks, **launch_options(pdl),
            num_warps=num_warps or shape["num_warps"], num_stages=num_stages or shape["num_stages"],
        )  # fmt: skip
        if splits > 1:
            grid = (tiles.num_blocks, len(a), tiles.num_tiles)
            _sum_kernel[grid](target, out, *routing, SPLITS=splits, **blocks, **launch_options(pdl), num_warps=4)
    return out


def expand_tiles(h, b, tiles, y, *, pdl=False, block_o=None, strip=None, held=None, num_warps=None, num_stages=None):
    """y[m][order[t]] += h[m, t] @ b[m]: each element read once and written once, rounded once, without atomics.

    h [modules, padded T, padded R] from `shrink_tiles`; b: one [R, O] or a tuple; y: one [T, O] or a tuple, changed in place,
    rows may lie apart, bf16, fp16 or fp32. The remaining keywords are the kernel's block sizes; they default by shape.
    """
    b, y = _as_tuple(b), _as_tuple(y)
    check_expand(h, b, tiles, y)
    features = tuple(part.shape[1] for part in b)
    shape = _expand_shape(h, features, tiles)
    given = {"block_o": block_o, "strip": strip, "held": held, "num_warps": num_warps, "num_stages": num_stages}
    shape |= {name: value for name, value in given.items() if value is not None}
    grid = (sum(cdiv(o, shape["block_o"] * shape["strip"]) for o in features), tiles.num_tiles)
    with torch.cuda.device_of(h):
        _expand_kernel[grid](
            y, h, b, tiles.order, tiles.counts, tiles.blocks, tiles.tokens,
            O=features, Y_ROW=tuple(part.stride(0) for part in y), R=tiles.rank, NUM_BLOCKS=tiles.num_blocks,
            BLOCK_T=tiles.block_t, BLOCK_R=tiles.block_r, BLOCK_O=shape["block_o"], STRIP=shape["strip"],
            HELD=shape["held"], STAGES=shape["num_stages"], num_warps=shape["num_warps"], num_stages=shape["num_stages"],
            **launch_options(pdl),
        )  # fmt: skip


def add_delta_tiles(y, x, a, b, tiles, *, pdl=False):
    """y[m][t] += ((x[t] @ a[m].T) * mask[t]) @ b[m], in place, by both kernels. Arguments as theirs; h is allocated here."""
    expand_tiles(shrink_tiles(x, a, tiles, pdl=pdl), b, tiles, y, pdl=pdl)


def _as_tuple(tensors):
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


# --- block sizes ----------------------------------------------------------------------------------------------------------


def _shrink_shape(x, tiles):
    """From 128 tokens a tile on, 256 ranks a program would share each tile of x further, but keep fewer processors busy: q, k and v of
    Llama-2-7B, 2048 tokens, rank 64, take 34 us with it, 27 with 128 (H100).
    """
    if x.dtype == torch.float32:  # twice the bytes, and dots without tensor cores
        return {"block_n": 64, "block_i": 32, "num_warps": 8, "num_stages": 2}
    if tiles.block_t < 64:
        return {"block_n": 64, "block_i": 128, "num_warps": 4, "num_stages": 4}
    return {"block_n": 128, "block_i": 64, "num_warps": 4 if tiles.block_t == 64 else 8, "num_stages": 4}


def _splits(x, modules, tiles, block_n, block_i):
    """Enough programs to fill the device, none with fewer than four steps; a power of two, as each is compiled.

    The host does not know the routing, hence a guess: a tile needs twice the blocks of a token.
    """
    units = min(tiles.num_blocks, 2 * _blocks_of_a_token(tiles)) * modules
    programs = tiles.num_tiles * cdiv(units * tiles.block_r, block_n)
    steps = cdiv(x.shape[1], block_i)
    splits = min(processors(x) // programs, steps // 4, 16)
    return 1 << max(0, splits.bit_length() - 1)


def compiled_for(x, features, tiles) -> tuple[int, ...]:
    """What kernels are compiled for, by default, of all that depends on the number of tokens: two numbers of `shrink_tiles` of x [.., I],
    then those of `expand_tiles` of outputs of these `features`."""
    shape = _shrink_shape(x, tiles)
    splits = _splits(x, len(features), tiles, max(shape["block_n"], tiles.block_r), shape["block_i"])
    return tiles.block_t, splits, *_expand_shape(x, features, tiles).values()


def _blocks_of_a_token(tiles):
    return tiles.top_k * cdiv(tiles.r, tiles.block_r) + cdiv(tiles.shared_rank, tiles.block_r)


def _expand_shape(h, features, tiles):
    """Whether a program holds h for a strip of columns depends on the ranks of a tile: those of the guess of `_splits`, and all of
    them for a few tokens. Times on an H100, q, k, v of Llama-2-7B, 2 of 8 experts, held, and not (estimated from the mean over
    all groups): 2048 tokens 60 and 77 us with rank 64 (256 ranks), 46 and 56 us with 16; 256 tokens 18 and 16.6 us (512 ranks),
    8.6 and 11.2 us.
    """
    most = next_power_of_2(tiles.num_blocks * tiles.block_r)
    guess = next_power_of_2(2 * _blocks_of_a_token(tiles) * tiles.block_r)
    held = max(16, most if tiles.num_tiles < 8 else min(guess, most))
    if h.dtype == torch.float32:
        return {"block_o": 32, "strip": 1, "held": min(held, 64), "num_warps": 8, "num_stages": 1}
    if held > 256:
        return {**_block_shape(h, features, tiles), "strip": 1, "held": tiles.block_r}
    num_warps = 8 if tiles.block_t > 64 else 4
    shape = {"block_o": 64, "held": held, "num_warps": num_warps, "num_stages": 3}
    memory = 2 * (tiles.block_t * held + 3 * (tiles.block_t + held) * 64)
    places = processors(h) * max(1, min(SHARED_MEMORY // memory, 16 // num_warps))
    return {**shape, "strip": _strip([cdiv(o, 64) for o in features], tiles.num_tiles, places)}


def _strip(blocks, num_tiles, places):
    """Columns so that all programs run at once, or in two turns where that would make them long: with a few programs more than
    places, the device waits for the last ones."""

    def programs(strip):
        return num_tiles * sum(cdiv(n, strip) for n in blocks)

    turns = 1 if programs(16) <= places else 2
    return next((n for n in range(1, 16) if programs(n) <= turns * places), 16)


def _block_shape(h, features, tiles):
    """Blocks of columns without strips: narrow for few tokens, so that every processor streams its share of b.

    The chain of loads, block number -> h and b, halves the stages: 3 keep two blocks of h and b in shared memory, 5 three. At
    128 x 128 two leave room for a second program on the processor, whose loads overlap with the writes of the first.
    """
    for block_o in (128, 64):
        if tiles.num_tiles * sum(features) >= 2 * processors(h) * block_o:
            area = tiles.block_t * block_o
            return {"block_o": block_o, "num_warps": 8 if area >= 8192 else 4, "num_stages": 3 if area > 8192 else 5}
    return {"block_o": 32, "num_warps": 4, "num_stages": 7}


# --- checks ---------------------------------------------------------------------------------------------------------------


def _check_shrink(x, a, tiles, out):
    _check_tiles(tiles)
    if x.dim() != 2 or x.shape[0] != tiles.tokens:
        raise ValueError(f"x is {list(x.shape)}, needs [T, I] with the {tiles.tokens} tokens of the routing")
    for part in a:
        _check("a", part, (tiles.rank, x.shape[1]), x.dtype)
    _check("out", out, tiles.h_shape(len(a)), x.dtype)
    _check_rows("x", x)


def check_expand(h, b, tiles, y):
    """ValueError for an h, tuple of b or of outputs y that do not fit the routing or one another."""
    _check_tiles(tiles)
    refuse_gradients(h, *b, *y)
    if len(b) != len(y):
        raise ValueError(f"{len(b)} tensors b for {len(y)} outputs y")
    _check("h", h, tiles.h_shape(len(b)), h.dtype)
    for part, into in zip(b, y, strict=True):
        if part.dim() != 2 or into.shape != (tiles.tokens, part.shape[1]):
            raise ValueError(f"y is {list(into.shape)} for {tiles.tokens} tokens and a b of {list(part.shape)}")
        _check("b", part, (tiles.rank, part.shape[1]), h.dtype)
        _check_rows("y", into)


def _check_tiles(tiles):
    if tiles.order.dim() != 1:
        raise ValueError(f"{list(tiles.order.shape[:-1])} routing decisions were given; choose one: tiles[d]")


def _check(name, tensor, shape, dtype):
    if tensor.shape != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, needs {list(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, the activations are {dtype}: convert one of them")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, needs to be contiguous")


def _check_rows(name, tensor):
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{name} is {tensor.dtype}, needs bfloat16, float16 or float32")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}, its last dimension needs to be contiguous")


# --- reference ------------------------------------------------------------------------------------------------------------


def shrink_tiles_ref(x, a, tiles):
    """`shrink_tiles` in PyTorch, all ranks computed: what it leaves alone is 0 here."""
    x, mask = x[tiles.order.long()], tiles.mask()
    h = x.new_zeros(tiles.h_shape(len(_as_tuple(a))))
    for out, part in zip(h, _as_tuple(a), strict=True):
        out[: tiles.tokens, : tiles.rank] = (x.float() @ part.float().T) * mask[: tiles.tokens, : tiles.rank]
    return h


def expand_tiles_ref(h, b, tiles, y):
    """`expand_tiles` in PyTorch, for an h whose unneeded parts are 0."""
    order = tiles.order.long()
    for h_part, b_part, out in zip(h, _as_tuple(b), _as_tuple(y), strict=True):
        delta = h_part[: tiles.tokens, : tiles.rank].float() @ b_part.float()
        out[order] = (out[order].float() + delta).to(out.dtype)


def add_delta_tiles_ref(y, x, a, b, tiles):
    """`add_delta_tiles` in PyTorch."""
    expand_tiles_ref(shrink_tiles_ref(x, a, tiles), b, tiles, y)
