"""The matmul of base and experts for many tokens, against a float64 loop over tokens and experts."""

import pytest
import torch

pytest.importorskip("triton")

from test_batch_op import DEVICE, LIMITS, ROUTINGS, assert_close, expected_delta, make_data, make_tiles, poisoned, route

from adafuse.ops.batch import shrink_tiles, shrink_tiles_ref
from adafuse.ops.matmul import matmul_tiles, matmul_tiles_ref

# tokens, experts, top_k, r, shared rank
SIZES = [(63, 8, 2, 16, 3), (130, 64, 16, 1, 0), (130, 6, 2, 48, 0), (40, 1, 1, 4, 3)]


def weights(features, outputs, dtype):
    return tuple((torch.randn(o, features) * features**-0.5).to(DEVICE, dtype) for o in outputs)


def assert_outputs(got, outputs, x, w, a, b, routing, size, dtype):
    """Base and experts of each linear, against the float64 loop."""
    for part, base, pair in zip(got.split(outputs, dim=1), w, zip(a, b, strict=True), strict=True):
        exact = x.double().cpu() @ base.double().cpu().T + expected_delta(x, *pair, routing, size)
        assert_close(part, exact, dtype)


def check(kind, size, features, outputs, dtype, **blocks):
    routing = route(kind, *size[:3])
    tiles = make_tiles(routing, size, **blocks)
    x, a, b, _ = make_data(size, features, outputs, dtype)
    w = weights(features, outputs, dtype)
    h = shrink_tiles(x, a, tiles, out=poisoned(tiles, len(a), dtype), block_i=32 if DEVICE == "cpu" else None)
    out = torch.full((size[0], sum(outputs)), torch.nan, dtype=dtype, device=DEVICE)
    matmul_tiles(x, w, h, b, tiles, out)
    assert_outputs(out, outputs, x, w, a, b, routing, size, dtype)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_linear(kind, size):
    dtype = [torch.float32, torch.float16, torch.bfloat16][(ROUTINGS.index(kind) + SIZES.index(size)) % 3]
    check(kind, size, 64, (72,), dtype)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("outputs", [(64, 24, 304), (40, 264)], ids=str)
def test_groups_of_odd_sizes(dtype, outputs):
    check("uniform", (63, 6, 2, 16, 3), 72, outputs, dtype, block_t=32, block_r=16)


def test_reference_agrees_with_the_loop():
    size, outputs = (63, 8, 2, 16, 3), (72, 24)
    routing = route("zipf", *size[:3])
    tiles = make_tiles(routing, size)
    x, a, b, _ = make_data(size, 64, outputs, torch.float32)
    w = weights(64, outputs, torch.float32)
    out = torch.empty(63, 96, device=DEVICE)
    matmul_tiles_ref(x, w, shrink_tiles_ref(x, a, tiles), b, tiles, out)
    assert_outputs(out, outputs, x, w, a, b, routing, size, torch.float32)


def test_rows_of_x_and_out_may_lie_apart():
    size = (40, 8, 2, 16, 0)
    routing = route("uniform", *size[:3])
    tiles = make_tiles(routing, size)
    x, a, b, _ = make_data(size, 64, (40,), torch.float32)
    w = weights(64, (40,), torch.float32)
    wide_x = torch.full((40, 80), torch.nan, device=DEVICE)
    wide_x[:, 5:69] = x
    wide = torch.full((40, 100), 7.0, device=DEVICE)
    x = wide_x[:, 5:69]
    matmul_tiles(x, w, shrink_tiles(x, a, tiles), b, tiles, wide[:, 33:73])
    assert_outputs(wide[:, 33:73], (40,), x, w, a, b, routing, size, torch.float32)
    assert wide[:, :33].eq(7).all()
    assert wide[:, 73:].eq(7).all()


def test_bad_arguments_are_refused():
    size = (40, 8, 2, 4, 0)
    tiles = make_tiles(route("uniform", *size[:3]), size)
    x, a, b, _ = make_data(size, 32, (16,), torch.float32)
    w = weights(32, (16,), torch.float32)
    h, out = shrink_tiles(x, a, tiles), torch.empty(40, 16, device=DEVICE)
    known = {}
    matmul_tiles(x, w, h, b, tiles, out, known=known)  # its checks must not spare the next call's
    for trained in (x, h, w[0], b[0]):
        trained.requires_grad_()
        with pytest.raises(ValueError, match="no backward pass"):
            matmul_tiles(x, w, h, b, tiles, out, known=known)
        trained.requires_grad_(False)
    with pytest.raises(ValueError, match="4 base weights were given"):
        matmul_tiles(x, w * 4, h, b, tiles, out)
    with pytest.raises(ValueError, match=r"x is \[39, 32\]"):
        matmul_tiles(x[:39], w, h, b, tiles, out)
    with pytest.raises(ValueError, match=r"a base weight is torch\.float16"):
        matmul_tiles(x, (w[0].half(),), h, b, tiles, out)
    with pytest.raises(ValueError, match="rows a multiple of 16 bytes"):
        matmul_tiles(x[:, :30], (w[0][:, :30].contiguous(),), h, b, tiles, out)
    with pytest.raises(ValueError, match="they must agree"):
        matmul_tiles(x, w, h, b, tiles, out.half())
    with pytest.raises(ValueError, match=r"out is \[40, 12\] with strides \(16, 1\), needs \[40, 16\]"):
        matmul_tiles(x, w, h, b, tiles, out[:, :12])
    with pytest.raises(ValueError, match="2 tensors b for 1 outputs"):
        matmul_tiles(x, w, h, b + b, tiles, out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    "size", [(1000, 8, 2, 64, 0), (2048, 64, 16, 1, 3), (600, 8, 2, 16, 16), (130, 16, 2, 64, 0)], ids=str
)
@pytest.mark.parametrize(("features", "outputs"), [(1024, (1024, 256, 256)), (1000, (1000,)), (2816, (1032,))], ids=str)
def test_large_sizes_on_the_gpu(dtype, size, features, outputs):
    check("uniform", size, features, outputs, dtype)
