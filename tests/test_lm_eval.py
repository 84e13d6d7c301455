"""lm-evaluation-harness runs the adapted model, unmodified and offline, and finds what `adafuse.evaluation` finds."""

import pytest
from byte_models import adapted
from tiny_text import write_jsonl

from adafuse.evaluation import evaluate, loglikelihoods, prompt_ids, read_choices

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

ITEMS = [
    {"prompt": f"{a}+{b}=", "choices": [str(a + b), str(a * b + 9), str(a), "four"], "answer": (a + b) % 4}
    for a in range(1, 5)
    for b in range(1, 5)
]


@pytest.fixture
def task(tmp_path):
    """A task as docs/evaluation.md shows it."""
    return {
        "task": "my_choices",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(write_jsonl(tmp_path / "choices.jsonl", ITEMS))},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


@pytest.mark.parametrize("routing", ["model", "layer"])
def test_lm_eval_agrees(tmp_path, task, routing):
    """The same log-likelihoods; and one byte being one token here, its accuracy by length in characters is ours by tokens."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tok = adapted(routing=routing)
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tok, batch_size=4),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    items = read_choices(tmp_path / "choices.jsonl")
    pairs = [(prompt_ids(tok, item.prompt), tok(choice).input_ids) for item in items for choice in item.choices]
    samples = sorted(found["samples"]["my_choices"], key=lambda sample: sample["doc_id"])
    assert [sample["doc"] for sample in samples] == ITEMS
    theirs = [value for sample in samples for value, _ in sample["filtered_resps"]]
    ours = loglikelihoods(model, pairs)
    assert theirs == pytest.approx(ours, abs=1e-4)
    result = evaluate(model, tok, items)
    assert found["results"]["my_choices"]["acc_norm,none"] == pytest.approx(result.overall.accuracy)
    sums = [ours[i : i + 4] for i in range(0, len(ours), 4)]
    by_sum = [row.index(max(row)) == item.answer for row, item in zip(sums, items, strict=True)]
    assert found["results"]["my_choices"]["acc,none"] == pytest.approx(sum(by_sum) / len(items))
    assert 0 < result.overall.accuracy < 1
