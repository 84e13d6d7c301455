"""Whole models under each execution: fused and switch against the per-token loop and against each other, and what they refuse."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from families import NAMES, batch, family, fill
from reference import relative_error, relative_rms, run
from transformers import DynamicCache

pytest.importorskip("triton")

from adafuse import AdaFuseConfig, AdaFuseModel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import drift as drift_benchmark

pytestmark = pytest.mark.usefixtures("few_programs")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = {"do_sample": False, "pad_token_id": 0}


def attached(name="llama", dtype=torch.float32, **changes) -> AdaFuseModel:
    settings = {"r": 2, "num_experts": 4, "top_k": 2, "shared_rank": 3, "routing": "layer", **changes}
    model = AdaFuseModel(family(name).build(dtype), AdaFuseConfig(**settings))
    fill(model)
    return model.to(DEVICE).eval()


def exact(model, name, **inputs):
    """Logits of the per-token loop."""
    fam, tensors = family(name), {name: tensor.cpu() for name, tensor in model.adapter_tensors().items()}
    return run(fam.build(), fam.blocks, model.adafuse_config, tensors, **inputs).logits


def weights_of(model):
    base = model.get_base_model()
    return {path: base.get_submodule(path).base_layer.weight.detach().clone() for path in model.banks}


# fused


@pytest.mark.parametrize("name", NAMES)
def test_fused_equals_the_loop_for_a_prompt_and_then_token_by_token(name):
    """A padded batch of prompts (the batch kernels), then single tokens (decode, or shrink and expand beside the base's own kernel)."""
    model = attached(name)
    model.execution = "fused"
    ids = batch(rows=2, length=9)
    wanted = exact(model, name, input_ids=ids)
    cache, parts = DynamicCache(config=model.get_base_model().config), []
    with torch.no_grad():
        for part in ids.to(DEVICE).split([6, 1, 2], dim=1):
            parts.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    assert relative_error(torch.cat(parts, dim=1).cpu(), wanted) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"routing": "model"}, {"shared_rank": 0, "top_k": 1}, {"num_experts": 5, "r": 3, "top_k": 5, "shared_rank": 0}],
)
def test_fused_equals_the_loop_whatever_the_config(changes):
    model = attached(**changes)
    model.execution = "fused"
    for rows, length in ((1, 1), (3, 1), (3, 7)):
        ids = batch(rows=rows, length=length)
        with torch.no_grad():
            got = model(input_ids=ids.to(DEVICE)).logits
        assert relative_error(got.cpu(), exact(model, "llama", input_ids=ids)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_is_as_exact_as_the_reference_in_half_precision(dtype):
    model, ids = attached(dtype=dtype), batch(rows=2, length=9)
    wanted = exact(attached(), "llama", input_ids=ids)
    errors = {}
    for execution in ("reference", "fused"):
        model.execution = execution
        with torch.no_grad():
            errors[execution] = relative_error(model(input_ids=ids.to(DEVICE)).logits.cpu(), wanted)
    # Two draws of the same rounding errors, on a GPU 1.23 apart in bf16; the interpreter truncates where a GPU rounds.
    assert errors["fused"] < (2 if DEVICE == "cpu" else 1.5) * errors["reference"]


def test_fused_under_autocast():
    model, ids = attached(), batch(rows=1, length=12)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        wanted = model(input_ids=ids.to(DEVICE)).logits
        model.execution = "fused"
        for part in (ids, ids[:, :3]):
            got = model(input_ids=part.to(DEVICE)).logits
            assert relative_error(got, wanted[:, : part.shape[1]]) < 3e-2


def test_fused_hooks_and_dropout_of_a_base_linear_are_kept():
    model, ids = attached(lora_dropout=0.5), batch(rows=1, length=3).to(DEVICE)
    layer = model.get_base_model().get_submodule(next(iter(model.banks)))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        model.execution = "fused"
        seen = []
        handle = layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
        assert relative_error(model(input_ids=ids).logits, wanted) < 1e-5
        assert seen == [1]
        handle.remove()
        model.train()
        dropped = [model(input_ids=ids).logits for _ in range(2)]
    assert relative_error(dropped[0], dropped[1]) > 1e-3


def test_fused_disabled_is_the_base():
    model, ids = attached(), batch(rows=2, length=8).to(DEVICE)
    model.execution = "fused"
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, family("llama").build().to(DEVICE)(input_ids=ids).logits)


# switch


@pytest.mark.parametrize("source", ["pristine", "in_place"])
@pytest.mark.parametrize(("name", "routing"), [("llama", "layer"), ("gpt2", "model"), ("qwen2", "model")])
@pytest.mark.filterwarnings("ignore:switch_source")
def test_every_execution_generates_the_same_tokens(name, routing, source):
    """Under switch the prompt runs unmerged, then the weights are switched for each token. (qwen2 has biases, gpt2 Conv1D.)"""
    model, ids = attached(name, routing=routing), batch(rows=1, length=10).to(DEVICE)
    before = weights_of(model)
    model.switch_source = source
    scores = {}
    for execution in ("reference", "fused", "switch"):
        model.execution = execution
        output = model.generate(ids, max_new_tokens=4, output_scores=True, return_dict_in_generate=True, **GREEDY)
        scores[execution] = (output.sequences, torch.stack(output.scores))
    assert any(not torch.equal(before[path], weight) for path, weight in weights_of(model).items())
    for execution in ("fused", "switch"):
        assert torch.equal(scores[execution][0], scores["reference"][0])
        assert relative_error(scores[execution][1], scores["reference"][1]) < 1e-4
    model.execution = "auto"
    for path, weight in weights_of(model).items():
        if source == "pristine":
            assert torch.equal(weight, before[path])
        else:
            assert relative_error(weight, before[path]) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "source"),
    [
        (torch.bfloat16, "pristine"),
        pytest.param(torch.bfloat16, "in_place", marks=pytest.mark.gpu),
        pytest.param(torch.float16, "pristine", marks=pytest.mark.gpu),
        pytest.param(torch.float16, "in_place", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.filterwarnings("ignore:switch_source")
def test_switch_is_as_exact_as_the_reference_in_half_precision(dtype, source):
    """Through generate, made to say the same tokens; the truth is the loop in fp32. Merging rounds the weights once more."""
    whole, prompt = batch(rows=1, length=8 if DEVICE == "cpu" else 12), 5
    wanted = exact(attached(), "llama", input_ids=whole)[:, prompt - 1 : -1]
    model, errors = attached(dtype=dtype), {}
    model.switch_source = source
    forced = {"prefix_allowed_tokens_fn": lambda _, seen: [whole[0, len(seen)].item()], **GREEDY}
    for execution in ("reference", "switch"):
        model.execution = execution
        given = {"max_new_tokens": whole.shape[1] - prompt, "output_logits": True, "return_dict_in_generate": True}
        output = model.generate(whole[:, :prompt].to(DEVICE), **forced, **given)
        assert torch.equal(output.sequences.cpu(), whole)
        errors[execution] = relative_rms(torch.stack(output.logits, dim=1).cpu(), wanted)
    assert errors["switch"] < (1.5 if source == "pristine" else 4) * errors["reference"]


def merged_model(**changes):
    """A model whose weights hold the experts of a token."""
    model = attached(**changes)
    before = weights_of(model)
    model.execution = "switch"
    with torch.no_grad():
        model(input_ids=batch(rows=1, length=1).to(DEVICE))
    assert any(not torch.equal(before[path], weight) for path, weight in weights_of(model).items())
    return model, before


def is_restored(model, before):
    return all(torch.equal(before[path], weight) for path, weight in weights_of(model).items())


def test_what_needs_the_untouched_weights_restores_them():
    model, before = merged_model()
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=batch(rows=1, length=1).to(DEVICE))
    assert is_restored(model, before)
    model, before = merged_model()
    with torch.no_grad():
        model(input_ids=batch(rows=1, length=5).to(DEVICE))
    assert is_restored(model, before)
    model, before = merged_model()
    base = model.detach()
    assert all(torch.equal(base.get_submodule(path).weight, weight) for path, weight in before.items())


def test_the_same_routing_again_is_no_work(monkeypatch):
    from adafuse.ops import switch as op

    model, _ = merged_model()
    for path in model.banks:
        model.get_base_model().get_submodule(path).base_layer.weight.data.fill_(float("nan"))
    launches, kernel = [], op._switch_kernel
    monkeypatch.setattr(op, "_switch_kernel", _Counted(kernel, launches))
    with torch.no_grad():
        model(input_ids=batch(rows=1, length=1).to(DEVICE))
    assert launches == [1], "one launch switches every matrix of the model"
    assert all(weight.isnan().all() for weight in weights_of(model).values()), (
        "a matrix was written though nothing changed"
    )
    with torch.no_grad():
        model(input_ids=(batch(rows=1, length=1).to(DEVICE) + 1) % 50)
    assert launches == [1, 1]
    assert not any(weight.isnan().any() for weight in weights_of(model).values())


class _Counted:
    """A kernel that notes each launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append(1)
            return self.kernel[grid](*args, **kwargs)

        return launch


def drift(dtype, *tokens):
    """Errors of in-place switched weights after some tokens, relative to what the experts add."""
    return drift_benchmark.drift(dtype, tokens, DEVICE, shape=(48, 64), num_experts=4, r=4)


def test_in_place_drifts_in_half_precision_and_not_in_fp32():
    after = {dtype: drift(dtype, 1, 100) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert max(after[torch.float32]) < 1e-3
    for dtype in (torch.float16, torch.bfloat16):
        assert after[dtype][1] > 3 * after[dtype][0]
    assert after[torch.bfloat16][1] > after[torch.float16][1]


@pytest.mark.gpu
def test_in_place_drift_over_a_thousand_tokens():
    (fp32,), (fp16,), (bf16,) = (drift(dtype, 1000) for dtype in (torch.float32, torch.float16, torch.bfloat16))
    assert fp32 < 1e-2 < fp16 < bf16


# what is refused


def test_switch_in_place_warns_once():
    model = attached()
    model.switch_source = "in_place"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.execution = "switch"
        model.generate(batch(rows=1, length=2).to(DEVICE), max_new_tokens=3, **GREEDY)
        model.bfloat16().float()  # each makes a new table
        model.execution = "reference"
        model.execution = "switch"
    assert sum("drift" in str(each.message) or "pile up" in str(each.message) for each in caught) == 1


@pytest.mark.parametrize("execution", ["fused", "switch"])
def test_kernels_refuse_a_forward_that_needs_gradients(execution):
    model, ids = attached(), batch(rows=1, length=3).to(DEVICE)
    model.execution = execution
    with pytest.raises(ValueError, match=f'execution="{execution}" has no gradients'):
        model(input_ids=ids)
    model.set_trainable("none")
    model(input_ids=ids)
    model.get_base_model().get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ValueError, match="has no gradients"):
        model(input_ids=ids)
    model.get_base_model().get_input_embeddings().weight.requires_grad_(False)
    model.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_()
    for part in (ids, ids[:, :1]):
        with pytest.raises(ValueError, match="no backward pass and the input needs a gradient"):
            model(input_ids=part)


def test_switch_refuses_more_than_one_sequence():
    model = attached()
    model.execution = "switch"
    with pytest.raises(ValueError, match="one sequence at a time"):
        model.generate(batch(rows=1, length=3).to(DEVICE), max_new_tokens=2, num_beams=2, **GREEDY)


def test_executions_that_cannot_run_are_refused_when_set(monkeypatch):
    model = attached()
    with pytest.raises(ValueError, match="'fast' is unknown; allowed: 'auto', 'reference', 'fused', 'switch'"):
        model.execution = "fast"
    with pytest.raises(ValueError, match="'elsewhere' is unknown"):
        model.switch_source = "elsewhere"
    model.execution = "switch"
    with pytest.raises(ValueError, match="cannot change while"):
        model.switch_source = "in_place"
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match='the model is on cpu; move it to a GPU, or use "reference"'):
            model.execution = "fused"
        assert model.execution == "switch"


def test_switch_refuses_weights_that_it_cannot_merge_into():
    base = family("llama").build()
    linear = base.model.layers[1].mlp.up_proj

    class Quantised(torch.nn.Linear):
        pass

    linear.__class__ = Quantised
    model = AdaFuseModel(base, AdaFuseConfig(num_experts=2, r=2)).to(DEVICE)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj \(Quantised\) does not keep plain ones"):
        model.execution = "switch"
    assert model.execution == "auto"
    model.execution = "fused"
    ids = batch(rows=1, length=2).to(DEVICE)
    fill(model)
    with torch.no_grad():
        fused = model(input_ids=ids).logits
        model.execution = "reference"
        assert relative_error(fused, model(input_ids=ids).logits) < 1e-5


def test_a_copied_model_keeps_its_execution_but_does_not_switch():
    model, ids = attached(), batch(rows=1, length=2).to(DEVICE)
    model.execution = "fused"
    twin = copy.deepcopy(model)
    assert twin.execution == "fused"
    with torch.no_grad():
        assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    model, before = merged_model()
    twin = copy.deepcopy(model)
    assert (model.execution, twin.execution) == ("switch", "auto")
    assert is_restored(twin, before)
    one = ids[:, :1]
    with torch.no_grad():
        wanted = twin(input_ids=one).logits
        assert relative_error(model(input_ids=one).logits, wanted) < 1e-5
        twin(input_ids=one + 1)
        assert relative_error(model(input_ids=one).logits, wanted) < 1e-5


def test_what_changes_under_switch_is_switched_anew_or_refused():
    one = batch(rows=1, length=1).to(DEVICE)

    def error(model):
        with torch.no_grad():
            got = model(input_ids=one).logits
            twin = copy.deepcopy(model)
            twin.execution = "reference"
            return relative_error(got, twin(input_ids=one).logits)

    model, _ = merged_model()
    model.bfloat16()
    model.float()
    assert model.execution == "switch"
    assert error(model) < 1e-5
    model.load_adapter_tensors({name: tensor * 1.5 for name, tensor in model.adapter_tensors().items()})
    assert error(model) < 1e-5
    model.get_base_model().half()
    with pytest.raises(ValueError, match="was moved, cast or replaced"):
        error(model)
    model, before = merged_model()
    saved = model.get_base_model().state_dict()
    assert all(torch.equal(saved[f"{path}.base_layer.weight"], weight) for path, weight in before.items())
    assert error(model) < 1e-5
    model.train()
    with torch.no_grad():
        model(input_ids=one)
    model, _ = merged_model(lora_dropout=0.1)
    model.train()
    with torch.no_grad(), pytest.raises(ValueError, match="has no dropout"):
        model(input_ids=one)


def test_switch_set_in_inference_mode_serves_outside_it():
    model, one = attached(), batch(rows=1, length=1).to(DEVICE)
    with torch.no_grad():
        wanted = [model(input_ids=ids).logits for ids in (one, one + 1)]
    with torch.inference_mode():
        model.execution = "switch"
        assert relative_error(model(input_ids=one).logits, wanted[0]) < 1e-5
    with torch.no_grad():
        assert relative_error(model(input_ids=one + 1).logits, wanted[1]) < 1e-5


def test_fused_leaves_what_a_base_returns_alone():
    """A hook keeps the output; a patched forward (accelerate's) is called; a transposed input is read right."""
    model, ids = attached(), batch(rows=1, length=12).to(DEVICE)
    layer = model.get_base_model().get_submodule(next(iter(model.banks)))
    kept = []
    layer.base_layer.register_forward_hook(lambda _, args, output: kept.append((args[0], output)))
    plain = layer.base_layer.forward
    with torch.no_grad():
        for part in (ids, ids[:, :2]):
            model.execution = "reference"
            wanted = model(input_ids=part).logits
            model.execution = "fused"
            assert relative_error(model(input_ids=part).logits, wanted) < 1e-5
            x, output = kept[-1]
            assert torch.equal(output, plain(x))
        layer.base_layer._forward_hooks.clear()
        layer.base_layer.forward = lambda x: 2 * plain(x)
        model.execution = "reference"
        wanted = model(input_ids=ids[:, :2]).logits
        model.execution = "fused"
        assert relative_error(model(input_ids=ids[:, :2]).logits, wanted) < 1e-5


@pytest.mark.parametrize("form", ["crowd", "tiles", "gated", "matmul"])
def test_every_form_of_fused_equals_the_loop(form, monkeypatch):
    model = attached(top_k=1)
    model.execution = "fused"
    monkeypatch.setattr("adafuse.fused.fused_form", lambda *args: form)
    ids = batch(rows=3, length=7)
    with torch.no_grad():
        got = model(input_ids=ids.to(DEVICE)).logits
    assert relative_error(got.cpu(), exact(model, "llama", input_ids=ids)) < 1e-5
