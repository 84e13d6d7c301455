"""MixLoraModel: an expert is the FFN with a LoRA of its own on each of its linears.

The FFN's own forward runs once for all chosen experts. Between its linears a token has K rows, one an expert: gate and up, which read the
token itself, compute W x once and answer with K rows; down takes K rows, each with its own expert.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import linear

from adafuse.baselines.config import FFN_LINEARS, MixLoraConfig
from adafuse.baselines.deltas import rank_mask
from adafuse.baselines.layers import StaticLinear
from adafuse.baselines.model import BaselineModel
from adafuse.baselines.places import Size, find_ffns, find_linears
from adafuse.config import ALL_LINEAR
from adafuse.layers import AdapterLinear, compute_dtype, running_share

ROUTER_STD = 0.02  # the router's initialisation in the method's public code
# [..., S, K, E*r], of the FFN whose forward is running, per thread: the scale over the ranks of the expert in each row, 0 elsewhere.
_running_mask: ContextVar = ContextVar("adafuse_mixlora_mask", default=None)


class MixLoraModel(BaselineModel):
    """`base` with MixLoRA's experts: see MixLoraConfig.

    base: a HuggingFace decoder-only causal LM whose blocks have one FFN with gate_proj, up_proj and down_proj (Llama, Mistral, Qwen2,
    Qwen3, ...); changed in place and frozen, `detach` gives it back. The experts cannot be merged into its weights.
    Raises ValueError, leaving the base as it was, for any other base.
    """

    config_class = MixLoraConfig

    @classmethod
    def _places(cls, base, config):
        ffns = [replace(place, experts=config.num_experts) for place in find_ffns(base)]
        inside = {f"{ffn.path}.{name}" for ffn in ffns for name in FFN_LINEARS}
        experts, static = Size(config.num_experts, config.r), Size(shared_rank=config.r)
        linears = find_linears(base, ALL_LINEAR)
        return [*(replace(place, size=experts if place.path in inside else static) for place in linears), *ffns]

    @classmethod
    def _router(cls, place, config):
        return place.make_router(config.top_k, std=ROUTER_STD)

    @classmethod
    def _module(cls, place, router, bank, config):
        if place.is_ffn:
            return MixedFFN(place, router, r=config.r, scale=config.scale)
        if bank.num_experts:
            return ExpertLinear(place, bank, dropout=config.lora_dropout)
        return StaticLinear(place, bank, dropout=config.lora_dropout, scale=config.scale)


class MixedFFN(nn.Module):
    """y = sum_k g_k FFN_{e_k}(x), with e and g of a router that reads x. x [..., S, H] -> [..., S, H].

    r, scale: of the LoRAs within the FFN's linears, which are ExpertLinears.
    """

    def __init__(self, place, router, *, r, scale):
        super().__init__()
        self.base_layer, self.router, self.path = place.module, router, place.path
        self.r, self.scale = r, scale
        self.training = place.module.training
        self.router.train(self.training)

    def forward(self, x, *args, **kwargs):
        share = running_share(self.path)
        if share is None:
            return self.base_layer(x, *args, **kwargs)
        routing = self.router(x)
        share.record(self.path, routing)
        token = _running_mask.set(self._mask(routing.experts, compute_dtype(x)))
        try:
            y = self.base_layer(x, *args, **kwargs)
        finally:
            _running_mask.reset(token)
        rows = y.unflatten(-2, routing.experts.shape[-2:])
        # In fp32: two bf16 weights need not sum to 1, and even a fresh adapter would scale the FFN's output.
        return (rows.float() * routing.weights.unsqueeze(-1)).sum(-2).to(y.dtype)

    def _mask(self, experts, dtype):
        each = experts.unsqueeze(-1)  # of each row: one expert
        scale = torch.full_like(each, self.scale, dtype=dtype)
        return rank_mask(each, scale, self.router.num_experts, self.r, dtype)


class ExpertLinear(AdapterLinear):
    """linear_e(x) = W x + bias + scale * B_e (A_e dropout(x)) for each of the K experts e of a token, inside a MixedFFN's forward.

    gate and up: x [..., S, I] -> [..., S*K, O], W x computed once. down: x [..., S*K, I], a row for each chosen expert.
    """

    def __init__(self, place, bank, *, dropout):
        super().__init__(place.module, bank, place.path, place.block, dropout)
        self.has_rows = place.path.endswith(f".{FFN_LINEARS[-1]}")

    def forward(self, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        if running_share(self.path) is None:
            return y
        mask = _running_mask.get()
        if mask is None:
            raise RuntimeError(f"{self.path} was called outside the forward of its FFN, so no routing is known for it")
        dtype = compute_dtype(x)
        x = self.dropout(x) if self.dropout.p else x
        a, b = self.bank.matrices(dtype)
        rows = mask.shape[-3:-1]
        # [..., S, K, .], or [..., S, 1, .] where the experts of a token share it.
        y, h = (t.unflatten(-2, rows) if self.has_rows else t.unsqueeze(-2) for t in (y, linear(x.to(dtype), a)))
        return (y + ((h * mask) @ b).to(y.dtype)).flatten(-3, -2)
