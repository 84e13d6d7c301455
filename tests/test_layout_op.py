"""The layout's kernels against the same in PyTorch, which the tests of `batch` check against loops."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch_op import DEVICE, ROUTINGS, route

from adafuse.ops import layout


def check(decisions, tokens, num_experts, top_k, r, shared_rank, block_t, block_r, kind="uniform", dtype=torch.int32):
    routings = [route(kind, tokens, num_experts, top_k) for _ in range(decisions)]
    experts, weights = (torch.stack(parts).to(DEVICE) for parts in zip(*routings, strict=True))
    sizes = {"r": r, "shared_rank": shared_rank, "block_t": block_t, "block_r": block_r}
    arguments = (experts.to(dtype), weights, num_experts, 0.7)
    for name, got, wanted in zip(
        layout.ROUTING, layout._by_kernels(*arguments, **sizes), layout._by_torch(*arguments, **sizes), strict=True
    ):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted), name


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_sizes(data):
    def one_of(*values):
        return data.draw(st.sampled_from(values))

    num_experts, r, shared_rank, block_r = (
        one_of(1, 6, 8, 64),
        one_of(1, 3, 16, 64),
        one_of(0, 5, 16),
        one_of(16, 32, 64),
    )
    if -(-(num_experts * r + shared_rank) // block_r) > layout.KEY_BITS:
        block_r = 128
    top_k = min(num_experts, one_of(1, 2, 5))
    tokens, block_t = data.draw(st.integers(1, 200)), one_of(16, 64, 128)
    check(
        one_of(1, 3),
        tokens,
        num_experts,
        top_k,
        r,
        shared_rank,
        block_t,
        block_r,
        one_of(*ROUTINGS),
        one_of(torch.int32, torch.int64),
    )


def test_as_many_blocks_as_a_key_has_bits():
    check(1, 100, 62, 16, 16, 0, 64, 16)
    check(1, 100, 60, 3, 16, 20, 64, 16)


def test_lay_out_takes_the_kernels_where_they_can(monkeypatch):
    experts, weights = route("uniform", 20, 8, 2)
    called = []
    for name in ("_by_kernels", "_by_torch"):
        run = getattr(layout, name)
        monkeypatch.setattr(
            layout, name, lambda *args, run=run, name=name, **sizes: called.append(name) or run(*args, **sizes)
        )
    layout.lay_out(experts, weights, num_experts=8, r=16)
    layout.lay_out(experts, weights, num_experts=8, r=1024, block_r=16)  # more blocks than bits
    layout.lay_out(experts[:0], weights[:0], num_experts=8, r=16)
    assert called == ["_by_kernels", "_by_torch", "_by_torch"]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 63, 1000, 2048, 16384])
@pytest.mark.parametrize(("num_experts", "top_k", "r"), [(8, 2, 64), (64, 16, 1), (256, 16, 4)])
def test_large_sizes_on_the_gpu(tokens, num_experts, top_k, r):
    for kind in ROUTINGS:
        check(1, tokens, num_experts, top_k, r, 16, 64, 64, kind)
    check(32, min(tokens, 2048), num_experts, top_k, r, 0, 128, 64)


def test_kernels_refuse_weights_that_need_a_gradient():
    experts, weights = route("uniform", 9, 8, 2)
    weights = weights.to(DEVICE).requires_grad_()
    with pytest.raises(ValueError, match="gradient"):
        layout.lay_out(experts.to(DEVICE), weights, num_experts=8, r=4)
    with torch.no_grad():
        assert layout.lay_out(experts.to(DEVICE), weights, num_experts=8, r=4).tokens == 9
