"""Layers that compute base and experts together, as plain ones do on a GPU: here by the operation's dense form."""

import pytest
import tiny
import torch
from engines import REQUESTS, compare, engine, texts
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from adafuse.integrations.vllm import linears
from adafuse.integrations.vllm.linears import AddedMethod, WholeMethod


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("qwen2", {"routing": "layer", "shared_rank": 2}, {"max_num_batched_tokens": 16, "max_num_seqs": 4}),  # biases
        ("llama", {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]}, {"enforce_eager": False}),
    ],
)
def test_texts_equal_huggingfaces(name, settings, options, tmp_path, monkeypatch):
    monkeypatch.setattr(linears, "_is_plain", lambda *_: True)
    # On a CPU vLLM packs the weights for its own kernels, and drops what was loaded.
    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", _keep)
    base = tiny.save_base(name, tmp_path / "base")
    adapter = tiny.save_adapter(base, tmp_path / "adapter", **settings)
    prompts, bare = tiny.prompts(), {2, 5}
    with engine(base, adapter, logits_processors=[REQUESTS], **options) as llm:
        (methods,) = llm.apply_model(_methods)
        found = texts(llm, prompts, bare=bare)
    added = {"gate_up_proj"} if "target_modules" in settings else set()  # one of its linears is not adapted
    assert {name for name, method in methods if method is AddedMethod} == added
    assert {name for name, method in methods if method is WholeMethod} >= {"qkv_proj", "down_proj"}
    models = {True: tiny.reference(base, None), False: tiny.reference(base, adapter)}
    compare(found, [tiny.judge(models[place in bare], prompts[place], ids) for place, (ids, _) in enumerate(found)])


def _methods(model):
    return {
        (path.rpartition(".")[2], type(layer.quant_method).__mro__[1])
        for path, layer in model.named_modules()
        if hasattr(layer, "adafuse")
    }


def _keep(self, layer):
    layer.cpu_linear = torch.nn.functional.linear
