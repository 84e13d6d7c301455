"""Benchmark results as JSON: the environment, and a row a measurement. Tables in the docs are made from these files."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import statistics
import subprocess
from contextlib import contextmanager
from pathlib import Path

SAME = ("gpu", "driver", "torch", "triton", "git", "vllm")  # of an environment, in all rows of a file


def row(name, case, samples, unit, vs=None):
    """A measurement: median and 20th and 80th percentile of `samples`; vs: the row of the same run that its ratio divides by."""
    low, high = (statistics.quantiles(samples, n=5, method="inclusive")[i] for i in (0, 3))
    median = statistics.median(samples)
    return {
        "name": name,
        "case": case,
        "median": median,
        "p20": low,
        "p80": high,
        "unit": unit,
        "vs": vs["name"] if vs else None,
        "ratio": median / vs["median"] if vs else None,
    }


def environment() -> dict:
    """What a reader needs to judge a figure: GPU, driver, versions, commit, date."""
    import peft
    import torch
    import transformers

    env = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        # A copy without its history is told its commit by the variable.
        "git": os.environ.get("GIT_COMMIT") or _command("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    try:
        import triton

        env["triton"] = triton.__version__
    except ImportError:
        env["triton"] = "none"
    return env


def write(path, rows, env=None, shown=None):
    """Write {"env", "rows"} and print the rows as a table. env: that of the measurement, if it was made elsewhere; None: this one.
    shown: the rows to print; None: all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"env": env or environment(), "rows": rows}, indent=1) + "\n")
    for entry in rows if shown is None else shown:
        case = " ".join(f"{key}={value}" for key, value in entry["case"].items())
        ratio = f"{entry['ratio']:.3f} x {entry['vs']}" if entry["ratio"] else ""
        print(f"{entry['name']:34} {entry['median']:9.3f} {entry['unit']:4} {ratio:32} {case}")


@contextmanager
def alone(path):
    """While it lasts no other process that asks the same writes to this file: cases may be measured on several GPUs at once."""
    folder = Path(path).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # the folder's, which leaves no file behind
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def appended(path, rows, place, env=None):
    """`rows` behind those that the file at `path` has of other places, which must be of the same machine and commit.

    place(row): what it is of; later rows take the place of all that were of the same.
    """
    known = json.loads(Path(path).read_text()) if Path(path).is_file() else None
    if known is None:
        return rows
    env = env or environment()
    if differing := [key for key in SAME if known["env"].get(key) != env.get(key)]:
        was = known["env"].get(differing[0])
        raise SystemExit(f"{path} is of another {differing[0]} ({was}); write to another file")
    new = [place(row) for row in rows]
    return [row for row in known["rows"] if place(row) not in new] + rows


def _command(*words):
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
