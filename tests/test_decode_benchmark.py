"""The decoding benchmark's plumbing with a toy model on a CPU: every contestant runs, and a wrong one is not timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from adafuse.engine.backbone import read_backbone

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels run in the interpreter only without a GPU"
)

ROOT = Path(__file__).parents[1]
MERGED = ["engine/switch_pristine", "engine/switch_in_place", "engine/merge_per_matrix"]
ROWS = [
    "hf/eager",
    "hf/compiled",
    "engine/backbone",
    "engine/fused_r64",
    *MERGED,
    "published/*",
    "graphed/layerwise",
    "graphed/pesc",
]
BATCH = ["hf/eager", "engine/backbone", "published/pesc", "graphed/layerwise_ours"]  # of several sequences, profiled


def run(*commands, before=""):
    """Benchmarks (script, arguments) one after another in a process of their own. before: code that it runs first."""
    code = "import sys; sys.path[:0] = ['benchmarks', 'tests']; import interpreter; "
    code += "interpreter.make_fast(); interpreter.take_ranks(8)\n" + before
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
    decode = ["decode", "--tiny", "--out", str(out[0]), "--only"]
    again = [*decode, *BATCH, "--append", "--batch", "4", "--profile"]
    return run([*decode, *ROWS, "graphed/layerwise_ours"], again, ["executions", "--tiny", "--out", str(out[1])]), *out


def rows_of(found, path):
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(path.read_text())["rows"]


def test_every_contestant_runs_and_is_right(right):
    found, path, _ = right
    rows = {row["name"]: row for row in rows_of(found, path) if row["case"]["batch"] == 1}
    methods = [f"published/{name}" for name in ("layerwise", "mola", "pesc")]
    assert rows.keys() >= {*ROWS, *methods} - {"published/*"}
    for name in ("engine/backbone", "engine/fused_r64", *MERGED):
        assert f"{name}: relative error" in found.stdout
    assert rows["engine/backbone"]["vs"] == "hf/compiled"
    assert rows["engine/switch_pristine_text"]["case"]["changes"] > 0
    assert rows["engine/fused_r64"]["vs"] == "engine/backbone"
    assert {row["case"]["new_tokens"] for row in rows.values()} == {3}


def test_the_faster_of_two_forms_is_the_row(right):
    found, path, _ = right
    rows = {row["name"]: row for row in rows_of(found, path) if row["case"]["batch"] == 1}
    forms = {name: row["case"]["form"] for name, row in rows.items() if "form" in row["case"]}
    (other,) = {"fused", "graph"} - {forms["graphed/layerwise"]}
    assert forms[f"graphed/layerwise_{other}"] == other
    assert rows[f"graphed/layerwise_{other}"]["vs"] == "graphed/layerwise"
    assert rows[f"graphed/layerwise_{other}"]["ratio"] >= 1
    assert forms["graphed/pesc"] == "graph"
    for form in ("graph", "fused"):
        assert f"graphed/layerwise as {form}: relative error" in found.stdout


def test_another_case_is_appended_with_its_profile(right):
    found, path, _ = right
    rows = {row["name"]: row for row in rows_of(found, path) if row["case"]["batch"] == 4}
    assert {name for name in rows if not name.startswith("profile/")} == {*BATCH}
    assert {f"profile/{name}/launches" for name in BATCH} < rows.keys()
    assert "engine/backbone: relative error" in found.stdout


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


def test_bytes_are_those_that_a_step_of_the_batch_reads(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import whole_models

    embeddings, router = torch.nn.Embedding.from_pretrained(torch.eye(8)), 10 * torch.eye(8)
    router[:, :] += 5 * torch.eye(8).roll(1, 0)  # token n chooses the experts n and n + 1
    tokens = torch.tensor([[0, 0], [0, 1], [2, 4]])
    assert whole_models.expert_sets(embeddings, router, tokens[2]) == [(2, 3), (4, 5)]
    assert whole_models.mean_distinct(embeddings, router, tokens) == (2 + 3 + 4) / 3
    assert whole_models.mean_distinct(embeddings, router, tokens[:, :1]) == 2

    monkeypatch.setitem(whole_models.SHAPES, "toy", whole_models.TINY)
    backbone = read_backbone(whole_models.base_model("toy", "cpu"))
    found = whole_models.bytes_of_a_token(backbone, batch=4, cached=20, experts=3.5)
    # Of a block: q and o 32 x 32, k and v 16 x 32, gate, up and down 48 x 32. Keys and values: two heads of 8.
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 97 * 32
    assert found["roofline"] == 2 * (weights + 2 * 2 * 2 * 8 * 4 * 20)
    features = 2 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (48 + 32))
    assert {name: found[name] - found["roofline"] for name in ("roofline_r64", "roofline_r16")} == {
        "roofline_r64": 2 * 3.5 * 64 * features,
        "roofline_r16": 2 * 3.5 * 16 * features,
    }


def test_appending_keeps_other_cases_and_takes_the_place_of_the_same(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import decode
    import record

    def row(batch, **case):
        return {"name": "graphed/mola", "case": {"model": "mistral-7b", "context": 1, "batch": batch, **case}}

    path = tmp_path / "decode.json"
    assert decode.append(path, [row(1)]) == [row(1)]
    path.write_text(json.dumps({"env": record.environment(), "rows": [row(1, form="graph"), row(2)]}))
    assert decode.append(path, [row(1, form="fused")]) == [row(1, form="fused"), row(2)]
    assert decode.append(path, [row(4)]) == [row(1, form="graph"), row(2), row(4)]
    first = row(8, model="llama-2-7b")
    assert decode.append(path, [first]) == [first, row(1, form="graph"), row(2)]
    path.write_text(json.dumps({"env": {**record.environment(), "git": "another"}, "rows": []}))
    with pytest.raises(SystemExit, match=r"is of another git \(another\); write to another file"):
        decode.append(path, [row(1)])


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
        "host/backbone": 2,
        "host/reference": 4,
        "host/fused": 4,
    }
