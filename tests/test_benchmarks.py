"""The kernels' benchmark at toy size, so that it does not rot: each way of running a stack of linears against fp64."""

import sys
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import shapes
import stack
import sweep
import token_parts

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
@pytest.mark.parametrize("among", [False, True])
def test_decoding_stacks(mixture, among):
    toy = stack.Stack("toy", device=DEVICE, among=among)
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


def test_a_stack_of_one_of_two_ranks():
    toy = stack.Stack("toy", device=DEVICE, ranks=2, among=True)
    assert [(g.features, g.widths) for g in toy.groups] == [(32, (16, 8, 8)), (16, (32,)), (32, (24, 24)), (24, (32,))]
    adapters = stack.Adapters(toy, num_experts=4, r=2, top_k=2)
    adapters.run(pdl=False)
    assert adapters.error() < LIMIT


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
        toy.poison()
        run()
        assert batch.error() < LIMIT, form
    toy.outputs[0][0].fill_(float("nan"))
    batch.run_as_huggingface()
    batch.collect_separate()
    assert batch.error() < LIMIT
    assert batch.ratio_of_bytes() >= batch.ratio_of_flops() > 1


@pytest.fixture
def found(monkeypatch):
    """A sweep without graphs and times."""
    monkeypatch.setattr(sweep, "Stack", partial(stack.Stack, device=DEVICE))
    monkeypatch.setattr(sweep, "graph_of", lambda run, warmup=2: SimpleNamespace(replay=run))
    monkeypatch.setattr(sweep, "times", lambda replay, *_: [replay() or 1.0] * 2)
    return sweep.Sweep()


@pytest.mark.parametrize("kernel", ["crowd", "batch"])
def test_every_variant_of_a_sweep_computes(kernel, found):
    """What one variant leaves is no number to the next."""
    getattr(sweep, f"sweep_{kernel}")(found, "toy", 20)
    variants = {"crowd": len(sweep.CROWD), "batch": sum(map(len, sweep.BATCH.values()))}
    assert len(found.rows) == 1 + 2 * variants[kernel]


def test_linears_among_ordinary_kernels(found, monkeypatch):
    monkeypatch.setattr(sweep, "best_read_times", lambda flat: [1.0] * 2)
    sweep.sweep_among(found, "toy", 2, 1, [4])
    pairs = ["pair"] * (len(sweep.PAIR) - 1) + ["pair_r4"] * len(sweep.PAIR)
    assert [row["name"] for row in found.rows] == ["read", "cublas", "backbone", "decode_r4", "crowd_r4", *pairs]


def test_a_wrong_variant_of_a_sweep_is_left_out(found, capsys):
    found.time("wrong", {}, lambda: None, error=lambda: float("nan"))
    assert found.rows == []
    assert "wrong {}: SystemExit" in capsys.readouterr().out


def test_a_batch_runs_each_group_in_the_form_that_the_library_takes(monkeypatch):
    toy = stack.Stack("toy", tokens=20, device=DEVICE)
    batch = stack.Batch(toy, num_experts=4, r=4, top_k=2)
    taken = iter(["tiles", "gated", "crowd", "matmul"])
    monkeypatch.setattr(stack, "fused_form", lambda *_: next(taken))
    batch.run()
    assert batch.error() < LIMIT
    assert next(taken, None) is None


def test_a_batch_runs_each_group_in_the_form_that_is_asked_for():
    toy = stack.Stack("toy", tokens=5, device=DEVICE)
    batch = stack.Batch(toy, num_experts=4, r=4, top_k=2)
    batch.run(["crowd", "decode", "decode", "crowd"], pdl=False)
    assert batch.error() < LIMIT


def test_one_group_of_a_batch_by_itself():
    toy = stack.Stack("toy", tokens=5, device=DEVICE, among=True)
    toy.run_cublas()
    batch = stack.Batch(toy, num_experts=4, r=4, top_k=2)
    others = [y.clone() for y in (toy.outputs[1][0], toy.outputs[1][2])]
    for block in range(toy.blocks):
        toy.outputs[block][1].fill_(float("nan"))
    for form in ("decode", "crowd"):
        batch.run(form, only=1, pdl=False)
        for block, _, _, x, y in toy.steps(only=1):
            assert y.isfinite().all()
            plain = x @ toy.weights[block][1].T
            assert LIMIT < stack.relative_error(y, plain.double()) < 1  # with experts
    assert all(map(torch.equal, others, (toy.outputs[1][0], toy.outputs[1][2])))
    batch.run("crowd", bare=True, pdl=False)
    assert toy.error() < LIMIT


def test_the_scripts_import():
    import bench_kernels as kernels
    import sweep

    assert {*kernels.MODELS} <= shapes.SHAPES.keys()
    assert sweep.MODELS is kernels.MODELS


def test_no_script_hides_a_package():
    """Scripts run with their folder in front of the path. transformers imports `kernels` where it finds one, and what else it likes."""
    scripts = {path.stem for path in Path(shapes.__file__).parent.glob("*.py")}
    assert not scripts & {*packages_distributions(), *sys.stdlib_module_names, "kernels"}


def test_time_in_which_several_kernels_run_counts_once():
    kernels = [
        token_parts.Kernel(name, *times) for name, times in {"b": (2.0, 5.0), "a": (0.0, 3.0), "c": (7.0, 8.0)}.items()
    ]
    assert token_parts.busy(kernels) == 6.0
    assert token_parts.busy([]) == 0.0


def test_the_parts_of_a_token_add_up():
    def token(name, ms, *busy, left_out=None):
        kernels = [token_parts.Kernel(kernel, *times) for kernel, times in busy]
        return token_parts.Token(name, ms, kernels, left_out or {})

    eager = token("hf/eager", 10.0, ("void pytorch_flash::fwd", (0.0, 1.0)), ("gemv", (1.0, 4.0)))
    published = token("published/pesc", 30.0, ("fmha_cutlassF", (0.0, 1.0)), *[("gemv", (1.0, 9.0))] * 9)
    assert eager.parts(2e3, None) == {"launching": 4.0, "python": 2.0, "attention": 1.0, "rest": 3.0}
    wanted = {"launching": 20.0, "python": 1.0, "attention": 1.0, "adapters": 5.0, "rest": 3.0}
    assert published.parts(2e3, eager) == wanted
    assert published.parts(1e6, eager)["launching"] == 21.0  # no more than the time in which no kernel runs
    bare = token("engine/backbone", 5.0, ("decode", (0.0, 4.5)), left_out={"attention": 0.25, "between": 0.25})
    switch = token("engine/switch_pristine", 9.0, ("switch", (0.0, 8.0)))
    assert switch.parts(2e3, bare) == {
        "launching": 1.0, "attention": 0.25, "between": 0.25, "adapters": 3.5, "rest": 4.0,
    }  # fmt: skip


def test_what_was_not_told_apart_is_not_split():
    graphed = token_parts.Token("graphed/mola", 9.0, [token_parts.Kernel("triton_poi_sdpa_mask", 0.0, 8.0)])
    compiled = token_parts.Token("hf/compiled", 5.0, graphed.kernels)
    assert graphed.parts(2.0, compiled).keys() == {"launching", "adapters", "rest"}
    assert graphed.parts(2.0, None) == {"launching": 1.0}
    assert graphed.parts(None, compiled) == {}


def test_every_row_is_compared_with_the_bare_model_that_runs_as_it_does():
    bare = {
        "hf/eager": None, "hf/compiled": None, "engine/backbone": None, "engine/switch_in_place": "engine/backbone",
        "published/mola": "hf/eager", "graphed/mola_fused": "hf/compiled", "graphed/layerwise_ours": "engine/backbone",
    }  # fmt: skip
    assert {name: token_parts.bare_of(name) for name in bare} == bare


def test_the_chart_and_the_table_show_parts_or_say_that_there_are_none(tmp_path):
    import charts
    import tables

    def row(name, ms):
        return {"name": name, "case": {"model": "m", "context": 1, "batch": 1}, "median": ms, "unit": "ms"}

    rows = [row("hf/compiled", 6.0), row("engine/backbone", 5.0), row("published/mola", 300.0)]
    rows += [row(f"profile/{each['name']}/{what}", 3.0) for each in rows for what in ("launches", "kernels")]
    parts = {"launching": 0.5, "attention": -0.25, "rest": 4.75}
    rows += [row(f"profile/engine/backbone/{part}", ms) for part, ms in parts.items()]
    found = {each["name"]: each for each in rows}
    assert charts.parts_of("engine/backbone", found) == {**parts, "attention": 0.0}
    assert charts.parts_of("published/mola", found) == {charts.NOT_SPLIT: 300.0}
    lines = {line.split(" | ")[0]: line for line in tables.decode_profile(rows)}
    assert lines["| engine/backbone"] == "| engine/backbone | 5.00 | 3 | 3.00 | 0.50 |  | -0.25 | not split |  | 4.75 |"
    assert lines["| published/mola"].count("not split") == 6
    charts.latency(rows, tmp_path / "latency.svg")
    assert (tmp_path / "latency.svg").stat().st_size > 10_000


def test_vllm_for_a_machine_without_network_leaves_out_what_is_there(tmp_path):
    import zipfile

    import vllm_offline

    wheel = tmp_path / "vllm-1-py3-none-any.whl"
    metadata = (
        "Requires-Dist: mcp>=1\nRequires-Dist: six; python_version < '3'\nRequires-Dist: pillow; extra == 'image'\n"
    )
    kept = ("vllm/a.py", "vllm/third_party/pynvml.py", vllm_offline.KERNELS[0], "other/c.so")
    names = (
        *kept,
        "vllm/_moe_C.abi3.so",
        "mistral_common/data/vocabulary.json",
        "vllm/third_party/deep_gemm/__init__.py",
        "vllm/third_party/deep_gemm/_C.cpython-312-x86_64-linux-gnu.so",
    )
    with zipfile.ZipFile(wheel, "w") as files:
        for name in names:
            files.writestr(name, "")
        files.writestr("vllm-1.dist-info/METADATA", metadata)
    assert [str(each) for each in vllm_offline.needs(wheel, ())] == ["mcp>=1"]
    assert len(list(vllm_offline.needs(wheel, ("image",)))) == 2
    vllm_offline.unpack(wheel, tmp_path / "site")
    found = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*") if path.is_file()}
    assert found == {*kept, "vllm-1.dist-info/METADATA"}
    for name, left_out in (
        ("torch", True),
        ("torchaudio", True),
        ("nvidia-cutlass-dsl", True),
        ("apache-tvm-ffi", False),  # xgrammar imports it
        ("msgspec", False),
        ("rayon", False),
    ):
        assert bool(vllm_offline.SKIPPED.fullmatch(vllm_offline.name_of(name))) == left_out


def test_code_of_other_gpus_is_left_out_of_a_library():
    import vllm_offline

    def entry(kind, capability, code):
        before = vllm_offline.ENTRY.pack(kind, 1, 64, len(code)).ljust(vllm_offline.CAPABILITY_AT, b"h")
        return (before + capability.to_bytes(4, "little")).ljust(64, b"h") + code

    def container(*entries):
        return vllm_offline.CONTAINER.pack(0xBA55ED50, 1, 16, sum(map(len, entries))) + b"".join(entries)

    binary, ptx = vllm_offline.BINARY, vllm_offline.PTX
    own = container(entry(binary, 80, b"old."), entry(binary, 90, b"mine"), entry(ptx, 90, b"text"))
    compiled = container(entry(binary, 80, b"old2"), entry(ptx, 80, b"tex2"))  # has none for it: PTX is compiled
    other = vllm_offline.MAGIC + b"that is no container, but looks like one"
    library = b"start" + own + b"between" + compiled + other + b"end" + vllm_offline.MAGIC
    found = vllm_offline.for_one_gpu(library, 90)
    assert found == library.replace(b"old.", bytes(4)).replace(b"text", bytes(4)).replace(b"old2", bytes(4))
    assert [len(entries) for entries in vllm_offline.containers(library)] == [3, 2, 0]
