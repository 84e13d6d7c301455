"""Tensor parallelism and torch.compile: texts and log-probabilities against HuggingFace's."""

import pytest
import tiny
from engines import REQUESTS, compare, engine, texts


def check(base, adapter, bare=(), **options):
    prompts = tiny.prompts()
    with engine(base, adapter, **options) as llm:
        if options.get("enforce_eager") is False:
            assert llm.apply_model(lambda model: model.model.do_not_compile) == [False]
        found = texts(llm, prompts, bare=bare)
    models = {True: tiny.reference(base, None), False: tiny.reference(base, adapter)}
    compare(found, [tiny.judge(models[place in bare], prompts[place], ids) for place, (ids, _) in enumerate(found)])


def test_two_ranks(tmp_path, monkeypatch):
    """A key-value head that both ranks hold, a shared expert, bare requests beside adapted ones, prompts in chunks."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    base = tiny.save_base("llama-grouped", tmp_path / "base")
    adapter = tiny.save_adapter(base, tmp_path / "adapter", shared_rank=3, routing="layer")
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 16, "max_num_seqs": 4}
    check(base, adapter, bare={2, 5}, logits_processors=[REQUESTS], **options)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_two_ranks_of_other_families(family, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    base = tiny.save_base(family, tmp_path / "base")
    check(base, tiny.save_adapter(base, tmp_path / "adapter"), tensor_parallel_size=2)


def test_compiled(tmp_path):
    """Then with another adapter in the same folder: what was compiled for the first must not be used for the second."""
    base = tiny.save_base("qwen3", tmp_path / "base")
    for settings in ({"shared_rank": 2}, {"num_experts": 2, "r": 8, "top_k": 1, "shared_rank": 2}):
        adapter = tiny.save_adapter(base, tmp_path / "adapter", **settings)
        check(base, adapter, enforce_eager=False)
