"""backbone: the parts of a HuggingFace model of the Llama family that the engine reads. References to its modules, no copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from adafuse.discover import check_causal_lm, find_blocks
from adafuse.engine.linears import Linear
from adafuse.layers import RoutedBlock
from adafuse.model import AdaFuseModel

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@dataclass(frozen=True)
class Block:
    """A block: its norms, its linears by the input they share, and how it attends (window: keys a token sees; None: all)."""

    attention_norm: nn.Module
    mlp_norm: nn.Module
    qkv: tuple[Linear, ...]
    o: tuple[Linear, ...]
    gate_up: tuple[Linear, ...]
    down: tuple[Linear, ...]
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    scaling: float
    window: int | None


class Embedded:
    """What the embeddings of a model say of it."""

    embeddings: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def vocab_size(self) -> int:
        """Token ids there are: embeddings, and as many logits."""
        return self.embeddings.weight.shape[0]


@dataclass(frozen=True)
class Backbone(Embedded):
    """A model: token ids -> embeddings -> blocks -> norm -> head. max_positions: the longest sequence its rotary embedding is for."""

    embeddings: nn.Module
    blocks: tuple[Block, ...]
    norm: nn.Module
    head: nn.Module
    rotary: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int


def read_backbone(model) -> Backbone:
    """The parts of an AdaFuseModel or of a bare HuggingFace causal LM.

    ValueError for what the engine does not run: another family, a model without the family's modules, one spread over devices.
    """
    base = base_of(model)
    config = base.config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"the engine runs models of type {', '.join(MODEL_TYPES)} (Llama, SmolLM2, Mistral, Qwen2, Qwen3), got "
            f"{config.model_type} ({type(base).__name__}); use model.generate for it"
        )
    decoder, (_, blocks) = base.get_decoder(), find_blocks(base)
    _check_structure(base, decoder, blocks)
    check_one_device(model)
    check_vocabulary(base)
    attention = blocks[0].self_attn
    found = Backbone(
        embeddings=base.get_input_embeddings(),
        blocks=tuple(_read_block(block, config) for block in blocks),
        norm=decoder.norm,
        head=base.get_output_embeddings(),
        rotary=decoder.rotary_emb,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        max_positions=max_positions(config),
    )
    if 2 * len(found.rotary.inv_freq) != found.head_dim:
        raise ValueError(
            f"the rotary embedding turns {2 * len(found.rotary.inv_freq)} of {found.head_dim} features of a head; the engine "
            "needs it to turn all: use model.generate"
        )
    return found


@torch.no_grad()
def addresses(backbone: Backbone, router=None) -> tuple[int, ...]:
    """Of all weights that a step reads, experts' casts included: a captured step is good while they stay."""
    modules, banks = [backbone.embeddings, backbone.norm, backbone.head, router], []
    for block in backbone.blocks:
        modules += [block.attention_norm, block.mlp_norm, block.q_norm, block.k_norm]
        for base, bank in (*block.qkv, *block.o, *block.gate_up, *block.down):
            modules.append(base)
            banks += [] if bank is None else [bank]
    tensors = [p for module in modules if module is not None for p in module.parameters()]
    tensors += [matrix for bank in banks for matrix in bank.matrices(backbone.dtype)]
    return tuple(tensor.data_ptr() for tensor in tensors)


def base_of(model):
    """The HuggingFace model of an AdaFuseModel, or the bare one itself; ValueError for what is neither."""
    if isinstance(model, AdaFuseModel):
        return model.get_base_model()
    check_causal_lm(model)
    if any(isinstance(module, RoutedBlock) for module in model.modules()):
        raise ValueError("this is the base of an attached adapter; pass the AdaFuseModel itself (or detach() it first)")
    return model


def _read_block(block, config):
    attention = block.self_attn
    q, k, v, o, gate, up, down = (Linear.of(block.get_submodule(path)) for path in _LINEARS)
    # Qwen2 and Qwen3 say it of each block; Mistral's config of all.
    window = getattr(attention, "sliding_window", None)
    if config.model_type == "mistral":
        window = config.sliding_window
    return Block(
        attention_norm=block.input_layernorm,
        mlp_norm=block.post_attention_layernorm,
        qkv=(q, k, v),
        o=(o,),
        gate_up=(gate, up),
        down=(down,),
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        scaling=attention.scaling,
        window=window,
    )


def _check_structure(base, decoder, blocks):
    missing = [name for name in ("norm", "rotary_emb") if not hasattr(decoder, name)]
    for index, block in enumerate(blocks):
        present = {name for name, _ in block.named_modules()}
        missing += [f"blocks.{index}.{name}" for name in (*_NORMS, *_LINEARS) if name not in present]
    if missing:
        raise ValueError(
            f"{type(base).__name__} ({base.config.model_type}) lacks {len(missing)} module(s) of its family, first {missing[0]}; the "
            "engine reads them: use model.generate"
        )
    if base.config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act={base.config.hidden_act!r}: the engine computes SwiGLU (silu) only; use model.generate"
        )


def check_one_device(model):
    """ValueError for a model that is spread over devices."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise ValueError(
            f"the model is on {', '.join(sorted(map(str, devices)))}; the engine needs all of it in the memory of one device"
        )


def check_vocabulary(base):
    """ValueError for a head with more logits than there are embeddings, or fewer: what is picked could not be gone on with."""
    rows, logits = (part.weight.shape[0] for part in (base.get_input_embeddings(), base.get_output_embeddings()))
    if rows != logits:
        raise ValueError(
            f"the head of {type(base).__name__} has {logits} logits for {rows} embeddings; the engine needs as many of both: use "
            "model.generate"
        )


def ropes_of(config) -> list[dict]:
    """The parameters of a model's rotary embeddings: one, or one for each kind of attention; none of a model without."""
    given = getattr(config, "rope_parameters", None) or {}
    found = [given] if "rope_type" in given else [each for each in given.values() if isinstance(each, dict)]
    return [rope for rope in found if "rope_type" in rope]


def max_positions(config) -> int:
    """Positions that a model has, and that its rotary embeddings serve with one set of frequencies: some change beyond those."""
    limit = config.max_position_embeddings
    return min((_served(rope, limit) for rope in ropes_of(config)), default=limit)


def _served(rope, limit) -> int:
    original = rope.get("original_max_position_embeddings") or limit
    if rope["rope_type"] == "longrope":
        return original
    if rope["rope_type"] == "dynamic":
        return limit
    return max(limit, int(original * (rope.get("factor") or 1)))
