"""The demo's output folder: an adapter, the held-out questions, and `demo.json`, by which a later demo knows what it may replace."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from adafuse.checkpoint import CONFIG_FILE, WEIGHTS_FILE

RECORD_FILE = "demo.json"
QUESTIONS_FILE = "questions.txt"


def check_out(out: Path):
    """ValueError unless `out` is free: it does not exist, is empty, or holds just what an earlier demo left there."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    found = {file.name for file in out.iterdir()}
    if foreign := sorted(found - {CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, QUESTIONS_FILE}):
        raise ValueError(f"--out {out} holds {foreign[0]}, which is not the demo's; name another folder with --out")
    if WEIGHTS_FILE in found and _recorded_digest(out) != _digest(out / WEIGHTS_FILE):
        raise ValueError(f"--out {out} holds an adapter that no demo left there; name another folder with --out")


def write_record(out: Path, items, results: dict):
    """Write the questions of `items`, one a line, and demo.json: the results, with the digest of the adapter they belong to."""
    (out / QUESTIONS_FILE).write_text("\n".join(item.prompt for item in items) + "\n", encoding="utf-8")
    record = {**results, "adapter_sha256": _digest(out / WEIGHTS_FILE)}
    (out / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _recorded_digest(out):
    try:
        return json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))["adapter_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # no record, or one that is not ours: no claim on the adapter


def _digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()
