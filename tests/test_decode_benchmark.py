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


def run(*commands, before=""):
    """Benchmarks (script, arguments) one after another in a process of their own. before: code that it runs first."""
    code = "import sys; sys.path[:0] = ['benchmarks', 'tests']; import interpreter; interpreter.make_fast()\n" + before
    for script, *arguments in commands:
        code += f"\nimport {script}; sys.argv = {[script, *arguments]}; {script}.main()"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """(the process, what decode wrote, what executions wrote). Both in one process: to start it, and to compile in it, takes most of its
    time."""
    out = [tmp_path_factory.mktemp("benchmarks") / f"{script}.json" for script in ("decode", "executions")]
    decode = ["decode", "--tiny", "--out", str(out[0]), "--only", *ROWS, "graphed/layerwise_ours"]
    return run(decode, ["executions", "--tiny", "--out", str(out[1])]), *out


def rows_of(found, path):
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(path.read_text())["rows"]


def test_every_contestant_runs_and_is_right(right):
    found, path, _ = right
    rows = {row["name"]: row for row in rows_of(found, path)}
    methods = [f"published/{name}" for name in ("layerwise", "mola", "pesc")]
    assert rows.keys() >= {*ROWS, *methods} - {"published/*"}
    for name in ("engine/backbone", "engine/fused_r16", "graphed/mola", *MERGED):
        assert f"{name}: relative error" in found.stdout
    assert rows["engine/backbone"]["vs"] == "hf/compiled"
    assert rows["engine/switch_pristine_text"]["case"]["changes"] > 0
    assert rows["engine/fused_r16"]["vs"] == "engine/backbone"


def test_layerwise_routing_on_our_kernels_is_that_of_the_peers(right):
    found, path, _ = right
    assert rows_of(found, path)
    assert "graphed/layerwise_ours: relative error" in found.stdout


def test_a_contestant_that_is_wrong_gets_no_row(tmp_path):
    wrong = "from contestants import EngineRun as Run; right = Run._step; "
    wrong += "Run._step = lambda run: (right(run), run.logits.mul_(-1))"
    out = tmp_path / "decode.json"
    found = run(["decode", "--tiny", "--out", str(out), "--only", "engine/backbone", "hf/eager"], before=wrong)
    assert found.returncode == 1
    assert "the logits of engine/backbone are wrong" in found.stderr
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["hf/eager"]


def test_a_row_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import decode

    monkeypatch.setattr(sys, "argv", ["decode", "--tiny", "--out", os.devnull, "--only", "engine/nothing"])
    with pytest.raises(SystemExit) as stopped:
        decode.main()
    assert stopped.value.code == 2
    assert "engine/nothing names no row" in capsys.readouterr().err


def test_both_executions_of_a_forward_are_timed(right):
    found, _, path = right
    names = [row["name"] for row in rows_of(found, path)]
    assert {name: names.count(name) for name in names} == {
        "forward/backbone": 2,
        "forward/reference": 4,
        "forward/fused": 4,
    }
