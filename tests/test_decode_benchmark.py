"""The decoding benchmark's plumbing with a toy model on a CPU: every contestant runs, and a wrong one is not timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels run in the interpreter only without a GPU"
)

ROOT = Path(__file__).parents[1]
MERGED = ["engine/switch_pristine", "engine/merge_per_matrix"]
ROWS = [
    "hf/eager",
    "hf/compiled",
    "engine/backbone",
    "engine/fused_r16",
    *MERGED,
    "published/*",
    "graphed/mola",
    "graphed/pesc",
]


def run(*arguments, code):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'benchmarks'); {code}", *arguments]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)


def decode(*arguments, code="import decode; decode.main()"):
    return run(*arguments, code=code)


def test_every_contestant_runs_and_is_right(tmp_path):
    out = tmp_path / "decode.json"
    found = decode("--tiny", "--out", str(out), "--only", *ROWS)
    assert found.returncode == 0, found.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    methods = [f"published/{name}" for name in ("layerwise", "mola", "pesc")]
    assert rows.keys() >= {*ROWS, *methods} - {"published/*"}
    for name in ("engine/backbone", "engine/fused_r16", "graphed/mola", *MERGED):
        assert f"{name}: relative error" in found.stdout
    assert rows["engine/backbone"]["vs"] == "hf/compiled"
    assert rows["engine/switch_pristine_text"]["case"]["changes"] > 0
    assert rows["engine/fused_r16"]["vs"] == "engine/backbone"


def test_layerwise_routing_on_our_kernels_is_that_of_the_peers():
    found = decode("--tiny", "--out", os.devnull, "--only", "graphed/layerwise_ours")
    assert found.returncode == 0, found.stderr[-3000:]
    assert "graphed/layerwise_ours: relative error" in found.stdout


def test_a_contestant_that_is_wrong_gets_no_row(tmp_path):
    wrong = "import decode; from contestants import EngineRun as Run; right = Run._step; "
    wrong += "Run._step = lambda run: (right(run), run.logits.mul_(-1)); "
    out = tmp_path / "decode.json"
    found = decode("--tiny", "--out", str(out), "--only", "engine/backbone", "hf/eager", code=wrong + "decode.main()")
    assert found.returncode == 1
    assert "the logits of engine/backbone are wrong" in found.stderr
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["hf/eager"]


def test_a_row_that_is_none_is_refused():
    found = decode("--tiny", "--out", os.devnull, "--only", "engine/nothing")
    assert found.returncode == 2
    assert "engine/nothing names no row" in found.stderr


def test_both_executions_of_a_forward_are_timed(tmp_path):
    out = tmp_path / "executions.json"
    found = run("--tiny", "--out", str(out), code="import executions; executions.main()")
    assert found.returncode == 0, found.stderr[-3000:]
    names = [row["name"] for row in json.loads(out.read_text())["rows"]]
    assert {name: names.count(name) for name in names} == {
        "forward/backbone": 2,
        "forward/reference": 4,
        "forward/fused": 4,
    }
