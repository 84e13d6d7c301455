"""Base and experts of many tokens in one launch, against a float64 loop over tokens and experts."""

import pytest
import torch

pytest.importorskip("triton")

from test_batch_op import (
    DEVICE,
    LIMITS,
    ROUTINGS,
    assert_close,
    make_data,
    make_tiles,
    needed_part,
    poisoned,
    route,
)
from test_matmul_op import SIZES, assert_outputs, check_reference, check_rows_that_lie_apart, weights

from adafuse.engine.graph import captured
from adafuse.ops.batch import shrink_tiles_ref
from adafuse.ops.mixture import Room, matmul_mixture, matmul_mixture_ref

NAN = float("nan")


def room_of(x, linears, tiles, **given):
    """Scratch in which another call left what is no number."""
    room = Room.make(x, linears, tiles, **given)
    room.partial.fill_(NAN)
    return room._replace(h=poisoned(tiles, linears, x.dtype))


def run(x, w, a, b, tiles, block_n=None, programs=None, **given):
    """Output, and what was left in h."""
    if given.get("transposed"):
        b = [part.T.contiguous() for part in b]
    tiles_of_y = {name: given[name] for name in ("block_o", "shared") if name in given}
    room = room_of(x, len(w), tiles, block_n=block_n, programs=programs, **tiles_of_y)
    out = torch.full((len(x), sum(map(len, w))), NAN, dtype=x.dtype, device=DEVICE)
    matmul_mixture(x, w, a, b, tiles, out, room, block_n=block_n, programs=programs, **given)
    return out, room.h


def check(kind, size, features, outputs, dtype, blocks=None, **given):
    routing = route(kind, *size[:3])
    tiles = make_tiles(routing, size, **(blocks or {}))
    x, a, b, _ = make_data(size, features, outputs, dtype)
    w = weights(features, outputs, dtype)
    got, h = run(x, w, a, b, tiles, **given)
    assert_close(needed_part(h, tiles), needed_part(shrink_tiles_ref(x, a, tiles), tiles).double().cpu(), dtype)
    assert_outputs(got, outputs, x, w, a, b, routing, size, dtype)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_linear(kind, size):
    dtype = [torch.float32, torch.float16, torch.bfloat16][(ROUTINGS.index(kind) + SIZES.index(size)) % 3]
    check(kind, size, 64, (72,), dtype, block_i=32)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("outputs", [(64, 24, 304), (40, 264)], ids=str)
def test_groups_of_odd_sizes(dtype, outputs):
    check("uniform", (63, 6, 2, 16, 3), 72, outputs, dtype, {"block_t": 32, "block_r": 16})


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(
    ("size", "outputs"),
    [((63, 8, 2, 16, 8), (72,)), ((130, 64, 16, 1, 0), (40, 24)), ((70, 6, 2, 48, 0), (64, 24, 304))],
    ids=str,
)
def test_in_one_loop(kind, size, outputs):
    """b transposed. Features that fill the last step or do not, ranks of one expert a block or of several, whole or in part."""
    dtype = [torch.float32, torch.float16, torch.bfloat16][(ROUTINGS.index(kind) + size[0]) % 3]
    blocks, features = {"block_t": 32, "block_r": 32}, 96 if ROUTINGS.index(kind) % 2 else 104
    check(kind, size, features, outputs, dtype, blocks, block_i=32, block_o=64, programs=5, transposed=True)


# What is dealt out depends on how many programs there are: none with a tile less than the others; some, too few for all chunks, enough,
# or more than there are chunks; some that compute no tile at all.
@pytest.mark.parametrize("programs", [1, 5, 6, 7, 11, 13, 50])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"each": 3},
        {"most_splits": 3},
        {"block_n": 16},
        {"transposed": True},
        {"shared": True},
        {"shared": True, "most_splits": 3},
    ],
    ids=str,
)
def test_every_way_to_deal_out_work(programs, given):
    """A chunk whole, by a program or several in turn, and by up to 8 programs. Tiles need from 2 to 8 of 8 blocks, and the last of the 25
    tiles of y are whole or of 2, 3 or 6 programs."""
    size, outputs, blocks = (70, 8, 2, 16, 0), (72, 40), {"block_t": 16, "block_r": 16}
    given = {"block_n": 64, "block_o": 32, "block_i": 16, "programs": programs, **given}
    kinds = torch.tensor([0, 1, 2, 0, 1]).repeat_interleave(16)[
        :70
    ]  # a tile of each: identical tokens, distinct ones, others
    experts = torch.stack([route(kind, 70, 8, 2)[0].cpu() for kind in ("identical", "distinct", "uniform")])
    routing = experts[kinds, torch.arange(70)].to(DEVICE), torch.rand(70, 2, device=DEVICE)
    tiles = make_tiles(routing, size, **blocks)
    x, a, b, _ = make_data(size, 512, outputs, torch.float32)
    w = weights(512, outputs, torch.float32)
    wanted = torch.empty(70, sum(outputs), device=DEVICE)
    matmul_mixture_ref(x, w, a, b, tiles, wanted)
    got, _ = run(x, w, a, b, tiles, **given)
    assert_close(got, wanted.double().cpu(), torch.float32)


def test_a_tile_that_needs_all_blocks():
    check("distinct", (63, 8, 2, 16, 3), 64, (40, 24, 16), torch.float32, {"block_t": 64, "block_r": 16}, block_n=32)


def test_more_tiles_than_are_counted_at_once():
    size = (130 * 16, 4, 1, 16, 0)
    tiles = make_tiles(route("uniform", *size[:3]), size, block_t=16, block_r=16)
    x, a, b, _ = make_data(size, 16, (16,), torch.float32)
    w = weights(16, (16,), torch.float32)
    wanted = torch.empty(len(x), 16, device=DEVICE)
    matmul_mixture_ref(x, w, a, b, tiles, wanted)
    assert tiles.num_tiles > 128
    assert_close(run(x, w, a, b, tiles, block_n=16)[0], wanted.double().cpu(), torch.float32)


def test_reference_agrees_with_the_loop():
    check_reference(matmul_mixture_ref)


def test_rows_of_x_and_out_may_lie_apart():
    check_rows_that_lie_apart(
        lambda x, w, a, b, tiles, out: matmul_mixture(x, w, a, b, tiles, out, room_of(x, 1, tiles))
    )


def test_bad_arguments_are_refused():
    size = (40, 8, 2, 4, 0)
    tiles = make_tiles(route("uniform", *size[:3]), size)
    x, a, b, _ = make_data(size, 32, (16,), torch.float32)
    w = weights(32, (16,), torch.float32)
    room, out, known = Room.make(x, 1, tiles), torch.empty(40, 16, device=DEVICE), {}
    matmul_mixture(x, w, a, b, tiles, out, room, known=known)  # its checks must not spare the next call's
    for trained in (x, w[0], a[0], b[0], tiles.gates):
        trained.requires_grad_()
        with pytest.raises(ValueError, match="no backward pass"):
            matmul_mixture(x, w, a, b, tiles, out, room, known=known)
        trained.requires_grad_(False)
    for small in (
        {"flags": room.flags[1:]},
        {"flags": room.flags.float()},
        {"partial": room.partial[1:]},
        {"h": room.h[:, 1:]},
    ):
        with pytest.raises(ValueError, match=r"room\.(flags are|partial is|h is)"):
            matmul_mixture(x, w, a, b, tiles, out, room._replace(**small), known=known)

    def refused(match, x=x, w=w, a=a, b=b, out=out, room=room, **given):
        with pytest.raises(ValueError, match=match):
            matmul_mixture(x, w, a, b, tiles, out, room, **given)

    refused("4 base weights were given", w=w * 4)
    refused(r"x is \[39, 32\]", x=x[:39])
    refused(r"a base weight is torch\.float16", w=(w[0].half(),))
    refused(r"a is \[31, 32\], needs \[32, 32\]", a=(a[0][:31],))
    refused(r"a is torch\.float16", a=(a[0].half(),))
    refused("2 tensors a for 1 base weights", a=a + a)
    refused("2 tensors b for 1 outputs", b=b + b)
    refused("they must agree", out=out.half())
    refused(r"h is \[1, 32, 32\]", room=room._replace(h=room.h[:, :32]))
    refused(r"block_n 48 must be a power of two", block_n=48)
    refused("with b transposed, ranks are taken 16 at once", b=(b[0].T.contiguous(),), block_i=16, transposed=True)
    refused(r"a b is .* needs, transposed, .* \[16, 32\]", block_i=32, transposed=True)
    refused(r"a b is .* needs, transposed, .* \[16, 32\]", b=(b[0].T,), block_i=32, transposed=True)
    refused("not both", transposed=True, shared=True)
    refused(r"room\.partial is .* needs contiguous fp32", shared=True)
    refused(r"block_n 16 must be a power of two, no smaller than the blocks of 32 ranks", block_n=16)


# --- on the GPU -----------------------------------------------------------------------------------------------------------

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")]
GROUPS = [(1024, (1024, 256, 256)), (4096, (4096,)), (1000, (1000,)), (2816, (1032, 520))]


def gpu_case(size, features, outputs, dtype, **blocks):
    routing = route("uniform", *size[:3])
    tiles = make_tiles(routing, size, **blocks)
    x, a, b, _ = make_data(size, features, outputs, dtype)
    w = weights(features, outputs, dtype)
    mask = tiles.mask().double()
    order, rows = tiles.order.long(), slice(0, tiles.tokens)
    exact = torch.empty(len(x), sum(outputs), dtype=torch.float64, device=DEVICE)
    for part, base, each_a, each_b in zip(exact.split(outputs, dim=1), w, a, b, strict=True):
        sorted_x = x.double()[order]
        h = (sorted_x @ each_a.double().T) * mask[rows, : tiles.rank]
        part[order] = sorted_x @ base.double().T + h @ each_b.double()
    return (x, w, a, b, tiles), exact.cpu()


class TestOnTheGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    @pytest.mark.parametrize(
        "size", [(1000, 8, 2, 64, 0), (2048, 8, 2, 16, 0), (2048, 64, 16, 1, 3), (130, 16, 2, 64, 0)], ids=str
    )
    @pytest.mark.parametrize(("features", "outputs"), GROUPS, ids=str)
    def test_large_sizes(self, dtype, size, features, outputs):
        case, exact = gpu_case(size, features, outputs, dtype)
        got, _ = run(*case)
        assert_close(got, exact, dtype)
        for _ in range(5):
            assert run(*case)[0].equal(got)

    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    @pytest.mark.parametrize("size", [(1000, 8, 2, 64, 0), (2048, 8, 2, 16, 0), (2048, 64, 16, 1, 8)], ids=str)
    @pytest.mark.parametrize(("features", "outputs"), GROUPS, ids=str)
    def test_large_sizes_in_one_loop(self, dtype, size, features, outputs):
        case, exact = gpu_case(size, features, outputs, dtype, block_r=32 if dtype == torch.float32 else 64)
        got, _ = run(*case, transposed=True)
        assert_close(got, exact, dtype)
        for _ in range(5):
            assert run(*case, transposed=True)[0].equal(got)

    @pytest.mark.parametrize(
        "programs", [7, 28, 45, 50, 100, 131, 132]
    )  # with 28 and 45 two and seven share a tile of the last
    @pytest.mark.parametrize(
        "given",
        [{}, {"most_splits": 1}, {"block_n": 64}, {"num_stages": 4}, {"transposed": True}, {"shared": True}],
        ids=str,
    )
    def test_every_way_to_deal_out_work(self, programs, given):
        case, exact = gpu_case((2048, 8, 2, 64, 0), 4096, (1024, 512), torch.bfloat16)
        assert_close(run(*case, programs=programs, **given)[0], exact, torch.bfloat16)

    @pytest.mark.parametrize("size", [(256, 8, 2, 64, 0), (100, 8, 2, 16, 3), (300, 64, 16, 1, 0)], ids=str)
    @pytest.mark.parametrize(("features", "outputs"), [*GROUPS, (14336, (4096,)), (4096, (11008, 11008))], ids=str)
    def test_few_tokens_whose_tiles_are_shared(self, size, features, outputs):
        case, exact = gpu_case(size, features, outputs, torch.bfloat16, block_t=128, block_r=64)
        got, _ = run(*case, shared=True)
        assert_close(got, exact, torch.bfloat16)
        for _ in range(20):
            assert run(*case, shared=True)[0].equal(got)

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("each", [1, 64])
    def test_tiles_wait_for_h_that_comes_late(self, each, transposed):
        """With each=64 a few programs compute all of h, chunk by chunk: the others' first tiles have long been ready for it, and h holds
        NaN. A hundred launches, each looked at."""
        x, w, a, b, tiles = gpu_case((2048, 8, 2, 64, 0), 4096, (4096,), torch.bfloat16)[0]
        wanted = run(x, w, a, b, tiles)[0]
        b = [part.T.contiguous() for part in b] if transposed else b
        room, out, bad = (
            room_of(x, 1, tiles),
            torch.empty_like(wanted),
            torch.zeros((), dtype=torch.int64, device=DEVICE),
        )
        for _ in range(100):
            for buffer in (room.h, room.partial, out):
                buffer.fill_(NAN)
            room.flags.zero_()
            matmul_mixture(x, w, a, b, tiles, out, room, each=each, transposed=transposed)
            bad += out.isnan().sum()
        assert bad.item() == 0
        assert_close(out, wanted.double().cpu(), torch.bfloat16)

    @pytest.mark.parametrize("shared", [False, True])
    def test_a_chain_in_a_graph(self, shared):
        """Each call reads what the one before wrote, with scratch in common; flags are filled once a replay."""
        size, features, depth = (600, 8, 2, 64, 0), 1024, 6
        cases = [gpu_case(size, features, (features,), torch.bfloat16)[0] for _ in range(depth)]
        tiles = cases[0][-1]
        xs = [cases[0][0].clone(), *(torch.empty_like(cases[0][0]) for _ in range(depth))]
        room = room_of(xs[0], 1, tiles, shared=shared)
        flags = room.flags.new_zeros(depth, len(room.flags))

        def chain():
            flags.zero_()
            for n, (_, w, a, b, _) in enumerate(cases):
                matmul_mixture(xs[n], w, a, b, tiles, xs[n + 1], room._replace(flags=flags[n]), shared=shared)

        chain()
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            chain()
        for _ in range(10):
            xs[0].normal_()
            for buffer in (*xs[1:], room.h, room.partial):
                buffer.fill_(NAN)
            graph.replay()
            for n, (_, w, a, b, _) in enumerate(cases):
                wanted = torch.empty_like(xs[n])
                matmul_mixture_ref(xs[n], w, a, b, tiles, wanted)
                assert_close(xs[n + 1], wanted.double().cpu(), torch.bfloat16)

    def test_more_programs_than_processors_are_refused(self):
        x, w, a, b, tiles = gpu_case((130, 8, 2, 16, 0), 64, (64,), torch.bfloat16)[0]
        with pytest.raises(ValueError, match="all have to run at once"):
            run(x, w, a, b, tiles, programs=1000)
