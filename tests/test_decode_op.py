"""`decode` against loops over tokens and experts in float64. On a CPU it runs under Triton's interpreter."""

import pytest
import torch
from gpus import early_launch
from test_batch_op import ROUTINGS, route

pytest.importorskip("triton")

from adafuse.ops.chosen import Chosen
from adafuse.ops.decode import Tile, decode, decode_ref
from adafuse.ops.launch import processors
from adafuse.ops.ranks import EMPTY, copies_of_h, expand_ref, shrink_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative RMS
SHARED_SCALE = 0.7
# tokens, features, widths of the group, experts, rank, top_k, shared rank
SIZES = [
    (1, 64, (32, 16), 8, 4, 2, 0),
    (1, 130, (17,), 6, 1, 6, 3),
    (2, 63, (17, 5, 9), 6, 16, 2, 0),
    (7, 64, (40,), 1, 16, 1, 2),
    (8, 40, (8, 24), 64, 1, 16, 0),
    (1, 40, (24,), 256, 1, 16, 0),
]
BIG = [
    (1, 4096, (4096, 1024, 1024), 8, 64, 2, 0),
    (1, 11008, (4096,), 8, 16, 2, 0),
    (1, 4096, (11008, 11008), 64, 1, 16, 0),
    (2, 2048, (2048, 512, 512), 128, 4, 4, 16),
    (8, 4096, (4096,), 8, 64, 2, 0),
    (4, 4096, (4096, 1024, 1024), 8, 64, 2, 0),
    (7, 14336, (4096,), 8, 16, 2, 0),
    (3, 576, (1536, 1536), 64, 1, 16, 8),
    (8, 2048, (2048,), 4, 128, 4, 0),
    (5, 999, (1001, 7), 7, 3, 3, 1),
]


def a_case(tokens, features, widths, num_experts, r, top_k, shared, dtype, kind="uniform"):
    torch.manual_seed(0)
    ranks = num_experts * r + shared

    def normal(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(DEVICE, dtype)

    chosen = Chosen(*route(kind, tokens, num_experts, top_k), num_experts, r, shared, SHARED_SCALE)
    x = normal(tokens, features)
    weights = [normal(o, features, scale=features**-0.5) for o in widths]
    banks_a = [normal(ranks, features, scale=features**-0.5) for _ in widths]
    banks_b = [normal(ranks, o) for o in widths]
    return x, weights, banks_a, banks_b, chosen


def loop(x, w, a, b, chosen):
    """h [T, J] and y [T, O] in float64, a token, an expert and a rank at a time."""
    x, w, a, b = (m.double().cpu() for m in (x, w, a, b))
    hs, ys = [], []
    for t in range(len(x)):
        h, y = [], w @ x[t]
        slots = [(int(e), float(g)) for e, g in zip(chosen.experts[t], chosen.weights[t], strict=True)]
        rows = [(e * chosen.r + i, g) for e, g in slots for i in range(chosen.r)]
        rows += [(chosen.num_experts * chosen.r + i, chosen.shared_scale) for i in range(chosen.shared_rank)]
        for row, scale in rows:
            h.append(scale * (a[row] @ x[t]))
            y = y + h[-1] * b[row]
        hs.append(torch.stack(h))
        ys.append(y)
    return torch.stack(hs), torch.stack(ys)


def relative_error(got, exact):
    return ((got.double().cpu() - exact).norm() / exact.norm()).item()


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def empty(*shape):
    return torch.full(shape, EMPTY.value, device=DEVICE, dtype=torch.int32)


def check(size, dtype, kind="uniform", copies=None, **options):
    x, weights, banks_a, banks_b, chosen = a_case(*size, dtype, kind)
    exact = [loop(x, *each, chosen) for each in zip(weights, banks_a, banks_b, strict=True)]
    exact_h = torch.stack([each for each, _ in exact])
    h = empty(copies or copies_of_h(chosen.active), len(x), len(weights), chosen.active)
    y = nan(len(x), sum(size[2]), dtype=dtype)
    decode(x, weights, y, banks_a=banks_a, banks_b=banks_b, chosen=chosen, h=h, **options)
    for copy in h.view(torch.float32):
        assert relative_error(copy.transpose(0, 1), exact_h) < 1e-5
    assert relative_error(y, torch.cat([each for _, each in exact], -1)) < LIMITS[dtype]
    plain = decode(x, weights, nan(len(x), sum(size[2]), dtype=dtype), **options)
    assert (
        relative_error(plain, torch.cat([x.double().cpu() @ w.double().cpu().T for w in weights], -1)) < LIMITS[dtype]
    )


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernels_equal_the_loop(size, dtype):
    check(size, dtype)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_every_routing(kind):
    check((3, 64, (32,), 8, 4, 2, 0), torch.float32, kind=kind)


def test_the_first_programs_compute_a_second_tile():
    """More outputs than the device is taken to have places for programs; the second tiles are of the other linear."""
    outputs = processors(torch.empty(0, device=DEVICE))
    check((1, 40, (outputs - 30, 60), 6, 2, 2, 1), torch.float32, tile=Tile(1, 4, resident=1))


@pytest.mark.parametrize(
    "tile",
    [
        Tile(4, 4, chunks=2, block_j=4),
        Tile(1, 8, chunks=8, block_j=2),
        Tile(16, 4, chunks=1),
        Tile(4, 4, patient=True),
        Tile(4, 4, patient=False),
    ],
)
@pytest.mark.parametrize("size", SIZES[1:3], ids=str)
def test_tiles_change_nothing(size, tile):
    check(size, torch.float32, tile=tile)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_o", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(2, 264, (9,), 16, 3, 2, 5), (8, 520, (13, 8), 6, 2, 2, 0)], ids=str)
def test_rows_in_parts_for_tensor_cores(size, block_o, dtype):
    """One row in eight parts for groups of two tokens, to eight rows whole; features that fill neither parts nor loads."""
    check(size, dtype, tile=Tile(block_o, 4))


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("num_experts", [5, 20])
def test_tokens_that_share_experts_by_tensor_cores(kind, num_experts):
    """Identical, distinct and uneven choices, of fewer and more experts than the tokens choose."""
    check((5, 64, (32, 16), num_experts, 5, 3, 2), torch.bfloat16, kind=kind)


@pytest.mark.parametrize("num_experts", [5, 20])
def test_a_token_may_have_an_expert_twice(num_experts):
    """As in buffers that were zeroed and hold no routing yet: whoever waits for a rank must find it."""
    check_routing(torch.zeros(3, 3), num_experts, 5)


def test_experts_that_only_the_last_of_many_choices_are_of():
    first, others = torch.arange(32).expand(4, 32), torch.arange(32, 64)
    check_routing(torch.cat([first, others[None]]), 64, 1)


def check_routing(experts, num_experts, r):
    tokens, top_k = experts.shape
    x, weights, banks_a, banks_b, chosen = a_case(tokens, 64, (32,), num_experts, r, top_k, 0, torch.bfloat16)
    chosen.experts.copy_(experts)
    h = empty(copies_of_h(chosen.active), tokens, 1, chosen.active)
    out = decode(x, weights, nan(tokens, 32, dtype=x.dtype), banks_a=banks_a, banks_b=banks_b, chosen=chosen, h=h)
    exact = decode_ref(x.double(), *([m.double() for m in each] for each in (weights, banks_a, banks_b)), chosen)
    assert relative_error(out, exact.cpu()) < LIMITS[torch.bfloat16]


def test_a_tile_for_tensor_cores_fits_into_registers():
    for features in (8, 576, 2048, 4096, 8192, 11008, 14336, 28672, 65536):
        tile = Tile.of_fragments(features)
        assert tile.steps(features) <= 16
        assert tile.steps(features) * 32 * tile.num_warps * (8 // tile.block_o) >= features


@pytest.mark.parametrize("tokens", [2, 7, 8])
def test_several_tokens_are_multiplied_by_tensor_cores_where_they_can_be(tokens, monkeypatch):
    """Sums in fp32 of products by tensor cores, against a kernel that is told to do without them."""
    size = (tokens, 72, (24,), 4, 4, 2, 0)
    x, weights, *_ = a_case(*size, torch.bfloat16)
    used = []
    original = Tile.of_fragments
    monkeypatch.setattr(Tile, "of_fragments", lambda features: used.append(features) or original(features))
    by_tensor_cores = decode(x, weights, nan(tokens, 24, dtype=torch.bfloat16))
    assert used == [72]
    plain = decode(x, weights, nan(tokens, 24, dtype=torch.bfloat16), tile=Tile(16, 4))
    assert relative_error(by_tensor_cores, plain.double().cpu()) < 4e-3  # rounded to bf16, twice
    apart = torch.empty(tokens, 73, dtype=torch.bfloat16, device=DEVICE)[:, :72].copy_(x)  # rows that are not aligned
    decode(apart, weights, nan(tokens, 24, dtype=torch.bfloat16))
    assert used == [72]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("pdl", [False, pytest.param(True, marks=early_launch)])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", BIG, ids=str)
def test_the_kernels_equal_the_loop_at_size(size, dtype, pdl):
    check(size, dtype, pdl=pdl)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_references_equal_the_loop(size):
    x, weights, banks_a, banks_b, chosen = a_case(*size, torch.float32)
    h = shrink_ref(x, banks_a, chosen)
    y = decode_ref(x, weights, banks_a, banks_b, chosen)
    exact = [loop(x, *each, chosen) for each in zip(weights, banks_a, banks_b, strict=True)]
    assert relative_error(h.transpose(0, 1), torch.stack([each for each, _ in exact])) < 1e-5
    assert relative_error(y, torch.cat([each for _, each in exact], -1)) < 1e-5
    delta = expand_ref(h[:, 0], banks_b[0], chosen)
    assert relative_error(x @ weights[0].T + delta, exact[0][1]) < 1e-5


def broken(**changes):
    """decode's arguments for a small case, one of them wrong."""
    x, weights, banks_a, banks_b, chosen = a_case(2, 64, (32, 16), 4, 2, 2, 0, torch.float32)
    arguments = {"x": x, "base_weights": weights, "banks_a": banks_a, "banks_b": banks_b, "chosen": chosen}
    arguments |= {"out": nan(2, 48), "h": empty(16, 2, 2, chosen.active)}
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda x: x.repeat(5, 1)}, r"1 to 8 tokens .* got \[10, 64\]"),
        ({"x": lambda x: x.T.contiguous().T}, "its last axis contiguous"),
        ({"x": lambda x: x[:, :40]}, r"base_weights has shape \[32, 64\], but x has 40 features"),
        ({"x": lambda x: x.bfloat16()}, "base_weights is torch.float32 .* x is torch.bfloat16"),
        ({"base_weights": lambda ws: [w.T.contiguous().T for w in ws]}, "must be a contiguous matrix"),
        ({"banks_b": lambda bs: [b[:5].contiguous() for b in bs]}, "banks_b has 5 rows, but the routing is of 8 ranks"),
        ({"h": lambda h: h[:, :1]}, r"h must be contiguous int32 \[C, 2, 2, 4\]"),
        ({"h": lambda h: h[:3]}, "C a power of two"),
        ({"h": lambda _: None}, "h must be contiguous int32"),
        ({"base_weights": lambda ws: [w.requires_grad_() for w in ws]}, "no backward pass"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decode(**broken(**changes))
