"""The baselines under test, with settings no number of which is a power of two, on tiny models; and their references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import baseline_reference
import torch
from families import BLOCKS, batch, family, fill

from adafuse.baselines import (
    LayerwiseConfig,
    LayerwiseModel,
    MixLoraConfig,
    MixLoraModel,
    PescConfig,
    PescModel,
    RandomConfig,
    RandomModel,
)

COEF = 0.5  # of the balance loss: enough to show in the gradients
_LAYERWISE = {"r": 3, "lora_alpha": 4.5, "lora_dropout": 0.0, "aux_loss_coef": COEF}
_PESC = {
    "bottleneck": 6,
    "adapter_scale": 0.7,
    "adapter_dropout": 0.0,
    "lora_r": 3,
    "lora_alpha": 2,
    "lora_dropout": 0.0,
}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3-multimodal")


@dataclass(frozen=True)
class Method:
    model: type
    config: object
    reference: Callable | None = None  # random routing is tested in a file of its own

    def attach(self, base=None, filled=True, **changes):
        """An adapted model in the base's mode, and the tensors that fill it."""
        model = self.model(family("llama").build() if base is None else base, replace(self.config, **changes))
        return model, fill(model) if filled else model.adapter_tensors()


METHODS = {
    "layerwise": Method(LayerwiseModel, LayerwiseConfig(num_experts=5, **_LAYERWISE), baseline_reference.layerwise),
    "mola": Method(LayerwiseModel, LayerwiseConfig.mola((2, 5), **_LAYERWISE), baseline_reference.layerwise),
    "moral": Method(LayerwiseModel, LayerwiseConfig.moral(num_experts=5, **_LAYERWISE), baseline_reference.layerwise),
    "pesc": Method(PescModel, PescConfig(num_experts=5, aux_loss_coef=COEF, **_PESC), baseline_reference.pesc),
    "mixlora": Method(MixLoraModel, MixLoraConfig(num_experts=5, **_LAYERWISE), baseline_reference.mixlora),
}
ALL = {**METHODS, "random": Method(RandomModel, RandomConfig(r=3, num_experts=5, routing="layer"))}
assert BLOCKS == 2, "mola: a number for each block"


def inputs(padding: str = "left") -> dict[str, torch.Tensor]:
    """Two rows, three positions of the second are padding; no label on padding, nor on two other tokens."""
    ids = batch()
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2:4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
