"""The kernels' benchmark at toy size, so that it does not rot: each way of running a stack of linears against fp64."""

import json
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import shapes
import stack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = 1e-2
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "toy", {**SHAPE, **HEADS})
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "mixture", [{"num_experts": 4, "r": 2, "top_k": 2}, {"num_experts": 6, "r": 1, "top_k": 3, "routing": "layer"}]
)
def test_decoding_stacks(mixture):
    toy = stack.Stack("toy", device=DEVICE)
    toy.run_backbone(pdl=False)
    assert toy.error() < LIMIT
    adapters = stack.Adapters(toy, **mixture)
    for run in (lambda: adapters.run(pdl=False), adapters.run_as_huggingface):
        toy.outputs[-1][-1].fill_(float("nan"))
        run()
        if adapters.separate:
            adapters.collect_separate()
        assert adapters.error() < LIMIT
    active = mixture["r"] * mixture["top_k"]
    linears = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert adapters.num_bytes == 2 * 2 * active * sum(i + o for i, o in linears)


def test_an_output_that_was_not_written_is_an_error():
    toy = stack.Stack("toy", device=DEVICE)
    adapters = stack.Adapters(toy, num_experts=4, r=2, top_k=2)
    adapters.run(pdl=False)
    toy.outputs[1][2][0, 5] = float("nan")
    assert not toy.error() < LIMIT
    assert not adapters.error() < LIMIT


@pytest.mark.parametrize("tokens", [5, 20])
def test_batches_of_stacks(tokens, monkeypatch):
    monkeypatch.setattr(stack, "FEWEST_OF_A_MATMUL", 1)
    toy = stack.Stack("toy", tokens=tokens, device=DEVICE)
    batch = stack.Batch(toy, num_experts=4, r=4, top_k=2)
    assert set(batch.choices()) <= batch.forms().keys()
    for form, run in (*batch.forms().items(), ("as the library", batch.run)):
        for outputs in toy.outputs:
            for y in outputs:
                y.fill_(float("nan"))
        run()
        assert batch.error() < LIMIT, form
    toy.outputs[0][0].fill_(float("nan"))
    batch.run_as_huggingface()
    batch.collect_separate()
    assert batch.error() < LIMIT
    assert batch.ratio_of_bytes() >= batch.ratio_of_flops() > 1


def test_a_batch_runs_each_group_in_the_form_that_the_library_takes(monkeypatch):
    toy = stack.Stack("toy", tokens=20, device=DEVICE)
    batch = stack.Batch(toy, num_experts=4, r=4, top_k=2)
    taken = iter(["tiles", "gated", "crowd", "matmul"])
    monkeypatch.setattr(stack, "fused_form", lambda *_: next(taken))
    batch.run()
    assert batch.error() < LIMIT
    assert next(taken, None) is None


def test_the_scripts_import():
    import bench_kernels as kernels
    import sweep

    assert {*kernels.MODELS} <= shapes.SHAPES.keys()
    assert sweep.MODELS is kernels.MODELS


def test_no_script_hides_a_package():
    """Scripts run with their folder in front of the path. transformers imports `kernels` where it finds one, and what else it likes."""
    scripts = {path.stem for path in Path(shapes.__file__).parent.glob("*.py")}
    assert not scripts & {*packages_distributions(), *sys.stdlib_module_names, "kernels"}


def test_the_chart_of_a_token_shows_what_was_measured(tmp_path):
    import charts

    rows = json.loads((charts.ROOT / "benchmarks" / "results" / "h100" / "decode.json").read_text())["rows"]
    found = {row["name"]: row for row in rows}
    for name in charts.BARS.keys() & found.keys():
        parts = charts.parts_of(name, charts.BARS[name], found)
        assert sum(parts.values()) == pytest.approx(found[name]["median"])
        assert min(parts.values()) >= 0
    charts.latency(rows, tmp_path / "latency.svg")
    assert (tmp_path / "latency.svg").stat().st_size > 10_000


def test_the_bound_of_a_served_step_is_that_of_its_bytes():
    import serve

    options = serve.parse(
        ["--models", "plain", "--out", "x", "--bound", '{"backbone": 100, "expert": 5, "experts": 8, "top_k": 2}']
    )
    assert serve.bound(options, 1) == pytest.approx(100 / 110)  # the two experts of the one token
    assert serve.bound(options, 1000) == pytest.approx(100 / 140)  # all of them
    assert serve.parse_model("multilora=l0,l1@http://h:1") == ("multilora", ["l0", "l1"], "http://h:1")
    assert serve.parse_model("tuned") == ("tuned", ["tuned"], "")
