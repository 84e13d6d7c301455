"""The methods that are compared, by name: each makes a trainable model of a base. A line here adds one.

The rank of a token's experts (active) is 16 in all, that of all experts (total) 64, and every linear of the blocks is adapted. Scales:
s = 2 for one or two experts a token and for LoRA; s = K where K = 8 or 16 finer experts share the weight, K / 2 times that of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from accuracy.token_router import TokenModel
from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.baselines import (
    LayerwiseConfig,
    LayerwiseModel,
    MixLoraConfig,
    MixLoraModel,
    PescConfig,
    PescModel,
    RandomConfig,
    RandomModel,
    account,
    static_lora,
)
from adafuse.baselines.accounting import Account

PAPER = {"num_experts": 8, "r": 8, "top_k": 2, "lora_alpha": 16, "routing": "model"}
FINE = {"num_experts": 64, "r": 1, "top_k": 16, "lora_alpha": 16}
# With a shared expert of rank 8 the routed ones leave it its part of both ranks.
SHARED_FINE = {"num_experts": 56, "r": 1, "top_k": 8, "lora_alpha": 8, "shared_rank": 8}
HIDDEN = {"router_hidden": 256}


@dataclass(frozen=True)
class Method:
    """build: a base, which it may change, to a model with trainable parameters in fp32 (None: the base as it is, nothing to train).

    router_lr_ratio: the routers' learning rate by that of the experts. teacher: the method that it is distilled from, trained before it.
    settings: what a reader of the results should know.
    """

    build: Callable | None
    router_lr_ratio: float = 1.0
    teacher: str | None = None
    settings: dict = field(default_factory=dict)

    def account(self, model) -> Account:
        """Parameters, ranks and bytes of a model that `build` made, experts in bf16."""
        if not self.build:
            return Account(0, 0, 0.0, 0)
        found = account(model, itemsize=2)
        unread = model.router.unread_bytes() if isinstance(model, TokenModel) else 0
        return replace(found, bytes_per_token=found.bytes_per_token - unread)


def pregate(*, router_lr_ratio=1.0, router_init=1.0, teacher=None, model_class=AdaFuseModel, **settings) -> Method:
    """One decision a token, by `AdaFuseConfig(**settings)`. router_init: what the router's first weights are multiplied with."""
    config = AdaFuseConfig(**settings)

    def build(base):
        model = model_class(base, config)
        model.execution = "reference"  # trained and scored by the same arithmetic
        with torch.no_grad():
            model.router.weight.mul_(router_init)
        return model

    told = {**settings, "router_lr_ratio": router_lr_ratio, "router_init": router_init}
    return Method(build, router_lr_ratio, teacher, told)


def baseline(model, config) -> Method:
    """One of `adafuse.baselines` under a config of its own."""
    return Method(lambda base: model(base, config), settings=config.to_dict())


def lora(rank: str, **settings) -> Method:
    """PEFT's LoRA on the same linears, of the "active" or "total" rank of `AdaFuseConfig(**settings)` and with its scale."""
    config = AdaFuseConfig(**settings)
    return Method(lambda base: static_lora(base, config, rank), settings={"rank": rank, **settings})


# Compared with each other: `tune` and `final` take them all. `pregate_best` joins them in `final`. Layer-wise and random routing differ
# from `pregate_paper` in who routes, and in nothing else; the others have their papers' settings.
ROUTED = {name: value for name, value in PAPER.items() if name != "routing"}
METHODS = {
    "base": Method(None),
    "pregate_paper": pregate(**PAPER),
    "layerwise": baseline(LayerwiseModel, LayerwiseConfig(**ROUTED, lora_dropout=0.0, aux_loss_coef=0.01)),
    "random_routing": baseline(RandomModel, RandomConfig(**PAPER)),
    "lora_active": lora("active", **PAPER),
    "lora_total": lora("total", **PAPER),
    "mola_2468": baseline(LayerwiseModel, LayerwiseConfig.mola()),
    "mola_5555": baseline(LayerwiseModel, LayerwiseConfig.mola((5, 5, 5, 5))),
    "moral": baseline(LayerwiseModel, LayerwiseConfig.moral()),
    "pesc": baseline(PescModel, PescConfig()),
    "mixlora": baseline(MixLoraModel, MixLoraConfig()),
}
BEST = "pregate_best"
FIRST_RATE_OF = "layerwise"  # at whose best rate the forms of the pre-gate are searched
# Forms of the pre-gate, all decided before block 0: `search` takes them, and the best on validation becomes `pregate_best`.
LAYER_FINE = {**FINE, "routing": "layer"}
LAYER_FINE_SHARED = {**SHARED_FINE, "routing": "layer"}
SEARCH = {
    "layer": pregate(**{**PAPER, "routing": "layer"}),
    "model_fine": pregate(**FINE, routing="model"),
    "layer_fine": pregate(**LAYER_FINE),
    "layer_fine_shared": pregate(**LAYER_FINE_SHARED),
    "layer_fine_hidden": pregate(**LAYER_FINE, **HIDDEN),
    "layer_fine_shared_hidden": pregate(**LAYER_FINE_SHARED, **HIDDEN),
    "layer_fine_token": pregate(**LAYER_FINE, model_class=TokenModel),
    "layer_fine_init_0.1": pregate(**LAYER_FINE, router_init=0.1),  # nearly even weights at the start
    # A temperature of 1/4: Adam's steps do not grow with the gradient, so 4 times the logits are 4 times the first weights and the steps.
    "layer_fine_sharp": pregate(**LAYER_FINE, router_init=4.0, router_lr_ratio=4.0),
    "layer_fine_router_lr_5": pregate(**LAYER_FINE, router_lr_ratio=5.0),
    "layer_fine_no_aux": pregate(**LAYER_FINE, aux_loss_coef=0.0),
    "layer_fine_distilled": pregate(**LAYER_FINE, teacher="layerwise"),
}
