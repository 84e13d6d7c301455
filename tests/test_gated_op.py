"""The expand of an h of all ranks, and weights with A appended, against a float64 loop over tokens and experts."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from test_batch_op import DEVICE, LIMITS, ROUTINGS, assert_close, expected_delta, make_data, make_tiles, route
from test_matmul_op import weights

from adafuse.ops.appended import append, whole
from adafuse.ops.gated import add_gated, expand_gated, expand_gated_ref, linear_gated, takes_in_order

SORTED = partial(expand_gated, in_order=False)
# tokens, experts, top_k, r, shared rank
SIZES = [(63, 8, 2, 16, 3), (130, 64, 16, 1, 0), (130, 6, 2, 48, 0), (40, 1, 1, 4, 3), (9, 8, 2, 64, 16)]


def check(kind, size, features, outputs, dtype, run=expand_gated, in_place=False, **blocks):
    routing = route(kind, *size[:3])
    tiles = make_tiles(routing, size, **blocks)
    x, a, b, _ = make_data(size, features, outputs, dtype)
    w = weights(features, outputs, dtype)
    weight, *a = append(torch.cat(w), a)
    y, h = (x.double() @ whole(weight, a).double().T).to(dtype).split([sum(outputs), len(a) * tiles.rank], dim=1)
    out = y if in_place else torch.full((size[0], sum(outputs)), torch.nan, dtype=dtype, device=DEVICE)
    assert run(y, h, b, tiles, out) is out
    for got, base, pair in zip(out.split(outputs, dim=1), w, zip(a, b, strict=True), strict=True):
        exact = x.double().cpu() @ base.double().cpu().T + expected_delta(x, *pair, routing, size)
        assert_close(got, exact, dtype)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_linear(kind, size):
    dtype = [torch.float32, torch.float16, torch.bfloat16][(ROUTINGS.index(kind) + SIZES.index(size)) % 3]
    check(kind, size, 64, (72,), dtype, run=SORTED)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sorted_tokens_and_tokens_as_they_come(size, in_order):
    dtype = [torch.float32, torch.float16, torch.bfloat16][SIZES.index(size) % 3]
    check("zipf", size, 64, (72, 24), dtype, run=partial(expand_gated, in_order=in_order))


def test_tokens_stay_in_order_where_sorting_leaves_nothing_out():
    assert takes_in_order(num_tiles=4, top_k=2, num_experts=8)
    assert not takes_in_order(num_tiles=5, top_k=2, num_experts=8)
    assert not takes_in_order(num_tiles=1, top_k=16, num_experts=256)
    assert not takes_in_order(num_tiles=4, top_k=1, num_experts=4)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("outputs", [(64, 24, 304), (40, 264)], ids=str)
def test_groups_of_odd_sizes(dtype, outputs):
    check("uniform", (63, 6, 2, 16, 3), 72, outputs, dtype, run=SORTED, in_place=True, block_t=32, block_r=16)


@pytest.mark.parametrize("blocks", [{"block_r": 32}, {"block_r": 64, "block_t": 64}, {"block_r": 16}], ids=str)
def test_blocks_of_less_and_more_than_an_expert(blocks):
    check("uniform", (63, 6, 2, 32, 0), 64, (72, 16), torch.float32, run=SORTED, **blocks)


def test_reference_agrees_with_the_loop():
    check("zipf", (63, 8, 2, 16, 3), 64, (72, 24), torch.float32, run=expand_gated_ref)


def test_whole_is_one_matrix_where_it_lies_so():
    rows = torch.arange(40.0).view(10, 4)
    weight, a, more = rows[:5], rows[5:7], rows[7:]
    assert whole(weight, [a, more]).data_ptr() == rows.data_ptr()
    assert torch.equal(whole(weight, [a, more]), rows)
    assert torch.equal(whole(weight, [a]), rows[:7])
    neighbour = torch.frombuffer(rows.numpy(), dtype=torch.float32, offset=5 * 16, count=8).view(
        2, 4
    )  # another storage
    assert neighbour.data_ptr() == a.data_ptr()
    for apart in ([neighbour], [more], [a.clone()], [a.T], [a, a], [a.bfloat16()]):
        assert whole(weight, apart) is None
    assert whole(weight[:, :2], [a[:, :2]]) is None
    copies = append(weight.clone(), [a.clone(), more.clone()])
    assert torch.equal(whole(copies[0], copies[1:]), rows)


@pytest.mark.parametrize("together", ["all", "a", "nothing"])
def test_a_whole_linear(together):
    size, outputs = (63, 8, 2, 16, 3), (72, 24)
    routing = route("zipf", *size[:3])
    tiles = make_tiles(routing, size)
    x, a, b, _ = make_data(size, 64, outputs, torch.float32)
    weight = torch.cat(weights(64, outputs, torch.float32))
    if together == "all":
        weight, *a = append(weight, a)
    elif together == "a":
        a = append(a[0], a[1:])
    exact = [
        x.double().cpu() @ base.double().cpu().T + expected_delta(x, *pair, routing, size)
        for base, *pair in zip(weight.split(outputs), a, b, strict=True)
    ]
    y = x @ weight.T
    assert add_gated(y, x, a, b, tiles) is y
    for got in (linear_gated(x, weight, a, b, tiles), y):
        for part, wanted in zip(got.split(outputs, dim=1), exact, strict=True):
            assert_close(part, wanted, torch.float32)


def test_bad_arguments_are_refused():
    size = (9, 8, 2, 4, 0)
    tiles = make_tiles(route("uniform", *size[:3]), size)
    y, h, b = torch.zeros(9, 16), torch.zeros(9, 32), torch.zeros(32, 16)
    y, h, b = (tensor.to(DEVICE) for tensor in (y, h, b))
    with pytest.raises(ValueError, match="4 tensors b were given"):
        expand_gated(y, h, [b] * 4, tiles)
    with pytest.raises(ValueError, match=r"y is torch\.float32 \[9, 15\]"):
        expand_gated(y[:, :15], h, [b], tiles)
    with pytest.raises(ValueError, match=r"h is torch\.float16"):
        expand_gated(y, h.half(), [b], tiles)
    with pytest.raises(ValueError, match="rows a multiple of 16 bytes"):
        expand_gated(y[:, :15], h, [b[:, :15].contiguous()], tiles)
    with pytest.raises(ValueError, match=r"out is .* \[8, 16\]"):
        expand_gated(y, h, [b], tiles, y[:8])
    with pytest.raises(ValueError, match="gradient"):
        expand_gated(y, h, [b.requires_grad_()], tiles)


@pytest.mark.parametrize("trained", ["x", "weight", "a", "b", "gates"])
@pytest.mark.parametrize("together", [False, True])
def test_gradients_are_refused_in_later_calls_too(trained, together):
    """Whether A lies behind the weight or not; `known` tells the second call what the first has checked."""
    size, known = (9, 8, 2, 4, 0), {}
    tiles = make_tiles(route("uniform", *size[:3]), size)
    x, weight, a, b = (torch.zeros(n, m, device=DEVICE) for n, m in ((9, 24), (16, 24), (32, 24), (32, 16)))
    if together:
        weight, a = append(weight, [a])
    linear_gated(x, weight, [a], [b], tiles, known=known)
    add_gated(torch.zeros(9, 16, device=DEVICE), x, [a], [b], tiles)
    {"x": x, "weight": weight, "a": a, "b": b, "gates": tiles.gates}[trained].requires_grad_()
    with pytest.raises(ValueError, match="no backward pass"):
        linear_gated(x, weight, [a], [b], tiles, known=known)
    if trained != "weight":
        with pytest.raises(ValueError, match="no backward pass"):
            add_gated(torch.zeros(9, 16, device=DEVICE), x, [a], [b], tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    "size",
    [(512, 8, 2, 64, 0), (256, 64, 16, 1, 3), (300, 8, 2, 16, 16), (65, 16, 2, 48, 0), (100, 256, 16, 4, 0)],
    ids=str,
)
@pytest.mark.parametrize(("features", "outputs"), [(1024, (1024, 256, 256)), (1000, (1000,)), (2816, (1032,))], ids=str)
@pytest.mark.parametrize("in_order", [False, True])
def test_large_sizes_on_the_gpu(dtype, size, features, outputs, in_order):
    check("uniform", size, features, outputs, dtype, run=partial(expand_gated, in_order=in_order))
