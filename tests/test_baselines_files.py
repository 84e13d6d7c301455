"""Adapter folders of the baselines: round trips bit for bit, names and shapes, refusals that leave the base as it was."""

import json

import pytest
import torch
from baseline_methods import ALL, METHODS, inputs
from families import HIDDEN, INTERMEDIATE, family
from safetensors.torch import load_file, save_file
from snapshots import differences, snapshot
from tiny_text import save_base
from trainers import assert_same_bits
from transformers import AutoModelForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.base import load_adapted
from adafuse.baselines import LayerwiseModel, PescModel
from adafuse.checkpoint import CONFIG_FILE, WEIGHTS_FILE


@torch.no_grad()
def logits(model):
    return model(**inputs()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALL)
def test_a_reloaded_adapter_has_the_same_bits(method, dtype, tmp_path):
    model, tensors = ALL[method].attach(family("llama").build(dtype))
    model.save_pretrained(tmp_path)
    again = ALL[method].model.from_pretrained(family("llama").build(dtype), tmp_path)
    assert again.adafuse_config == model.adafuse_config
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert_same_bits(again.adapter_tensors(), tensors)
    assert torch.equal(logits(again), logits(model))
    further = ALL[method].model.from_pretrained(family("llama").build(dtype), tmp_path, is_trainable=True)
    trained = sum(parameter.numel() for parameter in further.parameters() if parameter.requires_grad)
    assert trained == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("method", ALL)
def test_load_adapter_replaces_the_weights(method, tmp_path):
    model, _ = ALL[method].attach()
    model.save_pretrained(tmp_path)
    fresh, _ = ALL[method].attach(filled=False)
    fresh.load_adapter(tmp_path, is_trainable=True)
    assert_same_bits(fresh.adapter_tensors(), model.adapter_tensors())
    other, _ = ALL[method].attach(top_k=1)
    with pytest.raises(ValueError, match=rf"other settings.*top_k=2 \(here 1\); use {type(model).__name__}"):
        other.load_adapter(tmp_path)


def test_the_files_of_each_method(tmp_path):
    """Names and shapes, written down here: a linear's router and experts, an FFN's router and adapters, a static LoRA."""
    path = "model.layers.1"
    expected = {
        "layerwise": {
            f"{path}.mlp.down_proj.router.weight": (5, INTERMEDIATE),
            f"{path}.mlp.down_proj.experts_a": (5, 3, INTERMEDIATE),
            f"{path}.mlp.down_proj.experts_b": (5, HIDDEN, 3),
        },
        "pesc": {
            f"{path}.mlp.router.weight": (5, HIDDEN),
            f"{path}.mlp.experts_a": (5, 6, HIDDEN),
            f"{path}.mlp.experts_b": (5, HIDDEN, 6),
            f"{path}.mlp.up_proj.shared_a": (3, HIDDEN),
            f"{path}.mlp.up_proj.shared_b": (INTERMEDIATE, 3),
        },
        "mixlora": {
            f"{path}.mlp.router.weight": (5, HIDDEN),
            f"{path}.mlp.up_proj.experts_b": (5, INTERMEDIATE, 3),
            f"{path}.mlp.down_proj.experts_a": (5, 3, INTERMEDIATE),
            f"{path}.self_attn.v_proj.shared_a": (3, HIDDEN),
            f"{path}.self_attn.v_proj.shared_b": (16, 3),
        },
    }
    counts = {"layerwise": 2 * 7 * 3, "pesc": 2 * (7 * 2 + 3), "mixlora": 2 * (1 + 3 * 2 + 4 * 2)}
    for method, shapes in expected.items():
        ALL[method].attach()[0].save_pretrained(tmp_path / method)
        tensors = load_file(tmp_path / method / WEIGHTS_FILE)
        assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
        assert len(tensors) == counts[method]
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        description = json.loads((tmp_path / method / CONFIG_FILE).read_text())
        assert description["method"] == method
        assert sorted(description["fingerprint"]["linears"]) == sorted(family("llama").paths())


def refused(model, folder, match):
    base = family("llama").build()
    before = snapshot(base)
    with pytest.raises(ValueError, match=match):
        model.from_pretrained(base, folder)
    assert differences(before, snapshot(base)) == []


@pytest.mark.parametrize("method", ALL)
def test_an_adapter_of_another_method_is_refused(method, tmp_path):
    ALL[method].attach()[0].save_pretrained(tmp_path / "mine")
    name = ALL[method].config.method
    refused(AdaFuseModel, tmp_path / "mine", f"an adapter of the method '{name}', not of 'adafuse'")
    AdaFuseModel(family("llama").build(), AdaFuseConfig(r=2)).save_pretrained(tmp_path / "adafuse")
    refused(ALL[method].model, tmp_path / "adafuse", f"an adapter of the method 'adafuse', not of '{name}'")


def test_commands_refuse_a_baseline(tmp_path):
    """`adafuse eval`, `generate` and `inspect` load adapters so."""
    base = save_base(tmp_path / "base")
    METHODS["pesc"].attach(AutoModelForCausalLM.from_pretrained(base))[0].save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="an adapter of the method 'pesc', not of 'adafuse'"):
        load_adapted(tmp_path / "adapter", base, device="cpu")


def test_an_adafuse_folder_names_no_method(tmp_path):
    """The format of AdaFuse's own folders is as it was."""
    AdaFuseModel(family("llama").build(), AdaFuseConfig(r=2)).save_pretrained(tmp_path)
    assert "method" not in json.loads((tmp_path / CONFIG_FILE).read_text())


@pytest.mark.parametrize("method", ["layerwise", "pesc", "mixlora"])
def test_broken_files_and_other_bases_are_refused(method, tmp_path):
    model, _ = METHODS[method].attach()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made on another base: model_type is llama there and mistral"):
        METHODS[method].model.from_pretrained(family("mistral").build(), tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items()}
    router = next(name for name in tensors if name.endswith("router.weight"))
    for change, message in (
        ({router: tensors[router][:-1]}, rf"{router} has shape \[4, \d+\], expected \[5, \d+\]"),
        ({"model.layers.9.router.weight": tensors[router].clone()}, "this adapter cannot have, first model.layers.9"),
        ({router: tensors[router] * float("nan")}, f"{router} holds NaN or Inf"),
    ):
        save_file(
            {name: tensor.contiguous() for name, tensor in {**tensors, **change}.items()}, tmp_path / WEIGHTS_FILE
        )
        refused(METHODS[method].model, tmp_path, message)


def test_a_trainers_state_dict_is_what_is_saved(tmp_path):
    for method in ("pesc", "mixlora"):
        model, tensors = METHODS[method].attach()
        state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path / method, state_dict=state)
        assert_same_bits(load_file(tmp_path / method / WEIGHTS_FILE), {name: 2 * t for name, t in tensors.items()})


def test_models_of_one_method_load_each_others_variants(tmp_path):
    """MoLA and MoRAL-style are settings of LayerwiseModel: the folder says which."""
    for method in ("mola", "moral"):
        model, _ = METHODS[method].attach()
        model.save_pretrained(tmp_path / method)
        again = LayerwiseModel.from_pretrained(family("llama").build(), tmp_path / method)
        assert sorted(again.banks) == sorted(model.banks)
        assert torch.equal(logits(again), logits(model))
    refused(PescModel, tmp_path / "mola", "an adapter of the method 'layerwise', not of 'pesc'")
