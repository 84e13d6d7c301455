"""What each way is expected to cost, and the choices that follow, against what was measured (benchmarks/results/h100)."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import family
from tiny_text import save_base
from transformers import AutoModelForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.costs import FEW_TOKENS, FORMS, H100, Cost, Device, Layer, Part, Step, common_form, costs, fused_form
from adafuse.execution import automatic, cheapest, in_graph
from adafuse.weights import MOST_FEATURES, stored_bytes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from shapes import SHAPES, groups  # noqa: E402

MODEL = "llama-2-7b"
GROUPS = [Layer(g.features, sum(g.widths), len(g.widths), appended=True) for g in groups(MODEL)]
LINEARS = tuple((g.features, width) for g in groups(MODEL) for width in g.widths) * SHAPES[MODEL]["num_hidden_layers"]
CLOSE = 1.05


def mixture(r, **changes):
    return AdaFuseConfig(**{"r": r, "num_experts": 8, "top_k": 2, **changes})


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / "h100" / f"{name}.json").read_text())["rows"]


def by_case(rows):
    """{(tokens, r): {form: median}}."""
    found = {}
    for tokens, r, form, median in rows:
        found.setdefault((tokens, r), {})[form] = median
    return found


def measured_groups():
    for row in results("kernels"):
        case = row["case"]
        if "form" in case and case["model"] == MODEL and row["name"].endswith(f"_{case['form']}"):
            yield case["tokens"], case["r"], case["form"], row["median"]


MEASURED = by_case(measured_groups())


def test_the_groups_were_measured():
    assert {(tokens, r) for tokens in (2, 4, 8, 32, 256, 2048) for r in (16, 64)} <= MEASURED.keys()


def as_the_library():
    """{(tokens, r): (form of each group, median)} of the rows that time what the library runs."""
    rows = [row for row in results("kernels") if row["case"]["model"] == MODEL and "form" in row["case"]]
    return {
        (row["case"]["tokens"], row["case"]["r"]): (row["case"]["form"], row["median"])
        for row in rows
        if row["name"].endswith(f"_r{row['case']['r']}")
    }


@pytest.mark.parametrize(("tokens", "r"), as_the_library())
def test_a_batch_takes_the_fastest_forms(tokens, r):
    """What the library takes for the groups of a block: what was measured, and hardly slower than any one form for all."""
    form, median = as_the_library()[tokens, r]
    taken = [fused_form(group, mixture(r), tokens, 2) for group in GROUPS]
    assert form == ", ".join(f"{g.name} {each}" for g, each in zip(groups(MODEL), taken, strict=True))
    assert median <= CLOSE * min(MEASURED[tokens, r].values())


@pytest.mark.parametrize(("tokens", "r"), MEASURED)
def test_estimates_are_near_what_was_measured(tokens, r):
    step = Step(mixture(r), tokens, 2)
    for name, median in MEASURED[tokens, r].items():
        if name in FORMS and FORMS[name].fits(step, GROUPS[0]):
            kernels = [k for group in GROUPS for k in FORMS[name].kernels(step, group)]
            estimate = 1e3 * SHAPES[MODEL]["num_hidden_layers"] * sum(kernel.seconds(H100) for kernel in kernels)
            assert 0.85 <= estimate / median <= 1.25, name


def executions():
    rows = [row for row in results("executions") if row["case"].get("model") in SHAPES and "r" in row["case"]]
    return by_case(
        (
            (row["case"]["model"], row["case"]["sequences"] * row["case"]["tokens"]),
            row["case"]["r"],
            row["name"],
            row["median"],
        )
        for row in rows
        if row["name"] in ("forward/reference", "forward/fused")
    )


@pytest.mark.parametrize(("where", "r"), executions())
def test_auto_never_takes_what_was_measured_slower(where, r):
    model, tokens = where
    linears = (
        tuple((g.features, width) for g in groups(model) for width in g.widths) * SHAPES[model]["num_hidden_layers"]
    )
    taken = cheapest(linears, mixture(r), tokens, 2, False)
    rows = executions()[where, r]
    assert rows[f"forward/{taken}"] <= CLOSE * min(rows.values())


def test_auto_takes_the_kernels_where_they_pay():
    """Launched from Python they cost the host more than plain PyTorch does; in a CUDA graph that does not count."""
    gpu = torch.device("cuda")
    for r in (16, 64):
        config, taken = mixture(r), []
        for tokens in (1, 512, 2048, 3072, 4096, 8192, 16384, 65536):
            taken.append(automatic(LINEARS, config, tokens, 2, gpu, needs_grad=False))
            assert automatic(LINEARS, config, tokens, 2, gpu, needs_grad=True) == "reference"
            assert automatic(LINEARS, config, tokens, 2, torch.device("cpu"), needs_grad=False) == "reference"
        assert taken[:4] == ["reference"] * 4
        assert taken[-2:] == ["fused"] * 2, "once the device lags behind the host, only its time counts"
        assert taken == sorted(taken, reverse=True), "and it does so from some number of tokens on"
        with in_graph():
            for tokens in (1, 32, 256, 2048):
                assert automatic(LINEARS, config, tokens, 2, gpu, needs_grad=False) == "fused"
        assert automatic(LINEARS, config, 1, 2, gpu, needs_grad=False) == "reference"


def test_time_grows_with_tokens():
    for r in (1, 64):
        seconds = [costs(LINEARS, mixture(r), tokens, 2)[0].seconds for tokens in (512, 2048, 8192, 32768)]
        assert all(2 < b / a < 4.2 for a, b in pairwise(seconds))


# --- forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "config", "form"),
    [
        (1, {"num_experts": 8, "r": 16}, "decode"),
        (4, {"num_experts": 8, "r": 16}, "decode"),
        (8, {"num_experts": 8, "r": 16}, "crowd"),
        (4, {"num_experts": 128, "r": 16}, "decode"),
        (32, {"num_experts": 8, "r": 64}, "crowd"),
        (32, {"num_experts": 256, "r": 64, "top_k": 1}, "tiles"),
        (2048, {"num_experts": 64, "r": 64, "top_k": 1}, "matmul"),
        (256, {"num_experts": 256, "r": 64, "top_k": 1}, "tiles"),
        (256, {"num_experts": 8, "r": 64}, "gated"),
    ],
)
def test_fused_takes_the_cheapest_form(tokens, config, form):
    assert fused_form((4096, 4096), AdaFuseConfig(**config), tokens, 2) == form


def test_the_form_of_all_is_the_cheapest_in_sum():
    """Mistral-7B's groups, 5 tokens of r 64: by itself the first would take another form than the rest."""
    layers = [((4096, 6144, 3), mixture(64)), ((4096, 28672, 2), mixture(64)), ((4096, 32000), None)]
    among = ("decode", "crowd")
    assert fused_form(*layers[0], 5, 2, among=among) != fused_form(*layers[1], 5, 2, among=among)
    sums = {
        name: sum(
            kernel.seconds(H100)
            for layer, config in layers
            for kernel in FORMS[name].kernels(Step(config, 5, 2), Layer(*layer))
        )
        for name in among
    }
    assert common_form(layers, 5, 2, among=among) == min(sums, key=sums.get)
    assert common_form(layers, 1, 2, among=among) == "decode", "crowd is for several tokens"


def test_a_form_is_taken_only_where_it_fits():
    assert fused_form((4096, 4096), mixture(64), 2048, 2) == "matmul"
    assert fused_form((4096, 4096), mixture(64), 2048, 4) != "matmul", "fp32 has no tensor cores"
    assert fused_form((4095, 4096), mixture(64), 2048, 2) != "matmul", "rows that do not begin on 16 bytes"
    assert fused_form((4096, 4096), mixture(64), 2048, 2, among=("tiles",)) == "tiles"
    for tokens, form in ((FEW_TOKENS, "beside"), (FEW_TOKENS + 1, "beside_gated")):
        assert fused_form(Layer(4096, 4096, plain=False), mixture(64), tokens, 2) == form


def test_the_kernels_have_the_forms():
    pytest.importorskip("triton")
    from adafuse import fused
    from adafuse.ops.checks import MAX_FEATURES, MAX_TOKENS
    from adafuse.ops.layout import tile_shape

    assert fused.FORMS.keys() == {name for name, form in FORMS.items() if form.plain}
    assert (FEW_TOKENS, MOST_FEATURES) == (MAX_TOKENS, MAX_FEATURES)
    for tokens in (1, 9, 33, 64, 65, 512, 513, 4096):
        assert Step(mixture(64), tokens, 2).block_t == tile_shape(tokens, 64, 512)[0]


def test_bytes_and_flops_of_each_form():
    config = mixture(2, num_experts=4)

    def kernels(form, tokens, **changes):
        return FORMS[form].kernels(Step(config, tokens, 2), Layer(10, 20, **changes))

    def numbers(found):
        return sum(k.bytes for k in found) / 2, sum(k.flops for k in found) / 2

    base, flops = 10 * 20 + 1000 * 30, 1000 * 10 * 20
    ranks = 2 * 2  # of a tile: of two experts
    shrink, products = 8 * 10 + 1000 * (10 + ranks), 1000 * ranks * (10 + 20)
    total = 4 * 1000 * ranks  # the sum of the shrink's parts
    assert numbers(kernels("tiles", 1000)) == pytest.approx(
        (base + shrink + total + 8 * 20 + 1000 * (ranks + 40), flops + products)
    )
    h = 8 * 10 + 1000 * (10 + 8)  # of all experts
    gated = numbers(kernels("gated", 1000))
    assert gated == pytest.approx((base + h + 8 * 20 + 1000 * (ranks + 40), flops + 1000 * (8 * 10 + ranks * 20)))
    assert numbers(kernels("gated", 1000, appended=True)) == pytest.approx((gated[0] - 1000 * 10, gated[1])), (
        "x is read once"
    )
    matmul = numbers(kernels("matmul", 1000))
    assert matmul == pytest.approx((base + shrink + total + 8 * 20 + 1000 * ranks, flops + products)), (
        "no pass over the output"
    )
    assert [len(kernels(form, 1000)) for form in ("tiles", "gated", "matmul")] == [4, 3, 3]
    (_, decode) = kernels("decode", 1)
    assert numbers([decode]) == (10 * 20 + 4 * 30 + 30, 10 * 20 + 4 * 30)
    stored = kernels("beside", 1, plain=False, stored=100, copied=True)
    assert len(stored) == 4
    assert stored[0].bytes == 100 + 2 * 30


def test_a_switch_is_one_launch_for_all_weights():
    (merged,) = [c for c in costs([(10, 20), (20, 10)], mixture(2, num_experts=4), 1, 4) if c.execution == "switch"]
    assert len(merged.kernels) == 1 + 2
    assert merged.bytes == pytest.approx(2 * 4 * (3 * 10 * 20 + 2 * 2 * 30 + 30))


# --- devices --------------------------------------------------------------------------------------------------------------


def test_rates_of_a_device_follow_from_what_torch_knows():
    h100 = {"major": 9, "minor": 0, "multi_processor_count": 132, "clock_rate": 1_980_000}
    memory = {"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}
    assert Device.by(SimpleNamespace(**h100, **memory)) == pytest.approx(H100, rel=0.01)
    a100 = {"major": 8, "minor": 0, "multi_processor_count": 108, "clock_rate": 1_410_000}
    found = Device.by(SimpleNamespace(**a100, memory_clock_rate=1_593_000, memory_bus_width=5120))
    assert found.read == pytest.approx(1.95e12, rel=0.01)
    assert found.flops == pytest.approx(2.04e14, rel=0.01)
    assert found.processors == 108
    assert found.fragments
    assert not Device.by(SimpleNamespace(major=7, minor=5, multi_processor_count=40)).fragments
    unknown = Device.by(SimpleNamespace(major=11, minor=0, multi_processor_count=66))
    assert unknown == pytest.approx((H100.read, H100.flops / 2, 66, True)), "an H100's, for what torch does not say"
    assert Device.of(torch.device("cpu")) == H100


# --- what a model's linears take ------------------------------------------------------------------------------------------


def forms_of(model, tokens):
    gate = model._gate
    found: Cost = costs(gate.layers(model.get_base_model().dtype), gate.config, tokens, 4)[0]
    return {part.form: part.linears for part in found.parts}


def attached(name, **changes):
    return AdaFuseModel(family(name).build(), mixture(2, num_experts=4, **changes)).eval()


def test_explain_execution_counts_the_forms(capsys):
    """gpt2's Conv1D are not plain linears: a call of each, and a copy of what it answers, then the experts' two kernels."""
    model = attached("gpt2")
    text = model.explain_execution(1)
    assert capsys.readouterr().out.strip() == text
    assert "-> reference" in text
    assert "8 linears" in text
    assert "beside: the base as it is, then the chosen experts" in text
    (line,) = [line for line in text.splitlines() if "beside:" in line]
    assert "32 launches" in line
    (fused,) = [line for line in text.splitlines() if " fused " in line]
    assert "launched from Python in 4.0" in fused, "8 linears of 0.5 ms"
    (cost,) = [c for c in costs(model._gate.layers(torch.float32), model._gate.config, 1, 4) if c.execution == "fused"]
    assert f"expected: {1e3 * cost.seconds:.2f} ms on the GPU" in fused
    assert text.endswith('the model is on cpu, where "auto" takes the reference; the times are of an H100')
    assert forms_of(model, 1) == {"beside": 8}
    assert forms_of(model, 9) == {"beside_gated": 8}
    llama = attached("llama")
    count = len(llama.banks)
    assert forms_of(llama, 1) == {"decode": count}
    next(iter(llama._linears)).base_layer.register_forward_hook(lambda *_: None)
    assert forms_of(llama, 1) == {"decode": count - 1, "beside": 1}
    llama.execution = "reference"
    assert "-> reference" in llama.explain_execution(tokens=3)


def test_a_cast_is_seen_by_the_estimate():
    model = attached("llama")
    layers = model._gate.layers(torch.bfloat16)
    assert not any(layer.plain for layer in layers), "the base is fp32"
    model.to(torch.bfloat16)
    assert model._gate._layers == {}
    assert all(layer.plain for layer in model._gate.layers(torch.bfloat16))


def test_explain_execution_of_linears_that_take_different_forms():
    part = {p.form: p.linears for p in costs(LINEARS, mixture(16), 1024, 2)[0].parts}
    assert sum(part.values()) == len(LINEARS)
    assert len(part) > 1, "the down projection, of few tiles, is not computed as the others are"
    assert all(isinstance(p, Part) and p.flops > 0 < p.bytes for p in costs(LINEARS, mixture(16), 1024, 2)[0].parts)


def test_quantised_bases_count_as_they_are_stored(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder = save_base(tmp_path, hidden_size=64, intermediate_size=128, num_key_value_heads=4, head_dim=16)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    model = AdaFuseModel(base, mixture(2, num_experts=4)).eval()
    layers = model._gate.layers(torch.float32)
    assert not any(layer.plain for layer in layers)
    for layer in layers:
        assert layer.stored == layer.in_features * layer.out_features / 2
    assert stored_bytes(torch.nn.Linear(3, 5).half()) == 2 * (3 * 5 + 5)
