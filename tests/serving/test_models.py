"""Greedy texts and log-probabilities of vLLM's models with adapters, batched, against HuggingFace's, a prompt at a
time.
"""

from types import SimpleNamespace

import pytest
import tiny
import vllm
from engines import REQUESTS, compare, engine, texts
from packaging.version import Version
from vllm.forward_context import get_forward_context

from adafuse.integrations.vllm import llm_options, models
from adafuse.integrations.vllm.names import ALONE, INTERVAL

CHUNKED = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_prefix_caching": True, "block_size": 32}
PREEMPTED = {
    "num_gpu_blocks_override": 8,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_model_len": 128,
    "disable_log_stats": False,
}
CASES = {
    "llama": ("llama", {}, {}),
    "llama, a decision a block, shared expert": ("llama", {"routing": "layer", "shared_rank": 3}, CHUNKED),
    "llama, chosen linears": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"]}, {}),
    "mistral, deeper router": ("mistral", {"router_hidden": 8, "shared_rank": 2}, {}),
    "qwen2, one expert a token": ("qwen2", {"top_k": 1, "lora_alpha": 3.0}, CHUNKED),
    "qwen3, fine experts": ("qwen3", {"r": 1, "num_experts": 16, "top_k": 5}, PREEMPTED),
    "gemma3, a decision a block": ("gemma3", {"routing": "layer", "router_hidden": 8}, CHUNKED),
}
FIRST = {"phi": "0.28", "gpt-neox": "0.32"}  # version of vLLM that is known to load its head
FALLBACK = {"phi": ({"shared_rank": 2}, {}), "gpt-neox": ({"routing": "layer"}, CHUNKED)}


def made(tmp_path, name, settings):
    base = tiny.save_base(name, tmp_path / "base")
    return base, tiny.save_adapter(base, tmp_path / "adapter", **settings)


@pytest.mark.parametrize("case", CASES)
def test_texts_equal_huggingfaces(case, tmp_path):
    name, settings, options = CASES[case]
    base, adapter = made(tmp_path, name, settings)
    prompts = tiny.prompts()
    with engine(base, adapter, **options) as llm:
        found = texts(llm, prompts)
        again = texts(llm, prompts)  # with what the first time left in the prefix cache
        if options is PREEMPTED:
            assert next(m for m in llm.get_metrics() if m.name == "vllm:num_preemptions").value > 0
    right = judged(base, adapter, prompts, found)
    compare(found, right)
    compare(again, right)
    without = judged(base, None, prompts, found)
    assert all(one[0] != other[0] for one, other in zip(right, without, strict=True))  # the adapter matters


def judged(base, adapter, prompts, found):
    model = tiny.reference(base, adapter)
    return [tiny.judge(model, prompt, ids) for prompt, (ids, _) in zip(prompts, found, strict=True)]


@pytest.mark.parametrize("name", FALLBACK)
def test_texts_of_the_transformers_backend_equal_huggingfaces(name, tmp_path):
    if Version(vllm.__version__) < Version(FIRST[name]):
        pytest.skip(f"the Transformers backend of this vLLM cannot load the head of {name}, with or without an adapter")
    settings, options = FALLBACK[name]
    base, adapter = made(tmp_path, name, settings)
    prompts = tiny.prompts()
    # Before the engine starts: the backend changes the classes that HuggingFace's models are of.
    model, bare = tiny.reference(base, adapter), tiny.reference(base, None)
    right = [tiny.greedy(model, prompt, 12) for prompt in prompts]
    without = [tiny.greedy(bare, prompt, 2) for prompt in prompts]
    assert all(one[0][:2] != other[0] for one, other in zip(right, without, strict=True))  # the adapter matters
    with engine(base, adapter, **options) as llm:
        compare(texts(llm, prompts, tokens=12), right)


def test_bare_and_adapted_requests_share_a_batch(tmp_path):
    base, adapter = made(tmp_path, "llama", {"shared_rank": 2})
    prompts = [prompt for prompt in tiny.prompts(4, 80) for _ in range(2)]  # each twice: bare, and adapted
    bare = set(range(0, 8, 2))
    # Three places and too few blocks for three: requests enter and leave the batch, move within it, and begin again.
    options = {"max_num_seqs": 3, "max_num_batched_tokens": 16, "num_gpu_blocks_override": 8, "max_model_len": 128}
    options |= {"block_size": 32, "enable_prefix_caching": True, "disable_log_stats": False}
    with engine(base, adapter, logits_processors=[REQUESTS], **options) as llm:
        rounds = [texts(llm, prompts, bare=bare) for _ in range(2)]
        assert next(m for m in llm.get_metrics() if m.name == "vllm:num_preemptions").value > 0
    models = {True: tiny.reference(base, None), False: tiny.reference(base, adapter)}
    for found in rounds:
        right = [tiny.judge(models[place in bare], prompts[place], ids) for place, (ids, _) in enumerate(found)]
        compare(found, right)


def test_padding_and_bare_tokens_are_not_counted(tmp_path):
    base, adapter = made(tmp_path, "llama", {"routing": "layer"})
    prompts = tiny.prompts(4, 20)
    with engine(base, adapter, logits_processors=[REQUESTS]) as llm:
        texts(llm, prompts, tokens=5, bare={1, 3})
        (load,) = llm.apply_model(lambda model: model.adafuse_step.load.clone())
    processed = sum(len(prompts[place]) + 4 for place in (0, 2))  # the last token is not fed back
    assert load.sum(1).tolist() == [2 * processed] * tiny.BLOCKS


def test_a_backend_that_does_not_say_whose_tokens_are(tmp_path, monkeypatch):
    """As FlashInfer's, which CPUs do not have: the adapted model alone is served, with texts equal to HuggingFace's."""
    base, adapter = made(tmp_path, "llama", {"routing": "layer", "shared_rank": 3})
    prompts, says = tiny.prompts(), get_forward_context

    def silent():
        told = says().attn_metadata
        return SimpleNamespace(attn_metadata=told and {name: SimpleNamespace() for name in told})

    monkeypatch.setattr(models, "get_forward_context", silent)
    overrides = llm_options(base, adapter)["hf_overrides"]
    with engine(base, adapter, hf_overrides={**overrides, ALONE: True, INTERVAL: 0.0}) as llm:
        found = texts(llm, prompts)
    compare(found, judged(base, adapter, prompts, found))
    with engine(base, adapter) as llm, pytest.raises(Exception, match="choose FLASH_ATTN or TRITON_ATTN"):
        texts(llm, prompts)
