"""Sampling: against exact distributions, against transformers' own processors, and seeds that hold whatever is beside them."""

import math

import pytest
import torch
from engine_models import adapted, bare, generated, logits_of, prompt
from families import VOCAB
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adafuse import Engine
from adafuse.engine.sampling import Sampler, Sampling, draw

DRAWS = 20000


def exact(logits, *, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution [V] that transformers' warpers make of logits [V]."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.double().softmax(-1)[0]


def sampler(settings, prompts=None, ends=(), vocab_size=50):
    prompts = prompts or [[1]] * len(settings)
    return Sampler(settings, prompts, ends=ends, vocab_size=vocab_size, device="cpu")


def check_counts(tokens, probabilities):
    """Pearson's chi-square of the draws, within five standard deviations of what it is on average; impossible ones never."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = len(tokens) * probabilities
    often = expected > 10  # the rare ones together
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum().item()
    degrees = len(counts) - 1
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees) + 1


CUTS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5, "top_k": 7},
    {"top_p": 0.6},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"top_k": 1000},
]


@pytest.mark.parametrize("cut", CUTS)
def test_draws_follow_the_exact_distribution(cut):
    logits = 2 * torch.randn(50, generator=torch.Generator().manual_seed(3))
    wanted = exact(logits, **cut)
    settings = {"temperature": 1.0, **cut}
    of_seeds = sampler([Sampling(seed=seed, **settings) for seed in range(DRAWS)]).sample(logits.expand(DRAWS, -1))
    check_counts(of_seeds, wanted)
    one = sampler([Sampling(seed=0, max_new_tokens=5000, **settings)])
    check_counts(torch.cat([one.sample(logits[None]) for _ in range(5000)]), wanted)


def test_every_row_has_its_own_settings():
    logits = 2 * torch.randn(50, generator=torch.Generator().manual_seed(4))
    cuts = [{"temperature": 1.0, **cut} for cut in CUTS] + [{"temperature": 0.0}]
    rows = [Sampling(seed=seed, **cut) for seed in range(2000) for cut in cuts]
    tokens = sampler(rows).sample(logits.expand(len(rows), -1)).view(-1, len(cuts))
    for column, cut in enumerate(CUTS):
        check_counts(tokens[:, column], exact(logits, **cut))
    assert (tokens[:, -1] == logits.argmax()).all()


def test_the_cuts_keep_exactly_what_they_should():
    """Probabilities 0.4, 0.3, 0.2, 0.1: every token that may come does, over a grid of random numbers, and no other."""
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    uniform = torch.linspace(0, 1, 2001)[:, None]  # 1 itself too, which rounding can make

    def kept(top_k=4, top_p=1.0):
        many = draw(scores.expand(len(uniform), -1), torch.tensor([[top_k]]), torch.tensor([[top_p]]), uniform)
        return sorted(set(many.tolist()))

    assert kept() == [0, 1, 2, 3]
    assert [kept(top_k=k) for k in (1, 2, 3)] == [[1], [1, 3], [1, 2, 3]]
    assert [kept(top_p=p) for p in (0.01, 0.39, 0.41, 0.69, 0.71, 0.91)] == [
        [1],
        [1],
        [1, 3],
        [1, 3],
        [1, 2, 3],
        [0, 1, 2, 3],
    ]
    assert kept(top_k=2, top_p=0.5) == [1]  # of the two left, 4/7 and 3/7
    assert kept(top_k=2, top_p=0.6) == [1, 3]


def test_equal_logits_go_to_the_lower_id():
    logits = torch.zeros(3, 50)
    rows = [Sampling(), Sampling(temperature=1.0, top_k=1, seed=1), Sampling(temperature=1.0, top_p=1e-9, seed=2)]
    assert sampler(rows).sample(logits).tolist() == [0, 0, 0]


def test_temperatures_from_tiny_to_huge():
    logits = 5 * torch.randn(50, generator=torch.Generator().manual_seed(3))
    rows = [Sampling(temperature=1e-30, seed=s) for s in range(500)]
    assert set(sampler(rows).sample(logits.expand(500, -1)).tolist()) == {int(logits.argmax())}
    rows = [Sampling(temperature=1e30, seed=s) for s in range(DRAWS)]
    check_counts(sampler(rows).sample(logits.expand(DRAWS, -1)), torch.full((50,), 0.02, dtype=torch.float64))


def test_forbidden_tokens_never_come():
    logits = torch.full((50,), -torch.inf)
    logits[[7, 9]] = 0.0
    tokens = sampler([Sampling(temperature=1.0, seed=s) for s in range(500)]).sample(logits.expand(500, -1))
    assert set(tokens.tolist()) == {7, 9}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_none_are_told_apart(bad, temperature):
    logits = torch.randn(3, 50)
    logits[1, 4] = bad
    got = sampler([Sampling(temperature=temperature)] * 3).sample(logits).tolist()
    assert got[1] == -1
    assert min(got[0], got[2]) >= 0


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(5))
    prompts = [[3, 7, 7, 20], [1, 2]]
    settings = [Sampling(repetition_penalty=3.0), Sampling(repetition_penalty=0.5)]
    one = sampler(settings, prompts)
    for _ in range(30):
        wanted = [
            RepetitionPenaltyLogitsProcessor(each.repetition_penalty)(torch.tensor([ids]), row[None]).argmax(-1).item()
            for each, ids, row in zip(settings, prompts, logits, strict=True)
        ]
        assert one.sample(logits).tolist() == wanted
        prompts = [[*ids, token] for ids, token in zip(prompts, wanted, strict=True)]
    assert len(set(prompts[0])) > 10


def test_no_end_before_min_new_tokens():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(6))
    ends = logits.argmax(-1).tolist()
    one = sampler([Sampling(min_new_tokens=3), Sampling(min_new_tokens=1)], ends=[*ends, 1000])
    for count in range(5):
        wanted = [
            MinNewTokensLengthLogitsProcessor(1, least, ends, device="cpu")(
                torch.zeros(1, 1 + count, dtype=torch.long), row[None].clone()
            )
            .argmax(-1)
            .item()
            for row, least in zip(logits, (3, 1), strict=True)
        ]
        assert one.sample(logits).tolist() == wanted


def test_candidates_that_rounding_makes_change_places_stay_what_they_are():
    torch.manual_seed(0)
    scores = torch.randn(1, 50)
    scores[0, 30] = scores[0, 20] = scores.max() - 0.1
    other = scores.clone()
    scores[0, 30] += 2e-7
    other[0, 20] += 2e-7
    assert scores[0, 30] > scores[0, 20]
    assert other[0, 20] > other[0, 30]
    top_k, top_p, drawn = torch.tensor([[40]]), torch.tensor([[0.95]]), []
    for uniform in torch.rand(500, 1, 1):
        drawn += [(draw(scores, top_k, top_p, uniform).item(), draw(other, top_k, top_p, uniform).item())]
    assert all(a == b for a, b in drawn)
    assert {a for a, _ in drawn} >= {20, 30}


# --- in the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    return Engine(adapted("qwen2", routing="layer"), max_seq_len=256, max_batch=4, prefill_chunk=32)


HOT = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}


def test_a_seed_gives_the_same_tokens_whatever_is_beside_it(engine):
    ids = prompt(20)
    alone = engine.generate([ids], max_new_tokens=80, seed=7, **HOT)[0].ids
    assert engine.generate([ids], max_new_tokens=80, seed=7, **HOT)[0].ids == alone
    assert engine.generate([ids], max_new_tokens=50, seed=7, **HOT)[0].ids == alone[:50]
    beside = engine.generate(
        [prompt(90, 3), ids, ids, prompt(3, 4)],
        max_new_tokens=[100, 80, 80, 2],
        seed=[1, 7, 8, None],
        temperature=[0.0, 1.3, 1.3, 0.4],
        top_k=[0, 40, 40, 3],
        top_p=[1.0, 0.95, 0.95, 0.5],
        repetition_penalty=[1.0, 1.1, 1.1, 5.0],
    )
    assert beside[1].ids == alone != beside[2].ids
    assert beside[0].ids == generated(engine.model, prompt(90, 3), 100)


def test_without_a_seed_torchs_decides(engine):
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(engine.generate([prompt(5)] * 2, max_new_tokens=30, **HOT))
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0].ids != drawn[0][1].ids


def test_the_repetition_penalty_sees_prompt_and_text(engine):
    ids = prompt(20)
    inputs = torch.tensor([ids])
    wanted = engine.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=60, do_sample=False, repetition_penalty=1.4, pad_token_id=0
    )  # fmt: skip
    got = engine.generate([ids, prompt(9)], max_new_tokens=60, repetition_penalty=[1.4, 1.0])
    assert got[0].ids == wanted[0, 20:].tolist() != generated(engine.model, ids, 60)
    assert got[1].ids == generated(engine.model, prompt(9), 60)


def test_end_tokens_of_the_generation_config_and_of_the_argument():
    model, ids = bare(), prompt(20)
    free = generated(model, ids, 60)
    first, second = list(dict.fromkeys(free))[2:4]
    model.generation_config.eos_token_id = [first, second]
    one = Engine(model, max_seq_len=256)
    (got,) = one.generate([ids], max_new_tokens=60)
    assert (got.ids, got.finish_reason) == (free[: free.index(first) + 1], "stop")
    assert one.generate([ids], max_new_tokens=60, eos_token_id=second)[0].ids == free[: free.index(second) + 1]
    (got,) = one.generate([ids], max_new_tokens=60, eos_token_id=())
    assert (got.ids, got.finish_reason) == (free, "length")
    (got,) = one.generate([ids], max_new_tokens=free.index(first) + 1)
    assert got.finish_reason == "stop"
    (got,) = one.generate([ids], max_new_tokens=60, min_new_tokens=50)
    inputs = torch.tensor([ids])
    wanted = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=60, min_new_tokens=50, do_sample=False, pad_token_id=0
    )  # fmt: skip
    assert got.ids == wanted[0, 20:].tolist()
    assert len(got.ids) >= 50


def test_a_sequence_that_has_ended_does_not_disturb_the_others():
    model = bare()
    prompts = [prompt(20), prompt(30, 1)]
    free = [generated(model, ids, 60) for ids in prompts]
    end = next(token for token in free[0] if token not in free[1])
    got = Engine(model, max_seq_len=256).generate(prompts, max_new_tokens=60, eos_token_id=end)
    assert [each.finish_reason for each in got] == ["stop", "length"]
    assert [each.ids for each in got] == [free[0][: free[0].index(end) + 1], free[1]]


def test_log_probabilities_are_those_of_a_whole_forward(engine):
    prompts = [prompt(20), prompt(7, 1)]
    for got in engine.generate(prompts, max_new_tokens=[30, 12], logprobs=3, seed=1, **HOT):
        whole = logits_of(engine.model, got.prompt_ids + got.ids[:-1])[len(got.prompt_ids) - 1 :].log_softmax(-1)
        assert len(got.logprobs) == len(got.ids)
        for token, found, wanted in zip(got.ids, got.logprobs, whole, strict=True):
            assert found.logprob == pytest.approx(wanted[token].item(), abs=1e-4)
            best = wanted.topk(3)
            assert [each[0] for each in found.top] == best.indices.tolist()
            assert [each[1] for each in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_log_probabilities_of_the_chosen_alone_or_of_all(engine):
    (got,) = engine.generate([prompt(5)], max_new_tokens=3, logprobs=0)
    assert all(each.top == () and each.logprob <= 0 for each in got.logprobs)
    (got,) = engine.generate([prompt(5)], max_new_tokens=3, logprobs=VOCAB)
    assert all(sum(math.exp(p) for _, p in each.top) == pytest.approx(1, abs=1e-5) for each in got.logprobs)
    assert engine.generate([prompt(5)], max_new_tokens=3)[0].logprobs is None
