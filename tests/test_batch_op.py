"""The block-sparse delta of a batch: its layout against a slow interpreter of it, its kernels against a float64 loop."""

from itertools import pairwise

import pytest
import torch
from gpus import early_launch

pytest.importorskip("triton")

from adafuse.engine.graph import captured
from adafuse.ops.batch import (
    add_delta_tiles,
    add_delta_tiles_ref,
    expand_tiles,
    expand_tiles_ref,
    shrink_tiles,
    shrink_tiles_ref,
)
from adafuse.ops.layout import lay_out

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHARED_SCALE = 0.75
ROUTINGS = ["identical", "distinct", "uniform", "zipf", "one expert empty"]
# tokens, experts, top_k, r, shared rank: with experts larger than a block of ranks, as large, smaller and straddling blocks
SIZES = [
    (9, 8, 2, 16, 3),
    (63, 8, 2, 4, 0),
    (63, 6, 2, 16, 3),
    (63, 6, 2, 48, 0),
    (130, 8, 2, 16, 0),
    (130, 64, 16, 1, 3),
    (130, 64, 16, 4, 0),
    (9, 64, 2, 1, 0),
    (63, 1, 1, 4, 3),
    (130, 6, 1, 4, 0),
]


def route(kind, tokens, num_experts, top_k):
    """experts int32, weights fp32, both [tokens, top_k]; weights include the scale."""
    preference = torch.rand(tokens, num_experts)
    if kind == "identical":
        preference = preference[:1].expand(tokens, -1)
    if kind == "distinct":
        preference = -((torch.arange(num_experts) - torch.arange(tokens)[:, None] * top_k) % num_experts).float()
    if kind == "zipf":
        preference = preference.log() * torch.arange(1, num_experts + 1)
    if kind == "one expert empty" and num_experts > top_k:
        preference[:, num_experts // 2] = -1
    experts = preference.topk(top_k, dim=-1).indices.int()
    return experts.to(DEVICE), (torch.rand(tokens, top_k) * 2 + 0.1).to(DEVICE)


def make_tiles(routing, size, **blocks):
    _, num_experts, _, r, shared_rank = size
    return lay_out(*routing, num_experts=num_experts, r=r, shared_rank=shared_rank, shared_scale=SHARED_SCALE, **blocks)


def rank_mask(routing, size):
    """float64 [T, R] of the tokens in their own order, by loops."""
    tokens, num_experts, _, r, shared_rank = size
    mask = torch.zeros(tokens, num_experts * r + shared_rank, dtype=torch.float64)
    mask[:, num_experts * r :] = SHARED_SCALE
    for token, (experts, weights) in enumerate(zip(*(part.tolist() for part in routing), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            mask[token, expert * r : (expert + 1) * r] = weight
    return mask


def expected_delta(x, a, b, routing, size):
    """float64 [T, O]: every token and every expert in turn."""
    tokens, num_experts, _, r, _ = size
    x, a, b = (part.double().cpu() for part in (x, a, b))
    delta = torch.zeros(tokens, b.shape[1], dtype=torch.float64)
    shared = slice(num_experts * r, None)
    for t, (experts, weights) in enumerate(zip(*(part.tolist() for part in routing), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            rows = slice(expert * r, (expert + 1) * r)
            delta[t] += weight * (x[t] @ a[rows].T) @ b[rows]
        delta[t] += SHARED_SCALE * (x[t] @ a[shared].T) @ b[shared]
    return delta


def make_data(size, features, outputs, dtype):
    """x [T, I]; for each of the outputs a [R, I], b [R, O], y [T, O]."""
    tokens, num_experts, _, r, shared_rank = size
    rank = num_experts * r + shared_rank

    def random(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(DEVICE, dtype)

    a = tuple(random(rank, features, scale=features**-0.5) for _ in outputs)
    return (
        random(tokens, features),
        a,
        tuple(random(rank, o) for o in outputs),
        tuple(random(tokens, o) for o in outputs),
    )


def poisoned(tiles, modules, dtype):
    return torch.full(tiles.h_shape(modules), torch.nan, dtype=dtype, device=DEVICE)


def assert_close(got, expected, dtype):
    error = (got.double().cpu() - expected).norm() / expected.norm()
    assert error < LIMITS[dtype], f"relative error {error:.2e}"


def needed_part(h, tiles):
    """h where a tile needs it, 0 elsewhere."""
    kept = torch.zeros_like(h)
    for tile, count in enumerate(tiles.counts.tolist()):
        rows = slice(tile * tiles.block_t, (tile + 1) * tiles.block_t)
        for block in tiles.blocks[tile, :count].tolist():
            columns = slice(block * tiles.block_r, (block + 1) * tiles.block_r)
            kept[:, rows, columns] = h[:, rows, columns]
    return kept


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("blocks", [{}, {"block_t": 16, "block_r": 16}, {"block_t": 32, "block_r": 64}], ids=str)
def test_layout_covers_exactly_what_is_needed(kind, size, blocks):
    routing = route(kind, *size[:3])
    tiles, mask = make_tiles(routing, size, **blocks), rank_mask(routing, size)
    assert sorted(tiles.order.tolist()) == list(range(size[0]))
    assert (tiles.rank, tiles.tokens) == (mask.shape[1], size[0])

    for tile in range(tiles.num_tiles):
        tokens = tiles.order[tile * tiles.block_t : (tile + 1) * tiles.block_t].long().cpu()
        needed = [
            block
            for block in range(tiles.num_blocks)
            if mask[tokens, block * tiles.block_r : (block + 1) * tiles.block_r].any()
        ]
        assert tiles.blocks[tile, : tiles.counts[tile]].tolist() == needed

    laid = tiles.mask().double().cpu()
    assert laid.shape == tiles.h_shape(1)[1:]
    assert laid[size[0] :].eq(0).all()
    assert laid[:, mask.shape[1] :].eq(0).all()
    torch.testing.assert_close(laid[: size[0], : mask.shape[1]], mask[tiles.order.long().cpu()])


@pytest.mark.parametrize(("num_experts", "top_k", "r"), [(8, 2, 16), (64, 16, 1), (256, 16, 16), (256, 3, 64)])
def test_tokens_with_the_same_experts_are_neighbours(num_experts, top_k, r):
    experts, weights = route("uniform", 20, num_experts, top_k)
    choice = torch.randint(0, 20, (200,), device=DEVICE)
    tiles = lay_out(experts[choice], weights[choice], num_experts=num_experts, r=r, block_r=16)
    blocks_of = [frozenset(e * r // 16 for e in row) for row in experts[choice].tolist()]
    if r < 16:  # several experts to a block: sets of blocks are what is sorted
        sequence = [blocks_of[token] for token in tiles.order.tolist()]
    else:
        sequence = [frozenset(experts[choice[token]].tolist()) for token in tiles.order.tolist()]
    changes = sum(left != right for left, right in pairwise(sequence))
    assert changes == len(set(sequence)) - 1


def test_neighbouring_sets_of_one_size_differ_by_one_exchange():
    pairs = torch.combinations(torch.arange(8)).flip(0).to(DEVICE)
    tiles = lay_out(pairs, torch.ones(pairs.shape, device=DEVICE), num_experts=8, r=16, block_r=16)
    sequence = [set(pairs[token].tolist()) for token in tiles.order.tolist()]
    assert all(len(left & right) == 1 for left, right in pairwise(sequence))


def test_several_decisions_at_once_are_each_laid_out_alone():
    size = (63, 8, 2, 16, 3)
    routings = [route(kind, *size[:3]) for kind in ("uniform", "zipf")]
    both = make_tiles([torch.stack(part) for part in zip(*routings, strict=True)], size)
    for decision, routing in enumerate(routings):
        alone, view = make_tiles(routing, size), both[decision]
        for name in ("order", "gates", "counts", "blocks"):
            assert torch.equal(getattr(view, name), getattr(alone, name))


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_delta_of_one_linear(kind, size):
    dtype = [torch.float32, torch.float16, torch.bfloat16][(ROUTINGS.index(kind) + SIZES.index(size)) % 3]
    check_delta(kind, size, 63, (130,), dtype)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("blocks", [{}, {"block_t": 16, "block_r": 16}, {"block_t": 128, "block_r": 64}], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_delta_of_a_group_in_every_dtype_and_block_size(dtype, blocks, splits):
    check_delta("uniform", (63, 6, 2, 16, 3), 130, (63, 24, 130), dtype, splits=splits, **blocks)


def check_delta(kind, size, features, outputs, dtype, splits=None, **blocks):
    routing = route(kind, *size[:3])
    tiles = make_tiles(routing, size, **blocks)
    x, a, b, y = make_data(size, features, outputs, dtype)
    before = [part.double().cpu() for part in y]

    block_i = 32 if DEVICE == "cpu" else None
    h = shrink_tiles(x, a, tiles, out=poisoned(tiles, len(a), dtype), splits=splits, block_i=block_i)
    assert_close(needed_part(h, tiles), shrink_tiles_ref(x, a, tiles).double().cpu(), dtype)
    assert h.isnan().logical_not().sum() == tiles.counts.sum() * tiles.block_t * tiles.block_r * len(a)
    expand_tiles(h, b, tiles, y)
    for got, base, a_part, b_part in zip(y, before, a, b, strict=True):
        assert_close(got, base + expected_delta(x, a_part, b_part, routing, size), dtype)


@pytest.mark.parametrize("held", [16, 64, 512])
@pytest.mark.parametrize("size", [SIZES[3], SIZES[5], SIZES[9]], ids=str)
def test_what_is_held_and_how_columns_are_cut_changes_nothing(size, held):
    """Tiles that need more ranks than are held, and strips that end in the middle."""
    routing = route("zipf", *size[:3])
    tiles = make_tiles(routing, size, block_t=16, block_r=16)
    x, a, b, y = make_data(size, 40, (130, 24), torch.float32)
    h = shrink_tiles(x, a, tiles, block_i=32)
    wanted = [part.clone() for part in y]
    expand_tiles_ref(shrink_tiles_ref(x, a, tiles), b, tiles, wanted)
    expand_tiles(h, b, tiles, y, held=held, strip=3, block_o=16)
    for got, part in zip(y, wanted, strict=True):
        assert_close(got, part.double().cpu(), torch.float32)


def test_references_agree_with_the_loop():
    size = (63, 8, 2, 16, 3)
    routing = route("zipf", *size[:3])
    tiles = make_tiles(routing, size)
    x, a, b, y = make_data(size, 63, (130, 24), torch.float32)
    expected = [expected_delta(x, *pair, routing, size) for pair in zip(a, b, strict=True)]
    before = [part.double().cpu() for part in y]
    add_delta_tiles_ref(y, x, a, b, tiles)
    for got, base, delta in zip(y, before, expected, strict=True):
        assert_close(got, base + delta, torch.float32)


def test_rows_of_x_and_y_may_lie_apart():
    size = (63, 8, 2, 16, 0)
    routing = route("uniform", *size[:3])
    x, a, b, _ = make_data(size, 63, (40,), torch.float32)
    wide_x, wide_y = torch.full((63, 80), torch.nan, device=DEVICE), torch.full((63, 100), 7.0, device=DEVICE)
    wide_x[:, 5:68] = x
    add_delta_tiles(wide_y[:, 33:73], wide_x[:, 5:68], a, b, make_tiles(routing, size))
    assert_close(wide_y[:, 33:73], 7 + expected_delta(x, a[0], b[0], routing, size), torch.float32)
    assert wide_y[:, :33].eq(7).all()
    assert wide_y[:, 73:].eq(7).all()


def test_the_order_of_sums_is_fixed():
    size = (63, 8, 2, 16, 3)
    tiles = make_tiles(route("uniform", *size[:3]), size)
    x, a, _, _ = make_data(size, 130, (8, 8), torch.float32)
    first, second = (needed_part(shrink_tiles(x, a, tiles, splits=2, block_i=32), tiles) for _ in range(2))
    assert torch.equal(first, second)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    size = (9, 8, 2, 4, 0)
    routing = route("uniform", *size[:3])
    tiles = make_tiles(routing, size)
    x, a, b, y = make_data(size, 32, (16,), torch.float32)
    h = shrink_tiles(x, a, tiles)

    known = {}
    shrink_tiles(x, a, tiles, known=known)
    with pytest.raises(ValueError, match="no backward pass"):
        shrink_tiles(x.clone().requires_grad_(), a, tiles, known=known)
    with pytest.raises(ValueError, match="no backward pass"):
        expand_tiles(h, b[0].clone().requires_grad_(), tiles, y)
    with pytest.raises(ValueError, match="a is torch"):
        shrink_tiles(x, a[0].half(), tiles)
    with pytest.raises(ValueError, match="b is torch"):
        expand_tiles(h, b[0].half(), tiles, y)
    with pytest.raises(ValueError, match="needs bfloat16"):
        expand_tiles(h, b, tiles, y[0].double())
    with pytest.raises(ValueError, match="x has strides"):
        shrink_tiles(x.T.contiguous().T, a, tiles)
    with pytest.raises(ValueError, match="a has strides"):
        shrink_tiles(x, a[0].T.contiguous().T, tiles)
    with pytest.raises(ValueError, match="y has strides"):
        expand_tiles(h, b, tiles, y[0].T.contiguous().T)
    with pytest.raises(ValueError, match=r"x is \[8, 32\]"):
        shrink_tiles(x[:8], a, tiles)
    with pytest.raises(ValueError, match=r"a is \[31, 32\]"):
        shrink_tiles(x, a[0][:31], tiles)
    with pytest.raises(ValueError, match=r"y is \[8, 16\]"):
        expand_tiles(h, b, tiles, y[0][:8])
    with pytest.raises(ValueError, match="2 tensors b for 1 outputs"):
        expand_tiles(h, b + b, tiles, y)
    with pytest.raises(ValueError, match="choose one"):
        shrink_tiles(x, a, make_tiles([part[None] for part in routing], size))
    with pytest.raises(ValueError, match="powers of two"):
        make_tiles(routing, size, block_r=24)
    with pytest.raises(ValueError, match="must both be"):
        make_tiles((routing[0], routing[1][:, :1]), size)


def test_trained_weights_run_without_gradients():
    size = (9, 8, 2, 4, 0)
    x, a, b, y = make_data(size, 32, (16,), torch.float32)
    with torch.no_grad():
        add_delta_tiles(y, x, a[0].requires_grad_(), b, make_tiles(route("uniform", *size[:3]), size))


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    "size", [(1000, 8, 2, 64, 0), (1000, 64, 16, 1, 3), (256, 8, 2, 64, 16), (32, 16, 2, 64, 0)], ids=str
)
@pytest.mark.parametrize(("features", "outputs"), [(1024, (1024, 256, 256)), (1000, (1000,)), (2816, (1023,))], ids=str)
def test_large_sizes_on_the_gpu(dtype, size, features, outputs):
    check_delta("uniform", size, features, outputs, dtype)


@early_launch
@pytest.mark.gpu
def test_capture_and_dependent_launch_change_nothing():
    size = (256, 8, 2, 64, 0)
    routing = route("uniform", *size[:3])
    x, a, b, y = make_data(size, 1024, (1024, 512), torch.bfloat16)
    expected = tuple(part.clone() for part in y)
    add_delta_tiles(expected, x, a, b, make_tiles(routing, size))
    got, start = tuple(part.clone() for part in y), y

    def step():
        for into, value in zip(got, start, strict=True):
            into.copy_(value)
        add_delta_tiles(got, x, a, b, make_tiles(routing, size), pdl=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        step()
    for part in got:
        part.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(left, right) for left, right in zip(got, expected, strict=True))
