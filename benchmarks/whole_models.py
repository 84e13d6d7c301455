"""What the decoding benchmark runs: models with random weights, adapters on them, the tokens that are forced, the bytes of a token."""

import json
import statistics
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.baselines import LayerwiseConfig, LayerwiseModel, PescConfig, PescModel
from adafuse.ops.route import route_ref

EXPERTS, TOP_K = 8, 2
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97,
}  # fmt: skip
BASELINES = {
    "layerwise": (LayerwiseModel, LayerwiseConfig(r=64, num_experts=EXPERTS, top_k=TOP_K, lora_dropout=0.0)),
    "mola": (LayerwiseModel, LayerwiseConfig(r=64, num_experts=(2, 4, 6, 8), top_k=TOP_K, lora_dropout=0.0)),
    "pesc": (PescModel, PescConfig(num_experts=EXPERTS, top_k=TOP_K, adapter_dropout=0.0, lora_dropout=0.0)),
}
TINY_BASELINES = {
    "layerwise": {"r": 4},
    "mola": {"r": 4, "num_experts": (2, 8)},
    "pesc": {"bottleneck": 4, "lora_r": 4},
}


def base_model(name, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    kinds = {"mistral": (MistralConfig, MistralForCausalLM)}
    config, cls = kinds.get(name.partition("-")[0], (LlamaConfig, LlamaForCausalLM))
    more = {"sliding_window": None} if cls is MistralForCausalLM else {}
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = cls(config(**SHAPES[name], max_position_embeddings=8192, **more))
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def adapted(base, r, router):
    """An AdaFuseModel whose experts add about a sixth of what the linears give, so that a wrong one shows."""
    model = AdaFuseModel(base, AdaFuseConfig(r=r, num_experts=EXPERTS, top_k=TOP_K)).eval()
    model.router.weight.copy_(router)
    for bank in model.banks.values():
        bank.b.normal_(std=0.3 / r**0.5)
    return model


@contextmanager
def in_fp32(model):
    """The model's bf16 parameters as fp32 for a while: what its logits would be without rounding."""
    # The rounded ones stay where they are: a CUDA graph may hold their addresses.
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dtype == torch.bfloat16]
    for parameter, rounded in kept:
        parameter.data = rounded.float()
    try:
        yield
    finally:
        for parameter, rounded in kept:
            parameter.data = rounded


def weights_of(backbone):
    """Of all linears in the blocks."""
    groups = [group for block in backbone.blocks for group in (block.qkv, block.o, block.gate_up, block.down)]
    return [linear.base.weight for group in groups for linear in group]


@contextmanager
def unchanged(backbone):
    """The linears' weights are afterwards what they were: switching in place leaves rounding errors in them."""
    kept = [weight.detach().clone() for weight in weights_of(backbone)]
    yield
    for weight, copy in zip(weights_of(backbone), kept, strict=True):
        weight.detach().copy_(copy)


def with_baseline(base, name, tiny):
    """(model, config) of a peer's method."""
    cls, config = BASELINES[name]
    config = replace(config, **TINY_BASELINES[name]) if tiny else config
    model = cls(base, config).eval()
    for key, tensor in model.adapter_tensors().items():
        if key.endswith(("experts_b", "shared_b")):
            tensor.normal_(std=0.02)
    return model, config


def expert_sets(embeddings, router, ids):
    """The experts of each of these tokens [N], as sorted tuples."""
    experts, _ = route_ref(embeddings(ids).float(), router, num_experts=EXPERTS, top_k=TOP_K, scale=1.0)
    return [tuple(sorted(each)) for each in experts[0].tolist()]


def forced_tokens(embeddings, router, batch, count, generator):
    """[count, B]: of every row, tokens whose experts are others than those of the token before."""
    vocab = embeddings.weight.shape[0]
    ids = torch.randperm(vocab, generator=generator)[:4096].to(router.device)
    sets = expert_sets(embeddings, router, ids)
    rows = []
    for row in range(batch):
        taken, at = [], row * 17
        while len(taken) < count:
            at = (at + 1) % len(sets)
            if not taken or sets[at] != sets[taken[-1]]:
                taken.append(at)
        rows.append(ids[taken])
    return torch.stack(rows, dim=1)


def text_tokens(embeddings, router, count):
    """([count, 1], share): tokens of English prose, and of how many the experts are others than those of the token before."""
    ids = json.loads(Path(__file__).with_name("text.json").read_text())["ids"][:count]
    ids = torch.tensor(ids, device=router.device) % embeddings.weight.shape[0]
    sets = expert_sets(embeddings, router, ids)
    return ids[:, None], sum(a != b for a, b in pairwise(sets)) / (count - 1)


def mean_distinct(embeddings, router, forced):
    """Of so many experts a step of the batch reads: those that its tokens chose, each counted once; the mean over the steps of
    `forced` [count, B]."""
    sets = expert_sets(embeddings, router, forced.flatten())
    batch = forced.shape[1]
    steps = [set().union(*sets[start : start + batch]) for start in range(0, len(sets), batch)]
    return statistics.mean(map(len, steps))


def bytes_of_a_token(backbone, batch, cached, experts):
    """What one step must read in bf16, by row: weights, `cached` keys and values of every sequence, and chosen experts.

    experts: how many the tokens of a batch choose together (`mean_distinct`).
    """
    sizes = [weight.shape for weight in weights_of(backbone)]
    weights = sum(o * i for o, i in sizes) + backbone.head.weight.numel()
    heads = backbone.num_kv_heads * backbone.head_dim * len(backbone.blocks)
    numbers = {"roofline": weights + 2 * heads * batch * cached}
    for r in (64, 16):
        active = experts * r * sum(o + i for o, i in sizes)
        numbers[f"roofline_r{r}"] = numbers["roofline"] + active
    return {name: 2 * count for name, count in numbers.items()}
