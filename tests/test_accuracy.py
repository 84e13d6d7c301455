"""The accuracy study in miniature, on a tiny random model and two domains written here; its parts against slow, obvious ones."""

import argparse
import copy
import json
import shutil
import sys
from collections import Counter
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_text import save_base, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy.evaluate
import accuracy.train
from accuracy import methods, study
from accuracy.batches import buckets_of, widths_of
from accuracy.choose import RATES as ALL_RATES
from accuracy.choose import choose, gains, refine_runs, search_runs, summary, tune_runs
from accuracy.evaluate import Evaluation, pack, unpack
from accuracy.forward import Answers, divergence_of
from accuracy.graphs import Replayed
from accuracy.heatmap import draw, overlap, shares_of
from accuracy.items import SPLITS, Groups, make_items, read_items
from accuracy.report import accuracy_rows
from accuracy.routing_share import expert_shares
from accuracy.runs import Run, check_settings, check_study, read_json, results_of, work_through, write_json
from accuracy.stats import paired_difference
from accuracy.train import TrainSettings, _Step, plan_order, train
from tables import TABLES

from adafuse import evaluation as library
from adafuse.base import load_base
from adafuse.inspection import summarise
from adafuse.router import Routing

COUNTS = {"train": 24, "validation": 12, "test": 16}
RATES = ["0.001", "0.02"]


def questions(domain, split, count):
    """Items whose answer is a letter of the prompt's word; in "shared", four in a row share their choices, each right once."""
    rng = np.random.default_rng([len(domain), SPLITS.index(split)])
    choices = [" ab", " cde", " f", " gh"]
    for i in range(count):
        word = "".join(rng.choice(list("klmnop"), size=int(rng.integers(2, 20))))
        order = rng.permutation(4) if domain == "alone" or i % 4 == 0 else order  # noqa: F821
        yield {
            "prompt": f"{word}? Answer:",
            "choices": [choices[c] + (f"{i // 4}" if domain == "shared" else word[:1]) for c in order],
            "answer": i % 4,
            "domain": domain,
            "key": f"{split} {i // 2}",
        }


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(folder of the data, folder of the base)."""
    root = tmp_path_factory.mktemp("accuracy")
    for domain in ("alone", "shared"):
        (root / "data" / domain).mkdir(parents=True)
        for split, count in COUNTS.items():
            write_jsonl(root / "data" / domain / f"{split}.jsonl", questions(domain, split, count))
    return root / "data", save_base(root / "base", num_hidden_layers=4)


@pytest.fixture
def tiny(places, tmp_path):
    """(base, tokenizer, items)."""
    base, tokenizer = load_base(places[1], dtype="float32", device="cpu")
    return base, tokenizer, make_items(places[0], tokenizer, tmp_path / "items.safetensors")


@pytest.fixture
def small(monkeypatch):
    """Fewer methods and forms, small enough for the tiny model."""
    two = {"num_experts": 4, "r": 2, "top_k": 2}
    chosen = {
        "base": methods.METHODS["base"],
        "lora_active": methods.lora("active", **two),
        "pregate_paper": methods.pregate(**two),
    }
    forms = {
        "layer": methods.pregate(**two, routing="layer"),
        "distilled": methods.pregate(**two, teacher="lora_active"),
    }
    for registry, entries in ((methods.METHODS, chosen), (methods.SEARCH, forms)):
        for name in list(registry):
            monkeypatch.delitem(registry, name)
        for name, method in entries.items():
            monkeypatch.setitem(registry, name, method)
    monkeypatch.setattr("accuracy.choose.FIRST_RATE_OF", "lora_active")


def command(phase, places, folder, *more):
    where = ["--items", str(folder.parent / "items.safetensors"), "--base", str(places[1]), "--runs", str(folder)]
    return study.main([phase, *where, "--epochs", "1", "--batch", "8", "--rates", *RATES, *more])


def tokenise(places, folder):
    where = ["--items", str(folder.parent / "items.safetensors"), "--base", str(places[1])]
    assert study.main(["items", "--data", str(places[0]), *where]) == 0


def summed_up(phase, folder, *more):
    return study.main([phase, "--runs", str(folder), *more])


def test_the_whole_study(places, small, tmp_path, capsys):
    folder, out = tmp_path / "runs", tmp_path / "out" / "accuracy.json"
    assert command("tune", places, folder) == 1
    assert "study.py items" in capsys.readouterr().err
    tokenise(places, folder)
    for phase in ("search", "final"):  # nothing was tuned
        assert command(phase, places, folder) == 1
        assert "finish `tune`" in capsys.readouterr().err
    assert command("tune", places, folder, "--budget-s", "0") == study.RUNS_LEFT
    assert command("tune", places, folder) == 0
    few = ("--least-gain", "-1", "--seeds")
    assert command("final", places, folder, *few, "1") == 1  # nothing was searched
    assert "finish `search`" in capsys.readouterr().err
    assert command("search", places, folder) == 0
    assert command("final", places, folder, *few, "1") == 1
    assert "finish `refine`" in capsys.readouterr().err
    assert command("refine", places, folder) == 0
    assert command("final", places, folder) == 1  # a toy learns nothing
    assert "no method gains 10 points over the base in " in capsys.readouterr().err
    assert command("all", places, folder, *few, "1", "--budget-s", "0") == study.RUNS_LEFT  # tuned already
    assert not list(folder.glob("final-*"))
    check_search(folder)
    printed = capsys.readouterr().out
    assert "final: 0 of 4 runs are done" in printed
    assert "best at an end of the rates" in printed
    assert command("final", places, folder, *few, "1", "2") == 0
    chosen = json.loads((folder / "chosen.json").read_text())
    assert chosen["pregate_best"]["built_as"] in methods.SEARCH
    assert {path.suffix for path in folder.iterdir()} == {".json"}  # all of it can be committed
    assert summed_up("report", folder, "--out", str(out)) == 1
    assert "from 2 seeds, of 5" in capsys.readouterr().err
    two = ("--least-seeds", "2", "--out")
    assert summed_up("report", folder, *two, str(out)) == 1  # no layer-wise method among these
    assert "'layerwise'" in capsys.readouterr().err
    assert summed_up("report", folder, *two, str(out), "--reference", "lora_active") == 0
    check_report(json.loads(out.read_text()))
    routing = out.with_name("routing.json")
    assert summed_up("heatmap", folder, *two, str(routing)) == 0
    check_heatmap(json.loads(routing.read_text())["rows"])


def check_search(folder):
    """On validation, not on test; and the teacher was what `tune` had trained at that rate from that seed."""
    results = {result["method"]: result for result in results_of(folder, "search")}
    assert {result["score"]["items"] for result in results.values()} == {24}
    assert {result["seed"] for result in results.values()} == {0}
    teacher = results["distilled"]["teacher"]
    same = [
        result["train"]["final_loss"]
        for result in results_of(folder, "tune")
        if (result["method"], result["learning_rate"], result["seed"]) == ("lora_active", teacher["learning_rate"], 0)
    ]
    assert same == [teacher["final_loss"]]
    assert "teacher" not in results["layer"]


def check_heatmap(rows):
    assert {row["name"] for row in rows} == {"routing/pregate_paper", "routing/pregate_best"}
    assert {row["case"]["seed"] for row in rows} == {1}  # one seed is enough for a picture
    assert all(sum(row["shares"]) == pytest.approx(1, abs=1e-3) for row in rows)
    for domains, shares in shares_of(rows).values():
        assert domains == ["alone", "shared"]
        assert shares.shape[::2] == (2, 4)
        by_hand = [
            sum(min(a, b) for a, b in zip(shares[0, d], shares[1, d], strict=True)) for d in range(shares.shape[1])
        ]
        assert overlap(shares)[0, 1] == pytest.approx(np.mean(by_hand))
        np.testing.assert_allclose(overlap(shares).diagonal(), 1, atol=1e-3)
    assert len(TABLES["routing"](rows)) == 2 + 2 + 2


def check_report(document):
    rows = [row for row in document["rows"] if row["name"].startswith("accuracy/")]
    rows = {(row["name"], row["case"]["domain"], row["case"]["seed"]): row for row in rows}
    names = {name for name, _, _ in rows}
    assert names == {f"accuracy/{name}" for name in ("base", "lora_active", "pregate_paper", "pregate_best")}
    for name in names - {"accuracy/base"}:
        seeds = [rows[name, "mean", seed]["median"] for seed in (1, 2)]
        whole = rows[name, "mean", "all"]
        assert whole["median"] == pytest.approx(np.mean(seeds))
        assert whole["std"] == pytest.approx(np.std(seeds, ddof=1))
        assert rows[name, "mean", 1]["median"] == pytest.approx(
            np.mean([rows[name, domain, 1]["median"] for domain in ("alone", "shared")])
        )
    assert "diff_to_lora_active" not in rows["accuracy/lora_active", "mean", "all"]
    low, mid, high = rows["accuracy/pregate_paper", "mean", "all"]["diff_to_lora_active"]
    means = [rows[f"accuracy/{name}", "mean", "all"]["median"] for name in ("pregate_paper", "lora_active")]
    assert low <= mid <= high
    assert mid == pytest.approx(means[0] - means[1])
    assert len(rows["accuracy/base", "mean", "all"]["diff_to_lora_active"]) == 3
    low, mid, high = rows["accuracy/lora_active", "mean", "all"]["diff_of_pregate_best"]
    assert low <= mid <= high
    assert mid == pytest.approx(rows["accuracy/pregate_best", "mean", "all"]["median"] - means[1])
    assert "diff_of_pregate_best" not in rows["accuracy/pregate_best", "mean", "all"]
    for table, lines in (("accuracy", 6 + 4), ("accuracy.domains", 2 + 4)):
        assert len(TABLES[table](document["rows"])) == lines
    trials = [line for line in TABLES["accuracy.trials"](document["rows"]) if line.startswith("| ")]
    assert len(trials) == 1 + 2 + 1 + len(methods.SEARCH) + 2  # two methods that train; forms, one at three rates
    assert rows["accuracy/lora_active", "mean", 1]["case"]["params"] > 0


def fake(run):
    return {"score": {"accuracy": {"mean": 0.5}}, "did": run.file}


def test_a_killed_study_goes_on(tmp_path):
    runs = [Run("tune", "m", rate, 0, "m") for rate in (0.1, 0.2, 0.3)]

    def killed(run):
        if run is runs[1]:
            raise KeyboardInterrupt
        return fake(run)

    with pytest.raises(KeyboardInterrupt):
        work_through(tmp_path, runs, killed)
    assert [path.name for path in tmp_path.iterdir()] == [runs[0].file]
    done = []
    assert work_through(tmp_path, runs, lambda run: done.append(run) or fake(run)) == (0, 0)
    assert done == runs[1:]
    assert work_through(tmp_path, runs, killed) == (0, 0)  # nothing is left to do


def test_a_failed_run_does_not_stop_the_others(tmp_path, capsys):
    runs = [Run("tune", "m", rate, 0, "m") for rate in (0.1, 0.2, 0.3)]

    def broken(run):
        if run is runs[1]:
            raise RuntimeError("out of memory")
        return fake(run)

    assert work_through(tmp_path, runs, broken) == (1, 1)
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    assert work_through(tmp_path, runs, fake) == (0, 0)  # tried again
    assert len(results_of(tmp_path, "tune")) == 3


def test_a_budget_stops_before_a_run_that_would_not_fit(tmp_path):
    runs, now = [Run("tune", "m", rate, 0, "m") for rate in (0.1, 0.2, 0.3, 0.4)], [0.0]

    def ten_seconds(run):
        now[0] += 10
        return fake(run)

    assert work_through(tmp_path, runs, ten_seconds, 25, clock=lambda: now[0]) == (2, 0)
    now[0] = 0.0
    assert work_through(tmp_path, runs, ten_seconds, 9, clock=lambda: now[0]) == (2, 0)  # runs of before took 10 s
    assert work_through(tmp_path, runs, ten_seconds, 15, clock=lambda: now[0]) == (1, 0)
    assert json.loads((tmp_path / runs[0].file).read_text())["seconds"] == 10


def test_two_at_a_time_keep_to_the_budget(tmp_path):
    """Runs of one clock tick each, begun in pairs; the third pair would end too late."""
    runs, now, begun = [Run("tune", "m", rate, 0, "m") for rate in range(1, 7)], [0], []

    class Pair(Executor):
        """Does what was submitted once there are two of them: nothing before."""

        waiting = ()

        def submit(self, function, *arguments):
            future = Future()
            self.waiting = (*self.waiting, (future, function, arguments))
            begun.append(now[0])
            if len(self.waiting) == 2:
                now[0] += 10
                for each, does, given in self.waiting:
                    each.set_result({**does(*given), "seconds": 10})
                self.waiting = ()
            return future

    done = work_through(tmp_path, runs, fake, 25, clock=lambda: now[0], workers=2, pool=Pair())
    assert done == (2, 0)
    assert begun == [0, 0, 10, 10]
    assert len(results_of(tmp_path, "tune")) == 4


@pytest.mark.timeout(300)
def test_workers_do_what_one_process_does(places, tmp_path):
    """Two processes against one: the same scores, run by run."""
    tokenise(places, tmp_path / "one")
    chosen = ["--methods", "lora_active", "pregate_paper", "--rates", "0.001"]
    assert command("tune", places, tmp_path / "one", *chosen) == 0
    assert command("tune", places, tmp_path / "two", *chosen, "--workers", "2") == 0
    one, two = (results_of(tmp_path / name, "tune") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    assert [result["score"] for result in one] == [result["score"] for result in two]


def test_gpus_of_the_same_instructions_share_a_study(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert study.kind_of(torch.device("cuda", 1)) == "sm_90"
    assert study.kind_of(torch.device("cpu")) == "cpu"


def test_workers_take_turns_in_choosing_a_gpu(monkeypatch):
    for count, expected in ((0, ["cpu"] * 3), (1, ["cuda:0"] * 3), (2, ["cuda:0", "cuda:1", "cuda:0"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert [str(study.device_of(worker)) for worker in range(3)] == expected


def test_a_folder_holds_one_study(tmp_path):
    check_study(tmp_path, {"epochs": 1, "base": "a"})
    check_study(tmp_path, {"epochs": 1, "base": "a"})
    with pytest.raises(ValueError, match="epochs: 1 there, 2 here"):
        check_study(tmp_path, {"epochs": 2, "base": "a"})


def tried(folder, run, accuracy):
    """Leaves what is read of the result of a run on validation."""
    write_json(folder / run.file, {**vars(run), "score": {"accuracy": {"mean": accuracy}}})


def all_tuned(folder, best):
    """A finished `tune` of all methods, each with its best at the rate best[method], 0.002 for one not in there."""
    for run in tune_runs(methods.METHODS, ALL_RATES):
        tried(folder, run, 0.6 if run.learning_rate == best.get(run.method, 0.002) else 0.5)


def runs_of(phase, folder):
    options = argparse.Namespace(runs=folder, methods=None, rates=ALL_RATES, seeds=study.SEEDS, least_gain=0.1)
    return study.runs_of(options, phase)


def test_choices_are_fixed_once(small, tmp_path):
    def tried_from(name, rate, *accuracies):
        for seed, mean in zip((0, 100), accuracies, strict=True):
            tried(tmp_path, Run("tune", name, rate, seed, name), mean)

    def tried_again(rates):
        for run in refine_runs(tmp_path, ["lora_active", "pregate_paper"], rates):
            tried(tmp_path, run, 0.4)

    for name in ("lora_active", "pregate_paper"):
        tried_from(name, 0.1, 0.5, 0.3)
    with pytest.raises(ValueError, match=r"2 of 4 .*tune-lora_active-lr0.2-seed0.json; finish `tune`"):
        choose(tmp_path, ["lora_active"], [0.1, 0.2])
    tried_from("lora_active", 0.2, 0.3, 0.5)
    with pytest.raises(ValueError, match=r"4 of 4 .*refine-lora_active-lr0.1-seed200.json; finish `refine`"):
        choose(tmp_path, ["lora_active"], [0.1, 0.2])
    tried_again([0.1])
    for seed in (200, 300):
        tried(tmp_path, Run("refine", "lora_active", 0.2, seed, "lora_active"), 0.4)
    tied = choose(tmp_path, ["lora_active"], [0.2, 0.1])
    assert tied["lora_active"]["learning_rate"] == 0.1  # the lower one
    choose(tmp_path, ["lora_active", "pregate_paper"], [0.1])
    tried_from("lora_active", 0.2, 0.3, 0.6)
    with pytest.raises(ValueError, match="fixed other settings of lora_active"):
        choose(tmp_path, ["lora_active"], [0.1, 0.2])


def test_the_best_mean_over_the_seeds_is_taken(small, tmp_path):
    """The best single run is at 0.3, and it diverged from the other seed; 0.2 is best of the first two seeds, 0.1 of all four."""
    runs = tune_runs(["lora_active"], [0.1, 0.2, 0.3])
    found = {(0.1, 0): 0.42, (0.1, 100): 0.4, (0.2, 0): 0.3, (0.2, 100): 0.6, (0.3, 0): 0.8, (0.3, 100): 0.0}
    for run in runs[:4]:
        tried(tmp_path, run, found[run.learning_rate, run.seed])
    (line,) = summary(tmp_path, runs)
    assert " ".join(line.split()) == "lora_active 0.1: 41.00% 0.2: 30.00% 0.3: 80.00% best at an end of the rates"
    for run in runs[4:]:
        tried(tmp_path, run, found[run.learning_rate, run.seed])
    (line,) = summary(tmp_path, runs)
    assert " ".join(line.split()) == "lora_active 0.1: 41.00% 0.2: 45.00% 0.3: 40.00%"
    again = refine_runs(tmp_path, ["lora_active"], [0.1, 0.2, 0.3])
    assert [(run.learning_rate, run.seed) for run in again] == [(0.2, 200), (0.1, 200), (0.2, 300), (0.1, 300)]
    for run in again:
        tried(tmp_path, run, {0.1: 0.42, 0.2: 0.39}[run.learning_rate])
    assert choose(tmp_path, ["lora_active"], [0.1, 0.2, 0.3])["lora_active"] == {
        "built_as": "lora_active",
        "learning_rate": 0.2,
        "validation": pytest.approx((0.3 + 0.6 + 2 * 0.39) / 4),
    }
    for run in again:
        tried(tmp_path, run, {0.1: 0.44, 0.2: 0.39}[run.learning_rate])
    with pytest.raises(ValueError, match="fixed other settings"):
        choose(tmp_path, ["lora_active"], [0.1, 0.2, 0.3])


def test_every_method_has_as_many_trials(tmp_path):
    tune = runs_of("tune", tmp_path)
    assert Counter(run.method for run in tune) == {name: 12 if name != "base" else 1 for name in methods.METHODS}
    assert [run.method for run in tune[:11]] == ["base", *(name for name in methods.METHODS if name != "base")]
    with pytest.raises(ValueError, match="finish `tune`"):
        search_runs(tmp_path, ALL_RATES)
    all_tuned(tmp_path, {"pregate_paper": 0.001, "layerwise": 0.004})
    search = runs_of("search", tmp_path)
    assert len(search) == 12
    assert {(run.learning_rate, run.seed) for run in search} == {(0.004, 0)}
    assert {run.method: run.teacher_rate for run in search if run.teacher_rate} == {"layer_fine_distilled": 0.004}
    with pytest.raises(ValueError, match="finish `search`"):
        runs_of("refine", tmp_path)
    best_first = ["layer_fine_distilled", "layer_fine_shared", "layer"]  # the first has a teacher
    for run in search:
        tried(tmp_path, run, 0.8 - 0.1 * best_first.index(run.method) if run.method in best_first else 0.4)
    refine = runs_of("refine", tmp_path)
    forms = {(run.method, run.learning_rate, run.seed) for run in refine if run.method in methods.SEARCH}
    assert forms == {(name, rate, 0) for name in best_first[1:] for rate in (0.002, 0.008)}
    assert Counter(run.method for run in refine if run.method in methods.METHODS) == {
        name: 4 for name in methods.METHODS if name != "base"
    }
    assert {run.seed for run in refine if run.method in methods.METHODS} == {200, 300}
    with pytest.raises(ValueError, match="finish `refine`"):
        runs_of("final", tmp_path)
    for run in refine:
        tried(tmp_path, run, 0.75 if (run.method, run.learning_rate) == ("layer", 0.008) else 0.5)
    final = runs_of("final", tmp_path)
    assert (
        len({run.file for run in (*tune, *search, *refine, *final)}) == 233
    )  # and none writes over another one's file
    assert not {run.seed for run in final} & {run.seed for run in (*tune, *refine)}
    best = {(run.built_as, run.learning_rate, run.teacher_rate) for run in final if run.method == "pregate_best"}
    assert best == {("layer", 0.008, 0.0)}


def test_runs_of_other_settings_are_refused(tmp_path):
    all_tuned(tmp_path, {})
    (run,) = (run for run in tune_runs(["moral"], ALL_RATES) if (run.learning_rate, run.seed) == (0.001, 100))
    settings = methods.METHODS["moral"].settings
    write_json(tmp_path / run.file, {**read_json(tmp_path / run.file), "settings": settings})
    runs_of("search", tmp_path)
    write_json(tmp_path / run.file, {**read_json(tmp_path / run.file), "settings": {**settings, "r": 1}})
    with pytest.raises(ValueError, match=r"a run of moral with other settings \(tune, rate 0.001, seed 100\)"):
        runs_of("search", tmp_path)


def test_the_committed_runs_are_of_these_settings():
    folder = Path(study.__file__).parents[1] / "results" / "h200" / "accuracy_runs"
    results = [result for phase in study.PHASES for result in results_of(folder, phase)]
    assert len(results) == 233
    check_settings(
        folder, results, {name: method.settings for name, method in (methods.METHODS | methods.SEARCH).items()}
    )


def assert_close(one, other):
    """JSON, numbers up to rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair)
    else:
        assert one == (pytest.approx(other) if isinstance(one, float) else other)


def test_the_committed_results_are_of_the_committed_runs(tmp_path):
    """All of them, the bootstrap's intervals too, and what was chosen before."""
    folder = Path(study.__file__).parents[1] / "results" / "h200"
    for phase in ("report", "heatmap"):
        assert summed_up(phase, folder / "accuracy_runs", "--out", str(tmp_path / f"{phase}.json")) == 0
    for phase, committed in (("report", "accuracy.json"), ("heatmap", "routing.json")):
        again, found = read_json(tmp_path / f"{phase}.json"), read_json(folder / committed)
        assert_close(again, found)
    trials = [path for path in (folder / "accuracy_runs").iterdir() if not path.name.startswith(("chosen", "final"))]
    for path in trials:
        shutil.copy(path, tmp_path)
    choose(tmp_path, [*methods.METHODS, methods.BEST], study.RATES)
    assert read_json(tmp_path / "chosen.json") == read_json(folder / "accuracy_runs" / "chosen.json")


def test_another_teacher_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr("accuracy.choose.FIRST_RATE_OF", "pregate_paper")
    all_tuned(tmp_path, {"layerwise": 0.004})
    before = search_runs(tmp_path, ALL_RATES)
    all_tuned(tmp_path, {"layerwise": 0.001})
    differing = {run.file for run in search_runs(tmp_path, ALL_RATES)} ^ {run.file for run in before}
    assert differing == {f"search-layer_fine_distilled-lr0.002-seed0-teacher{rate}.json" for rate in ("0.004", "0.001")}


def test_formats_agree(tiny, places):
    """Training examples and evaluated sequences are what `adafuse eval` feeds, token by token."""
    _, tokenizer, items = tiny
    for split in SPLITS:
        theirs = [item for name in items.names for item in library.read_choices(places[0] / name / f"{split}.jsonl")]
        encoded = [library._encode(tokenizer, item, chat=False) for item in theirs]
        mine = getattr(items, split)
        assert as_lists(mine.pairs(right_only=False)) == [pair for pairs in encoded for pair in pairs]
        right = [pairs[item.answer] for pairs, item in zip(encoded, theirs, strict=True)]
        assert as_lists(mine.pairs(right_only=True)) == right


def as_lists(pairs):
    return [(prompt.tolist(), answer.tolist()) for prompt, answer in pairs]


def test_items_are_kept(tiny, places, tmp_path):
    _, tokenizer, items = tiny
    again = read_items(tmp_path / "items.safetensors")
    assert again.source == items.source
    again.check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="tokenised for another base"):
        replace(again, vocabulary="0").check_tokenizer(tokenizer)
    assert again.test.order_hash() == items.test.order_hash() != items.validation.order_hash()
    assert np.array_equal(again.train.clusters, items.train.clusters)
    _, counts = np.unique(items.train.clusters, return_counts=True)
    assert sorted(counts) == [2] * 12 + [4] * 6  # pairs of a key where choices differ, fours where they are shared
    with pytest.raises(ValueError, match="has no domain"):
        make_items(tmp_path, tokenizer, tmp_path / "other")


def test_no_mask_is_needed(tiny):
    """Answers of padded batches without a mask are those of the base's own masked forward, whatever the padding holds."""
    base, _, items = tiny
    pairs = items.validation.pairs(right_only=False)
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    buckets = buckets_of(pairs, widths_of(lengths, (0.5, 1.0)), [7, 5])
    assert len(buckets) == 2
    expected = [masked_nll(base, bucket.batches[i]) for bucket in buckets for i in range(len(bucket.batches))]
    answers, found = Answers(base), []
    for bucket in buckets:
        for i in range(len(bucket.batches)):
            batch = bucket.batches[i]
            found.append(answers.nll(batch))
            noise = torch.where(batch.mask == 1, batch.ids, torch.randint_like(batch.ids, 1, 257))
            torch.testing.assert_close(answers.nll(replace(batch, ids=noise)), found[-1])
    answers.close()
    torch.testing.assert_close(found, expected)
    assert base.config._attn_implementation == "sdpa"


class NoQuestions(TorchDispatchMode):
    """Refuses what would make the host wait for a device: a value, a condition, a shape that depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = (
            [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if name.startswith("index") and isinstance(args[1], list)
            else []
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
            raise AssertionError(f"a step calls {name}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name, method in (methods.METHODS | methods.SEARCH).items() if method.build])
def test_a_step_asks_nothing_of_the_device(tiny, name):
    base, _, items = tiny
    base.requires_grad_(False)
    method = (methods.METHODS | methods.SEARCH)[name]
    teacher = methods.METHODS[method.teacher].build(load(base)) if method.teacher else None
    model = method.build(base).train()
    pairs = items.train.pairs(right_only=True)
    batch = buckets_of(pairs, [64], [8])[0].batches[0]
    step = _Step(model, TrainSettings(learning_rate=0.002, batch=8), 8.0, torch.device("cpu"), teacher)
    with NoQuestions():
        losses = torch.stack([step.run(batch).clone() for _ in range(4)])
    step.close()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())
    if teacher is not None:
        assert not teacher.training
        assert not any(bank.b.any() for bank in teacher.banks.values())  # as it was: it does not learn


def test_a_mask_would_ask(tiny):
    base, _, items = tiny
    batch = buckets_of(items.train.pairs(right_only=True), [64], [8])[0].batches[0]
    with NoQuestions(), pytest.raises(AssertionError, match="a step calls"):
        base(input_ids=batch.ids, attention_mask=batch.mask)


@torch.no_grad()
def masked_nll(base, batch):
    logits = base(input_ids=batch.ids, attention_mask=batch.mask).logits.flatten(0, 1)
    return -logits.log_softmax(-1)[batch.slots, batch.targets] * batch.weights


def test_scores_are_those_of_adafuse_eval(tiny, places):
    base, tokenizer, items = tiny
    found = Evaluation(items.test, "cpu", tokens=100).score(base, items.names)
    for name in items.names:
        score = library.evaluate(base, tokenizer, library.read_choices(places[0] / name / "test.jsonl")).overall
        assert found["accuracy"][name] == score.accuracy
        assert found["nll"][name] == pytest.approx(score.nll, rel=1e-5)
    correct = unpack(found["correct"], found["items"])
    assert correct[items.test.domains == 0].mean() == found["accuracy"]["alone"]


def test_a_diverged_model_is_wrong_everywhere(tiny):
    base, _, items = tiny
    base.get_output_embeddings().weight.data.fill_(float("nan"))
    found = Evaluation(items.test, "cpu").score(base, items.names)
    assert found["accuracy"]["mean"] == 0
    assert found["nll"]["mean"] is None


def test_packing():
    correct = np.random.default_rng(0).random(21) < 0.5
    assert np.array_equal(unpack(pack(correct), 21), correct)


@pytest.mark.parametrize("taught", [False, True])
def test_training_is_the_plain_loop(tiny, small, taught):
    """The same parameters as a loop in plain PyTorch: masked forward, loss by hand, torch's AdamW with float learning rates."""
    base, _, items = tiny
    teacher = awake(methods.pregate(num_experts=2, r=4, top_k=1).build(load(base))) if taught else None
    pairs = items.train.pairs(right_only=True)
    settings = TrainSettings(learning_rate=0.01, router_lr_ratio=0.5, epochs=1, batch=8, clip=0.05, seed=3)
    ours, theirs = (methods.METHODS["pregate_paper"].build(load(base)) for _ in range(2))
    theirs.load_adapter_tensors(ours.adapter_tensors())
    result = train(ours, pairs, settings, teacher)
    losses = plain_loop(theirs, pairs, settings, teacher)
    assert result["steps"] == len(losses)
    assert result["final_loss"] == pytest.approx(losses[-1], rel=1e-4)
    assert result["final_loss"] < result["first_loss"]
    expected = theirs.adapter_tensors()
    for name, tensor in ours.adapter_tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def load(base):
    twin = type(base)(base.config)
    twin.load_state_dict(base.state_dict())
    return twin


def awake(model):
    """With experts that do something: a fresh B is zero."""
    for bank in model.banks.values():
        torch.nn.init.normal_(bank.b, std=0.3)
    return model


def plain_loop(model, pairs, settings, teacher=None):
    routers = list(model.router.parameters())
    others = [p for bank in model.banks.values() for p in bank.parameters()]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": routers}], lr=1.0, weight_decay=0.0, foreach=False)
    buckets, schedule = plan_order(pairs, settings)
    mean_tokens, losses = sum(len(answer) for _, answer in pairs) / len(pairs), []
    model.train()
    for i, (bucket, number) in enumerate(schedule):
        batch = buckets[bucket].batches[number]
        output = model(input_ids=batch.ids, attention_mask=batch.mask, output_router_logits=True)
        log_p = output.logits.flatten(0, 1).log_softmax(-1)[batch.slots]
        nll = -log_p[torch.arange(len(log_p)), batch.targets] * batch.weights
        lost = nll
        if teacher is not None:
            with torch.no_grad():
                q = (
                    teacher(input_ids=batch.ids, attention_mask=batch.mask)
                    .logits.flatten(0, 1)[batch.slots]
                    .softmax(-1)
                )
            lost = 0.5 * nll + 0.5 * (q * (q.log() - log_p)).sum(-1) * batch.weights
        optimizer.zero_grad()
        (lost.sum() / (settings.batch * mean_tokens) + 0.01 * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_([*others, *routers], settings.clip)
        rate = settings.learning_rate * settings.factor(i, len(schedule))
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, rate * settings.router_lr_ratio
        optimizer.step()
        losses.append((nll.sum() / batch.weights.sum()).item())
    return losses


def test_a_student_of_itself_learns_nothing_from_it(tiny):
    """KL is 0 where the two are the same, and its gradient too: what is left is half of the plain loss's."""
    base, _, items = tiny
    batch = buckets_of(items.train.pairs(right_only=True), [64], [8])[0].batches[0]
    form = methods.pregate(num_experts=4, r=2, top_k=2, aux_loss_coef=0.0)
    model = awake(form.build(base)).train()
    gradients = []
    for teacher in (None, copy.deepcopy(model)):
        student = copy.deepcopy(model)
        step = _Step(student, TrainSettings(batch=8, clip=1e9), 8.0, torch.device("cpu"), teacher)
        step.run(batch)
        gradients.append(student.adapter_tensors(grad=True))
        step.close()
    for name, alone in gradients[0].items():
        assert alone.any()
        torch.testing.assert_close(2 * gradients[1][name], alone, msg=name)
    logits = torch.randn(len(batch.slots), 257)
    assert not divergence_of(logits, logits, batch).any()
    other = divergence_of(logits, logits.flip(-1), batch)
    assert torch.equal(other > 0, batch.weights > 0)


def test_a_token_router_is_the_loop(tiny):
    """Decision by decision, from the concatenated input and the concatenated weights."""
    base, _, items = tiny
    model = methods.SEARCH["layer_fine_token"].build(base)
    router, ids = model.router, buckets_of(items.train.pairs(right_only=True), [64], [8])[0].batches[0].ids
    with torch.no_grad():
        router.embedding.normal_()
    routing, h0 = model.route(ids), model.hidden_before_blocks(ids)
    weight = torch.cat([router.weight, router.token_weight], dim=1).view(4, 64, -1).detach()
    for b, s in ((0, 0), (3, 5), (7, 20)):
        x = h0[b, s] / (h0[b, s].square().mean() + 1e-6).sqrt()
        for d in range(4):
            p = (weight[d] @ torch.cat([x, router.embedding[ids[b, s]].detach()])).softmax(0)
            best, experts = p.topk(16)
            assert torch.equal(routing.experts[b, s, d], experts)
            torch.testing.assert_close(routing.weights[b, s, d], best / best.sum())


def test_a_token_router_starts_as_the_plain_one(tiny):
    """The same decisions bit for bit; and its embeddings learn, those of the tokens seen alone, with the routers' rate."""
    base, _, items = tiny
    built = {}
    for name in ("layer_fine", "layer_fine_token"):
        torch.manual_seed(0)
        built[name] = methods.SEARCH[name].build(load(base))
    model, batch = built["layer_fine_token"], buckets_of(items.train.pairs(right_only=True), [64], [8])[0].batches[0]
    plain, ours = (built[name].route(batch.ids) for name in built)
    assert torch.equal(plain.experts, ours.experts)
    assert torch.equal(plain.weights, ours.weights)
    step = _Step(model.train(), TrainSettings(router_lr_ratio=3.0, batch=8), 8.0, torch.device("cpu"))
    assert any(p is model.router.embedding for p in step._optimizer.param_groups[1]["params"])
    for _ in range(2):  # at first B is zero, so that routing changes nothing
        step.run(batch)
    step.close()
    learned = model.router.embedding.any(-1)
    assert set(learned.nonzero().flatten().tolist()) == set(batch.ids[batch.mask == 1].tolist())
    found = methods.SEARCH["layer_fine_token"].account(model)
    before = methods.SEARCH["layer_fine"].account(built["layer_fine"])
    assert found.trainable - before.trainable == model.router.embedding.numel() + model.router.token_weight.numel()
    assert found.bytes_per_token - before.bytes_per_token == 4 * (64 + model.router.token_weight.numel())


@pytest.mark.parametrize(("form", "factor"), [("layer_fine_init_0.1", 0.1), ("layer_fine_sharp", 4)])
def test_the_routers_first_weights(tiny, form, factor):
    weights = []
    for name in ("layer_fine", form):
        torch.manual_seed(0)
        weights.append(methods.SEARCH[name].build(load(tiny[0])).router.weight)
    torch.testing.assert_close(weights[1], factor * weights[0])


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, method in (methods.METHODS | methods.SEARCH).items() if method.build])
def test_graphs_replay_what_eager_steps_do(tiny, places, monkeypatch, name):
    """Losses of steps replayed from graphs of two shapes in turn, and the scores after, against the same steps without graphs."""
    base, _ = load_base(places[1], dtype="bfloat16", device="cuda")
    items, pairs = tiny[2], tiny[2].train.pairs(right_only=True)
    monkeypatch.setattr(accuracy.train, "WIDTH_SHARES", (0.5, 1.0))
    settings, found = TrainSettings(learning_rate=0.01, epochs=4, batch=8, seed=3), []
    for device in ("cuda", "cpu"):  # as a CPU does: without graphs
        for module in (accuracy.train, accuracy.evaluate):
            monkeypatch.setattr(
                module, "Replayed", lambda function, _, *more, device=device: Replayed(function, device, *more)
            )
        method, teacher = (methods.METHODS | methods.SEARCH)[name], None
        if method.teacher:
            teacher, _ = trained_on_gpu(methods.METHODS[method.teacher], base, pairs, settings)
        model, result = trained_on_gpu(method, base, pairs, settings, teacher)
        assert len(result["shapes"]) == 2
        score = Evaluation(items.test, "cuda").score(model, items.names)
        found.append([result["first_loss"], result["final_loss"], score["nll"]["mean"]])
    assert found[0] == pytest.approx(found[1], rel=0.02)
    assert found[0][1] < found[0][0]


def trained_on_gpu(method, base, pairs, settings, teacher=None):
    torch.manual_seed(0)
    model = method.build(load(base).to("cuda", torch.bfloat16))
    without_dropout(model)  # its draws differ: a replay advances the generator otherwise than the calls do
    return model, train(model, pairs, settings, teacher)


def test_order_depends_on_the_seed_alone(tiny):
    pairs = tiny[2].train.pairs(right_only=True)
    settings = TrainSettings(epochs=2, batch=8, seed=1)
    buckets, schedule = plan_order(pairs, settings)
    again, same = plan_order(pairs, settings)
    assert schedule == same
    assert all(np.array_equal(a.members, b.members) for a, b in zip(buckets, again, strict=True))
    other, _ = plan_order(pairs, replace(settings, seed=2))
    assert not np.array_equal(buckets[0].members, other[0].members)
    seen = np.concatenate([bucket.members.ravel() for bucket in buckets])
    assert np.array_equal(np.bincount(seen[seen >= 0]), [2] * len(pairs))
    assert len(schedule) == len(set(schedule)) == sum(len(bucket.batches) for bucket in buckets)


def test_the_schedule():
    settings = TrainSettings(warmup=0.2)
    assert [settings.factor(i, 10) for i in range(10)] == pytest.approx(
        [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert replace(settings, schedule="cosine").factor(6, 10) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="learning_rate=0 must be"):
        TrainSettings(learning_rate=0)


@pytest.mark.parametrize("decisions", [1, 2, 5])
def test_the_heat_map_is_drawn(tmp_path, decisions):
    pytest.importorskip("matplotlib")
    rows = [
        {
            "name": f"routing/{name}",
            "case": {"domain": domain, "seed": 1, "decision": decision, "built_as": name},
            "shares": [0.25, 0.75],
        }
        for name in ("one", "two")
        for domain in ("alone", "shared")
        for decision in range(decisions)
    ]
    draw(rows, tmp_path / "new" / "routing.png")
    assert (tmp_path / "new" / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_shares_of_experts(tiny, small):
    """Against the library's statistics of one domain, item by item."""
    base, _, items = tiny
    model = methods.SEARCH["layer"].build(base)
    shares = torch.tensor(expert_shares(model, Evaluation(items.test, "cpu", tokens=90)))
    for domain in range(2):
        chosen = [i for i in range(len(items.test)) if items.test.domains[i] == domain]
        ids = [np.concatenate([items.test.prompt(i), items.test.choice(i, items.test.answers[i])])[:-1] for i in chosen]
        experts = torch.cat([model.route(torch.tensor(row, dtype=torch.long)[None]).experts for row in ids], dim=1)
        load = summarise(Routing(experts, torch.ones(experts.shape)), 4)["load"]
        torch.testing.assert_close(shares[domain].double(), load, atol=1e-4, rtol=0)


def test_accounts(places):
    base, _ = load_base(places[1], dtype="float32", device="cpu")
    width = sum(
        m.in_features + m.out_features
        for n, m in base.named_modules()
        if n.startswith("model.layers") and hasattr(m, "in_features")
    )

    def account(name):
        method = (methods.METHODS | methods.SEARCH)[name]
        return method.account(method.build(load(base)))

    hidden, router = base.config.hidden_size, 8 * base.config.hidden_size
    trainable = 64 * width + router
    assert account("pregate_paper") == methods.Account(trainable, trainable, 16.0, 2 * 16 * width + 4 * router)
    assert account("lora_total").active_rank == 64
    for name in methods.SEARCH:
        found = account(name)
        assert found.active_rank == 16, name
        routers = found.trainable - 64 * width
        assert 0 < routers <= 256 * (hidden + 64 * len(base.model.layers)), name
    assert account("layerwise").active_rank == account("random_routing").active_rank == 16
    assert methods.METHODS["base"].account(base) == methods.Account(0, 0, 0.0, 0)


def test_the_bootstrap_of_a_case_done_by_hand():
    """One seed, two domains of two clusters: 9 equally likely outcomes with weights 1, 2, 1 a domain."""
    domains, clusters = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3])
    ours, theirs = np.array([[1, 0, 1, 0]]), np.array([[0, 0, 0, 1]])
    # Domain 0: differences 1, 0, so a mean of 1, 1/2 or 0; domain 1: 1, -1, so 1, 0 or -1.
    means = sorted((a + b) / 2 for a in (1, 0.5, 0.5, 0) for b in (1, 0, 0, -1))
    wanted = np.percentile(np.repeat(means, 1000), (10, 90))
    low, mid, high = paired_difference(ours, theirs, domains, clusters, resamples=20000, interval=(10, 90))
    assert mid == pytest.approx(0.25)
    assert (low, high) == pytest.approx(tuple(wanted))
    # Items of one cluster come together: both of domain 1 always, so that only domain 0 varies.
    low, mid, high = paired_difference(ours, theirs, domains, np.array([0, 1, 2, 2]), interval=(0, 100))
    assert (low, mid, high) == pytest.approx((0, 0.25, 0.5))
    # Seeds vary, too: all right with one, all wrong with the other.
    low, mid, high = paired_difference([[1] * 4, [0] * 4], [[0] * 4] * 2, domains, clusters, interval=(0, 100))
    assert (low, mid, high) == pytest.approx((0, 0.5, 1))
    assert paired_difference(ours, ours, domains, clusters) == (0, 0, 0)
    with pytest.raises(ValueError, match="do not belong together"):
        paired_difference(ours, theirs[:, :3], domains, clusters)


def test_a_report_of_an_unfinished_study_is_refused(tiny):
    groups = Groups.of(tiny[2], tiny[2].test)

    def result(method, seed, learning_rate=0.1):
        score = {"order": groups.order}
        return {"method": method, "seed": seed, "learning_rate": learning_rate, "score": score}

    with pytest.raises(ValueError, match="two final runs of m from seed 1; remove one"):
        accuracy_rows([result("m", 1), result("m", 1, 0.2)], groups, "m")
    with pytest.raises(ValueError, match=r"different seeds: \{'m': \[1, 2\], 'n': \[1\]\}; finish `final`"):
        accuracy_rows([result("m", 1), result("m", 2), result("n", 1)], groups, "m")


@pytest.mark.parametrize(("best", "says"), [(0.45, ""), (0.35, "   replace this domain: no method gains 10 points")])
def test_a_domain_that_nothing_learns_is_named(tmp_path, best, says):
    runs = [Run("tune", "base", 0.0, 0, "base"), Run("tune", "lora_active", 0.1, 0, "lora_active")]
    assert gains(tmp_path, runs) == []
    for run, share in zip(runs, (0.3, best), strict=True):
        write_json(tmp_path / run.file, {**vars(run), "score": {"accuracy": {"mean": 0.9, "alone": share}}})
    assert [" ".join(line.split()) for line in gains(tmp_path, runs)] == [
        f"alone base 30.0%, best {best:.1%} {says.strip()}".strip()
    ]


def test_a_report_of_other_items_is_refused(tiny):
    groups = Groups.of(tiny[2], tiny[2].test)
    result = {"method": "m", "seed": 0, "score": {"order": "0"}}
    with pytest.raises(ValueError, match="other test items"):
        accuracy_rows([result], groups, "m")
