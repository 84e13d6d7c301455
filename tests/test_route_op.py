"""The router's kernels against the router. On a CPU they run under Triton's interpreter."""

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from adafuse.ops.layout import dense_gates
from adafuse.ops.route import route, route_ref
from adafuse.router import Router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# tokens, hidden size, experts, top_k, decisions, width of the hidden layer
SIZES = [
    (1, 64, 8, 2, 1, 0),
    (3, 63, 6, 6, 3, 0),
    (5, 40, 1, 1, 2, 12),
    (2, 130, 64, 16, 4, 0),
    (8, 48, 7, 1, 1, 5),
]


def routed(router, h0, scale=2.0):
    decisions, tokens = router.num_decisions, len(h0)
    experts = torch.full((decisions, tokens, router.top_k), -7, dtype=torch.int32, device=DEVICE)
    weights = torch.full((decisions, tokens, router.top_k), float("nan"), device=DEVICE)
    gates = torch.full((decisions, tokens, router.num_experts + 1), 5.0, device=DEVICE)
    hidden = router.hidden.weight if router.hidden is not None else None
    route(
        h0,
        router.weight,
        experts,
        weights,
        num_experts=router.num_experts,
        scale=scale,
        logits=torch.empty(tokens, decisions * router.num_experts, device=DEVICE),
        hidden=hidden,
        hidden_out=None if hidden is None else torch.empty(tokens, len(hidden), device=DEVICE),
        gates=gates,
    )
    assert torch.equal(gates, dense_gates(experts, weights, router.num_experts, 5.0)), (
        "the shared expert's is left alone"
    )
    return experts, weights


@pytest.mark.parametrize(
    ("size", "dtype", "router_dtype"),
    [
        *product(SIZES, (torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float16)),
        ((1, 40, 256, 16, 1, 0), torch.float32, torch.float32),
    ],
    ids=str,
)
def test_the_kernels_route_as_the_router(size, dtype, router_dtype):
    """Also where the whole model was cast, its router with it."""
    tokens, features, num_experts, top_k, decisions, hidden = size
    torch.manual_seed(0)
    router = Router(features, num_experts, top_k, num_decisions=decisions, router_hidden=hidden, device=DEVICE)
    router.to(router_dtype)
    h0 = torch.randn(tokens, features).to(DEVICE, dtype)
    experts, weights = routed(router.requires_grad_(False), h0)
    wanted = router(h0[None])
    assert torch.equal(experts.long(), wanted.experts[0].movedim(1, 0))
    torch.testing.assert_close(weights, 2.0 * wanted.weights[0].movedim(1, 0))
    inner = router.hidden.weight.float() if hidden else None
    plain = route_ref(h0.float(), router.weight.float(), num_experts=num_experts, top_k=top_k, scale=2.0, hidden=inner)
    assert torch.equal(experts.long(), plain[0])
    torch.testing.assert_close(weights, plain[1])


def test_decisions_may_lie_apart():
    tokens, top_k, decisions = 3, 2, 4
    router = Router(40, 6, top_k, num_decisions=decisions, device=DEVICE).requires_grad_(False)
    h0 = torch.randn(tokens, 40, device=DEVICE)
    logits = torch.empty(tokens, decisions * 6, device=DEVICE)
    rooms = [torch.full((decisions, 50), -7, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.float32)]
    gates = torch.zeros(decisions, 30, device=DEVICE)
    experts, weights = (room.as_strided((decisions, tokens, top_k), (50, top_k, 1)) for room in rooms)
    apart = gates.as_strided((decisions, tokens, 7), (30, 7, 1))
    route(h0, router.weight, experts, weights, num_experts=6, scale=2.0, logits=logits, gates=apart)
    wanted = routed(router, h0)
    assert torch.equal(experts, wanted[0])
    assert torch.equal(weights, wanted[1])
    assert torch.equal(apart, dense_gates(*wanted, 6, 0.0))
    assert all((room[:, tokens * top_k :] == -7).all() for room in rooms)  # nothing else is written
    assert (gates[:, tokens * 7 :] == 0).all()
    with pytest.raises(ValueError, match="they must be the same"):
        route(h0, router.weight, experts, weights.contiguous(), num_experts=6, scale=2.0, logits=logits)
    with pytest.raises(ValueError, match="but for where decisions begin"):
        route(h0, router.weight, experts.mT.contiguous().mT, weights, num_experts=6, scale=2.0, logits=logits)


def test_ties_go_to_the_lower_index():
    router = Router(16, 8, 3, device=DEVICE).requires_grad_(False)
    router.weight.zero_()
    experts, weights = routed(router, torch.ones(2, 16, device=DEVICE), scale=3.0)
    assert experts.tolist() == [[[0, 1, 2]] * 2]
    torch.testing.assert_close(weights, torch.ones_like(weights))
