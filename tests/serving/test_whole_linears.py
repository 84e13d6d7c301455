"""Layers that compute base and experts together, as plain ones do on a GPU: here by the operation's dense form."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from engines import REQUESTS, compare, engine, texts
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from adafuse.integrations.vllm import linears, models
from adafuse.integrations.vllm.linears import Adapter, AddedMethod, WholeMethod, compile_ahead
from adafuse.integrations.vllm.op import Routing
from adafuse.integrations.vllm.start import digest


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


def test_launches_of_many_tokens_are_made_once_for_each_kind_of_layer(monkeypatch):
    launched, asked = [], []

    class Method(WholeMethod):
        def apply(self, layer, x, bias=None):
            launched.append((id(layer), tuple(x.shape)))

    def numbers(x, b, routing, shape, max_tokens):
        asked.append(([part.shape[1] for part in b], shape.r, max_tokens))
        return [65, max_tokens]

    def layer(out_features, features, b=(8,), method=None):
        parts = {f"b{n}": torch.zeros(4, width) for n, width in enumerate(b)}
        adapter = Adapter([], list(parts), ["routing"] * len(Routing._fields), [], [0], [1, 2, 1, 2, 0])
        weight, method = torch.zeros(out_features, features), method or Method()
        return SimpleNamespace(weight=weight, adafuse=adapter, quant_method=method, routing=torch.zeros(1), **parts)

    monkeypatch.setattr("adafuse.integrations.vllm.ahead.numbers_of_tokens", numbers)
    first, second, other = layer(8, 4), layer(8, 4), layer(8, 4, b=(4, 4))
    compile_ahead([first, second, other, layer(8, 6, method=AddedMethod())], 1100)
    assert launched == [(id(each), (tokens, 4)) for each in (second, other) for tokens in (65, 1100)]
    assert asked == [([8], 2, 1100), ([4, 4], 2, 1100)]


def test_ranks_with_different_adapters_are_refused(tmp_path, monkeypatch):
    """On several machines each has a folder of its own."""
    adapter = tiny.save_adapter(tiny.save_base("llama", tmp_path / "base"), tmp_path / "adapter")
    ranks = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr(models, "get_tp_group", lambda: ranks)

    def gather(found, mine, group):
        found[:] = [mine, other or mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    other = ""
    models.check_same_on_all_ranks(adapter, digest(adapter))
    other = "0" * 64
    with pytest.raises(ValueError, match=f"by rank {digest(adapter)[:12]}, 000000000000; give all machines the same"):
        models.check_same_on_all_ranks(adapter, digest(adapter))
