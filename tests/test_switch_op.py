"""The switch kernel against sums over experts in float64. On a CPU it runs under Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from adafuse.engine.graph import captured
from adafuse.ops import switch as op
from adafuse.ops.switch import Segment, SwitchTable, Tile, switch, switch_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative RMS
SHAPES = [(63, 40), (17, 129), (128, 64)]
SMALL = Tile(block_m=32, block_n=32, strip=2, num_warps=4, num_stages=2)


def normal(*shape, scale=1.0, dtype=torch.float32):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def a_segment(m, n, *, r=4, num_experts=6, shared_rank=0, decision=0, top_k=2, pristine=True, dtype=torch.float32):
    """A weight of about the size of its delta. What is to be merged from a source starts as NaN."""
    ranks, base = num_experts * r + shared_rank, normal(m, n, dtype=dtype)
    return Segment(
        weight=torch.full_like(base, float("nan")) if pristine else base,
        source=base if pristine else None,
        left=normal(ranks, m, scale=(top_k * r + shared_rank) ** -0.5, dtype=dtype),
        right=normal(ranks, n, dtype=dtype),
        r=r,
        num_experts=num_experts,
        shared_rank=shared_rank,
        decision=decision,
    )


def a_mix(top_k, decisions, shared_rank, **options):
    """Three shapes with three ranks and three numbers of experts, on all decisions."""
    kinds = zip(SHAPES, (1, 4, 16), (1, 6, 8), strict=True)
    options |= {"top_k": top_k, "shared_rank": shared_rank}
    return [
        a_segment(*shape, r=r, num_experts=max(experts, top_k), decision=i % decisions, **options)
        for i, (shape, r, experts) in enumerate(kinds)
    ]


def a_routing(segments, top_k, decisions):
    """Experts that every segment of a decision has, distinct within a decision, and weights around 1."""
    experts = []
    for d in range(decisions):
        count = min((s.num_experts for s in segments if s.decision == d), default=top_k)
        experts.append(torch.randperm(count)[:top_k])
    weights = torch.rand(decisions, top_k) + 0.5
    return torch.stack(experts).int().to(DEVICE), weights.to(DEVICE)


def delta(s, experts, weights):
    """float64 [M, N]: what the chosen experts add to a weight."""
    total = torch.zeros(s.weight.shape, dtype=torch.float64, device=DEVICE)
    for expert, weight in zip(experts[s.decision].tolist(), weights[s.decision].tolist(), strict=True):
        own = slice(expert * s.r, (expert + 1) * s.r)
        total += weight * s.left[own].double().T @ s.right[own].double()
    return total


def shared_delta(s, scale):
    own = slice(s.num_experts * s.r, None)
    return scale * s.left[own].double().T @ s.right[own].double()


def check(segments, expected):
    for s, exact in zip(segments, expected, strict=True):
        error = ((s.weight.double() - exact).norm() / exact.norm()).item()
        assert error < LIMITS[s.weight.dtype], (s.weight.shape, error)


@pytest.fixture(params=[switch, switch_ref], ids=["kernel", "reference"])
def run(request):
    """Both implementations, without gradients as in inference."""
    return torch.no_grad()(request.param)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("top_k", "decisions", "shared_rank"), [(1, 1, 0), (1, 3, 3), (2, 3, 0), (2, 1, 3), (16, 3, 3)]
)
def test_merge_from_a_pristine_copy(run, dtype, top_k, decisions, shared_rank):
    segments = a_mix(top_k, decisions, shared_rank, dtype=dtype)
    routing = a_routing(segments, top_k, decisions)
    run(SwitchTable(segments, top_k=top_k, tile=SMALL), *routing, shared_scale=0.7)
    check(segments, [s.source.double() + delta(s, *routing) + shared_delta(s, 0.7) for s in segments])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("top_k", "decisions", "shared_rank"), [(1, 1, 0), (1, 3, 3), (2, 3, 3), (16, 1, 0)])
def test_switch_in_place_adds_new_and_takes_out_old(run, dtype, top_k, decisions, shared_rank):
    segments = a_mix(top_k, decisions, shared_rank, pristine=False, dtype=dtype)
    old, new = a_routing(segments, top_k, decisions), a_routing(segments, top_k, decisions)
    expected = [s.weight.double() + delta(s, *new) - delta(s, *old) for s in segments]
    run(SwitchTable(segments, top_k=top_k, tile=SMALL), *new, old=old, shared_scale=0.7)
    check(segments, expected)


def test_in_place_from_the_first_token_to_the_backbone_again(run):
    """The first launch adds the shared experts, later ones leave them, negative weights and scale take everything out."""
    segments = a_mix(2, 3, 3, pristine=False)
    table = SwitchTable(segments, top_k=2, tile=SMALL)
    base = [s.weight.double() for s in segments]
    first, second = a_routing(segments, 2, 3), a_routing(segments, 2, 3)
    run(table, *first, shared_scale=0.7)
    check(segments, [w + delta(s, *first) + shared_delta(s, 0.7) for w, s in zip(base, segments, strict=True)])
    run(table, *second, old=first, shared_scale=0.7)
    check(segments, [w + delta(s, *second) + shared_delta(s, 0.7) for w, s in zip(base, segments, strict=True)])
    run(table, second[0], -second[1], shared_scale=-0.7)
    check(segments, base)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    r=st.integers(1, 9),
    shared_rank=st.integers(0, 20),
    top_k=st.integers(1, 5),
    extra=st.integers(0, 3),
    strip=st.integers(1, 3),
    max_ranks=st.sampled_from([16, 64]),
    pristine=st.booleans(),
)
def test_any_shape_rank_and_tile(m, n, r, shared_rank, top_k, extra, strip, max_ranks, pristine):
    sizes = {"r": r, "num_experts": top_k + extra, "shared_rank": shared_rank, "top_k": top_k}
    s = a_segment(m, n, pristine=pristine, **sizes)
    old, new = a_routing([s], top_k, 1), a_routing([s], top_k, 1)
    tile = Tile(32, 32, strip, max_ranks, num_warps=4, num_stages=2)
    exact = s.reads.double() + delta(s, *new) + (shared_delta(s, 0.7) if pristine else -delta(s, *old))
    with torch.no_grad():
        switch(SwitchTable([s], top_k=top_k, tile=tile), *new, old=old, shared_scale=0.7)
    # Where the sum cancels, fp32 keeps the size of its terms and no more.
    assert (s.weight.double() - exact).abs().max() < 1e-4


@pytest.mark.parametrize("max_ranks", [16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_more_ranks_than_a_program_keeps(dtype, max_ranks):
    segments = [a_segment(40, 48, r=r, shared_rank=3, dtype=dtype) for r in (3, 24)]
    table = SwitchTable(segments, top_k=2, tile=Tile(32, 32, 1, max_ranks, num_warps=4, num_stages=2))
    routing = a_routing(segments, 2, 1)
    assert not table.resident
    with torch.no_grad():
        switch(table, *routing)
    check(segments, [s.source.double() + delta(s, *routing) + shared_delta(s, 1.0) for s in segments])


@pytest.mark.parametrize("pristine", [True, False])
@pytest.mark.parametrize("changed", ["expert", "weight"])
def test_only_decisions_that_changed_are_written(run, pristine, changed):
    segments = [a_segment(40, 48, decision=d, pristine=pristine) for d in (0, 1, 0, 1)]
    table = SwitchTable(segments, top_k=2, tile=SMALL)
    old = a_routing(segments, 2, 2)
    new = old[0].clone(), old[1].clone()
    if changed == "expert":
        new[0][1, 1] = min(set(range(6)) - set(old[0][1].tolist()))
    else:
        new[1][1, 1] = torch.nextafter(new[1][1, 1], new[1].new_tensor(9.0))
    for s in segments[::2]:
        s.weight.fill_(float("nan"))
    before = [s.reads.double() for s in segments]
    run(table, *new, old=old)
    for s, base in zip(segments[1::2], before[1::2], strict=True):
        check([s], [base + delta(s, *new) - (0 if pristine else delta(s, *old))])
    assert all(s.weight.isnan().all() for s in segments[::2])


def test_without_old_routing_nothing_is_skipped(run):
    s = a_segment(40, 48)
    table, routing = SwitchTable([s], top_k=2, tile=SMALL), a_routing([s], 2, 1)
    run(table, *routing)
    s.weight.fill_(float("nan"))
    run(table, *routing)
    check([s], [s.source.double() + delta(s, *routing)])


def test_a_transposed_weight_swaps_left_and_right(run):
    """A layer that stores [in, out] gets the transpose of what one that stores [out, in] gets."""
    s = a_segment(40, 56)
    t = Segment(torch.empty(56, 40, device=DEVICE), s.right, s.left, s.r, s.num_experts, source=s.source.T.contiguous())
    run(SwitchTable([s, t], top_k=2, tile=SMALL), *a_routing([s], 2, 1))
    torch.testing.assert_close(t.weight, s.weight.T, rtol=1e-5, atol=1e-5)


def test_one_launch_whatever_the_table(monkeypatch):
    launches, kernel = [], op._switch_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(op, "_switch_kernel", Counted())
    segments = a_mix(2, 3, 3)
    with torch.no_grad():
        switch(SwitchTable(segments, top_k=2, tile=SMALL), *a_routing(segments, 2, 3))
    assert len(launches) == 1


def test_a_weight_inside_a_larger_buffer_leaves_the_rest_alone():
    """Rows that are multiples of 8, of a weight that does not start on 16 bytes."""
    buffer, source = torch.zeros(1 + 40 * 24 + 64, device=DEVICE), normal(40, 24)
    part = Segment(
        buffer[1 : 1 + 40 * 24].view(40, 24), normal(24, 40), normal(24, 24), r=4, num_experts=6, source=source
    )
    table = SwitchTable([part], top_k=2, tile=SMALL)
    routing = a_routing([part], 2, 1)
    with torch.no_grad():
        switch(table, *routing)
    assert not table.aligned
    check([part], [source.double() + delta(part, *routing)])
    assert not buffer[0]
    assert not buffer[1 + 40 * 24 :].any()


def test_bytes_and_flops():
    pristine = SwitchTable([a_segment(40, 48, r=4, shared_rank=3, dtype=torch.bfloat16)], top_k=2)
    assert pristine.bytes_moved() == 2 * (2 * 40 * 48 + 11 * (40 + 48))
    assert pristine.flops() == 2 * 40 * 48 * 11
    in_place = SwitchTable([a_segment(40, 48, r=4, shared_rank=3, pristine=False)], top_k=2)
    assert in_place.bytes_moved() == 4 * (2 * 40 * 48 + 16 * (40 + 48))
    assert in_place.flops() == 2 * 40 * 48 * 16


def replaced(s, **changes):
    return Segment(**{**vars(s), **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: [], "at least one segment"),
        (lambda s: [replaced(s, weight=s.weight.double())], "allowed are bf16, fp16 and fp32"),
        (lambda s: [replaced(s, weight=s.weight[0])], "must be a matrix"),
        (lambda s: [replaced(s, left=s.left.half())], "left is torch.float16"),
        (lambda s: [replaced(s, right=s.right.to("meta"))], "right is torch.float32 on meta"),
        (lambda s: [replaced(s, left=s.left[1:])], r"left has shape \[23, 40\], \[24, 40\] is needed"),
        (lambda s: [replaced(s, right=s.right[:, 1:])], "right has shape"),
        (lambda s: [replaced(s, source=s.source.T)], "source has shape"),
        (lambda s: [replaced(s, weight=s.weight.T.contiguous().T)], "weight has strides"),
        (lambda s: [replaced(s, r=0)], "r >= 1"),
        (lambda s: [replaced(s, decision=-1)], "decision >= 0"),
        (lambda s: [replaced(s, num_experts=1, r=24)], "top_k <= num_experts"),
        (lambda s: [s, a_segment(8, 8, dtype=torch.float16)], "need one dtype"),
        (lambda s: [s, a_segment(8, 8, pristine=False)], "source and in place|in place, source"),
        (lambda s: [s, s], "write the same memory"),
        (lambda s: [replaced(s, source=s.weight)], "shares memory"),
    ],
)
def test_bad_tables_are_refused(make, message):
    segment = a_segment(40, 48)
    with pytest.raises(ValueError, match=message):
        SwitchTable(make(segment), top_k=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, w: (e.long(), w), "experts must be contiguous torch.int32"),
        (lambda e, w: (e, w.half()), "weights must be contiguous torch.float32"),
        (lambda e, w: (e[:1], w), "experts has shape"),
        (lambda e, w: (e, w[:, :1].contiguous()), "weights has shape"),
        (lambda e, w: (e, w.T.contiguous().T), "weights must be contiguous"),
    ],
)
@pytest.mark.parametrize("side", ["new", "old"])
def test_bad_routings_are_refused(change, message, side):
    s = a_segment(40, 48, decision=2)
    table, good = SwitchTable([s], top_k=2), a_routing([s], 2, 3)
    bad = change(*good)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        switch(table, *(bad if side == "new" else good), old=bad if side == "old" else None)


def test_gradients_are_refused():
    s = a_segment(40, 48)
    experts, weights = a_routing([s], 2, 1)
    with pytest.raises(ValueError, match="no backward pass"):
        switch(SwitchTable([s], top_k=2), experts, weights.requires_grad_())
    trained = replaced(s, left=s.left.requires_grad_())
    table = SwitchTable([trained], top_k=2, tile=SMALL)
    with pytest.raises(ValueError, match="no backward pass"):
        switch(table, experts, weights.detach())
    with torch.inference_mode():
        switch(table, experts, weights)
    assert not s.weight.isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("pristine", [True, False])
@pytest.mark.parametrize(("r", "top_k"), [(1, 16), (4, 1), (16, 2), (64, 2), (64, 8)])
def test_model_sizes_with_default_tiles(dtype, pristine, r, top_k):
    shapes = [(4096, 4096), (1024, 4096), (2112, 1000), (513, 4096 + 8)]
    sizes = {"r": r, "num_experts": top_k + 3, "top_k": top_k, "pristine": pristine, "dtype": dtype}
    segments = [a_segment(*shape, decision=i % 2, **sizes) for i, shape in enumerate(shapes)]
    old, new = a_routing(segments, top_k, 2), a_routing(segments, top_k, 2)
    for part in (segments[:3], segments[3:]):  # rows on 16 bytes, and not
        expected = [s.reads.double() + delta(s, *new) - (0 if pristine else delta(s, *old)) for s in part]
        with torch.no_grad():
            switch(SwitchTable(part, top_k=top_k), *new, old=old)
        check(part, expected)


@pytest.mark.gpu
def test_a_captured_launch_follows_its_routing():
    segments = a_mix(2, 3, 3, dtype=torch.bfloat16)
    table = SwitchTable(segments, top_k=2)
    new = a_routing(segments, 2, 3)
    old = new[0].clone(), new[1].clone()
    with torch.no_grad():
        switch(table, *new, old=old)  # compiles
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            switch(table, *new, old=old)
        for _ in range(3):
            for buffer, value in zip(new, a_routing(segments, 2, 3), strict=True):
                buffer.copy_(value)
            graph.replay()
            check(segments, [s.source.double() + delta(s, *new) + shared_delta(s, 1.0) for s in segments])
