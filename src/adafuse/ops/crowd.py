"""crowd: adapted linears for the tokens of several sequences, unmerged: base weights and experts in one launch.

    y[t, column(m) + o] = sum_i W_m[o, i] x[t, i] + sum_rank B_m[rank, o] h[t, m, rank]
    h[t, m, rank] = gate[t, expert(rank)] * sum_i A_m[rank, i] x[t, i]

So many tokens need nearly every expert: h is computed for all ranks, and is 0 where a token did not choose the expert. (With ranks
that none of the tokens need, `batch` is the better choice: it skips them.)

All is one kind of work: a tile of BLOCK_O rows by BLOCK_T tokens, summed over steps of BLOCK_I features. The rows are A's (the tile
ends as a piece of h) or W's; tiles of W have further steps, over blocks of ranks, with B in the place of W and h in that of x. The
first `shrinks` programs share the steps of A's tiles equally between them, the other `programs` those of W's, whatever the number
of tiles ("stream-K"): every processor gets the same number of bytes. A program walks its share backwards:

* It starts with the first steps of a tile whose last steps belong to a later program, and hands its sum over in `partial`. It ends
  with the last steps of a tile which others began, adds their sums in fixed order, and stores the tile. Whole tiles lie between.
* So the sums and the h that a program waits for were made by programs before it in the grid: programs start in that order, so
  nobody waits for one that cannot start, however few the device holds at once. Most of the time they have long been there.

h and sums are handed over by flags, one for each program and each piece of h. (`decode` reads h itself until nothing of it is EMPTY.
Here a program would have to look at T x R elements of it.)

Programmatic dependent launch as in `decode`: a program asks for the first weights that it will read, into the L2 cache, before it
waits for its input.

T tokens, M linears, E experts, R = E * r + S ranks, I and O features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from adafuse.ops import launch
from adafuse.ops.checks import aligned_rows, check_tensor
from adafuse.ops.flags import set_flag, wait_for
from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, dot, next_power_of_2, prefetch

LINE = 128  # bytes that a prefetch asks for
SHARED_MEMORY = 227 * 1024  # of a processor


# --- how the work is cut ------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """How a group's work is cut.

    block_r: ranks of a step over B and h. prefetch: features of each row asked for ahead of the input.
    """

    block_t: int
    block_o: int
    block_i: int
    block_r: int
    shrinks: int
    programs: int
    prefetch: int
    num_warps: int
    num_stages: int

    def num_flags(self, tokens, modules, ranks) -> int:
        """Length of `flags` [int32]."""
        return self.shrinks + self.programs + modules * cdiv(ranks, self.block_o) * cdiv(tokens, self.block_t)

    def h_shape(self, tokens, modules, ranks) -> tuple[int, int, int]:
        """Shape of `h`, in the dtype of x: [M, T padded, R padded]."""
        return modules, cdiv(tokens, self.block_t) * self.block_t, cdiv(ranks, self.block_o) * self.block_o

    @property
    def partial_shape(self) -> tuple[int, int, int]:
        """Shape of `partial`, fp32."""
        return self.shrinks + self.programs, self.block_o, self.block_t


def cut_for(tokens, features, widths, ranks, dtype=torch.bfloat16, *, processors=132, **given) -> Cut:
    """The default Cut of a group of linears with `widths` outputs (ranks = 0: without adapters), but for what is `given`.

    given: fields of Cut, or `slots`: how many programs the device is taken to hold at once.
    """
    if unknown := given.keys() - {*Cut._fields, "slots"}:
        raise ValueError(f"a Cut has no {sorted(unknown)}, only {', '.join(Cut._fields)}")
    block_t = max(16, next_power_of_2(tokens))
    if dtype == torch.float32:  # no tensor cores: small tiles
        shape = {"block_t": min(block_t, 32), "block_o": 64, "block_i": 32, "num_warps": 4, "num_stages": 3}
    elif tokens <= 64:  # bytes on their way are what counts: two programs a processor, with three steps of W each
        stages = 4 if block_t <= 32 else 3
        shape = {"block_t": block_t, "block_o": 64, "block_i": 128, "num_warps": 4, "num_stages": stages}
    elif tokens <= 128:  # two warp groups, whose sums fit into registers
        shape = {"block_t": 128, "block_o": 128, "block_i": 64, "num_warps": 8, "num_stages": 5}
    else:  # what counts is how often x and W go from L2 to the processors: large tiles
        shape = {"block_t": 256, "block_o": 128, "block_i": 64, "num_warps": 8, "num_stages": 4}
    shape |= {name: value for name, value in given.items() if name in shape}
    shape["block_r"] = given.get("block_r", min(shape["block_i"], shape["block_o"], max(16, next_power_of_2(ranks))))

    stage = (shape["block_o"] + shape["block_t"]) * shape["block_i"] * dtype.itemsize
    resident = max(1, min(SHARED_MEMORY // (stage * shape["num_stages"] + 1024), 2, 16 // shape["num_warps"] - 1))
    slots = given.get("slots", resident * processors)
    pieces, tiles, i_steps, r_steps = _work(shape, tokens, features, widths, ranks)
    total = tiles * (i_steps + r_steps)
    shrinks = given.get("shrinks", _shrinks(pieces, i_steps, total, slots))
    shrinks = min(shrinks, pieces * i_steps) if ranks else 0
    programs = given.get("programs", min(slots, cdiv(total, 4)))
    if ranks and "programs" not in given:  # the places that the shrinks leave
        programs = min(programs, max(slots - shrinks, slots // 2))
    return Cut(
        **shape,
        shrinks=shrinks,
        programs=max(1, min(programs, total)),
        prefetch=given.get("prefetch", 4 * shape["block_i"]),
    )


def _shrinks(pieces, i_steps, total, slots):
    """How many programs compute h, which must be there when the first of the others reaches its steps over ranks.

    A third of the steps of the others for each, but enough for the pipeline to fill.
    """
    return pieces * max(1, i_steps // max(4, cdiv(total, 3 * slots)))


def _work(shape, tokens, features, widths, ranks):
    """Tiles of A, tiles of W, steps of each over features, of W's over ranks."""
    token_tiles = cdiv(tokens, shape["block_t"])
    pieces = len(widths) * cdiv(ranks, shape["block_o"]) * token_tiles
    tiles = sum(cdiv(width, shape["block_o"]) for width in widths) * token_tiles
    return pieces, tiles, cdiv(features, shape["block_i"]), cdiv(ranks, shape["block_r"])


# --- reference ------------------------------------------------------------------------------------------------------------


def crowd_ref(x, base_weights, banks_a=(), banks_b=(), gates=None, r=1):
    """`crowd` in plain PyTorch, in the dtype of x."""
    ys = [x @ w.T for w in base_weights]
    if gates is not None:
        expert = (torch.arange(len(banks_a[0]), device=x.device) // r).clamp(max=gates.shape[1] - 1)
        mask = gates[:, expert].to(x.dtype)
        ys = [y + ((x @ a.T) * mask) @ b for y, a, b in zip(ys, banks_a, banks_b, strict=True)]
    return torch.cat(ys, dim=-1)


# --- kernel ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _owner(step, programs, total):
    """Which program has this step: the last that starts at or before it. Program p starts at p * total // programs."""
    return ((step + 1) * programs - 1) // total


@triton.jit
def _tile(
    base_weights, banks_a, banks_b, place, shrinking, widths: tl.constexpr, R: tl.constexpr, BLOCK_O: tl.constexpr
):
    """What block of rows `place` of all the linears' is a block of: its matrix, its b, its linear, block, first column, width."""
    w, b, linear, block, column, width = base_weights[0], base_weights[0], 0, place, 0, widths[0]
    if R > 0:
        b = banks_b[0]
        if shrinking:
            w = banks_a[0]
            width = R
    first, start = 0, 0
    for m in tl.static_range(1, len(base_weights)):
        blocks = (widths[m - 1] + BLOCK_O - 1) // BLOCK_O
        if shrinking:
            blocks = (R + BLOCK_O - 1) // BLOCK_O
        first += blocks
        start += widths[m - 1]
        if place >= first:
            w, linear, block, column, width = base_weights[m], m, place - first, start, widths[m]
            if R > 0:
                b = banks_b[m]
                if shrinking:
                    w = banks_a[m]
                    width = R
    return w, b, linear, block, column, width


@triton.jit(do_not_specialize=["T", "shrinks"])
def _crowd_kernel(
    x,
    base_weights,
    banks_a,
    banks_b,
    gates,
    h,
    partial,
    flags,
    y,
    stride_x,
    stride_y,
    T,
    shrinks,
    widths: tl.constexpr,
    O_TILES: tl.constexpr,
    I: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    r: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr,
    PIECES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PER_LINE: tl.constexpr,
    EVEN_O: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (shrinks + programs)."""
    R_TILES: tl.constexpr = (R + BLOCK_O - 1) // BLOCK_O
    I_STEPS: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    R_STEPS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    # Sums of other programs asked for at once: one by one, each costs a look at its flag and a load, both from the L2 cache. A
    # thread holds BLOCK_T / 2 of a sum (4 warps, 64 outputs).
    TOGETHER: tl.constexpr = max(1, 128 // BLOCK_T)
    pid = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token_tiles = (T + BLOCK_T - 1) // BLOCK_T
    h_flags = flags + tl.num_programs(0)
    index, steps, shrinking = pid - shrinks, I_STEPS + R_STEPS, False
    programs, total = tl.num_programs(0) - shrinks, O_TILES * token_tiles * steps
    if R > 0:
        shrinking = pid < shrinks
        if shrinking:
            index, steps = pid, I_STEPS
            programs, total = shrinks, len(base_weights) * R_TILES * token_tiles * I_STEPS
    first, end = index * total // programs, (index + 1) * total // programs

    if PREFETCH > 0 and PDL:
        place = (end - 1) // steps
        w, b, linear, block, column, width = _tile(
            base_weights, banks_a, banks_b, place // token_tiles, shrinking, widths, R, BLOCK_O
        )
        row = tl.minimum(block * BLOCK_O + tl.arange(0, BLOCK_O), width - 1)
        ahead = tl.maximum(first - place * steps, 0) * BLOCK_I + tl.arange(0, PREFETCH // PER_LINE) * PER_LINE
        prefetch(w + row.to(tl.int64)[:, None] * I + tl.minimum(ahead, I - 1)[None, :])
    if PDL:
        tl.extra.cuda.gdc_wait()

    while end > first:
        place = (end - 1) // steps
        from_step = tl.maximum(first - place * steps, 0)
        to_step = end - place * steps
        end = place * steps + from_step
        w, b, linear, block, column, width = _tile(
            base_weights, banks_a, banks_b, place // token_tiles, shrinking, widths, R, BLOCK_O
        )
        token_tile = place % token_tiles
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        t = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
        w_row = w + tl.minimum(o, width - 1).to(tl.int64) * I  # rows and tokens past the last: the last, not stored
        x_row = x + tl.minimum(t, T - 1).to(tl.int64) * stride_x
        if R > 0:  # noqa: SIM102 - nested, so that the first is decided by the compiler
            if to_step > I_STEPS and PDL:
                b_row = tl.minimum(tl.arange(0, RANKS), R - 1)
                for part in tl.static_range(0, BLOCK_O, PER_LINE):
                    prefetch(b + b_row.to(tl.int64) * width + tl.minimum(block * BLOCK_O + part, width - 1))

        acc = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
        for step in range(from_step, tl.minimum(to_step, I_STEPS)):
            i = step * BLOCK_I + tl.arange(0, BLOCK_I)
            w_at = w_row[:, None] + i[None, :]
            x_at = x_row[:, None] + i[None, :]
            if ALIGNED:
                # The compiler cannot see it through a choice of pointers, nor a hint given in a function of its own.
                w_at = tl.max_contiguous(tl.multiple_of(w_at, (1, 16)), (1, 16))
            if I % BLOCK_I == 0:
                w_tile = tl.load(w_at, eviction_policy="evict_first")
                x_tile = tl.load(x_at)
            else:
                w_tile = tl.load(w_at, mask=(i < I)[None, :], other=0.0, eviction_policy="evict_first")
                x_tile = tl.load(x_at, mask=(i < I)[None, :], other=0.0)
            acc = dot(w_tile, x_tile.T, acc)

        if R > 0:  # noqa: SIM102
            if to_step > I_STEPS:
                piece = tl.minimum(tl.arange(0, PIECES), R_TILES - 1)
                wait_for(h_flags + (linear * R_TILES + piece) * token_tiles + token_tile)
                h_row = h + (linear * token_tiles * BLOCK_T + t).to(tl.int64) * (R_TILES * BLOCK_O)
                for step in range(tl.maximum(from_step, I_STEPS) - I_STEPS, to_step - I_STEPS):
                    rank = step * BLOCK_R + tl.arange(0, BLOCK_R)
                    b_at = b + tl.minimum(rank, R - 1).to(tl.int64)[:, None] * width + o[None, :]
                    if ALIGNED:
                        b_at = tl.max_contiguous(tl.multiple_of(b_at, (1, 16)), (1, 16))
                    b_tile = tl.load(b_at) if EVEN_O else tl.load(b_at, mask=(o < width)[None, :], other=0.0)
                    h_tile = tl.load(h_row[:, None] + rank[None, :], cache_modifier=".cg")
                    acc = dot(b_tile.T, h_tile.T, acc)

        inside = tl.arange(0, BLOCK_O)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        if to_step < steps:
            tl.store(partial + pid * (BLOCK_O * BLOCK_T) + inside, acc)
            set_flag(flags + pid)
        else:
            # Apart from `acc`, whose layout is that of a product: each sum added to that would pass through shared memory on its way,
            # and the next be asked for only then.
            sums = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
            for other in range(pid - index + _owner(place * steps, programs, total), pid, TOGETHER):
                # As many lanes as a warp has, so that all of it goes on at the same time.
                wait_for(flags + tl.minimum(other + tl.arange(0, 32), tl.minimum(other + TOGETHER, pid) - 1))
                for j in tl.static_range(TOGETHER):
                    at = partial + (other + j) * (BLOCK_O * BLOCK_T) + inside
                    sums += tl.load(at, mask=other + j < pid, other=0.0, cache_modifier=".cg")
            acc += sums
            if shrinking:
                if R > 0:
                    expert = tl.minimum(o // r, E)
                    gate = tl.load(
                        gates + t[None, :] * (E + 1) + expert[:, None],
                        mask=(t < T)[None, :] & (o < R)[:, None],
                        other=0.0,
                    )
                    h_at = (linear * token_tiles * BLOCK_T + t).to(tl.int64)[None, :] * (R_TILES * BLOCK_O) + o[:, None]
                    tl.store(h + h_at, (acc * gate).to(h.dtype.element_ty))
                    set_flag(h_flags + place)
            else:
                y_at = y + t.to(tl.int64)[None, :] * stride_y + column + o[:, None]
                tl.store(y_at, acc.to(y.dtype.element_ty), mask=(t < T)[None, :] & (o < width)[:, None])


# --- launcher -------------------------------------------------------------------------------------------------------------


def crowd(
    x, base_weights, out, *, banks_a=(), banks_b=(), gates=None, r=1, h=None, partial, flags, cut=None,
    pdl=False,
):  # fmt: skip
    """out[t, column(m) + o] = sum_i base_weights[m][o, i] x[t, i] + sum_rank banks_b[m][rank, o] h[t, m, rank], with

    h[t, m, rank] = gates[t, min(rank // r, E)] * sum_i banks_a[m][rank, i] x[t, i]. One launch. Without `gates`: the base alone.

    x [T, I], its last axis contiguous; base_weights: for each linear of the group [O_m, I]; banks_a [R, I], banks_b [R, O_m], all of
    the dtype of x: bf16, fp16 or fp32. gates [T, E + 1] fp32, contiguous: scaled weight of each expert by token, 0 where not chosen;
    then the shared expert's scale. out [T, O_1 + ... + O_M], rows may lie apart, written whole. Summed in fp32, in the same order
    every time; h is rounded to the dtype of x.

    cut: how the work is cut, by default `cut_for` these shapes. h [cut.h_shape], partial [cut.partial_shape]: scratch, may serve
    one call after another. flags int32 [cut.num_flags]: filled with 0 before each call.
    The plan may be written by the kernel just ahead in the stream. No host sync, no allocation: safe inside a CUDA graph.
    """
    base_weights, banks_a, banks_b = tuple(base_weights), tuple(banks_a), tuple(banks_b)
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"x is {list(x.shape)}, needs [T, I] with at least one token")
    tokens, features = x.shape
    widths = tuple(w.shape[0] for w in base_weights)
    if gates is not None and not banks_a:
        raise ValueError("gates were given without banks: give both, or neither for the base alone")
    ranks = banks_a[0].shape[0] if gates is not None else 0
    cut = cut or cut_for(tokens, features, widths, ranks, x.dtype, processors=launch.processors(x))
    _check(x, base_weights, out, banks_a, banks_b, gates, r, h, partial, flags, cut)
    with torch.cuda.device_of(x):
        _crowd_kernel[(cut.shrinks + cut.programs,)](
            x,
            base_weights,
            banks_a if ranks else None,
            banks_b if ranks else None,
            gates,
            h,
            partial,
            flags,
            out,
            x.stride(0),
            out.stride(0),
            tokens,
            cut.shrinks,
            widths=widths,
            O_TILES=sum(cdiv(width, cut.block_o) for width in widths),
            I=features,
            R=ranks,
            E=gates.shape[1] - 1 if ranks else 0,
            r=r,
            BLOCK_T=cut.block_t,
            BLOCK_O=cut.block_o,
            BLOCK_I=cut.block_i,
            BLOCK_R=cut.block_r,
            RANKS=next_power_of_2(max(1, ranks)),
            PIECES=next_power_of_2(max(1, cdiv(ranks, cut.block_o))),
            PREFETCH=next_power_of_2(cut.prefetch) if cut.prefetch else 0,
            PER_LINE=LINE // x.element_size(),
            EVEN_O=all(width % cut.block_o == 0 for width in widths),
            ALIGNED=aligned_rows(features, *base_weights, *banks_a) and all(map(aligned_rows, widths, banks_b)),
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            **launch.launch_options(pdl),
        )
    return out


# --- checks ---------------------------------------------------------------------------------------------------------------


def _check(x, base_weights, out, banks_a, banks_b, gates, r, h, partial, flags, cut):
    refuse_gradients(*(t for t in (x, *base_weights, *banks_a, *banks_b, gates, out) if t is not None))
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x is {x.dtype}, needs bfloat16, float16 or float32")
    tokens, features = x.shape
    if not base_weights:
        raise ValueError("base_weights is empty, needs the weights of at least one linear")
    for w in base_weights:
        check_tensor("a base weight", w, (w.shape[0], features), x.dtype, x.device)
    widths = [w.shape[0] for w in base_weights]
    check_tensor("out", out, (tokens, sum(widths)), x.dtype, x.device, whole=False)
    check_tensor("x", x, (tokens, features), x.dtype, x.device, whole=False)
    ranks = 0
    if gates is None and (banks_a or banks_b):
        raise ValueError("banks were given without gates: give both, or neither for the base alone")
    if gates is not None:
        if len(banks_a) != len(widths) or len(banks_b) != len(widths):
            raise ValueError(f"{len(banks_a)} banks_a and {len(banks_b)} banks_b for {len(widths)} base weights")
        ranks = banks_a[0].shape[0]
        experts = gates.shape[-1] - 1
        if ranks < experts * r or ranks == 0:
            raise ValueError(f"banks of {ranks} ranks are too small for {experts} experts of rank {r}")
        for a, b, width in zip(banks_a, banks_b, widths, strict=True):
            check_tensor("a bank a", a, (ranks, features), x.dtype, x.device)
            check_tensor("a bank b", b, (ranks, width), x.dtype, x.device)
        check_tensor("gates", gates, (tokens, experts + 1), torch.float32, x.device)
        check_tensor("h", h, cut.h_shape(tokens, len(widths), ranks), x.dtype, x.device)
    _check_cut(cut, tokens, features, tuple(widths), ranks)
    check_tensor("partial", partial, cut.partial_shape, torch.float32, x.device)
    need = cut.num_flags(tokens, len(widths), ranks)
    if flags.dtype != torch.int32 or flags.dim() != 1 or len(flags) < need or not flags.is_contiguous():
        raise ValueError(f"flags are {flags.dtype} {list(flags.shape)}, need int32 [{need}] at least, contiguous")


@lru_cache(maxsize=1024)
def _check_cut(cut, tokens, features, widths, ranks):
    """Once a shape: the host is not to do it at each launch."""
    for name in ("block_t", "block_o", "block_i", "block_r"):
        block = getattr(cut, name)
        if block < 16 or block & (block - 1):
            raise ValueError(f"{name} is {block}, needs to be a power of two of at least 16")
    if cut.block_r > cut.block_o:
        raise ValueError(
            f"block_r {cut.block_r} is larger than block_o {cut.block_o}: pieces of h would stay unwritten"
        )
    pieces, tiles, i_steps, r_steps = _work(cut._asdict(), tokens, features, widths, ranks)
    # A program without a step would never say that it is done.
    if not (1 <= cut.programs <= tiles * (i_steps + r_steps) and min(1, ranks) <= cut.shrinks <= pieces * i_steps):
        raise ValueError(
            f"the cut has {cut.programs} programs and {cut.shrinks} shrinks: make it with cut_for these shapes"
        )
