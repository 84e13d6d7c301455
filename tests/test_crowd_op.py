"""`crowd` against loops over tokens and experts in float64. On a CPU it runs under Triton's interpreter."""

import pytest
import torch
from gpus import early_launch
from test_batch_op import ROUTINGS, route

pytest.importorskip("triton")

from adafuse.engine.graph import captured
from adafuse.ops.crowd import crowd, crowd_ref, cut_for
from adafuse.ops.layout import dense_gates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative RMS
SHARED_SCALE = 0.7
# tokens, features, widths of the group, experts, rank, top_k, shared rank
SIZES = [
    (9, 64, (32, 16), 8, 4, 2, 0),
    (33, 130, (80,), 6, 1, 2, 3),
    (63, 63, (17, 70, 9), 8, 16, 2, 0),
    (130, 96, (65, 64), 64, 1, 16, 3),
    (33, 256, (128, 64, 64), 8, 16, 2, 3),
    (9, 40, (24,), 1, 16, 1, 0),
    (63, 100, (33,), 6, 4, 1, 3),
]
# The least there is; fewer programs than tiles; more; nearly one program a step; several tiles of tokens; narrow blocks of ranks.
CUTS = [
    {"programs": 1, "shrinks": 1},
    {"programs": 3, "shrinks": 2, "block_i": 32},
    {"programs": 7, "shrinks": 5, "block_i": 16, "block_o": 32},
    {"programs": 13, "shrinks": 3, "block_i": 16, "block_o": 32},
    {"programs": 61, "shrinks": 23, "block_i": 16, "block_r": 16},
    {"programs": 10, "shrinks": 9, "block_t": 16, "block_i": 32},
    {"programs": 4, "block_o": 128, "block_r": 128, "block_t": 32},
]
BIG = [
    (32, 4096, (4096, 1024, 1024), 8, 64, 2, 0),
    (32, 11008, (4096,), 8, 64, 2, 0),
    (256, 4096, (11008, 11008), 8, 64, 2, 0),
    (256, 11008, (4096,), 8, 64, 2, 16),
    (256, 4096, (4096, 4096, 4096), 64, 1, 16, 0),
    (100, 999, (1001, 7), 7, 3, 3, 1),
    (9, 4096, (4096,), 8, 16, 2, 0),
    (128, 4096, (4096, 1024, 1024), 8, 64, 2, 0),
    (100, 14336, (4096,), 8, 16, 2, 16),
    (300, 4096, (4096,), 8, 16, 2, 0),
]


def a_case(tokens, features, widths, num_experts, r, top_k, shared, dtype, kind="uniform"):
    torch.manual_seed(0)
    ranks = num_experts * r + shared

    def normal(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(DEVICE, dtype)

    gates = dense_gates(*route(kind, tokens, num_experts, top_k), num_experts, SHARED_SCALE)
    x = normal(tokens, features)
    weights = [normal(o, features, scale=features**-0.5) for o in widths]
    banks_a = [normal(ranks, features, scale=features**-0.5) for _ in widths]
    banks_b = [normal(ranks, o) for o in widths]
    return x, weights, banks_a, banks_b, gates


def loop(x, w, a, b, gates, r):
    """[T, O] in float64, a token and an expert at a time."""
    x, w, a, b = (m.double().cpu() for m in (x, w, a, b))
    gates = gates.double().cpu()
    shared = slice((gates.shape[1] - 1) * r, None)
    ys = []
    for x_t, gates_t in zip(x, gates, strict=True):
        y = w @ x_t + gates_t[-1] * (a[shared] @ x_t) @ b[shared]
        for e in gates_t[:-1].nonzero().flatten().tolist():
            rows = slice(e * r, (e + 1) * r)
            y = y + gates_t[e] * (a[rows] @ x_t) @ b[rows]
        ys.append(y)
    return torch.stack(ys)


def scratch(cut, tokens, modules, ranks, dtype):
    nan = float("nan")
    h = torch.full(cut.h_shape(tokens, modules, ranks), nan, dtype=dtype, device=DEVICE) if ranks else None
    partial = torch.full(cut.partial_shape, nan, device=DEVICE)
    flags = torch.zeros(cut.num_flags(tokens, modules, ranks), dtype=torch.int32, device=DEVICE)
    return {"h": h, "partial": partial, "flags": flags, "cut": cut}


def run(x, weights, banks_a=(), banks_b=(), gates=None, r=1, out=None, given=None, **options):
    widths = [len(w) for w in weights]
    ranks = len(banks_a[0]) if gates is not None else 0
    cut = cut_for(*x.shape, widths, ranks, x.dtype, **(given or {}))
    if out is None:
        out = torch.full((len(x), sum(widths)), float("nan"), dtype=x.dtype, device=DEVICE)
    buffers = scratch(cut, len(x), len(weights), ranks, x.dtype)
    return crowd(x, weights, out, banks_a=banks_a, banks_b=banks_b, gates=gates, r=r, **buffers, **options)


def error(got, exact):
    return ((got.double().cpu() - exact).norm() / exact.norm()).item()


def check(size, dtype, kind="uniform", **options):
    case = a_case(*size, dtype, kind)
    x, weights, *_, gates = case
    exact = [loop(x, *each, gates, size[4]) for each in zip(*case[1:4], strict=True)]
    got = run(*case, size[4], **options)
    for part, expected in zip(got.split(size[2], -1), exact, strict=True):
        assert error(part, expected) < LIMITS[dtype]
    plain = torch.cat([x.double().cpu() @ w.double().cpu().T for w in weights], -1)
    assert error(run(x, weights, **options), plain) < LIMITS[dtype]
    return got


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_the_loop(size, dtype):
    check(size, dtype)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[3]], ids=str)
def test_every_routing(kind, size):
    check(size, torch.float32, kind)


@pytest.mark.parametrize("given", CUTS, ids=str)
@pytest.mark.parametrize("size", [SIZES[2], SIZES[4]], ids=str)
def test_every_cut(given, size):
    check(size, torch.float32, given=given)


@pytest.mark.parametrize("r", [4, 64])
def test_two_warp_groups(r):
    """As cut for 65 to 128 tokens; more pieces of h than programs that compute it, and fewer."""
    check((100, 256, (128, 72), 8, r, 2, 0), torch.bfloat16)


def test_the_reference_equals_the_loop():
    size = SIZES[4]
    x, *matrices, gates = a_case(*size, torch.float32)
    exact = torch.cat([loop(x, *each, gates, size[4]) for each in zip(*matrices, strict=True)], -1)
    assert error(crowd_ref(x, *matrices, gates, size[4]), exact) < 1e-5


def test_rows_may_lie_apart():
    size = SIZES[0]
    case = a_case(*size, torch.float32)
    wide = torch.full((9, 64 + 5), 7.0, device=DEVICE)
    wide[:, :64] = case[0]
    out = torch.full((9, 48 + 3), 7.0, device=DEVICE)
    got = run(wide[:, :64], *case[1:], size[4], out=out[:, :48])
    torch.testing.assert_close(got, run(*case, size[4]))
    assert out[:, 48:].eq(7).all()


def test_the_same_bits_every_time():
    size = SIZES[4]
    case = a_case(*size, torch.bfloat16)
    given = {"programs": 7, "shrinks": 5, "block_i": 32}
    assert run(*case, size[4], given=given).equal(run(*case, size[4], given=given))


@pytest.mark.parametrize("tokens", [9, 32, 64, 100, 128, 256, 300])
@pytest.mark.parametrize("ranks", [0, 16, 67, 512])
def test_default_cuts_leave_nobody_without_work(tokens, ranks):
    for features, widths in [(4096, (4096, 1024, 1024)), (4096, (4096,)), (11008, (4096,)), (4096, (11008, 11008))]:
        cut = cut_for(tokens, features, widths, ranks)
        token_tiles = -(-tokens // cut.block_t)
        tiles = sum(-(-o // cut.block_o) for o in widths) * token_tiles
        steps = -(-features // cut.block_i)
        assert cut.programs <= tiles * steps
        pieces = len(widths) * -(-ranks // cut.block_o) * token_tiles
        assert (cut.shrinks == 0) == (ranks == 0)
        assert cut.shrinks <= pieces * steps
        # Shared h is done about when the programs that need it get to their steps over ranks.
        if ranks:
            assert pieces * steps / cut.shrinks <= 2 * max(4, tiles * steps / cut.programs)
            assert cut.shrinks + cut.programs <= 2 * 132 + cut.shrinks * (tokens <= 64)


def test_a_cut_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="Cut has no"):
        cut_for(32, 4096, (4096,), 128, block_x=64)


def bad(change):
    size = SIZES[0]
    x, weights, banks_a, banks_b, gates = a_case(*size, torch.float32)
    cut = cut_for(*x.shape, size[2], 32, x.dtype)
    arguments = {"x": x, "base_weights": weights, "out": torch.empty(9, 48, device=DEVICE)}
    arguments |= {"banks_a": banks_a, "banks_b": banks_b, "gates": gates, "r": 4}
    arguments |= scratch(cut, 9, 2, 32, x.dtype)
    return arguments | change(arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"x": a["x"].clone().requires_grad_()}, "no backward"),
        (lambda a: {"x": a["x"].double()}, "needs bfloat16, float16 or float32"),
        (lambda a: {"x": a["x"][0]}, r"needs \[T, I\]"),
        (lambda a: {"x": a["x"][:0]}, r"at least one token"),
        (lambda a: {"x": a["x"].T.contiguous().T}, "last dimension"),
        (lambda a: {"base_weights": ()}, "at least one linear"),
        (lambda a: {"base_weights": [w[:, ::2] for w in a["base_weights"]]}, "a base weight is"),
        (lambda a: {"base_weights": [w.T.contiguous().T for w in a["base_weights"]]}, "contiguous"),
        (lambda a: {"base_weights": [w.half() for w in a["base_weights"]]}, "float16, needs torch.float32"),
        (lambda a: {"out": a["out"][:, 1:]}, "out is"),
        (lambda a: {"gates": None}, "without gates"),
        (lambda a: {"gates": a["gates"][:5]}, "gates is"),
        (lambda a: {"r": 16}, "too small"),
        (lambda a: {"banks_b": a["banks_b"][:1]}, "1 banks_b for 2"),
        (lambda a: {"banks_a": (), "banks_b": ()}, "without banks"),
        (lambda a: {"h": None}, "h is missing"),
        (lambda a: {"partial": a["partial"][1:]}, "partial is"),
        (lambda a: {"flags": a["flags"][1:]}, "flags are"),
        (lambda a: {"cut": a["cut"]._replace(shrinks=0)}, "make it with cut_for"),
        (lambda a: {"cut": a["cut"]._replace(block_i=24)}, "power of two"),
        (lambda a: {"cut": a["cut"]._replace(block_r=128)}, "unwritten"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        crowd(**bad(change))


def check_at_size(size, dtype, **options):
    """Against the reference in float64, on the device: the loop would take minutes."""
    x, *matrices, gates = a_case(*size, dtype)
    double = [[m.double() for m in group] for group in matrices]
    exact = crowd_ref(x.double(), *double, gates.double(), size[4]).cpu()
    got = run(x, *matrices, gates, size[4], **options)
    for part, expected in zip(got.split(size[2], -1), exact.split(size[2], -1), strict=True):
        assert error(part, expected) < LIMITS[dtype]
    for _ in range(5):
        assert run(x, *matrices, gates, size[4], **options).equal(got)
    assert error(run(x, matrices[0], **options), crowd_ref(x.double(), double[0]).cpu()) < LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("pdl", [False, pytest.param(True, marks=early_launch)])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", BIG, ids=str)
def test_it_equals_the_reference_at_size(size, dtype, pdl):
    check_at_size(size, dtype, pdl=pdl)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [32, 256])
def test_many_more_programs_than_the_device_holds(tokens):
    given = {"programs": 1500, "shrinks": 700}
    check_at_size((tokens, 4096, (4096, 4096), 8, 64, 2, 0), torch.bfloat16, given=given)


@early_launch
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [32, 256])
def test_a_chain_in_a_graph(tokens):
    """Each call reads what the one before wrote, with scratch in common; flags are filled once per replay."""
    torch.manual_seed(0)
    r, num_experts, features, depth = 16, 8, 2048, 6
    cases = [a_case(tokens, features, (features,), num_experts, r, 2, 0, torch.bfloat16) for _ in range(depth)]
    gates = cases[0][-1]
    cut = cut_for(tokens, features, (features,), num_experts * r)
    buffers = scratch(cut, tokens, 1, num_experts * r, torch.bfloat16)
    need = len(buffers.pop("flags"))
    flags = torch.zeros(depth, need, dtype=torch.int32, device=DEVICE)
    xs = [cases[0][0].clone(), *(torch.empty_like(cases[0][0]) for _ in range(depth))]

    def chain():
        flags.zero_()
        for n, (_, w, a, b, _) in enumerate(cases):
            options = {"banks_a": a, "banks_b": b, "gates": gates, "r": r, "pdl": True}
            crowd(xs[n], w, xs[n + 1], flags=flags[n], **options, **buffers)

    chain()
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        chain()
    for _ in range(10):
        xs[0].normal_()
        for x in xs[1:]:
            x.fill_(float("nan"))
        graph.replay()
        for n, (_, w, a, b, _) in enumerate(cases):
            exact = crowd_ref(xs[n].double(), [w[0].double()], [a[0].double()], [b[0].double()], gates.double(), r)
            assert error(xs[n + 1], exact.cpu()) < 1e-2
