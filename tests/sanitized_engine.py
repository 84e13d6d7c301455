"""Short generations in CUDA graphs: what compute-sanitizer watches. Run by test_gpu_kernels.py."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel, Engine

PROMPTS = [[1, 2, 3], list(range(30)), [4], [5] * 9]
GREEDY = {"max_new_tokens": 4, "eos_token_id": ()}
SAMPLED = {**GREEDY, "temperature": 1.0, "repetition_penalty": 1.1}


def adapted(base):
    model = AdaFuseModel(base, AdaFuseConfig(r=2, num_experts=4, routing="layer"))
    return model.to("cuda", torch.bfloat16).eval()


def engine(model):
    return Engine(model, max_seq_len=64, max_batch=4, prefill_chunk=16, graphs=True)


def on_kernels():
    """Prompts of several lengths in a batch; then one prompt alone, sampled: each takes other kernels. Then one whose experts are merged
    into the weights, from a copy and in place."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = adapted(LlamaForCausalLM(LlamaConfig(**shape, vocab_size=97, num_key_value_heads=2)))
    one = engine(model)
    one.generate(PROMPTS, **GREEDY)
    one.generate(PROMPTS[:1], **SAMPLED)
    for source in ("pristine", "in_place"):
        model.execution = "auto"
        model.switch_source = source
        model.execution = "switch"
        one.generate(PROMPTS[:1], **GREEDY)
    model.execution = "auto"


def of_another_family():
    """Its own forward, with the adapter's kernels."""
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 97}
    model = adapted(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)))
    model.execution = "fused"
    engine(model).generate(PROMPTS, **GREEDY)


if __name__ == "__main__":
    torch.manual_seed(0)
    on_kernels()
    of_another_family()
    torch.cuda.synchronize()
