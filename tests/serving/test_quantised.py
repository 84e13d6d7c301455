"""Adapters on backbones of less precision: log-probabilities of what vLLM generates, against HuggingFace with the
same weights in fp32.
"""

import pytest
import tiny
import torch
import vllm._custom_ops  # noqa: F401 - loads the kernels
from engines import engine, texts
from quantised import quantise, round_inputs


def errors(model, prompts, found):
    """Of every token of every text: how far its log-probability is from what a HuggingFace model says."""
    right = [tiny.judge(model, prompt, ids)[1] for prompt, (ids, _) in zip(prompts, found, strict=True)]
    found = torch.tensor([logprobs for _, logprobs in found])
    return (found - torch.tensor(right)).abs()


@pytest.fixture
def made(tmp_path):
    base = tiny.save_base("llama", tmp_path / "base")
    return base, tiny.save_adapter(base, tmp_path / "adapter", shared_rank=2)


def test_int8(made, tmp_path):
    """Weights a scale an output, inputs a scale a token. An input rounded the other way would move a log-probability
    by about 1e-2.
    """
    base, adapter = made
    quantised, rounded = quantise(base, tmp_path, "int8")
    prompts = tiny.prompts()
    with engine(quantised, adapter) as llm:
        found = texts(llm, prompts)
    model = tiny.reference(rounded, adapter)
    round_inputs(model)
    assert errors(model, prompts, found).max() < 0.05
    assert errors(tiny.reference(rounded, None), prompts, found).mean() > 0.5  # the adapter matters


# vLLM's build for processors with AVX2 alone, which it takes by itself, is without this kernel.
INT4 = pytest.param(
    "int4", marks=pytest.mark.skipif(not hasattr(torch.ops._C, "cpu_gemm_wna16"), reason="vLLM has no int4 here")
)


@pytest.mark.parametrize("scheme", [INT4, None], ids=["int4", "bf16"])
def test_int4_and_bf16(scheme, made, tmp_path):
    """vLLM's int4 kernel for CPUs is for bf16: off by no more than HuggingFace in bf16 is. The same without
    quantisation.
    """
    base, adapter = made
    served, weights = quantise(base, tmp_path, scheme) if scheme else (base, base)
    prompts = tiny.prompts()
    with engine(served, adapter, dtype="bfloat16") as llm:
        found = texts(llm, prompts)
    exact, bf16 = tiny.reference(weights, adapter), tiny.reference(weights, adapter, torch.bfloat16)
    usual = [(ids, tiny.judge(bf16, prompt, ids)[1]) for prompt, (ids, _) in zip(prompts, found, strict=True)]
    assert errors(exact, prompts, found).mean() < 1.5 * errors(exact, prompts, usual).mean()
    assert errors(tiny.reference(weights, None), prompts, found).mean() > 0.5
