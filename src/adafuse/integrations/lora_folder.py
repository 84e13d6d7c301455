"""A PEFT LoRA folder: read it as pairs (A, B) with PEFT's scale folded in, or write one. Knows files, not models.

Reading refuses every folder that is more than `y += scale * B (A x)` on some linears: what cannot be carried over exactly is
not carried over at all. Weights are read from safetensors alone, never from a pickle.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from adafuse import checkpoint

PREFIX = "base_model.model."  # PEFT's, before the module's path
_KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<which>[AB])\.weight")

# Ways to start A and B that leave the base as it is, beside True and False. The others subtract the initial B A from the base
# (or quantise it), so that their A and B mean nothing on the original one.
_INITS = ("gaussian", "eva", "orthogonal", "mica")

_READ = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_READ |= {"base_model_name_or_path"}
# Settings with no say in what trained A and B compute: notes, training, which modules were chosen (the tensors tell), and
# details of other settings that are refused or harmless themselves.
_HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "runtime_config",
    "lora_dropout",
}
_HARMLESS |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"}
_HARMLESS |= {"fan_in_fan_out"}  # how the base stores its weight; A is [r, in] and B [out, r] either way
_HARMLESS |= {"eva_config", "corda_config", "lora_ga_config", "loftq_config", "megatron_core", "qalora_group_size"}
_REFUSED = {
    "use_dora": "DoRA also rescales the base's weights by learned magnitudes",
    "lora_bias": "its B matrices come with a bias",
    "modules_to_save": "whole modules of the base were trained beside the LoRA",
    "trainable_token_indices": "rows of the embeddings were trained beside the LoRA",
    "target_parameters": "it adapts bare parameters (stacked mixture-of-experts weights), not linears",
    "layer_replication": "it repeats blocks of the base",
    "megatron_config": "it was made for Megatron's parallel linears",
    "alora_invocation_tokens": "an activated LoRA acts on the tokens after its invocation only",
    "use_qalora": "QALoRA pools the inputs of A in groups",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal and stored as blocks",
    "arrow_config": "Arrow routes between LoRAs in a way of its own",
    "kasa_config": "KaSA changes the base's weights",
    "monteclora_config": "MonteCLoRA adds sampled perturbations",
    "velora_config": "VeLoRA keeps more than A and B",
}


@dataclass(frozen=True)
class Lora:
    """One LoRA. pairs: module path -> (A [r, in], B [out, r]), fp32 on the CPU, PEFT's delta being B A: the scale is in B."""

    folder: Path
    base_name: str
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def ranks(self) -> list[int]:
        """The ranks its linears have, ascending."""
        return sorted({a.shape[0] for a, _ in self.pairs.values()})


def read_lora(folder) -> Lora:
    """Read a PEFT LoRA folder. Raises ValueError, naming the folder and the reason, if it is anything but a plain LoRA."""
    folder = Path(folder)
    settings = _read_settings(folder)
    _check_settings(folder, settings)
    matrices = _read_matrices(folder)
    pairs = {}
    for path in sorted({path for path, _ in matrices}):
        if absent := [which for which in "AB" if (path, which) not in matrices]:
            raise ValueError(f"{folder}: lora_{absent[0]} of {path} is missing; the file is incomplete")
        a, b = matrices[path, "A"], matrices[path, "B"]
        rank, scale = _rank_and_scale(folder, settings, path)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(
                f"{folder}: {path} has A {list(a.shape)} and B {list(b.shape)}, but its {checkpoint.CONFIG_FILE} gives rank {rank}"
            )
        pairs[path] = a, b * scale
    return Lora(folder, settings.get("base_model_name_or_path") or "", pairs)


def write_lora(folder: Path, pairs, *, r, alpha, target_modules, base_name, fan_in_fan_out):
    """Write (A, B) pairs as a new PEFT LoRA folder: module path -> (A [r, in], B [out, r]), saved in fp32, scaled by alpha / r."""
    config = LoraConfig(
        r=r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=target_modules,
        base_model_name_or_path=base_name or None,
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {
        f"{PREFIX}{path}.lora_{which}.weight": t
        for path, ab in pairs.items()
        for which, t in zip("AB", ab, strict=True)
    }
    weights = folder / checkpoint.WEIGHTS_FILE
    save_file({name: _own_copy(tensor) for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    weights.chmod((folder / checkpoint.CONFIG_FILE).stat().st_mode)  # safetensors creates its file for the owner alone


def _own_copy(tensor):
    return tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def _read_settings(folder) -> dict:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; a PEFT LoRA is a folder with {checkpoint.CONFIG_FILE} and {checkpoint.WEIGHTS_FILE} "
            "(for one on the hub, download it first)"
        )
    path = folder / checkpoint.CONFIG_FILE
    if not path.is_file():
        inside = sorted(child.name for child in folder.iterdir() if (child / checkpoint.CONFIG_FILE).is_file())
        hint = f"; it contains folders that have one ({', '.join(inside)}): name those" if inside else ""
        raise ValueError(f"{folder} is not a PEFT LoRA: it has no {checkpoint.CONFIG_FILE}{hint}")
    settings = checkpoint.parse(path.read_bytes(), path)
    if "format_version" in settings:
        raise ValueError(f"{folder} is a dynamic adapter, not a PEFT LoRA; load it with AdaFuseModel.from_pretrained")
    return settings


def _check_settings(folder, settings):
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder}: peft_type is {kind!r}; only 'LORA' can become an expert")
    if (bias := settings.get("bias") or "none") != "none":
        raise ValueError(
            f"{folder}: bias={bias!r} means that biases of the base were trained too; only bias='none' can be imported"
        )
    _check_init(folder, settings.get("init_lora_weights", True))
    for name, value in settings.items():
        if value and name not in _READ | _HARMLESS:
            why = _REFUSED.get(name, "this version does not know what that changes")
            raise ValueError(f"{folder}: {name} is set ({_short(value)}): {why}; only a plain LoRA can be imported")


def _check_init(folder, init):
    if isinstance(init, bool) or init is None or str(init).lower() in _INITS:
        return
    raise ValueError(
        f"{folder}: init_lora_weights={init!r} is not known to leave the base's weights alone, so its A and B may fit a changed base "
        "only. PiSSA, OLoRA, CorDA and LoRA-GA can be turned into a plain LoRA where it was trained: PEFT's "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )


def _read_matrices(folder) -> dict[tuple[str, str], torch.Tensor]:
    """(module path, "A" or "B") -> tensor, fp32: 2-D, finite, and nothing else in the file."""
    matrices = {}
    with checkpoint.open_weights(folder / checkpoint.WEIGHTS_FILE) as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors file is not a dict
            match = _KEY.fullmatch(key)
            if match is None:
                raise ValueError(
                    f"{folder}: {key} {_what_else(key)}; only a LoRA on linears of the blocks can be imported"
                )
            tensor = file.get_tensor(key)
            if not tensor.is_floating_point() or tensor.dim() != 2 or 0 in tensor.shape:
                raise ValueError(
                    f"{folder}: {key} is a {tensor.dtype} tensor of shape {list(tensor.shape)}; a LoRA of a linear has floating-point "
                    "matrices (convolutions have more axes; a shard that was saved without gathering has fewer)"
                )
            if not torch.isfinite(tensor.float()).all():
                raise ValueError(f"{folder}: {key} holds NaN or Inf")
            matrices[match["path"], match["which"]] = tensor.float()
    if not matrices:
        raise ValueError(f"{folder}: {checkpoint.WEIGHTS_FILE} holds no tensor")
    return matrices


def _what_else(key):
    if "lora_embedding_" in key:
        return "is a LoRA on an embedding"
    if "lora_magnitude_vector" in key:
        return "belongs to DoRA"
    if ".lora_" in key:
        return f"is not named as PEFT names the matrices of a linear ({PREFIX}<path>.lora_A.weight)"
    return "is a weight of the base, saved beside the LoRA"


def _rank_and_scale(folder, settings, path) -> tuple[int, float]:
    """r and alpha / r (rsLoRA: alpha / sqrt(r)) of a module, by the patterns as PEFT resolves them."""
    rank = _resolve(folder, settings, path, "rank_pattern", "r")
    alpha = _resolve(folder, settings, path, "alpha_pattern", "lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{folder}: the rank of {path} is {rank!r}, not a whole number above 0")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _resolve(folder, settings, path, pattern, default):
    patterns = settings.get(pattern) or {}
    try:
        value = patterns.get(get_pattern_key(patterns.keys(), path), settings.get(default))
    except (re.error, AttributeError) as error:
        raise ValueError(f"{folder}: its {pattern} is not a dict of name patterns: {error}") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{folder}: {default} of {path} is {value!r}, not a number")
    return value


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
