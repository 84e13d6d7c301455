"""The benchmark of servers, with servers of no model in place of vLLM's: what is started, what is asked of whom, what the rows say."""

import json
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import record
import serve
import serve_models
import serve_tables

from adafuse import checkpoint

SERVER = Path(__file__).with_name("completions_server.py")
SIZES = ["--rounds", "2", "--prompt-tokens", "5", "--max-tokens", "4"]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs serve_models with these arguments: (rows, what was asked). `broken`: labels of servers that do not start."""
    broken, real = set(), serve_models.servers
    monkeypatch.setenv("REQUESTS", str(tmp_path / "requests"))

    def fake(options, folder, r):
        code = ["-c", "print('ValueError: no room'); raise SystemExit(1)"]
        found = real(options, folder, r).items()
        return {label: s._replace(arguments=code if label in broken else [str(SERVER), label]) for label, s in found}

    def run(*arguments):
        (tmp_path / "requests").write_text("")
        folder, out = ["--folder", str(tmp_path / "models")], tmp_path / "out.json"
        serve_models.main(["--model", "tiny", *SIZES, *folder, "--out", str(out), *arguments])
        asked = [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]
        return json.loads(out.read_text())["rows"], asked

    monkeypatch.setattr(serve_models, "servers", fake)
    run.broken, run.out = broken, tmp_path / "out.json"
    return run


def test_every_server_is_loaded_and_compared_with_the_backbone(bench):
    rows, asked = bench("--r", "4", "8", "--in-flight", "1", "8")
    labels = ("backbone", "ours", "multilora_1", "multilora_8")
    wanted = {(f"{m}/{label}", n, r) for m in serve.METRICS for label in labels for n in (1, 8) for r in (4, 8)}
    assert {(row["name"], row["case"]["in_flight"], row["case"]["r"]) for row in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        metric, label = row["name"].split("/")
        assert row["vs"] == (None if label == "backbone" or metric == "errors" else f"{metric}/backbone")
        assert ("bound" in row) == (row["name"] == "throughput/ours")
        assert (row["median"] == 0) == (metric == "errors")
    assert json.loads(bench.out.read_text())["env"]["vllm"] == "1.2.3"
    assert len({tuple(body["prompt"]) for body in asked}) == len(asked)  # nothing is cached for anybody
    assert all(body["ignore_eos"] and len(body["prompt"]) == 5 and body["max_tokens"] == 4 for body in asked)
    requests = 2 * 3 * (2 + 16)  # of both ranks, in three rounds, two for each in flight
    assert Counter(body["arguments"][1] for body in asked) == {
        "backbone": requests,
        "ours": requests,
        "multilora": 2 * requests,
    }
    assert sum("return_token_ids" in body for body in asked) == len(asked) / 3  # while warming up
    models = Counter(body["model"] for body in asked if body["arguments"][1] == "multilora")
    # Of all eight in turn, two requests a round going on where the round before ended: of 16 each two.
    assert models == {"lora0": requests + 14, **{f"lora{n}": 14 if n < 6 else 12 for n in range(1, 8)}}


def test_servers_of_all_ranks_may_run_together(bench):
    rows, asked = bench("--r", "4", "8", "--in-flight", "1", "--servers", "ours", "multilora", "--together")
    found = {(row["name"], row["case"]["r"]) for row in rows}
    assert found == {
        (f"{metric}/{label}", r)
        for metric in serve.METRICS
        for label in ("backbone", "ours", "multilora_1", "multilora_8")
        for r in (4, 8)
    }
    processes = {(body["arguments"][1], body["arguments"][-1]) for body in asked}  # by port
    assert Counter(label for label, _ in processes) == {"backbone": 1, "ours": 2, "multilora": 2}
    bench.broken.add("multilora")
    with pytest.raises(SystemExit, match="left out: multilora-r4, multilora-r8"):
        bench("--r", "4", "8", "--in-flight", "1", "--servers", "ours", "multilora", "--together")
    rows = json.loads(bench.out.read_text())["rows"]
    assert {(row["name"], row["case"]["r"]) for row in rows if "/ours" in row["name"]} == {
        (f"{metric}/ours", r) for metric in serve.METRICS for r in (4, 8)
    }


def test_rows_become_tables(bench):
    rows, _ = bench("--r", "4", "--in-flight", "1", "8", "--prefix", "tp1/")
    found = {(row["name"], row["case"]["in_flight"]): row for row in rows}
    ours, alone = (found[f"tp1/throughput/{label}", 8] for label in ("ours", "backbone"))
    line = serve_tables.throughput(rows)[3]
    reached = ours["ratio"] / ours["bound"]
    throughputs = f"{alone['median']:.0f} | {ours['median']:.0f}"
    assert line.startswith(
        f"| tiny | 1 | 4 | 8 | {throughputs} | {ours['ratio']:.3f} | {ours['bound']:.3f} | {reached:.3f} | "
    )
    assert line.count("|") == serve_tables.throughput(rows)[0].count("|")
    assert serve_tables.latency(rows)[2].startswith("| tiny | 1 | 4 | 1 | ")
    assert serve_tables.latency(rows)[2].endswith(" | 0 |")
    gap = found["tp1/itl_p50/backbone", 1]["median"]
    ours = found["tp1/itl_p50/ours", 1]["median"]
    assert serve_tables.alone(rows)[2:] == [f"| tiny | 1 | {gap:.2f} | 4 | {ours:.2f} |"]


def test_the_bound_is_of_the_experts_that_the_generated_tokens_choose(bench, tmp_path):
    rows, _ = bench("--r", "4", "--in-flight", "2", "--servers", "ours")
    (row,) = (row for row in rows if "bound" in row)
    chosen = json.loads((tmp_path / "models" / "tiny" / "chosen4.json").read_text())
    experts = [
        len(set(chosen[token])) for token in (0, 1, 2)
    ]  # the server answers tokens 0 to 3, of which the last is not fed back
    assert row["experts_a_step"] == sum(experts) / 3 == 2
    sizes = serve_models.step_bytes("tiny", 4)
    assert row["bound"] == sizes["backbone"] / (sizes["backbone"] + 2 * sizes["expert"])


def test_what_a_step_reads_of_experts(tmp_path):
    sizes = {"backbone": 100, "expert": 5, "experts": 8, "top_k": 2}
    assert serve.experts_a_step(sizes, 1, []) == 2
    assert serve.experts_a_step(sizes, 1000, []) == pytest.approx(8)
    assert serve.bound(sizes, 4) == 100 / 120
    (tmp_path / "chosen").write_text(json.dumps([[0, 1], [1, 2], [6, 7]]))
    sizes["chosen"] = str(tmp_path / "chosen")
    ids = [[0, 0, 2], [1, 2, 2], [0, 1, 2], [0, 1, 2], [2, 2, 2]]  # two waves of two, and one that is left over
    assert serve.experts_a_step(sizes, 2, ids) == (3 + 4 + 2 + 2) / 4
    assert serve.experts_a_step(sizes, 1, [[2]]) == 2  # no step but the prompt's


def test_rows_are_added_by_case_and_time_is_kept(bench, capsys):
    first, _ = bench("--r", "4", "--in-flight", "1", "2", "--servers", "ours")
    rows, _ = bench("--r", "4", "--in-flight", "1", "--servers", "multilora", "--append")
    kept = [row for row in first if row["case"]["in_flight"] == 2]
    assert rows[: len(kept)] == kept
    assert {row["name"].split("/")[1] for row in rows[len(kept) :]} == {"backbone", "multilora_1", "multilora_8"}
    more, _ = bench("--r", "4", "--in-flight", "1", "--servers", "ours", "--append", "--prefix", "tp2/")
    assert more[: len(rows)] == rows
    assert {row["name"].split("/")[0] for row in more[len(rows) :]} == {"tp2"}
    assert {row["vs"] for row in more if row["name"] == "tp2/ttft/ours"} == {"tp2/ttft/backbone"}
    before = bench.out.read_text()
    bench("--r", "4", "8", "--in-flight", "1", "--append", "--minutes", "0")
    assert bench.out.read_text() == before
    assert "r 4 left out: 0.0 minutes are over" in capsys.readouterr().out


def test_a_server_that_does_not_start_is_left_out(bench, capsys):
    bench.broken.add("ours")
    with pytest.raises(SystemExit, match="left out: ours-r4"):
        bench("--r", "4", "--in-flight", "1", "--servers", "ours")
    rows = json.loads(bench.out.read_text())["rows"]
    assert {row["name"] for row in rows} == {f"{metric}/backbone" for metric in serve.METRICS}
    assert "ValueError: no room" in capsys.readouterr().out
    bench.broken.add("backbone")
    with pytest.raises(SystemExit, match="nothing to compare with"):
        bench("--r", "4", "--in-flight", "1", "--servers", "ours")


def test_a_failed_request_is_counted_whatever_its_round(bench, monkeypatch):
    real, rounds = serve._load, []

    def fails_once(model, *rest, **options):
        load = real(model, *rest, **options)
        if model.startswith("ours"):
            rounds.append(1)
            load.errors.extend(["500"] * (len(rounds) == 2))
        return load

    monkeypatch.setattr(serve, "_load", fails_once)
    with pytest.raises(SystemExit, match="1 requests failed"):
        bench("--r", "4", "--in-flight", "2", "--servers", "ours")
    rows = {row["name"]: row["median"] for row in json.loads(bench.out.read_text())["rows"]}
    assert (rows["errors/ours"], rows["errors/backbone"]) == (1, 0)


def test_models_are_made_once_and_whole(tmp_path):
    made = []
    for _ in range(2):
        serve_models.make_models("tiny", [4], tmp_path, True, "cpu")
        made.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")})
    assert made[0] == made[1]

    def fails(folder):
        folder.mkdir()
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        serve_models._once(tmp_path / "r16", fails)
    assert not (tmp_path / "r16").exists()


def test_servers_are_told_what_was_made_and_asked_for(tmp_path):
    arguments = [
        "--model",
        "tiny",
        "--r",
        "4",
        "--in-flight",
        "1",
        "8",
        "--servers",
        *serve_models.SERVERS,
        "--out",
        "x",
    ]
    options = serve_models.parse([*arguments, "--", "--enforce-eager", "--block-size", "32"])
    options.device = "cpu"
    serve_models.make_models("tiny", options.r, tmp_path, True, "cpu")
    assert checkpoint.read_description(tmp_path / "r4")["base_model_name_or_path"] == str(tmp_path / "base")
    found = serve_models.servers(options, tmp_path, 4)
    assert {label: len(server.names) for label, server in found.items()} == {
        label: 8 if label == "multilora" else 1 for label in serve_models.SERVERS
    }
    for server in found.values():
        assert " --enforce-eager --block-size 32 " in " ".join([*server.arguments, ""])
        paths = [word.rpartition("=")[2] for word in server.arguments if str(tmp_path) in word]
        assert paths
        assert all(Path(path, "config.json").exists() or Path(path, "adapter_config.json").exists() for path in paths)
    assert found["ours"].environment == {}  # as users have it


def test_servers_may_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    arguments = ["--model", "tiny", "--in-flight", "1", "--servers", "ours", "--tensor-parallel", "2", "--out", "x"]
    options = serve_models.parse([*arguments, "--apart"])
    found = serve_models.servers(options, Path("/models"), 4)
    assert [server.environment["CUDA_VISIBLE_DEVICES"] for server in found.values()] == ["4,5", "6,7"]
    options = serve_models.parse([*arguments, "--servers", "ours", "multilora", "--apart"])
    with pytest.raises(SystemExit, match="needs 3 times 2 GPUs for backbone, ours, multilora, but there are 4"):
        serve_models.servers(options, Path("/models"), 4)
    options = serve_models.parse([*arguments, "--servers", "ours", "multilora", "--apart", "multilora"])
    found = serve_models.servers(options, Path("/models"), 4)
    assert {label: server.environment["CUDA_VISIBLE_DEVICES"] for label, server in found.items()} == {
        "backbone": "4,5",
        "ours": "4,5",
        "multilora": "6,7",
    }
    with pytest.raises(SystemExit):
        serve_models.parse([*arguments, "--apart", "--together"])
    runner = serve_models.on_gpus_apart(
        {"ours": serve_models.Server([], [], {"VLLM_USE_V2_MODEL_RUNNER": "1"})}, ["ours"], 1, ["3"]
    )
    assert runner["ours"].environment == {"VLLM_USE_V2_MODEL_RUNNER": "1", "CUDA_VISIBLE_DEVICES": "3"}


def test_sizes_of_what_is_served():
    options = serve_models.parse(["--model", "tiny", "--in-flight", "1", "8", "--out", "x"])
    options.device = "cuda"
    # Keys and values of two heads of 32, for 9 of 256 + 128 + 16.
    assert serve_models.kv_bytes(options) == 2 * (2 * 2 * 2 * 32) * 9 * 400
    # A block: q and o 128 x 128, k and v 64 x 128, gate, up and down 48 x 128.
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 48 * 128) + 97 * 128
    assert serve_models.step_bytes("tiny", 4)["backbone"] == 2 * weights
    assert serve_models.step_bytes("tiny", 4)["expert"] == 2 * 4 * 2 * (2 * 256 + 2 * 192 + 3 * 176)
    of_two = serve_models.step_bytes("tiny", 4, ranks=2)
    assert of_two["backbone"] == weights
    features = (
        (128 + 64) + (64 + 128) + 2 * (128 + 32) + 2 * (128 + 24) + (24 + 128)
    )  # q, o, k and v, gate and up, down
    assert of_two["expert"] == 2 * 4 * 2 * features


def test_a_load_waits_for_a_file(tmp_path):
    options = serve_models.parse(["--out", "x", "--wait-for", str(tmp_path / "ready")])
    timer = threading.Timer(0.2, options.wait_for.touch)
    timer.start()
    serve_models.wait_for(options.wait_for)
    assert options.wait_for.exists()
    timer.join()


def test_models_are_named_with_their_server():
    assert serve.parse_model("multilora=l0,l1@http://h:1") == ("multilora", ["l0", "l1"], "http://h:1")
    assert serve.parse_model("tuned") == ("tuned", ["tuned"], "")


def test_errors_of_a_log_begin_with_the_cause():
    cause, later = "RuntimeError: the cause", "RuntimeError: failed, see above"
    log = "\n".join(["start", "raise RuntimeError(text)", cause, cause, *["line"] * 100, later])
    assert serve_models.errors_in(log, lines=2).splitlines() == [cause, later, "...", "line", later]


def test_a_file_of_another_machine_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    assert record.appended(path, [1], lambda row: row) == [1]
    path.write_text(json.dumps({"env": {**record.environment(), "vllm": "1"}, "rows": []}))
    with pytest.raises(SystemExit, match=r"is of another vllm \(1\); write to another file"):
        record.appended(path, [1], lambda row: row, {**record.environment(), "vllm": "2"})
