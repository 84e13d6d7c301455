"""The operation behind an adapted linear of vLLM's, and the buffers of a step, without vLLM: kernels (in Triton's
interpreter where there is no GPU) and dense form against loops over tokens and experts."""

import pytest
import torch

from adafuse.config import AdaFuseConfig
from adafuse.integrations.vllm.op import add_by_kernels, add_dense
from adafuse.integrations.vllm.routing import Step
from adafuse.router import Router

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, IN, OUT = 24, 40, (33, 16)
REQUESTS = 4


def make_step(dtype=torch.float32, *, kernels, decisions=2, max_tokens=64, **settings):
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
    for buffer in step.routing:  # a kernel that reads what no step has written must not go unseen
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


def case(tokens, dtype, step):
    ranks = step.shape.ranks
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, dtype)

    h0 = torch.randn(tokens, HIDDEN, generator=generator).to(DEVICE, dtype)
    return (
        h0,
        random(tokens, sum(OUT)),
        random(tokens, IN),
        [random(ranks, IN) for _ in OUT],
        [random(ranks, o) for o in OUT],
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
            add(found, x, a, b, [0, OUT[0]], step.routing, decision, step.shape)
            torch.testing.assert_close(
                found.double(), by_loops(y, x, a, b, step, h0, decision, starts, bare), rtol=1e-5, atol=1e-5
            )
            without = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
            for i in range(REQUESTS):
                without[starts[i] : starts[i + 1]] = bare[i]
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
    (add_by_kernels if form == "kernels" else add_dense)(found, x, a, b, [0, OUT[0]], step.routing, 0, step.shape)
    right = by_loops(y, x, a, b, step, h0, 0, starts, [False] * REQUESTS)
    torch.testing.assert_close(found.double(), right, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_step_of_any_size_has_room(kernels):
    step = make_step(kernels=kernels, decisions=1, max_tokens=600, r=1, num_experts=20, top_k=9)
    for tokens in (1, 17, 65, 257, 511, 513, 600):
        h0 = torch.randn(tokens, HIDDEN, device=DEVICE)
        step.route(h0, spread(tokens, 0))
    with pytest.raises(ValueError, match="601 tokens came, with room for 600"):
        step.route(torch.randn(601, HIDDEN, device=DEVICE), spread(601, 0))


def test_load_counts_real_tokens_of_adapted_requests():
    step = make_step(kernels=False, decisions=1)
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
    arguments = (x, a, b, [0, OUT[0]], list(step.routing), 0, list(step.shape))
    if DEVICE.type == "cpu":
        torch.library.opcheck(torch.ops.adafuse.add_delta.default, (y.clone(), *arguments))

    def run(y):
        out = y * 2
        torch.ops.adafuse.add_delta(out, *arguments)
        return out + 1

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(y), run(y))
