"""Choice items: log-likelihoods against one sequence at a time, accuracy, NLL, and what is refused or left out."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from byte_models import VOCAB, adapted, save_adapted
from families import NAMES
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_text import EOS, tokenizer, write_jsonl
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from adafuse.data import prompt_ids
from adafuse.evaluation import (
    ChoiceItem,
    Result,
    Score,
    evaluate,
    loglikelihoods,
    position_limit,
    read_choices,
    run_evaluation,
)

ITEMS = [
    ChoiceItem("2+2=", ("4", "five", "22"), 0, "sums"),
    ChoiceItem("3+1=", ("3", "31", "4"), 2, "sums"),
    ChoiceItem("the sky is ", ("green", "blue"), 1, "colours"),
    ChoiceItem("", ("empty", "not"), 0, "colours"),
]
GOOD = {"prompt": "p", "choices": ["a", "b", "c"], "answer": 1}


@torch.no_grad()
def slow_loglikelihood(model, prompt, answer):
    """One forward a token, no batch, no padding, no mask, in fp64 from the logits on."""
    total = 0.0
    for i, token in enumerate(answer):
        logits = model(input_ids=torch.tensor([prompt + answer[:i]])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(-1)).item()
    return total


def slow_evaluation(model, tok, items):
    """(right?, NLL, tokens) of each item."""
    found = []
    for item in items:
        prompt = tok(item.prompt).input_ids or [tok.eos_token_id]
        answers = [tok(choice).input_ids for choice in item.choices]
        sums = [slow_loglikelihood(model, prompt, answer) for answer in answers]
        means = [total / len(answer) for total, answer in zip(sums, answers, strict=True)]
        right = max(range(len(means)), key=lambda c: means[c]) == item.answer
        found.append((right, -sums[item.answer], len(answers[item.answer])))
    return found


class Uniform(torch.nn.Module):
    """Every token equally likely; all choices tie. With value=NaN, no answer at all."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value, self.device = value, torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())  # it names no limit

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=torch.full((*input_ids.shape, VOCAB), self.value))


@pytest.mark.parametrize("name", NAMES)
def test_loglikelihoods_equal_one_sequence_at_a_time(name):
    """Of unequal lengths in one padded batch; for every family, as each treats padding and positions its own way."""
    model, _ = adapted(name, routing="layer")
    pairs = [([5, 6, 7], [8]), ([9], [3, 4, 5, 6]), ([0, 0, 2, 90], [0, 1]), ([7] * 20, [1, 2, 3])]
    wanted = [slow_loglikelihood(model, *pair) for pair in pairs]
    assert loglikelihoods(model, pairs) == pytest.approx(wanted, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(*[st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)] * 2), min_size=1, max_size=9
    ),
    batch_size=st.integers(1, 10),
)
def test_batch_size_and_order_do_not_matter(shared_model, pairs, batch_size):
    model, _ = shared_model
    alone = [slow_loglikelihood(model, *pair) for pair in pairs]
    assert loglikelihoods(model, pairs, batch_size) == pytest.approx(alone, abs=1e-4)


@pytest.fixture(scope="module")
def shared_model():
    return adapted()


def test_accuracy_and_nll_equal_the_loop(shared_model):
    model, tok = shared_model
    outcomes = slow_evaluation(model, tok, ITEMS)
    result = evaluate(model, tok, ITEMS, batch_size=3)
    assert list(result.domains) == ["colours", "sums"]
    for score, part in (
        (result.overall, outcomes),
        (result.domains["sums"], outcomes[:2]),
        (result.domains["colours"], outcomes[2:]),
    ):
        right, nll, tokens = (sum(column) for column in zip(*part, strict=True))
        assert (score.items, score.answer_tokens) == (len(part), tokens)
        assert score.accuracy == pytest.approx(right / len(part))
        assert score.nll == pytest.approx(nll / tokens, abs=1e-5)
    assert (result.skipped, result.limit) == (0, 64)


def test_the_answer_counts_not_its_place(shared_model):
    """Naming each choice in turn as the answer: just one of them is right, the one of best mean log-likelihood."""
    choices = ("x", "yyyyyyyy", "zz")
    scores = [evaluate(*shared_model, [ChoiceItem("p", choices, answer)]).overall.accuracy for answer in range(3)]
    assert sorted(scores) == [0, 0, 1]


def test_ties_go_to_the_lower_index():
    items = [ChoiceItem("p", ("aa", "b", "ccc"), answer) for answer in (0, 1, 2, 0)]
    result = evaluate(Uniform(), tokenizer(), items)
    assert result.overall.accuracy == 0.5
    assert result.overall.nll == pytest.approx(math.log(VOCAB))
    assert result.limit is None


def test_a_choice_that_repeats_the_answer_is_right():
    assert evaluate(Uniform(), tokenizer(), [ChoiceItem("p", ("a", "b", "a"), 2)]).overall.accuracy == 1


def test_nan_is_refused():
    with pytest.raises(ValueError, match="log-likelihoods are NaN"):
        evaluate(Uniform(math.nan), tokenizer(), ITEMS)


def test_items_that_are_too_long_are_left_out_whole_and_counted(shared_model):
    """64 tokens fit; one choice of 65 takes its item with it."""
    model, tok = shared_model
    fits, too_long = ChoiceItem("p" * 60, ("a", "bbbb"), 1), ChoiceItem("p" * 60, ("a", "bbbbb"), 0)
    result = evaluate(model, tok, [too_long, fits, too_long])
    assert (result.overall.items, result.skipped) == (1, 2)
    assert "left out: 2 item(s) longer than the model's 64 tokens" in str(result)
    assert result.overall == evaluate(model, tok, [fits]).overall
    with pytest.raises(ValueError, match="each of the 1 item\\(s\\) is longer than the model's 64 tokens"):
        evaluate(model, tok, [too_long])


def test_nothing_to_evaluate_is_refused(shared_model):
    with pytest.raises(ValueError, match="nothing to evaluate: no items were given"):
        evaluate(*shared_model, [])


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_parts_without_tokens_are_refused(shared_model, pair):
    with pytest.raises(ValueError, match="has no tokens"):
        loglikelihoods(shared_model[0], [pair])


def test_a_batch_size_below_one_is_refused(shared_model):
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(*shared_model, ITEMS, batch_size=0)


def test_a_choice_without_tokens_is_refused(shared_model):
    tok = tokenizer()
    tok.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(ValueError, match="makes no token of a choice: '~'"):
        evaluate(shared_model[0], tok, [ChoiceItem("p", ("a", "~"), 0)])


def test_chat_puts_the_prompt_into_the_template(shared_model):
    model, tok = shared_model[0], tokenizer(chat=True)
    written_out = [ChoiceItem(f"<user>{item.prompt}<assistant>", item.choices, item.answer) for item in ITEMS]
    assert evaluate(model, tok, ITEMS, chat=True).overall == evaluate(model, tok, written_out).overall
    with pytest.raises(ValueError, match="no chat template"):
        evaluate(*shared_model, ITEMS, chat=True)


def test_a_tokenizer_that_frames_its_texts(shared_model):
    """What it puts in front stays, what it puts behind a prompt does not come between prompt and answer."""
    framing = tokenizer()
    framing.backend_tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A {EOS}", special_tokens=[(EOS, 0)])
    assert prompt_ids(framing, "a") == [0, *tokenizer()("a").input_ids]
    by_hand = [ChoiceItem(EOS + item.prompt, item.choices, item.answer) for item in ITEMS]
    assert evaluate(shared_model[0], framing, ITEMS).overall == evaluate(*shared_model, by_hand).overall


def test_modes_come_back_and_dropout_is_off(shared_model):
    model, tok = adapted(lora_dropout=0.5)
    model.train()
    model.get_base_model().lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert evaluate(model, tok, ITEMS).overall == evaluate(*shared_model, ITEMS).overall
    assert [module.training for module in model.modules()] == modes


def test_progress_counts_sequences(shared_model):
    seen = []
    evaluate(*shared_model, ITEMS, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_a_position_limit(name):
    assert position_limit(adapted(name)[0]) == 64


def test_the_table_of_a_result():
    score = Score(items=4, accuracy=0.5, nll=1.25, answer_tokens=9)
    assert str(Result(score, {"sums": score}, 0, None)) == (
        "         items  accuracy  NLL/token\nsums         4    50.0%      1.250\noverall      4    50.0%      1.250"
    )


# --- files and the command -----------------------------------------------------------------------------------------


def test_reading_items(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "domain": "é", "more": 1}), "utf-8")
    assert read_choices(path) == [ChoiceItem("p", ("a", "b", "c"), 1), ChoiceItem("p", ("a", "b", "c"), 1, "é")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "broken JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"prompt": "p"}', "missing choices, answer"),
        (json.dumps({**GOOD, "prompt": 1}), "prompt and domain must be strings"),
        (json.dumps({**GOOD, "domain": None}), "prompt and domain must be strings"),
        (json.dumps({**GOOD, "choices": "abc"}), "choices must be a list of non-empty strings"),
        (json.dumps({**GOOD, "choices": ["a", ""]}), "choices must be a list of non-empty strings"),
        (json.dumps({**GOOD, "choices": ["a", 2]}), "choices must be a list of non-empty strings"),
        (json.dumps({**GOOD, "choices": ["a"]}), "1 choice\\(s\\); needed: 2 or more"),
        (json.dumps({**GOOD, "answer": 3}), "answer 3 is not the index of a choice; allowed: 0 to 2"),
        (json.dumps({**GOOD, "answer": -1}), "answer -1 is not the index"),
        (json.dumps({**GOOD, "answer": True}), "answer True is not the index"),
        (json.dumps({**GOOD, "answer": "b"}), "answer 'b' is not the index"),
    ],
)
def test_broken_lines_are_refused_with_their_number(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n", "utf-8")
    with pytest.raises(ValueError, match=f"items.jsonl, line 3: {message}"):
        read_choices(path)


@pytest.mark.parametrize(("content", "message"), [(None, "is not a file"), ("", "is empty"), ("\n \n", "is empty")])
def test_files_without_items_are_refused(tmp_path, content, message):
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_choices(path)


def test_the_command_prints_and_writes_the_result(tmp_path, capsys):
    base, adapter = save_adapted(tmp_path)
    data = write_jsonl(tmp_path / "items.jsonl", [{**GOOD, "domain": "letters"}, GOOD])
    out = tmp_path / "result.json"
    result = run_evaluation(data, adapter, out=out, console=Console(width=100))
    assert capsys.readouterr().out == f"{result}\n"
    written = json.loads(out.read_text())
    assert written == {
        "data": str(data),
        "adapter": str(adapter),
        "base": None,
        "chat": False,
        **result.to_dict(),
    }
    assert sorted(written["domains"]) == ["(no domain)", "letters"]
    alone = run_evaluation(data, base=base, console=Console(quiet=True))
    assert alone.overall.nll != result.overall.nll


@pytest.mark.parametrize("out", ["missing/result.json", "."])
def test_places_that_cannot_be_written_are_refused_before_the_model_is_loaded(tmp_path, out):
    data = write_jsonl(tmp_path / "items.jsonl", [GOOD])
    with pytest.raises(ValueError, match="is not a file in an existing folder"):
        run_evaluation(data, tmp_path / "no-adapter", out=tmp_path / out)
