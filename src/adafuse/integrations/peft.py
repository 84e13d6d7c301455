"""PEFT LoRA folders in and out: N trained LoRAs become the experts of one adapter, and each expert a LoRA folder again."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from adafuse.adapter_state import check_unadapted
from adafuse.config import AdaFuseConfig
from adafuse.discover import check_causal_lm, find_blocks, linear_features
from adafuse.integrations.lora_folder import Lora, read_lora, write_lora
from adafuse.model import AdaFuseModel
from adafuse.peft_surface import ADAPTER_NAME

# What the path of a language model's blocks may go through: the same model is `model.layers` alone, and
# `model.language_model.layers` or `language_model.model.layers` inside a multimodal one, by the version that saved it.
_WRAPPERS = ("model", "language_model", "text_model")


def import_loras(
    base,
    folders,
    *,
    top_k: int | None = None,
    routing: str = "model",
    router_hidden: int = 0,
    aux_loss_coef: float = 0.01,
    lora_dropout: float = 0.0,
    shared_rank: int = 0,
    shared_alpha: float | None = None,
) -> AdaFuseModel:
    """Attach a dynamic adapter to `base` whose expert i is the PEFT LoRA in folders[i]; only its router is left to train.

    base: the HuggingFace causal LM that the LoRAs were trained on, not adapted yet. top_k: experts a token uses; None: 2, or 1 for
    a single folder. The other settings are those of AdaFuseConfig; rank, number of experts, scale and targets come from the files.

    An expert's delta equals PEFT's: each LoRA's scale (alpha / r, rsLoRA's alpha / sqrt(r), per-module patterns) is folded into its
    B, and the adapter's own is 1. The adapter's rank is the largest of all, its targets are the union: where a LoRA has less, its B is
    zero (and its A that of a fresh adapter, so that the extra ranks can learn, should the experts be trained later). A warning says so.
    The router starts fresh and is the only part that trains (`model.set_trainable("all")` for the rest too).

    Raises ValueError, leaving the base as it was, if a folder is anything but a plain LoRA on linears of this base's blocks.
    """
    folders = _checked(folders, top_k)
    check_unadapted(base)
    check_causal_lm(base)
    blocks, linears = _linears_of_blocks(base)
    loras, notes = [], []
    for folder in folders:
        lora, note = _on_base(read_lora(folder), base, blocks, linears)
        loras.append(lora)
        notes += note
    paths = [path for path in linears if any(path in lora.pairs for lora in loras)]
    r = max(lora.ranks()[-1] for lora in loras)
    config = AdaFuseConfig(
        r=r,
        lora_alpha=r,
        num_experts=len(loras),
        top_k=min(2, len(loras)) if top_k is None else top_k,
        target_modules=_names_of(paths, linears, blocks),
        routing=routing,
        router_hidden=router_hidden,
        aux_loss_coef=aux_loss_coef,
        lora_dropout=lora_dropout,
        shared_rank=shared_rank,
        shared_alpha=shared_alpha,
    )
    model = AdaFuseModel(base, config)
    model.load_adapter_tensors(_filled(model.adapter_tensors(), loras))
    model.set_trainable("router")
    notes += _padding(loras, r, len(paths)) + _bases(loras)
    if notes:
        warnings.warn(f"imported {len(loras)} LoRA(s) as experts; note:\n" + "\n".join(notes), stacklevel=2)
    return model


def export_loras(model: AdaFuseModel, folder) -> list[Path]:
    """Write expert i of `model` as the PEFT LoRA folder `folder/expert-<i>`, and the shared expert, if any, as `folder/shared`.

    Loaded by PeftModel.from_pretrained on the same base, a folder adds `s B (A x)`: that expert alone, with weight 1, without the
    shared one. The router is not exported: no LoRA can hold it. Weights are saved in fp32. Returns the folders, `shared` last.

    folder must not exist yet, or be empty: all appears in it at once or, if anything fails, nothing. ValueError otherwise.
    """
    if not isinstance(model, AdaFuseModel):
        raise ValueError(f"export_loras needs an AdaFuseModel, got {type(model).__name__}")
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        kind = "a folder with files in it" if folder.is_dir() else "a file"
        raise ValueError(f"cannot export into {folder}: it is {kind}; name a folder that does not exist yet")
    tensors = model.adapter_tensors()
    if bad := sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()):
        raise ValueError(
            f"refusing to export: {bad[0]} and {len(bad) - 1} more tensor(s) hold NaN or Inf; the training diverged"
        )
    base, config = model.get_base_model(), model.adafuse_config
    common = {
        "target_modules": _names_of(model.banks, [name for name, _ in base.named_modules()], find_blocks(base)[0]),
        "base_name": model.peft_config[ADAPTER_NAME].base_model_name_or_path,
        "fan_in_fan_out": all(isinstance(base.get_submodule(path).base_layer, Conv1D) for path in model.banks),
    }
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    staged.mkdir(parents=True)
    names = []
    try:
        for expert in range(config.num_experts):
            names.append(f"expert-{expert}")
            pairs = {p: (tensors[f"{p}.experts_a"][expert], tensors[f"{p}.experts_b"][expert]) for p in model.banks}
            write_lora(staged / names[-1], pairs, r=config.r, alpha=config.lora_alpha, **common)
        if config.shared_rank:
            names.append("shared")
            pairs = {p: (tensors[f"{p}.shared_a"], tensors[f"{p}.shared_b"]) for p in model.banks}
            write_lora(staged / names[-1], pairs, r=config.shared_rank, alpha=config.shared_alpha, **common)
        if folder.exists():
            folder.rmdir()
        os.rename(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return [folder / name for name in names]


def _checked(folders, top_k):
    if isinstance(folders, (str, os.PathLike)):
        raise ValueError(f"folders={folders!r} is one path; pass a list of PEFT LoRA folders, one an expert")
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise ValueError("no LoRA folder was given; pass at least one")
    if isinstance(top_k, int) and top_k > len(folders):
        raise ValueError(
            f"top_k={top_k} is more than the {len(folders)} LoRA folder(s) given; allowed: 1 to {len(folders)}"
        )
    return folders


def _linears_of_blocks(base) -> tuple[str, dict[str, tuple[int, int]]]:
    """Path of the blocks, and path -> (in, out) features of every linear in them, in module order."""
    path, blocks = find_blocks(base)
    modules = blocks.named_modules(remove_duplicate=False)
    return path, {f"{path}.{name}": size for name, module in modules if (size := linear_features(module)) is not None}


def _on_base(lora: Lora, base, blocks, linears) -> tuple[Lora, list[str]]:
    """`lora` with the base's own paths, and a note if they are not those of the file. ValueError unless every pair fits a linear."""
    pairs, renamed = {}, {}
    for path, (a, b) in lora.pairs.items():
        place = path if path in linears else _renamed(path, blocks)
        if place not in linears:
            raise ValueError(
                f"{lora.folder}: {path} is {_what_is(base, path)}; only linears of the blocks ({blocks}) are adapted"
            )
        if place in pairs:
            raise ValueError(f"{lora.folder}: two LoRAs in the file are for {place}, one of them named {path}")
        if (a.shape[1], b.shape[0]) != linears[place]:
            raise ValueError(
                f"{lora.folder}: its LoRA for {path} goes from {a.shape[1]} to {b.shape[0]} features, the base's linear from "
                f"{linears[place][0]} to {linears[place][1]}; it was trained on another base"
            )
        pairs[place] = a, b
        if place != path:
            renamed[path] = place
    example = next(iter(renamed.items()), None)
    note = (
        [f"- {lora.folder}: {len(renamed)} module(s) have another prefix here, {example[0]} is {example[1]}"]
        if example
        else []
    )
    return replace(lora, pairs=pairs), note


def _renamed(path, blocks):
    """`path` of a file made with the same blocks under another wrapper, as a path of this base; None if it is not one."""
    name = blocks.rsplit(".", 1)[-1]
    parts = path.split(".")
    if name not in parts:
        return None
    at = parts.index(name)
    return ".".join([blocks, *parts[at + 1 :]]) if all(part in _WRAPPERS for part in parts[:at]) else None


def _what_is(base, path):
    module = dict(base.named_modules()).get(path)
    if module is None:
        return "no module of this base"
    if module is base.get_output_embeddings():
        return "the language-model head"
    return f"a {type(module).__name__}" + ("" if linear_features(module) is None else " outside the blocks")


def _names_of(paths, candidates, blocks) -> list[str]:
    """The shortest suffixes that name exactly `paths` among `candidates`: last parts, paths within a block, or the full paths."""
    inside = len(blocks) + 1
    for shorten in (lambda path: path.rsplit(".", 1)[-1], lambda path: path[inside:].split(".", 1)[-1]):
        names = sorted({shorten(path) for path in paths})
        if [path for path in candidates if any(f".{path}".endswith(f".{name}") for name in names)] == list(paths):
            return names
    return list(paths)


def _filled(fresh, loras):
    """The fresh adapter's tensors (every B zero) with each LoRA's A and B written into the first ranks of its expert."""
    tensors = {name: tensor.clone() for name, tensor in fresh.items()}
    for expert, lora in enumerate(loras):
        for path, (a, b) in lora.pairs.items():
            tensors[f"{path}.experts_a"][expert, : len(a)] = a.to(tensors[f"{path}.experts_a"].device)
            tensors[f"{path}.experts_b"][expert, :, : len(a)] = b.to(tensors[f"{path}.experts_b"].device)
    return tensors


def _padding(loras, r, linears) -> list[str]:
    """A line for each LoRA that has a smaller rank or fewer linears than the adapter."""
    lines = []
    for lora in loras:
        ranks, absent = lora.ranks(), linears - len(lora.pairs)
        parts = (
            [f"rank {'-'.join(map(str, sorted({ranks[0], ranks[-1]})))} padded with zeros to {r}"]
            if ranks[0] < r
            else []
        )
        parts += [f"absent from {absent} of {linears} linears, zero there"] if absent else []
        lines += [f"- {lora.folder}: {', '.join(parts)}"] if parts else []
    return lines


def _bases(loras) -> list[str]:
    """A line if the LoRAs name different bases: their shapes may agree while their weights do not."""
    names = {lora.base_name: lora.folder for lora in loras if lora.base_name}
    if len(names) < 2:
        return []
    return [
        "- they name different bases, which is right only if those are one model: "
        + ", ".join(f"{n} ({f})" for n, f in names.items())
    ]
