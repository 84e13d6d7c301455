"""Tiny random models for the engine: the families it runs, with room for long texts, bare and adapted."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from families import VOCAB, family, fill

from adafuse import AdaFuseConfig, AdaFuseModel

NAMES = ("llama", "mistral", "qwen2", "qwen3")
POSITIONS = 512


def bare(name="llama", dtype=torch.float32, **changes):
    """A HuggingFace model in evaluation mode; changes: to its config."""
    fam = family(name)

    def make():
        model = fam.make()
        config = type(model.config)(
            **{**model.config.to_dict(), "max_position_embeddings": POSITIONS, "rope_parameters": None, **changes}
        )
        return type(model)(config)

    return replace(fam, make=make).build(dtype)


def roomy(name, dtype=torch.float32):
    """A model of any of the families, with as many positions."""
    fam = family(name)

    def make():
        model = fam.make()
        config = copy.deepcopy(model.config)
        config.get_text_config(decoder=True).max_position_embeddings = POSITIONS
        return type(model)(config)

    return replace(fam, make=make).build(dtype)


def adapted(name="llama", dtype=torch.float32, base=None, **settings):
    """An AdaFuseModel with random adapter tensors. base: changes to the config of its base."""
    config = AdaFuseConfig(**{"r": 2, "num_experts": 4, "top_k": 2, **settings})
    model = AdaFuseModel(bare(name, dtype, **(base or {})), config)
    fill(model)
    return model.eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCAB - 3, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def logits_of(model, ids: list[int]) -> torch.Tensor:
    """[len(ids), V] fp32 of one whole forward."""
    return model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()


def generated(model, ids: list[int], count: int) -> list[int]:
    """What HuggingFace's greedy generate continues with."""
    inputs = torch.tensor([ids], device=model.device)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)[0, len(ids) :].tolist()
