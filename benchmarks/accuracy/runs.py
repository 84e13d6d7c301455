"""Runs of a study: what each does, the file it leaves, and going through a list of them within a time budget."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

STUDY = "study.json"
CHOSEN = "chosen.json"
MARGIN = 1.2


@dataclass(frozen=True)
class Run:
    """One training and evaluation. phase: "tune", "search" or "final". method: its name in the results. built_as: the name of the settings
    it is built from, another one for the best of a search. learning_rate 0: nothing is trained.
    """

    phase: str
    method: str
    learning_rate: float
    seed: int
    built_as: str = ""

    @property
    def file(self) -> str:
        return f"{self.phase}-{self.method}-lr{self.learning_rate:g}-seed{self.seed}.json"

    @property
    def split(self) -> str:
        """Only final runs see the test items."""
        return "test" if self.phase == "final" else "validation"


def write_json(path, document):
    """As a whole or not at all."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(document) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path):
    """ValueError for a file that is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is broken ({error}); remove it, and its run is done again") from error


def results_of(folder, phase) -> list[dict]:
    """The results of a phase found in the folder, by name of file."""
    return [read_json(path) for path in sorted(Path(folder).glob(f"{phase}-*.json"))]


def check_study(folder, settings):
    """Write what all runs of a folder share, or compare with what was written. ValueError if this is another study."""
    path = Path(folder) / STUDY
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    before = read_json(path)
    if differing := [
        f"{key}: {before.get(key)!r} there, {value!r} here"
        for key, value in settings.items()
        if before.get(key) != value
    ]:
        raise ValueError(f"{folder} holds runs of another study ({'; '.join(differing)}); use another folder")


def left(folder, runs) -> list[Run]:
    """The runs without a result yet."""
    return [run for run in runs if not (Path(folder) / run.file).is_file()]


def work_through(folder, runs, do, budget_s=None, clock=time.monotonic, started=None) -> int:
    """Do the runs without a result, in order, each writing its file; stop before one that would not end within the budget.

    do(run) -> result, a dict. budget_s: seconds since `started` (of `clock`; None: now). A run is expected to take a
    little longer (`MARGIN`) than the longest so far, of this call or in the folder. Returns how many are left.
    """
    started = clock() if started is None else started
    waiting, longest = left(folder, runs), _longest(folder)
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done")
    for number, run in enumerate(waiting):
        if budget_s is not None and clock() - started + MARGIN * longest > budget_s:
            print(
                f"stopped before the budget of {budget_s:g} s: {len(waiting) - number} runs left; the same command goes on"
            )
            return len(waiting) - number
        begun = clock()
        result = do(run)
        seconds = clock() - begun
        longest = max(longest, seconds)
        write_json(Path(folder) / run.file, {**vars(run), **result, "seconds": round(seconds, 2)})
        print(f"{run.file}: {result['score']['accuracy']['mean']:.2%} on {run.split}, {seconds:.1f} s", flush=True)
    return 0


def _longest(folder):
    """Seconds of the longest run in the folder, 0 if there is none."""
    return max(
        (found["seconds"] for phase in ("tune", "search", "final") for found in results_of(folder, phase)), default=0.0
    )
