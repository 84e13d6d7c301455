"""Shapes of the models that benchmarks run with random weights, and the groups of linears of a block that share an input."""

from typing import NamedTuple

SHAPES = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
}


class Group(NamedTuple):
    """Linears of a block with one input of `features`; `widths` are their numbers of outputs."""

    name: str
    features: int
    widths: tuple[int, ...]


def groups(model, ranks=1) -> list[Group]:
    """The four groups of a block, in the order of the forward; ranks: what one of so many tensor-parallel ranks has of them."""
    shape = SHAPES[model]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return [
        Group("qkv", hidden, (hidden // ranks, kv // ranks, kv // ranks)),
        Group("o", hidden // ranks, (hidden,)),
        Group("gate_up", hidden, (inner // ranks, inner // ranks)),
        Group("down", inner // ranks, (hidden,)),
    ]
