"""Static LoRA, PEFT's own: the baseline without routing, at the rank a token uses or at the rank that is trained."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from adafuse.adapter_state import check_unadapted
from adafuse.config import AdaFuseConfig
from adafuse.discover import check_causal_lm, find_targets

RANKS = ("active", "total")


def lora_config(base, config: AdaFuseConfig, rank: str = "active"):
    """The `peft.LoraConfig` of a static LoRA on the very linears of `base` that an AdaFuse adapter of `config` would adapt.

        y = W x + bias + s B (A dropout(x)),    s = config.scale

    rank: "active" (K r + shared_rank: as many ranks as a token uses) or "total" (E r + shared_rank: as many parameters in its experts).
    Both keep the scale s of the experts, so alpha = s * rank. Source: Hu et al., arXiv 2106.09685. ValueError for another rank.
    """
    from peft import LoraConfig

    if rank not in RANKS:
        raise ValueError(f"rank={rank!r} is unknown; allowed: {', '.join(map(repr, RANKS))}")
    count = config.top_k if rank == "active" else config.num_experts
    r = count * config.r + config.shared_rank
    targets = find_targets(base, config)
    return LoraConfig(
        r=r,
        lora_alpha=config.scale * r,
        lora_dropout=config.lora_dropout,
        target_modules=[target.path for target in targets],
        fan_in_fan_out=all(isinstance(target.module, Conv1D) for target in targets),
        task_type="CAUSAL_LM",
    )


def static_lora(base, config: AdaFuseConfig, rank: str = "active"):
    """`base` with that LoRA: a `peft.PeftModel`, which trains, saves and loads as PEFT does it. See `lora_config`."""
    from peft import get_peft_model

    check_unadapted(base)
    check_causal_lm(base)
    return get_peft_model(base, lora_config(base, config, rank))
