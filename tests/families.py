"""Tiny random models of every family the tests cover, and what the tests know about each of them by hand.

Nothing here is discovered: the path of the blocks, the names and shapes of their linears are written down, so that the
library's own discovery is tested against something. Weights are random everywhere (biases and norms too), from a fixed
seed, large enough that logits differ clearly from token to token; dropout is off, so that training is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

HIDDEN = 32
INTERMEDIATE = 48
BLOCKS = 2
VOCAB = 97
PAD = 0

_SPECIAL = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GATED = {**_SHAPE, "intermediate_size": INTERMEDIATE, "num_key_value_heads": 2}
# head_dim 8 and two key-value heads: q [32, 32], k and v [16, 32].
_GATED_LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (16, HIDDEN),
    "self_attn.v_proj": (16, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
_OPT_LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.out_proj": (HIDDEN, HIDDEN),
    "fc1": (INTERMEDIATE, HIDDEN),
    "fc2": (HIDDEN, INTERMEDIATE),
}


@dataclass(frozen=True)
class Family:
    """A model family: how to build it, where its blocks are, the linears of a block as name -> (out, in).

    positional: the hidden state entering block 0 depends on the position too, not on the token id alone.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    blocks: str
    linears: dict[str, tuple[int, int]]
    positional: bool = False

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        """A random model in evaluation mode, the same for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.08 * torch.randn_like(parameter))
        return model.to(dtype).eval()

    def paths(self) -> list[str]:
        """Module paths of all linears of all blocks, in order."""
        return [f"{self.blocks}.{block}.{name}" for block in range(BLOCKS) for name in self.linears]

    def shape(self, path: str) -> tuple[int, int]:
        """(out, in) of the linear at a module path."""
        return self.linears[path.removeprefix(f"{self.blocks}.").split(".", 1)[1]]

    def tensors(self, config) -> dict[str, tuple[int, ...]]:
        """Names and shapes that the exchange format prescribes when every linear is adapted."""
        decisions = BLOCKS if config.routing == "layer" else 1
        shapes = {"router.weight": (decisions * config.num_experts, config.router_hidden or HIDDEN)}
        if config.router_hidden:
            shapes["router.hidden.weight"] = (config.router_hidden, HIDDEN)
        for path in self.paths():
            out_features, in_features = self.shape(path)
            shapes[f"{path}.experts_a"] = (config.num_experts, config.r, in_features)
            shapes[f"{path}.experts_b"] = (config.num_experts, out_features, config.r)
            if config.shared_rank:
                shapes[f"{path}.shared_a"] = (config.shared_rank, in_features)
                shapes[f"{path}.shared_b"] = (out_features, config.shared_rank)
        return shapes


def _gemma3_text():
    settings = {**_GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
    return Gemma3TextConfig(**settings, layer_types=["sliding_attention", "full_attention"])


def _gemma3_multimodal():
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    # The image tokens' ids lie at the end of the vocabulary; no test uses them.
    ids = {"boi_token_index": VOCAB - 3, "eoi_token_index": VOCAB - 2, "image_token_index": VOCAB - 1}
    config = Gemma3Config(text_config=_gemma3_text(), vision_config=vision, mm_tokens_per_image=4, **ids, **_SPECIAL)
    return Gemma3ForConditionalGeneration(config)


def _mistral():
    return MistralForCausalLM(MistralConfig(**_GATED, sliding_window=4))


def _opt(**changes):
    settings = {**_SHAPE, "ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN, "dropout": 0.0, **changes}
    return OPTForCausalLM(OPTConfig(**settings))


def _neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE, intermediate_size=INTERMEDIATE, tie_word_embeddings=False))


def _gpt2():
    sizes = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_inner": INTERMEDIATE, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **dropout, **_SPECIAL))


_ALL = (
    Family("llama", lambda: LlamaForCausalLM(LlamaConfig(**_GATED)), "model.layers", _GATED_LINEARS),
    Family("mistral", _mistral, "model.layers", _GATED_LINEARS),
    Family("qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**_GATED)), "model.layers", _GATED_LINEARS),
    Family("qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**_GATED, head_dim=8)), "model.layers", _GATED_LINEARS),
    Family("gemma3", lambda: Gemma3ForCausalLM(_gemma3_text()), "model.layers", _GATED_LINEARS),
    Family("gemma3-multimodal", _gemma3_multimodal, "model.language_model.layers", _GATED_LINEARS),
    Family(
        "phi",
        lambda: PhiForCausalLM(PhiConfig(**_SHAPE, intermediate_size=INTERMEDIATE)),
        "model.layers",
        {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN, HIDDEN),
            "self_attn.v_proj": (HIDDEN, HIDDEN),
            "self_attn.dense": (HIDDEN, HIDDEN),
            "mlp.fc1": (INTERMEDIATE, HIDDEN),
            "mlp.fc2": (HIDDEN, INTERMEDIATE),
        },
    ),
    Family("opt", _opt, "model.decoder.layers", _OPT_LINEARS, positional=True),
    # As in OPT-350M: narrower embeddings, projected up before block 0 by a linear outside the blocks; norms at the end.
    Family(
        "opt-projected",
        lambda: _opt(word_embed_proj_dim=16, do_layer_norm_before=False),
        "model.decoder.layers",
        _OPT_LINEARS,
        positional=True,
    ),
    Family(
        "gpt-neox",
        _neox,
        "gpt_neox.layers",
        {
            "attention.query_key_value": (3 * HIDDEN, HIDDEN),
            "attention.dense": (HIDDEN, HIDDEN),
            "mlp.dense_h_to_4h": (INTERMEDIATE, HIDDEN),
            "mlp.dense_4h_to_h": (HIDDEN, INTERMEDIATE),
        },
    ),
    Family(
        "gpt2",
        _gpt2,
        "transformer.h",
        {
            "attn.c_attn": (3 * HIDDEN, HIDDEN),
            "attn.c_proj": (HIDDEN, HIDDEN),
            "mlp.c_fc": (INTERMEDIATE, HIDDEN),
            "mlp.c_proj": (HIDDEN, INTERMEDIATE),
        },
        positional=True,
    ),
)
NAMES = tuple(family.name for family in _ALL)
TOKEN_ONLY = tuple(family.name for family in _ALL if not family.positional)
POSITIONAL = tuple(family.name for family in _ALL if family.positional)


def family(name: str) -> Family:
    return next(each for each in _ALL if each.name == name)


def fill(model, seed: int = 1) -> dict[str, torch.Tensor]:
    """Write random numbers into every adapter tensor of `model` and return them (a fresh B is zero: it tests nothing).

    Sizes: A keeps the variance of its input, B makes an adapter's output about as large as its linear's, and the
    router's logits have a standard deviation of about 1, so that weights are neither equal nor one-hot.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
        for name, tensor in model.adapter_tensors().items()
    }
    model.load_adapter_tensors(tensors)
    return tensors


def batch(rows: int = 2, length: int = 7, seed: int = 2) -> torch.Tensor:
    """Random token ids [rows, length] without the padding id and the image tokens."""
    return torch.randint(1, VOCAB - 3, (rows, length), generator=torch.Generator().manual_seed(seed))
