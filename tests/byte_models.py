"""Adapted tiny models that read text: a random model over the byte tokenizer of `tiny_text`, in memory or in folders."""

from __future__ import annotations

from dataclasses import replace

from families import family, fill
from tiny_text import save_base, tokenizer

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.base import load_base

VOCAB = 257


def adapted(name="llama", *, chat=False, **changes):
    """(AdaFuseModel in evaluation mode with random adapter tensors, tokenizer); changes: of the AdaFuseConfig."""
    fam = family(name)

    def make():
        model = fam.make()
        config = type(model.config)(**{**model.config.to_dict(), "vocab_size": VOCAB})
        return type(model)(config)

    base = replace(fam, make=make).build()
    model = AdaFuseModel(base, AdaFuseConfig(**{"r": 2, "num_experts": 4, "top_k": 2, **changes}))
    fill(model)
    return model.eval(), tokenizer(chat)


def save_adapted(folder, *, chat=False, positions=64, **changes):
    """(folder of the base, folder of an adapter with random tensors, which names that base), made inside `folder`."""
    base, adapter = save_base(folder / "base", chat=chat, positions=positions), folder / "adapter"
    model = AdaFuseModel(load_base(base)[0], AdaFuseConfig(**{"r": 2, "num_experts": 4, "top_k": 2, **changes}))
    fill(model)
    model.save_pretrained(adapter)
    return base, adapter
