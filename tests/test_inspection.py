"""Statistics of a routing against plain loops; the report of a text."""

import itertools
import math

import pytest
import torch
from byte_models import VOCAB, adapted
from families import BLOCKS
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import EOS, tokenizer
from tokenizers.processors import TemplateProcessing

from adafuse.inspection import inspect_text, summarise
from adafuse.router import Routing, choose

PER_DECISION = ("load_entropy", "weight_entropy", "same_set", "overlap", "same_set_chance", "overlap_chance")


def bits(values):
    return -sum(p * math.log2(p) for p in values if p > 0)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def alike(pair):
    return float(set(pair[0]) == set(pair[1]))


def common(pair):
    return len(set(pair[0]) & set(pair[1])) / len(pair[0])


def summarise_slowly(experts, weights, num_experts, kept):
    """What `summarise` documents, from nested lists [B][S][D][K], one decision at a time; for random order, every ordered pair."""
    found = {name: [] for name in ("load", "weights", "collapsed", *PER_DECISION)}
    places = [(b, t) for b, row in enumerate(kept) for t, real in enumerate(row) if real]
    for d in range(len(experts[0][0])):
        sets = [experts[b][t][d] for b, t in places]
        shares = [[w / sum(weights[b][t][d]) for w in weights[b][t][d]] for b, t in places]
        load = [sum(s.count(e) for s in sets) / sum(map(len, sets)) for e in range(num_experts)]
        pairs = [(experts[b][t][d], experts[b][t + 1][d]) for b, t in places if (b, t + 1) in places]
        strangers = list(itertools.permutations(sets, 2)) if pairs else []
        found["load"].append(load)
        found["collapsed"] += [(d, e) for e in range(num_experts) if load[e] < 0.1 / num_experts]
        found["weights"].append([mean(weights[b][t][d][k] for b, t in places) for k in range(len(sets[0]))])
        found["load_entropy"].append(bits(load))
        found["weight_entropy"].append(mean(map(bits, shares)))
        found["same_set"].append(mean(map(alike, pairs)))
        found["overlap"].append(mean(map(common, pairs)))
        found["same_set_chance"].append(mean(map(alike, strangers)))
        found["overlap_chance"].append(mean(map(common, strangers)))
    return found


@st.composite
def routings(draw):
    """(Routing, number of experts, mask): skewed or even, with padding anywhere, at least one token."""
    batch, seq, decisions = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    num_experts = draw(st.integers(1, 12))
    top_k, skew = draw(st.integers(1, num_experts)), draw(st.sampled_from([0.1, 3.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(batch, seq, decisions, num_experts, generator=generator)
    favourites = skew * torch.randn(decisions, num_experts, generator=generator)
    mask = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=batch * seq, max_size=batch * seq)))
    mask[draw(st.integers(0, batch * seq - 1))] = 1
    return choose(logits + favourites, top_k), num_experts, mask.view(batch, seq)


@settings(max_examples=60, deadline=None)
@given(routings())
def test_statistics_equal_the_loops(case):
    routing, num_experts, mask = case
    got = summarise(routing, num_experts, mask)
    wanted = summarise_slowly(routing.experts.tolist(), routing.weights.double().tolist(), num_experts, mask.tolist())
    assert got["tokens"] == mask.sum()
    assert got["collapsed"] == wanted["collapsed"]
    for name in ("load", "weights", *PER_DECISION):
        expected = torch.tensor(wanted[name], dtype=torch.float64)
        torch.testing.assert_close(got[name].double(), expected, atol=1e-5, rtol=0, equal_nan=True)


def chosen(*sets):
    """A Routing of one sequence and one decision, with even weights."""
    experts = torch.tensor(sets)[None, :, None]
    return Routing(experts, torch.full(experts.shape, 1 / experts.shape[-1]))


def test_statistics_of_a_text_worked_out_by_hand():
    """Sets {0,1} {1,0} {0,2} {0,2}: neighbours alike 2 of 3, sharing 1, 1/2, 1; of the 6 pairs in any order 2 are alike."""
    found = summarise(chosen([0, 1], [1, 0], [0, 2], [2, 0]), 4)
    assert found["load"].tolist() == [[0.5, 0.25, 0.25, 0.0]]
    assert found["load_entropy"].item() == pytest.approx(1.5)
    assert found["weight_entropy"].item() == pytest.approx(1.0)
    assert found["collapsed"] == [(0, 3)]
    assert found["same_set"].item() == pytest.approx(2 / 3)
    assert found["overlap"].item() == pytest.approx(5 / 6)
    assert found["same_set_chance"].item() == pytest.approx(1 / 3)
    assert found["overlap_chance"].item() == pytest.approx((2 * 1 + 4 * 0.5) / 6)


def test_the_order_of_experts_within_a_token_does_not_matter():
    assert summarise(chosen([0, 1], [1, 0]), 2)["same_set"].item() == 1


def test_without_neighbours_there_is_nothing_to_share():
    apart = Routing(torch.zeros(2, 3, 1, 1, dtype=torch.long), torch.ones(2, 3, 1, 1))
    found = summarise(apart, 2, torch.tensor([[1, 0, 1], [0, 1, 0]]))
    assert found["tokens"] == 3
    assert all(math.isnan(found[name].item()) for name in PER_DECISION[2:])
    assert found["load_entropy"].item() == 0


def test_a_mask_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no token to summarise"):
        summarise(chosen([0], [1]), 2, torch.zeros(1, 2))


@pytest.mark.parametrize("routing", ["model", "layer"])
def test_a_report_is_the_routing_of_the_text(routing):
    model, tok = adapted(routing=routing)
    report = inspect_text(model, tok, "one, two")
    ids = torch.tensor([tok("one, two").input_ids])
    wanted = model.route(ids)
    assert report.token_ids == tuple(ids[0].tolist())
    assert report.experts.shape == (8, BLOCKS if routing == "layer" else 1, 2)
    assert torch.equal(report.experts, wanted.experts[0])
    assert torch.equal(report.weights, wanted.weights[0])
    assert (report.num_experts, report.routing) == (4, routing)
    assert torch.equal(report.statistics["load"], summarise(wanted, 4)["load"])


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1, max_size=12))
def test_the_pieces_are_the_text(shared_model, text):
    model, tok = shared_model
    report = inspect_text(model, tok, text)
    assert report.text == text
    assert len(report.pieces) == len(report.token_ids) == len(report.token_names) == len(report.experts)


@pytest.fixture(scope="module")
def shared_model():
    return adapted()


def test_the_first_byte_of_a_character_shows_it(shared_model):
    assert inspect_text(*shared_model, "aé🙂").pieces == ("a", "é", "", "🙂", "", "", "")


def test_tokens_that_the_tokenizer_adds_are_told_from_those_of_the_text(shared_model):
    tok = tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    report = inspect_text(shared_model[0], tok, f"a{EOS}b")
    assert report.special == (True, False, False, False)
    assert report.pieces == ("", "a", EOS, "b")
    assert report.token_names[0] == EOS


def test_a_text_longer_than_the_positions_is_refused(shared_model):
    assert len(inspect_text(*shared_model, "a" * 64).pieces) == 64
    with pytest.raises(ValueError, match="the text has 65 tokens, and the model allows 64"):
        inspect_text(*shared_model, "a" * 65)


def test_an_empty_text_is_refused(shared_model):
    with pytest.raises(ValueError, match="the text is empty"):
        inspect_text(*shared_model, "")


def test_the_mode_of_the_model_comes_back(shared_model):
    model, tok = shared_model
    model.train()
    modes = [module.training for module in model.modules()]
    inspect_text(model, tok, "text")
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_a_router_that_sees_positions(shared_model):
    """GPT-2 adds positions before block 0: the same byte may go elsewhere, and the report says where."""
    model, tok = adapted("gpt2", num_experts=8, top_k=1)
    report = inspect_text(model, tok, "a" * 40)
    assert len(set(report.experts.flatten().tolist())) > 1
    assert report.experts[:, 0].max() < 8
    assert max(report.token_ids) < VOCAB
