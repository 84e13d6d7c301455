"""Tiny random models that vLLM can run, adapters on them, and what HuggingFace with the reference execution makes of
prompts.

Nothing here knows vLLM.
"""

from __future__ import annotations

from pathlib import Path

import torch
from families import fill
from tiny_text import tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adafuse import AdaFuseConfig, AdaFuseModel

VOCAB, HIDDEN, BLOCKS = 257, 64, 2
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
_GATED = {**_SHAPE, "num_key_value_heads": 2}  # head_dim 32: the least that vLLM's attention has on a CPU
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
_WIDE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 384}  # head_dim 64, for a GPU's attention
MAKE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GATED)),
    "llama-wide": lambda: LlamaForCausalLM(LlamaConfig(**{**_GATED, **_WIDE})),
    "llama-grouped": lambda: LlamaForCausalLM(LlamaConfig(**{**_GATED, "num_key_value_heads": 1})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GATED, sliding_window=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GATED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GATED, head_dim=32)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_GATED, **_GEMMA, layer_types=["sliding_attention", "full_attention"])
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_SHAPE)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE)),
}


def save_base(name: str, folder: Path, seed: int = 0) -> Path:
    """A folder with a random model of a family and a tokenizer of bytes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MAKE[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer(chat=True).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int = 1, **settings) -> Path:
    """A folder with an adapter whose every tensor is random."""
    settings = {"r": 4, "num_experts": 4, "top_k": 2, **settings}
    model = AdaFuseModel(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), AdaFuseConfig(**settings))
    fill(model, seed)
    model.save_pretrained(folder)
    return folder


def reference(base: Path, adapter: Path | None, dtype=torch.float32):
    """What the texts are compared with: the model in HuggingFace, with the adapter by the reference execution, or
    bare.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if adapter is not None:
        model = AdaFuseModel.from_pretrained(model, adapter)
        model.execution = "reference"
    return model.eval()


def prompts(count: int = 8, longest: int = 60, seed: int = 3) -> list[list[int]]:
    """Random prompts of lengths from 1 to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (longest - 1) * i // (count - 1) for i in range(count)]
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy(model, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The likeliest continuation of `count` tokens and its log-probabilities: a whole forward a token, no cache."""
    ids, found = list(prompt), []
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        token = int(logits.argmax())
        found.append(float(logits.log_softmax(-1)[token]))
        ids.append(token)
    return ids[len(prompt) :], found


@torch.no_grad()
def judge(model, prompt: list[int], continuation: list[int]) -> tuple[list[int], list[float]]:
    """After each token of prompt and continuation but the last: the likeliest next token; and the log-probabilities
    of the continuation.

    If the likeliest tokens are those of the continuation, it is the greedy one. One forward.
    """
    logits = model(input_ids=torch.tensor([prompt + continuation]), use_cache=False).logits[0].float()
    logits = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logits.argmax(-1).tolist(), logits.gather(-1, torch.tensor(continuation)[:, None])[:, 0].tolist()
