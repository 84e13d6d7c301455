"""The operations behind an adapted linear of vLLM's, and the buffers of a step, without vLLM: kernels (in Triton's
interpreter where there is no GPU) and dense form against loops over tokens and experts."""

import weakref

import pytest
import torch
from gpus import no_host_sync

from adafuse.config import AdaFuseConfig
from adafuse.costs import H100, Device
from adafuse.engine.graph import captured
from adafuse.integrations.vllm import op, routing
from adafuse.integrations.vllm.ahead import numbers_of_tokens
from adafuse.integrations.vllm.fused import linear_by_kernels
from adafuse.integrations.vllm.op import Group, Shape, add_by_kernels, add_dense, linear_dense
from adafuse.integrations.vllm.routing import Step
from adafuse.ops.appended import append
from adafuse.router import Router

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, IN, OUT = 24, 40, (33, 16)
REQUESTS = 4


def make_step(dtype=torch.float32, *, kernels, decisions=2, max_tokens=64, widths=None, others=(), **settings):
    """A step of layers that add their experts to what the base made; with widths: of as many layers as decisions that compute
    both, of linears with so many outputs. others: the widths of further layers.
    """
    settings = {
        "r": 4,
        "num_experts": 5,
        "top_k": 2,
        "shared_rank": 3,
        "lora_alpha": 6.0,
        "shared_alpha": 2.0,
        **settings,
    }
    config = AdaFuseConfig(**settings, routing="layer" if decisions > 1 else "model")
    router = Router(HIDDEN, config.num_experts, config.top_k, num_decisions=decisions, device=DEVICE).requires_grad_(
        False
    )
    step = Step(
        router, config, hidden_size=HIDDEN, max_tokens=max_tokens, max_requests=REQUESTS, dtype=dtype, kernels=kernels
    )
    groups = [each and Group(IN, each, dtype, step.shape) for each in [widths] * decisions + list(others)]
    step.rooms = [step.room_of(layer) for layer in [step.join(group) for group in groups]]
    for buffer in (*step.routing, *step.room):  # a kernel that reads what no step has written must not go unseen
        buffer.fill_(float("nan") if buffer.is_floating_point() else 1)
    return step


def spread(tokens, padding):
    """Where the tokens of REQUESTS requests begin, some padding behind: [REQUESTS + 1]."""
    real = tokens - padding
    return torch.tensor([real * i // REQUESTS for i in range(REQUESTS + 1)], dtype=torch.int32, device=DEVICE)


def by_loops(y, x, a, b, step, h0, decision, starts, bare):
    """y + delta in fp64, a token and an expert at a time."""
    config, y = step.config, y.double().clone()
    routing = step.router(h0[None].float())
    for t in range(len(x)):
        request = next((i for i in range(REQUESTS) if starts[i] <= t < starts[i + 1]), None)
        if request is None or bare[request]:
            continue
        column = 0
        for a_m, b_m in zip(a, b, strict=True):
            parts = [
                (config.scale * float(weight), slice(int(expert) * config.r, (int(expert) + 1) * config.r))
                for expert, weight in zip(routing.experts[0, t, decision], routing.weights[0, t, decision], strict=True)
            ]
            parts.append((config.shared_scale, slice(config.num_experts * config.r, len(a_m))))
            for scale, rows in parts:
                delta = (a_m[rows].double() @ x[t].double()) @ b_m[rows].double()
                y[t, column : column + b_m.shape[1]] += scale * delta
            column += b_m.shape[1]
    return y


def without_adapter(starts, bare, tokens):
    """[T]: whether a token is of no request, or of one without adapter."""
    without = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
    for i in range(REQUESTS):
        without[starts[i] : starts[i + 1]] = bare[i]
    return without


def case(tokens, dtype, step, widths=OUT):
    ranks = step.shape.ranks
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, dtype)

    h0 = torch.randn(tokens, HIDDEN, generator=generator).to(DEVICE, dtype)
    return (
        h0,
        random(tokens, sum(widths)),
        random(tokens, IN),
        [random(ranks, IN) for _ in widths],
        [random(ranks, o) for o in widths],
    )


@pytest.mark.parametrize("form", ["dense", "kernels"])
@pytest.mark.parametrize(("tokens", "shared_rank"), [(1, 3), (5, 0), (8, 3), (9, 3), (31, 0), (64, 3)])
def test_delta_of_a_step_equals_loops(form, tokens, shared_rank):
    step = make_step(kernels=form == "kernels", shared_rank=shared_rank)
    bare = [False, True, False, False]
    step.set_bare(bare)
    starts = spread(tokens, padding=tokens // 6)
    h0, y, x, a, b = case(tokens, torch.float32, step)
    add = add_by_kernels if form == "kernels" else add_dense
    for _ in range(2):  # buffers are used again
        assert torch.equal(step.route(h0, starts), h0)
        for decision in range(2):
            found = y.clone()
            add(found, x, a, b, [0, OUT[0]], step.by_decision[decision], step.shape)
            torch.testing.assert_close(
                found.double(), by_loops(y, x, a, b, step, h0, decision, starts, bare), rtol=1e-5, atol=1e-5
            )
            without = without_adapter(starts, bare, tokens)
            assert torch.equal(found[without], y[without])  # to the bit
            assert (found[~without] != y[~without]).any(1).all()


@pytest.mark.parametrize("form", ["dense", "kernels"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_delta_in_bf16(form, tokens):
    step = make_step(torch.bfloat16, kernels=form == "kernels", decisions=1)
    starts = spread(tokens, 0)
    h0, y, x, a, b = case(tokens, torch.bfloat16, step)
    step.route(h0, starts)
    found = y.clone()
    (add_by_kernels if form == "kernels" else add_dense)(found, x, a, b, [0, OUT[0]], step.by_decision[0], step.shape)
    right = by_loops(y, x, a, b, step, h0, 0, starts, [False] * REQUESTS)
    torch.testing.assert_close(found.double(), right, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_step_of_any_size_has_room(kernels, monkeypatch):
    monkeypatch.setattr(routing, "ROUTE_ROWS", 0)  # by PyTorch: the interpreter takes minutes for so many tokens
    step = make_step(kernels=kernels, decisions=1, max_tokens=600, r=1, num_experts=20, top_k=9)
    for tokens in (1, 17, 65, 257, 511, 513, 600):
        h0 = torch.randn(tokens, HIDDEN, device=DEVICE)
        step.route(h0, spread(tokens, 0))
    with pytest.raises(ValueError, match="601 tokens came, with room for 600"):
        step.route(torch.randn(601, HIDDEN, device=DEVICE), spread(601, 0))


@pytest.mark.parametrize("kernels", [False, True])
def test_load_counts_real_tokens_of_adapted_requests(kernels):
    step = make_step(kernels=kernels, decisions=1)
    step.set_bare([False, False, True, False])
    starts = torch.tensor([0, 3, 4, 9, 9], dtype=torch.int32, device=DEVICE)  # 3, 1, 5 and no tokens, then padding
    h0 = torch.randn(12, HIDDEN, device=DEVICE)
    step.route(h0, starts)
    chosen = step.router(h0[None]).experts[0, :4, 0].flatten().tolist()
    assert step.load[0].tolist() == [chosen.count(expert) for expert in range(5)]
    step.route(h0, None)  # no token of a request
    assert step.load.sum() == len(chosen)


def test_the_operation_is_one_that_torch_compile_keeps():
    step = make_step(kernels=False, decisions=1)
    h0, y, x, a, b = case(7, torch.float32, step)
    step.route(h0, spread(7, 0))
    arguments = (x, a, b, [0, OUT[0]], list(step.by_decision[0]), list(step.shape))
    if DEVICE.type == "cpu":
        torch.library.opcheck(torch.ops.adafuse.add_delta.default, (y.clone(), *arguments))

    def run(y):
        out = y * 2
        torch.ops.adafuse.add_delta(out, *arguments)
        return out + 1

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(y), run(y))


# --- base and experts together -----------------------------------------------------------------------------------------

SMALL = {"r": 1, "num_experts": 3, "shared_rank": 1}  # so few ranks that all may be read for a token
# form, tokens, dtype, settings
FORMS = [
    ("decode", 1, torch.bfloat16, {"shared_rank": 0}),
    ("decode", 3, torch.float32, {"shared_rank": 0}),
    ("decode", 8, torch.float32, {"shared_rank": 0}),
    ("crowd", 1, torch.bfloat16, SMALL),
    ("crowd", 6, torch.bfloat16, {"shared_rank": 0}),
    ("crowd", 8, torch.float32, SMALL),
    ("crowd", 9, torch.float32, {"shared_rank": 0}),
    ("crowd", 64, torch.float32, {}),
    ("tiles", 1, torch.float32, {}),
    ("tiles", 8, torch.float32, {}),
    ("tiles", 65, torch.float32, {}),
]


def check_layers(step, tokens, dtype, widths=OUT, bare=(False, True, False, False)):
    """The layers of a step, one a decision, against loops; tokens without adapter against the same layer with other experts."""
    step.set_bare(list(bare))
    starts = spread(tokens, padding=tokens // 6)
    h0, _, x, a, b = case(tokens, dtype, step, widths)
    weight = torch.randn(sum(widths), IN, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    base, tolerance = x.double() @ weight.double().T, {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    without = without_adapter(starts, bare, tokens)

    def compute(b, decision):
        return linear_by_kernels(x, weight, a, b, step.by_decision[decision], step.rooms[decision], step.shape)

    step.route(h0, starts)
    found = [compute(b, decision) for decision in range(step.shape.decisions)]
    step.route(h0, starts)
    others = [compute([-b_m for b_m in b], decision) for decision in range(step.shape.decisions)]
    for decision, (y, other) in enumerate(zip(found, others, strict=True)):
        right = by_loops(base, x, a, b, step, h0, decision, starts, bare)
        torch.testing.assert_close(y.double(), right, rtol=tolerance, atol=tolerance)
        assert torch.equal(y[without], other[without])  # to the bit
        assert (y[~without] != other[~without]).any(1).all()


@pytest.mark.parametrize(("form", "tokens", "dtype", "settings"), FORMS)
def test_a_whole_linear_equals_loops(form, tokens, dtype, settings):
    step = make_step(dtype, kernels=True, max_tokens=70, widths=OUT, **settings)
    assert Group(IN, OUT, dtype, step.shape).form(tokens) == form
    check_layers(step, tokens, dtype)


@pytest.mark.parametrize("tokens", [1, 8, 20])
@pytest.mark.parametrize("shared_rank", [0, 3])
def test_two_launches_equal_loops(tokens, shared_rank, monkeypatch):
    monkeypatch.setattr(op, "PAIR_TOKENS", 32)
    monkeypatch.setattr(Group, "form", Group.form.__wrapped__)
    step = make_step(torch.bfloat16, kernels=True, max_tokens=70, widths=OUT, shared_rank=shared_rank)
    assert Group(IN, OUT, torch.bfloat16, step.shape).form(tokens) == "pair"
    check_layers(step, tokens, torch.bfloat16)


@pytest.mark.parametrize("widths", [OUT, (32, 16)])
@pytest.mark.parametrize("form", ["tiles", "gated", "matmul"])
def test_forms_of_larger_linears(form, widths, monkeypatch):
    """Also where gated and matmul cannot read the rows of what is estimated to be theirs."""
    monkeypatch.setattr(Group, "form", Group.form.__wrapped__)  # what it keeps is of the right estimate
    monkeypatch.setattr(op, "fused_form", lambda *_: form)
    monkeypatch.setattr(op, "CROWD_READS", 0)
    step = make_step(torch.bfloat16, kernels=True, widths=widths, num_experts=6)
    assert all(buffer.numel() == 0 for buffer in step.room)
    check_layers(step, 20, torch.bfloat16, widths)


def test_sorted_tokens_for_many_experts(monkeypatch):
    """Too many for a tile to need nearly all: `gated` reads the layout, so the step must have written it."""
    monkeypatch.setattr(Group, "form", lambda *_: "gated")
    check_layers(make_step(kernels=True, widths=(32, 16), num_experts=16), 20, torch.float32, (32, 16))


def test_rows_that_descriptors_cannot_read():
    wide, odd, many = (
        Group(4096, widths, torch.bfloat16, Shape(1, 8, 2, 16, 0)) for widths in ((4096,) * 3, (4097,), (4096,) * 4)
    )
    assert [group.form(100) for group in (wide, odd, many)] == ["gated", "tiles", "tiles"]
    assert [group.form(4096) for group in (wide, odd, many)] == ["matmul", "tiles", "tiles"]


@pytest.mark.parametrize("form", ["gated", "matmul"])
def test_a_layer_may_get_other_weights(form, monkeypatch):
    """What launches found out of the first is not taken for the second, and keeps nothing from being freed."""
    monkeypatch.setattr(Group, "form", lambda *_: form)
    step = make_step(kernels=True, decisions=1, widths=(32, 16))
    h0, _, x, a, b = case(20, torch.float32, step, (32, 16))
    step.route(h0, spread(20, 2))
    first, second = (torch.randn(48, IN, device=DEVICE) for _ in range(2))
    weight, freed = torch.nn.Parameter(first.clone(), requires_grad=False), []
    weakref.finalize(weight, freed.append, "freed")
    for matrix in (first, second):
        weight.data = matrix
        found = linear_by_kernels(x, weight, a, b, step.by_decision[0], step.rooms[0], step.shape)
        wanted = linear_dense(x, matrix, a, b, step.by_decision[0], step.shape)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    del weight
    assert freed


def test_forms_of_llama_7b():
    """All experts are read for a few tokens where they are few, and never by `decode` beside a shared one."""
    for shape, expected in (
        (Shape(1, 8, 2, 16, 0), {1: "decode", 4: "decode", 8: "crowd", 64: "crowd", 65: "gated", 2048: "matmul"}),
        (Shape(1, 8, 2, 16, 16), {1: "crowd", 8: "crowd", 12: "crowd", 64: "crowd", 65: "gated"}),
        (Shape(1, 8, 2, 64, 0), {1: "decode", 12: "crowd", 32: "crowd"}),
        (Shape(1, 256, 1, 64, 64), {1: "tiles", 8: "tiles", 32: "tiles"}),
    ):
        group = Group(4096, (11008, 11008), torch.bfloat16, shape)
        assert {tokens: group.form(tokens) for tokens in expected} == expected


@pytest.mark.skipif(DEVICE.type == "cuda", reason="launches are counted by Triton's interpreter")
@pytest.mark.parametrize(
    ("r", "widths"), [(16, (1024, 256, 256)), (64, (1024,)), (64, (1024, 1024)), (64, (1023,))], ids=str
)
def test_what_steps_of_many_tokens_launch_was_launched_ahead(r, widths, monkeypatch):
    """Each launch by its kernel and what that is compiled for; nothing is computed."""
    most, launched = 3000, set()

    def note(launch, *args, **constants):
        launched.add((launch.fn.__name__, repr(sorted(constants.items()))))

    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", note)
    for module in ("batch", "matmul"):
        monkeypatch.setattr(f"adafuse.ops.{module}.processors", lambda x: 132)
    settings = {"r": r, "num_experts": 8, "shared_rank": 0}
    step = make_step(torch.bfloat16, kernels=True, decisions=1, max_tokens=most, widths=widths, **settings)
    x, weight = (torch.zeros(size, 2048, dtype=torch.bfloat16) for size in (most, sum(widths)))
    b = [x.new_zeros(8 * r, o) for o in widths]
    weight, *a = append(weight, [x.new_zeros(8 * r, 2048) for _ in widths])
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, matrix: x.new_empty(len(x), len(matrix)))

    def launches(numbers):
        launched.clear()
        for tokens in numbers:
            linear_by_kernels(x[:tokens], weight, a, b, step.by_decision[0], step.rooms[0], step.shape)
        return set(launched)

    ahead = numbers_of_tokens(x[:1], b, step.by_decision[0], step.shape, most)
    assert launches(range(65, most + 1, 47)) <= launches(ahead)
    fewer = [launches(ahead[:n] + ahead[n + 1 :]) for n in range(len(ahead))]
    readable = sum(widths) % 8 == 0  # else two kernels change with the tokens, each in its own way
    assert not readable or all(each < launches(ahead) for each in fewer)  # none for nothing
    assert numbers_of_tokens(x[:1], b, step.by_decision[0], step.shape, 64) == []


def test_the_rates_of_the_device_count():
    """One with few FLOPs a byte does not gain from what saves passes over the output."""
    slow, shape = H100._replace(flops=H100.flops / 20), Shape(1, 8, 2, 64, 0)
    forms = [Group(4096, (11008, 11008), torch.bfloat16, shape, device).form(512) for device in (H100, slow)]
    assert forms == ["matmul", "gated"]
    x, b = torch.zeros(1, 4096), [torch.zeros(512, 11008)]
    assert Group.of(x, b, shape).device == Device.of(x.device)


def test_steps_of_all_sizes_in_the_same_buffers():
    step = make_step(kernels=True, max_tokens=70, widths=OUT, shared_rank=0)
    for tokens in (64, 1, 9, 70, 8, 1):
        check_layers(step, tokens, torch.float32)


@pytest.mark.parametrize("tokens", [8, 20])
def test_layers_of_a_step_may_differ(tokens):
    """Each finds the routing as it reads it, and its own part of the room."""
    narrow, bare = (7, 8), [False, True, False, False]
    step = make_step(kernels=True, decisions=1, widths=OUT, others=(narrow, None), shared_rank=0)
    rooms = dict(zip((OUT, narrow, None), step.rooms, strict=True))
    step.set_bare(bare)
    starts = spread(tokens, 2)
    step.route(case(tokens, torch.float32, step)[0], starts)
    for widths, room in rooms.items():
        h0, y, x, a, b = case(tokens, torch.float32, step, widths or OUT)
        if widths is None:
            add_by_kernels(found := y.clone(), x, a, b, [0, OUT[0]], step.by_decision[0], step.shape)
        else:
            weight = torch.randn(sum(widths), IN, device=DEVICE)
            y = x.double() @ weight.double().T
            found = linear_by_kernels(x, weight, a, b, step.by_decision[0], room, step.shape)
        right = by_loops(y, x, a, b, step, h0, 0, starts, bare)
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


def test_no_layer_joins_when_room_is_given_out():
    step = make_step(kernels=True, widths=OUT)
    with pytest.raises(ValueError, match="given out already"):
        step.join(None)


def test_tokens_are_sorted_only_for_layers_that_read_tiles():
    for widths, sorted_at in ((OUT, [65]), (None, [20, 64, 65])):
        for tokens in (1, 8, 20, 64, 65):
            step = make_step(kernels=True, max_tokens=65, widths=widths, decisions=1)
            step.route(torch.randn(tokens, HIDDEN, device=DEVICE), spread(tokens, 0))
            assert bool((step.routing.order != 1).any()) == (tokens in sorted_at)


def test_a_whole_linear_in_plain_pytorch_equals_loops():
    step = make_step(kernels=False, widths=OUT)
    starts, bare = spread(7, 1), (False, True, False, False)
    step.set_bare(list(bare))
    h0, _, x, a, b = case(7, torch.float32, step)
    weight = torch.randn(sum(OUT), IN, device=DEVICE)
    step.route(h0, starts)
    for decision in range(2):
        y = linear_dense(x, weight, a, b, step.by_decision[decision], step.shape)
        right = by_loops(x.double() @ weight.double().T, x, a, b, step, h0, decision, starts, bare)
        torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)


def test_torch_compile_keeps_a_whole_linear():
    step = make_step(kernels=DEVICE.type == "cuda", decisions=1, widths=OUT)
    h0, _, x, a, b = case(7, torch.float32, step)
    weight = torch.randn(sum(OUT), IN, device=DEVICE)
    routed = (a, b, list(step.by_decision[0]), list(step.rooms[0]), list(step.shape))
    step.route(h0, spread(7, 0))
    if DEVICE.type == "cpu":
        torch.library.opcheck(torch.ops.adafuse.adapted_linear.default, (x[None], weight, *routed))

    def run(x):
        return torch.ops.adafuse.adapted_linear(x * 2, weight, *routed) + 1

    right = run(x)
    step.route(h0, spread(7, 0))
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), right)


class OneLayer:
    """A step of bf16 tokens and a layer that reads it. run(): routes and computes."""

    def __init__(self, tokens, shared_rank, **options):
        self.step = make_step(torch.bfloat16, kernels=True, decisions=1, widths=OUT, shared_rank=shared_rank, **options)
        self.h0, _, self.x, self.a, self.b = case(tokens, torch.bfloat16, self.step)
        self.weight, self.starts = torch.randn(sum(OUT), IN, device=DEVICE).bfloat16(), spread(tokens, 0)
        step = self.step
        self.routed = (self.a, self.b, list(step.by_decision[0]), list(step.rooms[0]), list(step.shape))

    def run(self):
        self.step.route(self.h0, self.starts)
        return torch.ops.adafuse.adapted_linear(self.x, self.weight, *self.routed)

    def by_loops(self):
        base = self.x.double() @ self.weight.double().T
        return by_loops(base, self.x, self.a, self.b, self.step, self.h0, 0, self.starts, [False] * REQUESTS)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 48])
@pytest.mark.parametrize("shared_rank", [0, 3])
@pytest.mark.parametrize("pair_tokens", [0, 32])
def test_a_cuda_graph_holds_step_and_linears(tokens, shared_rank, pair_tokens, monkeypatch):
    monkeypatch.setattr(op, "PAIR_TOKENS", pair_tokens)
    monkeypatch.setattr(Group, "form", Group.form.__wrapped__)  # what it keeps is of another number
    layer = OneLayer(tokens, shared_rank)
    layer.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        y = layer.run()
    for _ in range(3):
        layer.x.normal_()
        layer.h0.normal_()
        graph.replay()
        torch.testing.assert_close(y.double(), layer.by_loops(), rtol=3e-2, atol=6e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [70, 600, 2100])
@pytest.mark.parametrize("shared_rank", [0, 3])
def test_a_prompt_does_not_wait_for_the_device(tokens, shared_rank):
    """Neither routing, sorting nor linears, launched kernel by kernel."""
    layer = OneLayer(tokens, shared_rank, max_tokens=tokens)
    right = layer.run()  # compiles
    with no_host_sync():
        y = layer.run()
    assert torch.equal(y, right)
