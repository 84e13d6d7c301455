"""`pair` against loops over tokens and experts in float64. On a CPU it runs under Triton's interpreter."""

import pytest
import torch
from gpus import early_launch, no_host_sync
from test_crowd_op import DEVICE, LIMITS, a_case, error, loop

pytest.importorskip("triton")

from adafuse.engine.graph import captured
from adafuse.ops.pair import Tile, h_shape, pair

# tokens, features, widths of the group, experts, rank, top_k, shared rank
SIZES = [
    (1, 256, (32, 16), 8, 16, 2, 0),
    (1, 264, (24, 17), 4, 3, 2, 3),
    (2, 64, (48, 16), 4, 4, 2, 2),
    (7, 520, (40,), 6, 1, 6, 0),
    (8, 512, (32, 16, 16), 8, 16, 2, 0),
    (9, 1024, (17, 70), 4, 8, 1, 3),
    (20, 128, (16,), 64, 1, 16, 0),
    (32, 72, (33,), 8, 64, 2, 0),
]
# One step ahead; all of them; few warps and many; two tiles of rows a program.
TILES = [
    {"ahead": 1, "x_ahead": 1},
    {"ahead": 99, "x_ahead": 99},
    {"num_warps": 2},
    {"num_warps": 16},
    {"rows": 32},
    {"rows": 64, "num_warps": 4},
]
BIG = [
    (1, 4096, (4096, 1024, 1024), 8, 64, 2, 0),
    (1, 14336, (4096,), 64, 1, 16, 8),
    (3, 11008, (4096,), 8, 64, 2, 0),
    (8, 5120, (2560, 2560, 2560), 8, 16, 2, 0),
    (8, 4096, (14336, 14336), 8, 64, 2, 16),
    (13, 6912, (5120,), 8, 16, 2, 0),
    (32, 1000, (1001, 7), 7, 3, 3, 1),
    (20, 4096, (1040,), 8, 64, 2, 0),  # where 32 rows a program go past the last output, by 16
]


def chosen(gates):
    """Of one token, as the operation takes them."""
    return gates[:, :-1].nonzero()[:, 1].int()[None].to(gates.device).contiguous()


def run(x, weights, banks_a=(), banks_b=(), gates=None, r=1, experts=None, out=None, h=None, **options):
    """Into memory that holds NaN."""
    if out is None:
        out = torch.full((len(x), sum(map(len, weights))), float("nan"), dtype=x.dtype, device=DEVICE)
    if gates is not None:
        ranks, num_experts = len(banks_a[0]), gates.shape[1] - 1
        active = ranks if experts is None else experts.shape[1] * r + ranks - num_experts * r
        h = torch.full(h_shape(len(x), len(weights), active), float("nan"), dtype=x.dtype, device=DEVICE)
    return pair(x, weights, out, banks_a=banks_a, banks_b=banks_b, gates=gates, experts=experts, r=r, h=h, **options)


def check(size, dtype=torch.bfloat16, kind="uniform", **options):
    """Of all ranks, of one token also of its own alone, and without experts."""
    case, r = a_case(*size, dtype, kind), size[4]
    x, weights, *_, gates = case
    exact = torch.cat([loop(x, *each, gates, r) for each in zip(*case[1:4], strict=True)], -1)
    assert error(run(*case, r, **options), exact) < LIMITS[dtype]
    if len(x) == 1:
        assert error(run(*case, r, experts=chosen(gates), **options), exact) < LIMITS[dtype]
    plain = torch.cat([x.double().cpu() @ w.double().cpu().T for w in weights], -1)
    assert error(run(x, weights, **options), plain) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_the_loop(size, dtype):
    check(size, dtype)


@pytest.mark.parametrize("kind", ["identical", "distinct", "empty"])
@pytest.mark.parametrize("size", [SIZES[4], SIZES[6]], ids=str)
def test_every_routing(kind, size):
    check(size, kind=kind)


@pytest.mark.parametrize("given", TILES, ids=str)
@pytest.mark.parametrize("size", [SIZES[1], SIZES[5]], ids=str)
def test_every_tile(given, size):
    check(size, tile=Tile(**given))
    check(size, of_ranks=Tile(**{**given, "rows": 16}))


def test_tokens_without_adapter_get_the_base():
    case = a_case(*SIZES[4], torch.bfloat16)
    gates = case[-1].clone()
    gates[3] = 0
    got = run(*case[:-1], gates, SIZES[4][4])
    assert torch.equal(got[3], run(*case[:2])[3])
    assert not torch.equal(got[4], run(*case[:2])[4])


def test_rows_apart():
    x, *rest = a_case(*SIZES[4], torch.bfloat16)
    wide = torch.randn(len(x), 2 * x.shape[1], device=DEVICE).to(x.dtype)
    wide[:, : x.shape[1]] = x
    out = torch.full((len(x), 100), 7.0, dtype=x.dtype, device=DEVICE)
    run(wide[:, : x.shape[1]], *rest, SIZES[4][4], out=out[:, 8:72])
    assert torch.equal(out[:, 8:72], run(x, *rest, SIZES[4][4]))
    assert (out[:, :8] == 7).all()
    assert (out[:, 72:] == 7).all()


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": lambda x: x.float()}, "x is torch.float32"),
        ({"x": lambda x: x.repeat(5, 1)}, "1 to 32 tokens"),
        ({"x": lambda x: x[:, ::2]}, "last axis contiguous"),
        ({"weights": lambda w: []}, "base_weights is empty"),
        ({"weights": lambda w: [w[0], w[1][:, :-8], w[2]]}, r"a base weight is torch.bfloat16 \[16, 504\]"),
        ({"banks_b": lambda b: b[:2]}, "3 banks_a and 2 banks_b, and gates, for 3 base weights"),
        ({"gates": lambda g: None}, "3 banks_a and 3 banks_b, no gates"),
        ({"banks_b": lambda b: [b[0], b[1][:-1], b[2]]}, r"a bank b is torch.bfloat16 \[127, 16\].*needs.*\[128, 16\]"),
        ({"gates": lambda g: g[:4].contiguous()}, r"gates is torch.float32 \[4, 9\].*needs torch.float32 \[8, 9\]"),
        ({"gates": lambda g: g[:, :0].contiguous()}, r"gates is torch.float32 \[8, 0\].*needs torch.float32 \[8, 1\]"),
        ({"gates": lambda g: g.T.contiguous().T}, r"gates is .* with strides \(1, 8\), needs .*, contiguous"),
        ({"r": lambda r: 17}, "banks of 128 ranks do not hold 8 experts of rank 17"),
        ({"r": lambda r: 0}, "banks of 128 ranks do not hold 8 experts of rank 0"),
        ({"experts": lambda _: int32(8, 2)}, r"experts are \[8, 2\] for 8 token\(s\): give those of one token"),
        ({"h": lambda h: h[:2]}, r"h is torch.bfloat16 \[2, 8, 128\].*needs torch.bfloat16 \[3, 8, 128\]"),
        ({"h": lambda h: None}, "h is missing"),
        ({"out": lambda out: out[:, :-1]}, r"out is torch.bfloat16 \[8, 63\].*needs torch.bfloat16 \[8, 64\]"),
        ({"tile": lambda _: Tile(rows=24)}, "tiles of 24 rows"),
        ({"of_ranks": lambda _: Tile(rows=32)}, "of ranks 32"),
    ],
)
def test_what_cannot_be_read_is_refused(changes, says):
    x, weights, banks_a, banks_b, gates = a_case(*SIZES[4], torch.bfloat16)
    given = {
        "x": x,
        "weights": weights,
        "banks_a": banks_a,
        "banks_b": banks_b,
        "gates": gates,
        "r": 16,
        "experts": None,
    }
    given |= {
        "h": torch.empty(3, 8, 128, dtype=x.dtype, device=DEVICE),
        "out": torch.empty(8, 64, dtype=x.dtype, device=DEVICE),
    }
    given |= {name: change(given.get(name)) for name, change in changes.items()}
    with pytest.raises(ValueError, match=says):
        pair(given.pop("x"), given.pop("weights"), given.pop("out"), **given)


@pytest.mark.parametrize(
    ("shape", "says"), [((1, 0), "at least one"), ((2, 2), r"experts is .*\[2, 2\].*needs torch.int32 \[1, 2\]")]
)
def test_experts_of_one_token(shape, says):
    case = a_case(1, 64, (16,), 4, 4, 2, 3, torch.bfloat16)
    with pytest.raises(ValueError, match=says):
        run(*case, 4, experts=int32(*shape))


def test_rows_that_do_not_begin_on_16_bytes_are_refused():
    case = a_case(2, 60, (16,), 4, 4, 2, 0, torch.bfloat16)
    with pytest.raises(ValueError, match="rows of 60 features, of x 60 apart, do not all begin on 16 bytes"):
        run(*case, 4)


def test_gradients_are_refused():
    x, weights, *_ = a_case(*SIZES[4], torch.bfloat16)
    with pytest.raises(ValueError, match="no backward pass"):
        run(x.requires_grad_(), weights)


@pytest.mark.gpu
@pytest.mark.parametrize("size", BIG, ids=str)
def test_large_sizes_on_the_gpu(size):
    check(size)
    check(size, tile=Tile(rows=32, ahead=4, maxnreg=168))


@pytest.mark.gpu
@early_launch
@pytest.mark.parametrize("size", [BIG[0], BIG[3]], ids=str)
def test_the_second_launch_waits_for_the_first(size):
    """h holds NaN, and x what the step before left, until a slow kernel has written x. In a graph, without host sync, often."""
    case, r = a_case(*size, torch.bfloat16), size[4]
    x, *rest, gates = case
    xs = torch.randn(8, *x.shape, device=DEVICE).to(x.dtype)
    late, given = torch.empty_like(x), {"experts": chosen(gates)} if len(x) == 1 else {}
    exact = [run(each, *rest, gates, r, **given) for each in xs]  # one after the other
    active = given["experts"].shape[1] * r if given else len(rest[1][0])
    h = torch.empty(h_shape(len(x), len(rest[0]), active), dtype=x.dtype, device=DEVICE)
    outs, slow = [torch.empty_like(each) for each in exact], torch.randn(1 << 22, device=DEVICE)
    banks = {"banks_a": rest[1], "banks_b": rest[2], "gates": gates, "r": r, "h": h, **given}

    slow_ranks = Tile(num_warps=1, ahead=1, x_ahead=1)  # so that h is late

    def steps():
        for n, (each, out) in enumerate(zip(xs, outs, strict=True)):
            h.fill_(float("nan"))
            late.copy_(each + slow.sum() * 0)
            pair(late, rest[0], out, **banks, pdl=True, of_ranks=slow_ranks if n % 2 else None)
            pair(xs[n - 1], rest[0], outs[n - 1], **banks, pdl=True)  # at once, with the same h

    steps()
    graph = torch.cuda.CUDAGraph()
    with no_host_sync(), captured(graph):
        steps()
    for _ in range(50):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        # Not to the bit: other warps, another order of sums.
        assert all(error(out, each.double().cpu()) < 1e-2 for out, each in zip(outs, exact, strict=True))
