"""Runs of a study: what each does, the file it leaves, and going through a list of them within a time budget."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path

STUDY = "study.json"
CHOSEN = "chosen.json"
GROUPS = "test.json"
PHASES = ("tune", "search", "refine", "final")
MARGIN = 1.2


@dataclass(frozen=True)
class Run:
    """One training and evaluation. phase: one of `PHASES`. method: its name in the results. built_as: the name of the settings
    it is built from, another one for the best of a search. learning_rate 0: nothing is trained. teacher_rate: the learning rate of its
    teacher, 0 where there is none.
    """

    phase: str
    method: str
    learning_rate: float
    seed: int
    built_as: str = ""
    teacher_rate: float = 0.0

    @property
    def file(self) -> str:
        teacher = f"-teacher{self.teacher_rate:g}" if self.teacher_rate else ""
        return f"{self.phase}-{self.method}-lr{self.learning_rate:g}-seed{self.seed}{teacher}.json"

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


def check_settings(folder, results, known):
    """ValueError for results of methods whose settings (known: by name) are others now."""
    for result in results:
        settings = json.loads(json.dumps(known.get(result["built_as"])))
        if "settings" in result and result["settings"] != settings:
            raise ValueError(
                f"{folder} holds a run of {result['built_as']} with other settings ({result['phase']}, rate {result['learning_rate']:g}, "
                f"seed {result['seed']}): {result['settings']} there, {settings} here; use another folder"
            )


def left(folder, runs) -> list[Run]:
    """The runs without a result yet."""
    return [run for run in runs if not (Path(folder) / run.file).is_file()]


def done(folder, runs) -> list[dict]:
    """The results of those of these runs that have one."""
    paths = [Path(folder) / run.file for run in runs]
    return [read_json(path) for path in paths if path.is_file()]


def work_through(
    folder, runs, do, budget_s=None, *, clock=time.monotonic, started=None, workers=1, pool=None
) -> tuple[int, int]:
    """Do the runs without a result, in order, each writing its file; begin none that would not end within the budget.

    do(run) -> result, a dict. budget_s: seconds since `started` (of `clock`; None: now). A run is expected to take a little longer
    (`MARGIN`) than the longest so far, of this call or in the folder. One that raises leaves its traceback and no file, and the others go
    on. pool: does up to `workers` runs at once (an Executor); None: here, one by one.
    Returns how many are left, and how many of them failed.
    """
    started = clock() if started is None else started
    waiting, longest, failed, running = left(folder, runs), _longest(folder), 0, {}
    pool = Here() if pool is None else pool
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    while True:
        while waiting and len(running) < workers:
            if budget_s is not None and clock() - started + MARGIN * longest > budget_s:
                break
            run = waiting.pop(0)
            running[pool.submit(_timed, do, run, clock)] = run
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            if isinstance(error := future.exception(), BrokenExecutor):
                raise error
            if error is not None:
                failed += 1
                print(f"{run.file}: failed\n{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
                traceback.clear_frames(error.__traceback__)  # they hold the run's model, and the next needs its memory
                continue
            result = future.result()
            longest = max(longest, result["seconds"])
            write_json(Path(folder) / run.file, result)
            accuracy = result["score"]["accuracy"]["mean"]
            print(f"{run.file}: {accuracy:.2%} on {run.split}, {result['seconds']:.1f} s", flush=True)
    if waiting:
        print(f"stopped before the budget of {budget_s:g} s: {len(waiting)} runs left; the same command goes on")
    return len(waiting) + failed, failed


class Here(Executor):
    """Does what is submitted at once, in this thread."""

    def submit(self, function, /, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def _timed(do, run, clock):
    begun = clock()
    result = do(run)
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**vars(run), **result, "seconds": round(clock() - begun, 2), "finished": finished}


def _longest(folder):
    """Seconds of the longest run in the folder, 0 if there is none."""
    return max((found["seconds"] for phase in PHASES for found in results_of(folder, phase)), default=0.0)
