"""pair: adapted linears for up to 32 tokens among kernels of others, unmerged, in two launches: the second starts while the first runs.

    h[m, t, j] = gates[t, expert(j)] * sum_i A_m[row(j), i] x[t, i]                                 the first: `_ranks_kernel`
    y[t, column(m) + o] = sum_i W_m[o, i] x[t, i] + sum_j B_m[row(j), o] h[m, t, j]                 the second: `_linears_kernel`

j are all R ranks, and h is 0 where a token did not choose the expert (of finite banks); of one token whose experts are given its
K * r + S active ranks alone.

* A program takes 16 whole rows of a matrix and all tokens. Rows are A of a warp's mma.m16n8k16 and 8 tokens its B
  (`fragments`), so that a load of x serves two of W. (`decode` has it the other way round: with 8 tokens it loads x twice for each W.)
  The warps share the columns.
* A thread asks for its parts of the rows some steps before it multiplies them, in registers. Nothing of a tile is kept in shared
  memory, whose stages would have to be filled and drained at every tile, and no program waits for another's sum.
* The first launch starts when all before it has ended, as any does. The second is launched by programmatic dependent launch (PDL): it
  starts when all programs of the first have started, which are few. So both read x at once; the second waits for the first only when
  it needs h. `decode` and `crowd` compute h in the same launch, where the rows of A queue behind those of W, unless PDL has brought
  these before. Among kernels that let nothing start early it does not.

Without PDL (`pdl=False`) the second launch starts when the first has ended.

T tokens, M linears, K experts a token, R = E * r + S ranks, I and O features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from adafuse.ops.checks import aligned_rows, check_tensor
from adafuse.ops.decode import tile_of
from adafuse.ops.fragments import COLUMNS, STEP, first_part, lane, two_mma, two_mma_in_turn
from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, dot, has_mma, launch_options, next_power_of_2, prefetch
from adafuse.ops.ranks import pick_part, rank_rows

MOST_TOKENS = 32


# --- rows times tokens ----------------------------------------------------------------------------------------------------


@triton.jit
def _rows_of(start, end, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Which rows each thread holds a part of, from `start` on: ROWS / 8 times [THREADS]. Past the last: the last again."""
    _, g, _ = lane(WARPS)
    rows = ()
    for n in tl.static_range(0, ROWS, 8):
        rows = rows + (tl.minimum(start + n + g, end - 1),)  # noqa: RUF005 - Triton's tuples
    return rows


@triton.jit
def _load(pointers, column, step, there, I: tl.constexpr, EVEN: tl.constexpr, WARPS: tl.constexpr, ONCE: tl.constexpr):
    """A step of what each thread holds of its row, [THREADS, 4] int32: 0 past the last column, or not `there` [THREADS] (None: all are).

    ONCE: nobody reads it again.
    """
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    pointers += step * (STEP // 2 * WARPS)
    pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, 4))  # bytes, numbers
    if EVEN and there is None:
        return tl.load(pointers, eviction_policy=POLICY)
    else:  # noqa: RET505 - what is not taken must not be compiled
        if there is None:
            mask = column + step * (STEP * WARPS) < I
        elif EVEN:
            mask = there
        else:
            mask = there & (column + step * (STEP * WARPS) < I)
        return tl.load(pointers, mask=tl.broadcast_to(mask[:, None], pointers.shape), other=0, eviction_policy=POLICY)


@triton.jit
def _load_all(
    places, step, rows, end, MASKED: tl.constexpr, I: tl.constexpr, EVEN: tl.constexpr, WARPS: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """A step of all these rows. MASKED: 0 of rows from `end` on."""
    warp, _, q = lane(WARPS)
    column, parts = warp * STEP + q * COLUMNS, ()
    for n in tl.static_range(len(places)):
        there = None
        if MASKED:
            there = rows[n] < end
        part = _load(places[n], column, step, there, I, EVEN, WARPS, ONCE)
        parts = parts + (part,)  # noqa: RUF005 - Triton's tuples
    return parts


@triton.jit
def _ask(
    matrix, rows, x, tokens, stride_x, T: tl.constexpr, I: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    X_AHEAD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The first AHEAD steps of the rows and X_AHEAD of x, and where the threads' parts of both begin."""
    places, x_places = (), ()
    for n in tl.static_range(len(rows)):
        place, _ = first_part(matrix, rows[n], 0, I, 0, WARPS)
        places = places + (place,)  # noqa: RUF005 - Triton's tuples
    for n in tl.static_range(len(tokens)):
        place, _ = first_part(x, tl.minimum(tokens[n], T - 1), 0, stride_x, 0, WARPS)
        x_places = x_places + (place,)  # noqa: RUF005
    held, xs = (), ()
    for step in tl.static_range(min(AHEAD, STEPS)):
        held = held + _load_all(places, step, rows, 0, False, I, EVEN, WARPS, True)
    for step in tl.static_range(min(X_AHEAD, STEPS)):
        xs = xs + _load_all(x_places, step, tokens, T, T % 8 != 0, I, EVEN, WARPS, False)
    return held, xs, places, x_places


@triton.jit
def _multiply(
    held, xs, places, x_places, rows, tokens, DTYPE: tl.constexpr, T: tl.constexpr, I: tl.constexpr, STEPS: tl.constexpr,
    EVEN: tl.constexpr, AHEAD: tl.constexpr, X_AHEAD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Rows times x, from what `_ask` gave: of each 16 rows [16, tokens] fp32."""
    TILES: tl.constexpr = len(rows) // 2
    GROUPS: tl.constexpr = len(tokens)
    ALONE: tl.constexpr = (
        TILES * GROUPS == 1
    )  # then there are two sums: an mma takes some 30 clocks, for which the next of its sum waits
    sums = ()
    for _ in tl.static_range(2 * TILES * GROUPS):
        sums = sums + (tl.zeros([32 * WARPS, 4], tl.float32),)  # noqa: RUF005 - Triton's tuples
    for step in tl.static_range(STEPS):
        if step + AHEAD < STEPS:
            held = held + _load_all(places, step + AHEAD, rows, 0, False, I, EVEN, WARPS, True)
        if step + X_AHEAD < STEPS:
            xs = xs + _load_all(x_places, step + X_AHEAD, tokens, T, T % 8 != 0, I, EVEN, WARPS, False)
        more = ()
        for tile in tl.static_range(TILES):
            low, high = held[step * len(rows) + 2 * tile], held[step * len(rows) + 2 * tile + 1]
            for group in tl.static_range(GROUPS):
                c, d = sums[2 * (tile * GROUPS + group)], sums[2 * (tile * GROUPS + group) + 1]
                if ALONE:
                    c, d = two_mma(xs[step * GROUPS + group], low, high, c, d, DTYPE, WARPS)
                else:
                    c = two_mma_in_turn(xs[step * GROUPS + group], low, high, c, DTYPE, WARPS)
                more = more + (c, d)  # noqa: RUF005
        sums = more
    found = ()
    for tile in tl.static_range(TILES):
        of_tile = ()
        for n in tl.static_range(2 * tile * GROUPS, 2 * (tile + 1) * GROUPS, 2):
            of_tile = of_tile + (sums[n] + sums[n + 1],)  # noqa: RUF005
        found = found + (_sum_of_warps(of_tile, WARPS),)  # noqa: RUF005
    return found


@triton.jit
def _sum_of_warps(sums, WARPS: tl.constexpr):
    """[16, 8], [16, 16] or [16, 32] of 1, 2 or 4 times 8 tokens, together: the warps meet once.

    Thread 4 g + q of a warp has rows g and g + 8 of tokens 2 q and 2 q + 1.
    """
    if len(sums) == 1:
        c = tl.sum(sums[0].reshape(WARPS, 8, 4, 2, 2), 0)
        return c.permute(2, 0, 1, 3).reshape(16, 8)
    elif len(sums) == 2:  # noqa: RET505 - what is not taken must not be compiled
        c = tl.sum(tl.join(sums[0], sums[1]).reshape(WARPS, 8, 4, 2, 2, 2), 0)
        return c.permute(2, 0, 4, 1, 3).reshape(16, 16)
    else:
        c = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
        c = tl.sum(c.reshape(WARPS, 8, 4, 2, 2, 2, 2), 0)
        return c.permute(2, 0, 4, 5, 1, 3).reshape(16, 32)


# --- kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _ranks_kernel(
    x, banks_a, experts, gates, h, stride_x,
    T: tl.constexpr, I: tl.constexpr, J: tl.constexpr, E: tl.constexpr, K: tl.constexpr, r: tl.constexpr, S: tl.constexpr,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr, X_AHEAD: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: 16 ranks of a linear. Grid (linears * BLOCKS). K > 0: of one token, its active ranks."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    linear, start = pid // BLOCKS, pid % BLOCKS * 16
    rows, tokens = _rows_of(start, J, 16, WARPS), _rows_of(0, GROUPS * 8, GROUPS * 8, WARPS)
    j = start + tl.arange(0, 16)
    row = tl.minimum(j, J - 1)
    if K > 0:
        low, high = rank_rows(experts, 0, E * r, rows[0], K, r, S), rank_rows(experts, 0, E * r, rows[1], K, r, S)
        rows, row = (low, high), rank_rows(experts, 0, E * r, row, K, r, S)
    held, xs, places, x_places = _ask(
        pick_part(banks_a, linear), rows, x, tokens, stride_x, T, I, STEPS, EVEN, AHEAD, X_AHEAD, WARPS
    )
    t = tl.arange(0, GROUPS * 8)
    mask = (j < J)[:, None] & (t < T)[None, :]
    gate = tl.load(gates + t[None, :] * (E + 1) + tl.minimum(row // r, E)[:, None], mask=mask, other=0.0)
    (found,) = _multiply(
        held, xs, places, x_places, rows, tokens, x.dtype.element_ty, T, I, STEPS, EVEN, AHEAD, X_AHEAD, WARPS
    )
    where = h + (linear * GROUPS * 8 + t)[None, :] * J + j[:, None]
    tl.store(where, (found * gate).to(h.dtype.element_ty), mask=mask)


@triton.jit
def _b_rows(b, experts, j, width, J: tl.constexpr, E: tl.constexpr, K: tl.constexpr, r: tl.constexpr, S: tl.constexpr):
    """Where the rows of B of the ranks j begin; of ranks past the last, some row."""
    row = tl.minimum(j, J - 1)
    if K > 0:
        row = rank_rows(experts, 0, E * r, row, K, r, S)
    return b + row.to(tl.int64) * width


@triton.jit
def _b_of(b_rows, j, first, width, J: tl.constexpr, ALIGNED: tl.constexpr):
    """B of the ranks j at 16 outputs from `first` on: [ranks, 16], 0 where there is no rank, others' of outputs past the last, which are
    not stored."""
    if ALIGNED:  # then no 16 outputs are cut: they exist or do not
        pointers = b_rows[:, None] + (tl.minimum(first, width - 16) + tl.arange(0, 16))[None, :]
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 32)), (1, 16))
    else:
        pointers = b_rows[:, None] + tl.minimum(first + tl.arange(0, 16), width - 1)[None, :]
    return tl.load(pointers, mask=(j < J)[:, None], other=0.0)


@triton.jit
def _linears_kernel(
    x, base_weights, banks_b, experts, h, y, stride_x, stride_y, widths: tl.constexpr,
    T: tl.constexpr, I: tl.constexpr, J: tl.constexpr, E: tl.constexpr, K: tl.constexpr, r: tl.constexpr, S: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_J: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    AHEAD: tl.constexpr, X_AHEAD: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: ROWS outputs of a linear. J ranks of h; 0: the base alone."""
    TILES: tl.constexpr = ROWS // 16
    w, linear, block, column, width = tile_of(tl.program_id(0), base_weights, widths, ROWS)
    rows, tokens = _rows_of(block * ROWS, width, ROWS, WARPS), _rows_of(0, GROUPS * 8, GROUPS * 8, WARPS)
    held, xs, places, x_places = _ask(w, rows, x, tokens, stride_x, T, I, STEPS, EVEN, AHEAD, X_AHEAD, WARPS)
    b_tiles = ()
    if J > 0:
        b, j = pick_part(banks_b, linear), tl.arange(0, BLOCK_J)
        b_rows = _b_rows(b, experts, j, width, J, E, K, r, S)
        for n in tl.static_range(TILES):  # behind the first rows, since the warps meet when it has come
            b_tile = _b_of(b_rows, j, block * ROWS + n * 16, width, J, ALIGNED)
            b_tiles = b_tiles + (b_tile,)  # noqa: RUF005 - Triton's tuples
        # That of further ranks would else come from memory, at the end, with nothing else on its way.
        for start in tl.static_range(BLOCK_J, J, BLOCK_J):
            b_rows = _b_rows(b, experts, start + j, width, J, E, K, r, S)
            prefetch(b_rows + tl.minimum(block * ROWS, width - 1))
    sums = _multiply(
        held, xs, places, x_places, rows, tokens, x.dtype.element_ty, T, I, STEPS, EVEN, AHEAD, X_AHEAD, WARPS
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
    t = tl.arange(0, GROUPS * 8)
    for start in tl.static_range(0, J, BLOCK_J):
        j, more = start + tl.arange(0, BLOCK_J), ()
        # h of tokens past the last is not initialised: it reaches only their columns, which are not stored.
        where = h + (linear * GROUPS * 8 + t)[:, None] * J + j[None, :]
        h_tile = tl.load(where, mask=(j < J)[None, :], other=0.0)
        for n in tl.static_range(TILES):
            b_tile = b_tiles[n]
            if start > 0:
                b_rows = _b_rows(b, experts, j, width, J, E, K, r, S)
                b_tile = _b_of(b_rows, j, block * ROWS + n * 16, width, J, ALIGNED)
            more = more + (dot(b_tile.T, h_tile.T, sums[n]),)  # noqa: RUF005
        sums = more
    for n in tl.static_range(TILES):
        o = block * ROWS + n * 16 + tl.arange(0, 16)
        where = y + t[None, :] * stride_y + column + o[:, None]
        tl.store(where, sums[n].to(y.dtype.element_ty), mask=(t < T)[None, :] & (o < width)[:, None])


# --- launcher -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts the work. A program has `rows` rows of a matrix, 16 or a power of two times as many; its threads ask for `ahead`
    steps of them and `x_ahead` of x before they multiply. maxnreg: registers of a thread, so that so many programs fit on a
    processor. The compiler orders loads anew: it has as many on their way as registers allow, and without a limit few."""

    rows: int = 16
    num_warps: int = 8
    ahead: int = 8
    x_ahead: int = 2
    maxnreg: int = 80

    @classmethod
    def default(cls, tokens: int) -> Tile:
        """Three programs a processor; two where the sums of more tokens would not leave registers for loads."""
        return cls(maxnreg=80 if tokens <= 16 else 128)


# Of the first launch, whose programs are few: each has to be quick.
OF_RANKS = Tile(ahead=16, x_ahead=4, maxnreg=168)


def _groups(tokens):
    """Of 8 tokens, a power of two."""
    return next_power_of_2(cdiv(tokens, 8))


def h_shape(tokens: int, modules: int, ranks: int) -> tuple[int, int, int]:
    """Shape of `h`. ranks: all R, of one token its active ones."""
    return modules, 8 * _groups(tokens), ranks


def pair(
    x, base_weights, out, *, banks_a=(), banks_b=(), gates=None, experts=None, r=1, h=None, pdl=False, tile: Tile | None = None,
    of_ranks: Tile | None = None,
):  # fmt: skip
    """out[t, column(m) + o] = sum_i base_weights[m][o, i] x[t, i] + sum_j banks_b[m][row(j), o] h[m, t, j], with

    h[m, t, j] = gates[t, min(row(j) // r, E)] * sum_i banks_a[m][row(j), i] x[t, i]. Two launches; without `gates` one, of the base alone.

    x [T <= 32, I], its last axis contiguous; base_weights: for each linear of the group [O_m, I]; banks_a [R, I], banks_b [R, O_m];
    all of one dtype, bf16 or fp16, and each row of x, a weight or an a on 16 bytes. gates [T, E + 1] fp32, contiguous: scaled weight
    of each expert by token, 0 where not chosen; then the shared expert's scale. experts [1, K] int32, for one token: only the rows of
    these and of the shared expert are read. out [T, O_1 + ... + O_M], rows may lie apart, written whole. Summed in fp32, in the same
    order every time; h is rounded to the dtype of x.

    h [h_shape], of x's dtype: scratch, may serve one call after another. pdl: the second launch starts while the first runs, which itself
    starts when all before it has ended. A GPU of compute capability 8.0 or more, for pdl 9.0. No host sync, no allocation: safe inside
    a CUDA graph.
    """
    base_weights, banks_a, banks_b = tuple(base_weights), tuple(banks_a), tuple(banks_b)
    tile, of_ranks = tile or Tile.default(len(x)), of_ranks or OF_RANKS
    _check(x, base_weights, out, banks_a, banks_b, gates, experts, r, h, tile, of_ranks)
    tokens, features = x.shape
    widths = tuple(w.shape[0] for w in base_weights)
    sizes = {"T": tokens, "I": features, "J": 0, "E": 0, "K": 0, "r": r, "S": 0, "GROUPS": _groups(tokens)}
    if gates is not None:
        sizes |= {"J": h.shape[2], "E": gates.shape[1] - 1, "S": len(banks_a[0]) - (gates.shape[1] - 1) * r}
    if experts is not None:
        sizes["K"] = experts.shape[1]
    pdl = pdl and gates is not None
    with torch.cuda.device_of(x):
        if gates is not None:
            blocks = cdiv(h.shape[2], 16)
            # Starts as any other, and lets the second start early.
            starts = {**launch_options(False, of_ranks.maxnreg), "PDL": launch_options(pdl)["PDL"]}
            options = _options(of_ranks, features) | starts
            _ranks_kernel[(len(widths) * blocks,)](
                x, banks_a, experts, gates, h, x.stride(0), BLOCKS=blocks, **sizes, **options
            )
        options = _options(tile, features) | launch_options(pdl, tile.maxnreg)
        block_j, aligned = min(128, max(16, next_power_of_2(sizes["J"] or 1))), all(map(_on_32_bytes, banks_b))
        _linears_kernel[(sum(cdiv(width, tile.rows) for width in widths),)](
            x, base_weights, banks_b or None, experts, h, out, x.stride(0), out.stride(0), widths=widths, ROWS=tile.rows, BLOCK_J=block_j,
            ALIGNED=aligned, **sizes, **options,
        )  # fmt: skip
    return out


@lru_cache(maxsize=256)
def _options(tile, features):
    span = STEP.value * tile.num_warps
    steps = {"STEPS": cdiv(features, span), "EVEN": features % span == 0}
    ahead = {"AHEAD": tile.ahead, "X_AHEAD": tile.x_ahead}
    return {**steps, **ahead, "WARPS": tile.num_warps, "num_warps": tile.num_warps}


def _on_32_bytes(b):
    return b.data_ptr() % 32 == 0 and b.shape[1] % 16 == 0


# --- checks ---------------------------------------------------------------------------------------------------------------


def _check(x, base_weights, out, banks_a, banks_b, gates, experts, r, h, tile, of_ranks):
    refuse_gradients(*(t for t in (x, *base_weights, *banks_a, *banks_b, gates, out) if t is not None))
    if (
        x.dim() != 2
        or not 1 <= len(x) <= MOST_TOKENS
        or x.stride(1) != 1
        or x.dtype not in (torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}, needs bfloat16 or float16 [T, I] of 1 to {MOST_TOKENS} tokens, its "
            "last axis contiguous"
        )
    if not has_mma(x):
        raise ValueError(f"x is on {x.device}, needs a GPU of compute capability 8.0 or more")
    if not base_weights:
        raise ValueError("base_weights is empty, needs the weights of at least one linear")
    (tokens, features), widths = x.shape, [len(w) for w in base_weights]
    for w in base_weights:
        check_tensor("a base weight", w, (len(w), features), x.dtype, x.device)
    check_tensor("out", out, (tokens, sum(widths)), x.dtype, x.device, whole=False)
    if (gates is None) != (not banks_a) or len(banks_a) != len(banks_b) or len(banks_a) not in (0, len(widths)):
        raise ValueError(
            f"{len(banks_a)} banks_a and {len(banks_b)} banks_b, {'no' if gates is None else 'and'} gates, for {len(widths)} base weights: "
            "give gates and as many of both banks, or none"
        )
    if gates is not None:
        _check_experts(x, banks_a, banks_b, widths, gates, experts, r, h)
    if not aligned_rows(features, *base_weights, *banks_a) or x.data_ptr() % 16 or (tokens > 1 and x.stride(0) % 8):
        raise ValueError(
            f"rows of {features} features, of x {x.stride(0)} apart, do not all begin on 16 bytes: pad or copy them, or take `crowd`"
        )
    if tile.rows < 16 or tile.rows & (tile.rows - 1) or of_ranks.rows != 16:
        raise ValueError(
            f"tiles of {tile.rows} rows, of ranks {of_ranks.rows}: rows need to be 16 or a power of two times as many, of ranks 16"
        )


def _check_experts(x, banks_a, banks_b, widths, gates, experts, r, h):
    (tokens, features), ranks = x.shape, len(banks_a[0])
    for a, b, width in zip(banks_a, banks_b, widths, strict=True):
        check_tensor("a bank a", a, (ranks, features), x.dtype, x.device)
        check_tensor("a bank b", b, (ranks, width), x.dtype, x.device)
    num_experts = gates.shape[-1] - 1
    check_tensor("gates", gates, (tokens, max(0, num_experts) + 1), torch.float32, x.device)
    if r < 1 or ranks < max(1, num_experts * r):
        raise ValueError(f"banks of {ranks} ranks do not hold {num_experts} experts of rank {r}")
    active = ranks
    if experts is not None:
        if tokens != 1 or experts.shape[-1] == 0:
            raise ValueError(
                f"experts are {list(experts.shape)} for {tokens} token(s): give those of one token, at least one, or none"
            )
        check_tensor("experts", experts, (1, experts.shape[-1]), torch.int32, x.device)
        active = experts.shape[1] * r + ranks - num_experts * r
    check_tensor("h", h, h_shape(tokens, len(widths), active), x.dtype, x.device)
