"""On a GPU: the kernels behind the operation, eager and in CUDA graphs, few tokens and many, against HuggingFace in fp32. vLLM's two model
runners, each with the part of the plugin that follows its batch.
"""

import pytest
import tiny
import torch
from engines import REQUESTS, compare, engine, texts
from test_quantised import errors

SETTINGS = {"shared_rank": 8, "r": 16, "num_experts": 8}


def followed(runner, monkeypatch):
    """Options of an engine on one of vLLM's runners that follows which requests are bare."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    # The first runner forbids captures once it has made its own, in the whole process, and the second does not allow them again.
    monkeypatch.setattr("vllm.compilation.monitor.cudagraph_capturing_enabled", True)
    return {"logits_processors": [REQUESTS]} if runner == "0" else {}


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    "settings", [SETTINGS, {**SETTINGS, "routing": "layer"}, {"r": 1, "num_experts": 64, "top_k": 16}]
)
def test_no_further_from_fp32_than_huggingface_in_bf16(runner, eager, settings, tmp_path, monkeypatch):
    base = tiny.save_base("llama-wide", tmp_path / "base")
    adapter = tiny.save_adapter(base, tmp_path / "adapter", **settings)
    prompts, bare = tiny.prompts(24, 100), set(range(0, 24, 3))
    options = {
        "dtype": "bfloat16",
        "enforce_eager": eager,
        **followed(runner, monkeypatch),
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


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("runner", ["0", "1"])
def test_two_ranks_give_the_texts_of_one(runner, tmp_path, monkeypatch):
    """In fp32, eager and in CUDA graphs; each against HuggingFace, and so one against the other."""
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")  # in vLLM's attention; its products of fp32 are TF32's otherwise
    base = tiny.save_base("llama-wide", tmp_path / "base")
    adapter = tiny.save_adapter(base, tmp_path / "adapter", **SETTINGS)
    prompts, bare = tiny.prompts(), {2, 5}
    options = {"dtype": "float32", **followed(runner, monkeypatch), "gpu_memory_utilization": 0.05}
    models = [tiny.reference(base, None if place in bare else adapter) for place in range(len(prompts))]
    found = {}
    for ranks, eager in ((1, True), (2, True), (2, False)):
        memory = {"kv_cache_memory_bytes": 1 << 28, "tensor_parallel_size": ranks, "enforce_eager": eager}
        with engine(base, adapter, **options, **memory) as llm:
            found[ranks, eager] = texts(llm, prompts, bare=bare)
        judged = [tiny.judge(models[i], prompts[i], ids) for i, (ids, _) in enumerate(found[ranks, eager])]
        compare(found[ranks, eager], judged)
    first = [ids for ids, _ in found[1, True]]
    assert all([ids for ids, _ in each] == first for each in found.values())
