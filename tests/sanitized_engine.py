"""A short generation on kernels, in CUDA graphs: what compute-sanitizer watches. Run by test_gpu_kernels.py."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel, Engine


def a_generation():
    """Of a tiny adapted model, prompts of several lengths in a batch; then one prompt alone, sampled: each takes other kernels."""
    base = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
    }
    model = AdaFuseModel(
        LlamaForCausalLM(LlamaConfig(**base, num_key_value_heads=2)), AdaFuseConfig(r=2, num_experts=4)
    )
    engine = Engine(
        model.to("cuda", torch.bfloat16), max_seq_len=64, max_batch=4, prefill_chunk=16, kernels=True, graphs=True
    )
    engine.generate([[1, 2, 3], list(range(30)), [4], [5] * 9], max_new_tokens=4, eos_token_id=())
    engine.generate([[1, 2, 3]], max_new_tokens=4, eos_token_id=(), temperature=1.0, repetition_penalty=1.1)


if __name__ == "__main__":
    torch.manual_seed(0)
    a_generation()
    torch.cuda.synchronize()
