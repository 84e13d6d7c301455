"""Plans against a slow interpreter: what a token gets when the buffers are read as the kernels read them, one number at a time."""

import pytest
import torch
from gpus import no_host_sync
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from adafuse import AdaFuseConfig
from adafuse.engine.graph import captured
from adafuse.plan import Plan
from adafuse.router import choose


def a_routing(config, decisions, batch, seq, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return choose(torch.randn(batch, seq, decisions, config.num_experts, generator=generator), config.top_k)


def owner(rank, config):
    """The expert that a rank belongs to; num_experts for the shared one."""
    return min(rank // config.r, config.num_experts)


def expected(routing, config, block):
    """{rank: weight} of each token, from the routing."""
    tokens = []
    for experts, weights in zip(routing.experts.flatten(0, 1), routing.weights.flatten(0, 1), strict=True):
        decision = block if experts.shape[0] > 1 else 0
        chosen = dict(zip(experts[decision].tolist(), weights[decision].tolist(), strict=True))
        chosen = {expert: weight * config.scale for expert, weight in chosen.items()}
        chosen[config.num_experts] = config.shared_scale
        ranks = range(config.num_experts * config.r + config.shared_rank)
        tokens.append({rank: chosen[owner(rank, config)] for rank in ranks if owner(rank, config) in chosen})
    return tokens


def interpret_chosen(chosen):
    """{rank: weight} of each token, as the decode kernel goes through the active ranks."""
    tokens = []
    for experts, weights in zip(chosen.experts.tolist(), chosen.weights.tolist(), strict=True):
        found = {}
        for j in range(len(experts) * chosen.r):
            found[experts[j // chosen.r] * chosen.r + j % chosen.r] = weights[j // chosen.r]
        for j in range(chosen.shared_rank):
            found[chosen.num_experts * chosen.r + j] = chosen.shared_scale
        tokens.append(found)
    return tokens


def interpret_tiles(tiles, config):
    """{rank: weight} of each token, as the batch kernels go through tiles and their blocks of ranks."""
    tokens = [None] * tiles.tokens
    for place, token in enumerate(tiles.order.tolist()):
        assert tokens[token] is None, f"token {token} has two places"
        tile = place // tiles.block_t
        blocks = tiles.blocks[tile, : tiles.counts[tile]].tolist()
        assert len(set(blocks)) == len(blocks)
        tokens[token] = {}
        for rank in (block * tiles.block_r + i for block in blocks for i in range(tiles.block_r)):
            if rank < config.num_experts * config.r + config.shared_rank:
                weight = tiles.gates[token, owner(rank, config)].item()
                if weight:
                    tokens[token][rank] = weight
    return tokens


@st.composite
def cases(draw):
    num_experts = draw(st.integers(1, 12))
    config = AdaFuseConfig(
        r=draw(st.integers(1, 20)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        shared_rank=draw(st.integers(0, 5)),
        routing=draw(st.sampled_from(["model", "layer"])),
    )
    return config, draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 9, 40])), draw(st.integers(0, 99))


def check(plan, routing, config, blocks):
    for block in range(blocks):
        part = plan.of_block(block)
        wanted = [{r: pytest.approx(w) for r, w in each.items()} for each in expected(routing, config, block)]
        assert interpret_chosen(part.chosen) == wanted
        assert interpret_tiles(part.tiles.to("cpu"), config) == wanted
        assert part.gates.equal(part.tiles.gates)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_a_plan_says_what_the_routing_says(case):
    config, batch, seq, seed = case
    blocks = 3
    routing = a_routing(config, blocks if config.routing == "layer" else 1, batch, seq, seed)
    check(Plan.of(routing, config), routing, config, blocks)


def test_writing_again_keeps_the_buffers():
    config = AdaFuseConfig(r=4, num_experts=6, top_k=2, shared_rank=3)
    plan = Plan(config, decisions=1, tokens=20, device="cpu")
    buffers = [
        plan.experts,
        plan.weights,
        plan.gates,
        plan.tiles.order,
        plan.tiles.gates,
        plan.tiles.counts,
        plan.tiles.blocks,
    ]
    places = [buffer.data_ptr() for buffer in buffers]
    for seed in range(3):
        routing = a_routing(config, 1, 2, 10, seed)
        plan.write(routing)
        check(plan, routing, config, 1)
    assert [buffer.data_ptr() for buffer in buffers] == places


def test_a_plan_before_its_first_routing_points_at_experts_that_exist():
    plan = Plan(AdaFuseConfig(num_experts=3, top_k=2), decisions=2, tokens=3, device="cpu")
    assert plan.experts.unique().tolist() == [0, 1]
    assert not plan.weights.any()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 64, 1000])
@pytest.mark.parametrize("decisions", [1, 4])
def test_a_plan_is_written_without_host_sync_in_a_graph(tokens, decisions):
    config = AdaFuseConfig(r=8, num_experts=8, shared_rank=4)
    routings = [a_routing(config, decisions, 1, tokens, seed) for seed in range(3)]
    given_ = type(routings[0])(*(each.cuda() for each in vars(routings[0]).values()))
    plan = Plan(config, decisions=decisions, tokens=tokens, device="cuda")
    assert plan.tiles.gates.equal(plan.gates), "laid out ahead of the capture"
    plan.write(given_)
    graph = torch.cuda.CUDAGraph()
    with no_host_sync(), captured(graph):
        plan.write(given_)
    for routing in routings:
        for name, tensor in vars(routing).items():
            getattr(given_, name).copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        check(plan, routing, config, decisions)
