"""A tiny Llama quantised by hand in the format of compressed-tensors, and the same weights for HuggingFace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
SCHEMES = {
    "int8": {
        "format": "int-quantized",
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    },
    "int4": {
        "format": "pack-quantized",
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
            "dynamic": False,
        },
        "input_activations": None,
    },
}


def quantise(base: Path, folder: Path, scheme: str) -> tuple[Path, Path]:
    """(a folder with the quantised model for vLLM, one with a model of the same, rounded weights in fp32 for
    HuggingFace).
    """
    quantised, rounded = folder / "quantised", folder / "rounded"
    for copy in (quantised, rounded):
        shutil.copytree(base, copy)
    weights, packed, back = load_file(base / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            packed[name] = back[name] = weight
            continue
        stem = name.removesuffix(".weight")
        tensors, back[name] = (_int8 if scheme == "int8" else _int4)(weight)
        packed |= {f"{stem}.{key}": tensor for key, tensor in tensors.items()}
    save_file(packed, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(back, rounded / "model.safetensors", metadata={"format": "pt"})
    _write_config(quantised, SCHEMES[scheme])
    return quantised, rounded


def _int8(weight):
    """A scale an output. Numbers of 7 bits: with 8, sums of two products saturate on processors without VNNI, in vLLM without us too."""
    scale = weight.abs().amax(1, keepdim=True) / 63
    whole = (weight / scale).round().clamp(-128, 127)
    return {"weight": whole.to(torch.int8), "weight_scale": scale}, whole * scale


def _int4(weight):
    """A scale an output and group of inputs; eight numbers from -8 to 7, plus 8, in an int32, the first in the lowest
    bits.
    """
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2, keepdim=True) / 7
    whole = (groups / scale).round().clamp(-8, 7)
    nibbles = (whole.flatten(1).to(torch.int64) + 8).unflatten(1, (-1, 8))
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    tensors = {"weight_packed": words, "weight_scale": scale[..., 0], "weight_shape": torch.tensor(weight.shape)}
    return tensors, (whole * scale).flatten(1)


def _write_config(folder, scheme):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    group = {"targets": ["Linear"], **{key: scheme[key] for key in ("weights", "input_activations")}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": scheme["format"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    path.write_text(json.dumps(config))


def round_inputs(model):
    """Give the base linears of an AdaFuseModel int8 inputs, a scale a token, as the int8 scheme does; the experts see
    the exact ones.
    """
    for layer in model.modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, torch.nn.Linear):
            base.register_forward_pre_hook(lambda _, args: (_round(args[0]),))


def _round(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127) * scale
