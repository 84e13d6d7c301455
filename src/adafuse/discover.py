"""Find the blocks of a HuggingFace causal LM and the linears in them, by structure, not by model family."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adafuse.config import ALL_LINEAR


@dataclass(frozen=True)
class Target:
    """A linear to adapt: its path in the model, the module, and its features."""

    path: str
    module: nn.Module
    in_features: int
    out_features: int


def check_causal_lm(base):
    """ValueError unless `base` is a decoder-only HuggingFace model with a language-model head."""
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"the base must be a HuggingFace causal LM (a transformers PreTrainedModel), got {type(base).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    name, model_type = type(base).__name__, base.config.model_type
    if layerdrop := getattr(base.config.get_text_config(decoder=True), "layerdrop", 0.0):
        raise ValueError(
            f"{name} ({model_type}) skips blocks at random in training (layerdrop={layerdrop}), block 0 too, where tokens are routed; "
            "load it with layerdrop=0.0"
        )
    if base.config.is_encoder_decoder:
        raise ValueError(f"{name} ({model_type}) is an encoder-decoder model; adafuse adapts decoder-only causal LMs")
    if base.get_output_embeddings() is None or not base.can_generate():
        raise ValueError(
            f"{name} ({model_type}) is not a causal LM: it has no language-model head to generate with; load it with "
            "AutoModelForCausalLM instead"
        )


def find_blocks(base) -> tuple[str, nn.ModuleList]:
    """Path and ModuleList of the decoder's blocks: the outermost list of `num_hidden_layers` modules under get_decoder()."""
    decoder = base.get_decoder()
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    prefix = next(path for path, module in base.named_modules() if module is decoder)
    lists = [
        (path, module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outermost = [entry for entry in lists if not any(entry[0].startswith(path + ".") for path, _ in lists)]
    if len(outermost) != 1:
        raise ValueError(
            f"cannot tell the blocks of {type(base).__name__}: expected one ModuleList of {count} modules under its decoder, found "
            f"{[path for path, _ in outermost] or 'none'}"
        )
    path, blocks = outermost[0]
    return ".".join(part for part in (prefix, path) if part), blocks


def find_targets(base, config) -> list[Target]:
    """The linears of the blocks that `config.target_modules` names, in module order.

    "all-linear": every one. A list: those whose path ends with one of the names (as in PEFT); each name must match.
    """
    path, blocks = find_blocks(base)
    linears = [
        Target(f"{path}.{name}", module, *features)
        for name, module in blocks.named_modules(remove_duplicate=False)
        if (features := linear_features(module)) is not None
    ]
    _refuse_shared_modules(linears)
    _warn_of_stacked_experts(blocks)
    bypassed = {target.path: why for target in linears if (why := _bypass(base, target.path))}
    if config.target_modules == ALL_LINEAR:
        linears = [target for target in linears if target.path not in bypassed]
        if not linears:
            raise ValueError(f"the blocks of {type(base).__name__} ({path}) contain no linear to adapt")
        if bypassed:
            first, why = next(iter(bypassed.items()))
            warnings.warn(f"{len(bypassed)} linear(s) are not adapted ({first}, ...): {why}", stacklevel=2)
        return linears
    names = config.target_modules
    _check_names(base, names, linears, path)
    for name in names:
        if refused := next((path for path in bypassed if _ends_with(path, name)), None):
            raise ValueError(
                f"target_modules: {name!r} matches {refused}, which cannot be adapted: {bypassed[refused]}"
            )
    return [target for target in linears if any(_ends_with(target.path, name) for name in names)]


def linear_features(module) -> tuple[int, int] | None:
    """(in, out) features of a linear, plain or quantised or GPT-2's Conv1D; None for any other module."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    cls = type(module)
    # A family's own subclass with a forward of its own may be a router or a grouped product; Falcon's is y = W x.
    if cls.__module__.startswith("transformers.models.") and cls.__name__ != "FalconLinear" and "forward" in vars(cls):
        return None
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return features if all(isinstance(number, int) for number in features) else None


def _bypass(base, path) -> str | None:
    """Why the linear at `path` does not compute y = W x on its block's tokens, if that is so."""
    parent = base.get_submodule(path.rpartition(".")[0])
    if hasattr(parent, "A_log"):
        return "state-space mixers read the weights of their linears directly, past any adapter"
    name = path.rpartition(".")[2]
    if name.startswith("kv_b_proj") and any(child.startswith("kv_a_proj") for child, _ in parent.named_children()):
        return "latent attention applies it to all cached tokens, whose routing is gone"
    return None


def _ends_with(path, name):
    return path == name or path.endswith("." + name)


def _check_names(base, names, linears, blocks_path):
    head = base.get_output_embeddings()
    head_path = next((path for path, module in base.named_modules() if module is head), "")
    for name in names:
        if _ends_with(head_path, name):
            raise ValueError(
                f"target_modules: {name!r} is the language-model head ({head_path}), which is never adapted; remove it"
            )
        if not any(_ends_with(target.path, name) for target in linears):
            known = sorted({target.path.rsplit(".", 1)[-1] for target in linears})
            raise ValueError(
                f"target_modules: {name!r} matches no linear of the blocks ({blocks_path}); there: {', '.join(known)}"
            )


def _refuse_shared_modules(linears):
    seen = {}
    for target in linears:
        first = seen.setdefault(id(target.module), target.path)
        if first != target.path:
            raise ValueError(f"{target.path} and {first} are one shared module, which cannot be adapted per block")


def _warn_of_stacked_experts(blocks):
    stacked = [
        name
        for name, module in blocks.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
    ]
    if stacked:
        warnings.warn(
            f"{len(stacked)} module(s) keep mixture-of-experts weights stacked in 3-D parameters ({stacked[0]}, ...); these are not "
            "adapted, the linears beside them are",
            stacklevel=3,
        )
