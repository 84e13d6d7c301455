"""Multiple choice on the demo's held-out questions: `adafuse eval` and lm-evaluation-harness on the same items, base and adapter.

    adafuse demo --out demo-0 && python benchmarks/choices.py demo-0 --out benchmarks/results/cpu/choices.json

The wrong choices of a question are the answers to other questions of its domain.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import record
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from adafuse.base import load_adapted
from adafuse.demo.run import DemoSettings
from adafuse.demo.tasks import make_tasks
from adafuse.evaluation import evaluate, read_choices

TASK = {
    "task": "demo_choices",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_items(seed, path):
    """A line a held-out question of the demo with this seed: its solution among three of the same domain, at a random place."""
    settings, rng = DemoSettings(), random.Random(seed)
    _, items = make_tasks(seed, settings.train_per_domain, settings.test_per_domain)
    with path.open("w") as file:
        for item in items:
            others = sorted({o.solution for o in items if o.domain == item.domain} - {item.solution})
            choices = [*rng.sample(others, 3), item.solution]
            rng.shuffle(choices)
            answer = choices.index(item.solution)
            line = {
                "prompt": item.prompt,
                "choices": [" " + c for c in choices],
                "answer": answer,
                "domain": item.domain,
            }
            file.write(json.dumps(line) + "\n")


def rows_of(name, model, tokenizer, path, case):
    found = evaluate(model, tokenizer, read_choices(path))
    case = {**case, "items": found.overall.items}
    yield _row(f"{name}/adafuse_accuracy", case, found.overall.accuracy, "share of right picks")
    yield _row(f"{name}/adafuse_nll", case, found.overall.nll, "nats per token")
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(path)}}}
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    results = simple_evaluate(
        model=lm, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    yield _row(f"{name}/lm_eval_acc", case, results["results"][TASK["task"]]["acc,none"], "share of right picks")


def _row(name, case, value, unit):
    return {
        "name": name,
        "case": case,
        **dict.fromkeys(("median", "p20", "p80"), value),
        "unit": unit,
        "vs": None,
        "ratio": None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that `adafuse demo` wrote")
    parser.add_argument("--out", required=True, help="JSON file to write")
    args = parser.parse_args()
    seed = json.loads((args.folder / "demo.json").read_text())["seed"]
    model, tokenizer = load_adapted(args.folder, dtype="float32")
    case = {"model": "smollm2-135m-instruct", "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "choices.jsonl"
        write_items(seed, path)
        rows = list(rows_of("choices/adapter", model, tokenizer, path, case))
        rows += rows_of("choices/base", model.detach(), tokenizer, path, case)
    record.write(args.out, rows)


if __name__ == "__main__":
    main()
