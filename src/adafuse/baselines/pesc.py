"""PescModel: adapters on the output of each FFN, chosen by a router on its input, beside a LoRA on every linear."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.nn.functional import gelu

from adafuse.baselines.config import PescConfig
from adafuse.baselines.deltas import ADD
from adafuse.baselines.layers import StaticLinear
from adafuse.baselines.model import BaselineModel
from adafuse.baselines.places import Size, find_ffns, find_linears
from adafuse.config import ALL_LINEAR
from adafuse.layers import compute_dtype, running_share


class PescModel(BaselineModel):
    """`base` with PESC's adapters: see PescConfig.

    base: a HuggingFace decoder-only causal LM whose blocks have one FFN with gate_proj, up_proj and down_proj (Llama, Mistral, Qwen2,
    Qwen3, ...); changed in place and frozen, `detach` gives it back. The experts cannot be merged into its weights.
    Raises ValueError, leaving the base as it was, for any other base.
    """

    config_class = PescConfig
    executions = ("graph", "published")

    @classmethod
    def _places(cls, base, config):
        adapters = Size(config.num_experts, config.bottleneck)
        ffns = [replace(place, experts=config.num_experts, size=adapters) for place in find_ffns(base)]
        lora = Size(shared_rank=config.lora_r)
        return [*(replace(place, size=lora) for place in find_linears(base, ALL_LINEAR)), *ffns]

    @classmethod
    def _module(cls, place, router, bank, config):
        if place.is_ffn:
            return AdapterFFN(place, router, bank, dropout=config.adapter_dropout, scale=config.adapter_scale)
        return StaticLinear(place, bank, dropout=config.lora_dropout, scale=config.lora_scale)


class AdapterFFN(nn.Module):
    """y = h + scale * sum_k g_k U[e_k] gelu(D[e_k] dropout(h)), h = FFN(x), with e and g of a router that reads x.

    The bank's `a` is D, its `b` is U. x [..., H] -> [..., H], with all tokens of the running forward in order.
    """

    def __init__(self, place, router, bank, *, dropout, scale):
        super().__init__()
        self.base_layer, self.bank, self.router = place.module, bank, router
        self.dropout = nn.Dropout(dropout)
        self.path, self.scale = place.path, scale
        self.training = place.module.training
        for own in (self.bank, self.router, self.dropout):
            own.train(self.training)

    def forward(self, x, *args, **kwargs):
        share = running_share(self.path)
        h = self.base_layer(x, *args, **kwargs)
        if share is None:
            return h
        routing = self.router(x)
        share.record(self.path, routing)
        dtype = compute_dtype(h)
        down, up = self.bank.matrices(dtype)
        how = {"num_experts": self.bank.num_experts, "scale": self.scale, "activation": gelu}
        return ADD[share.execution](h, self.dropout(h).to(dtype), down, up, routing, **how)
