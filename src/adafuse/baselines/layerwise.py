"""LayerwiseModel: layer-wise MoE-LoRA, MoLA and MoRAL-style; every adapted linear routes for itself."""

from __future__ import annotations

from dataclasses import replace

from adafuse.baselines.config import LayerwiseConfig
from adafuse.baselines.layers import RoutedLinear
from adafuse.baselines.model import BaselineModel
from adafuse.baselines.places import Size, find_linears
from adafuse.discover import find_blocks


class LayerwiseModel(BaselineModel):
    """`base` with a mixture of LoRA experts and a router on each adapted linear: see LayerwiseConfig.

    base: any HuggingFace decoder-only causal LM that AdaFuseModel takes; changed in place and frozen, `detach` gives it back.
    Raises ValueError, leaving the base as it was, if the base is not a causal LM, carries adapters already, or has no such targets.
    """

    config_class = LayerwiseConfig
    executions = ("graph", "published", "fused")

    @classmethod
    def _places(cls, base, config):
        num_blocks = len(find_blocks(base)[1])
        places = []
        for place in find_linears(base, config.target_modules):
            experts = config.experts_of(place.block, num_blocks)
            places.append(replace(place, experts=experts, size=Size(experts, config.r)))
        return places

    @classmethod
    def _module(cls, place, router, bank, config):
        return RoutedLinear(place, router, bank, dropout=config.lora_dropout, scale=config.scale)
