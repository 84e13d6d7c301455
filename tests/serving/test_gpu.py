"""On a GPU: the kernels behind the operation, eager and in CUDA graphs, few tokens and many, against HuggingFace in fp32."""

import pytest
import tiny
import torch
from engines import REQUESTS, engine, texts
from test_quantised import errors

SETTINGS = {"shared_rank": 8, "r": 16, "num_experts": 8}


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    "settings", [SETTINGS, {**SETTINGS, "routing": "layer"}, {"r": 1, "num_experts": 64, "top_k": 16}]
)
def test_no_further_from_fp32_than_huggingface_in_bf16(eager, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    base = tiny.save_base("llama-wide", tmp_path / "base")
    adapter = tiny.save_adapter(base, tmp_path / "adapter", **settings)
    prompts, bare = tiny.prompts(24, 100), set(range(0, 24, 3))
    options = {
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "logits_processors": [REQUESTS],
        "gpu_memory_utilization": 0.05,  # of a GPU that other tests use at the same time
        "kv_cache_memory_bytes": 1 << 28,  # else measured, which fails while they give memory back
    }
    with engine(base, adapter, **options) as llm:
        rounds = [texts(llm, prompts[:2], bare=bare), texts(llm, prompts, bare=bare)]  # 2 tokens a step, and 24
    for found in rounds:
        for without in (True, False):
            places = [place for place in range(len(found)) if (place in bare) == without]
            asked, got = [prompts[place] for place in places], [found[place] for place in places]
            folder = None if without else adapter
            exact, bf16 = tiny.reference(base, folder), tiny.reference(base, folder, torch.bfloat16)
            usual = [(ids, tiny.judge(bf16, prompt, ids)[1]) for prompt, (ids, _) in zip(asked, got, strict=True)]
            assert errors(exact, asked, got).mean() < 2 * errors(exact, asked, usual).mean() + 1e-3
            other = tiny.reference(base, adapter if without else None)
            assert errors(other, asked, got).mean() > 0.3  # the other model is another
