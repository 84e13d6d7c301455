"""Models of other families in the engine, by their own forward on its cache, against HuggingFace's generate."""

import pytest
import torch
from engine_models import NAMES as OWN
from engine_models import generated, prompt
from families import NAMES, family, fill
from transformers import BloomConfig, BloomForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel, Engine

OTHERS = [name for name in NAMES if name not in OWN]


def a_model(name, dtype=torch.float32, **settings):
    model = family(name).build(dtype)
    if not settings:
        return model
    model = AdaFuseModel(model, AdaFuseConfig(**{"r": 2, "num_experts": 4, **settings}))
    fill(model)
    return model.eval()


def engine(model, **options):
    return Engine(model, **{"max_seq_len": 64, "max_batch": 4, "prefill_chunk": 16, **options})


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("settings", [{}, {"routing": "layer", "shared_rank": 2}], ids=["bare", "adapted"])
def test_a_batch_of_different_lengths_gives_the_tokens_of_huggingface(name, settings):
    model, prompts = a_model(name, **settings), [prompt(20), prompt(5, 1), prompt(33, 2)]
    one = engine(model)
    for _ in range(2):
        got = one.generate(prompts, max_new_tokens=[30, 8, 30], eos_token_id=())
        for ids, count, each in zip(prompts, (30, 8, 30), got, strict=True):
            assert each.ids == generated(model, ids, count)


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_routing_and_a_disabled_adapter(name):
    model, ids = a_model(name, routing="layer"), prompt(20)
    one = engine(model)
    (got,) = one.generate([ids], max_new_tokens=8, eos_token_id=(), return_routing=True)
    wanted = model.route(torch.tensor([ids + got.ids[:-1]]))
    assert torch.equal(got.routing.experts, wanted.experts[0])
    torch.testing.assert_close(got.routing.weights, wanted.weights[0])
    with model.disable_adapter():
        bare = one.generate([ids], max_new_tokens=8, eos_token_id=())[0].ids
    assert bare == generated(a_model(name), ids, 8) != got.ids


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on a CPU in the interpreter only; see test_engine_gpu"
)
@pytest.mark.parametrize("execution", ["fused", "switch"])
def test_the_execution_of_the_model_is_taken(execution):
    pytest.importorskip("triton")
    model, ids = a_model("phi", routing="layer"), prompt(9)
    wanted = generated(model, ids, 4)
    model.execution = execution
    one = engine(model)
    for _ in range(2):
        assert one.generate([ids], max_new_tokens=4, eos_token_id=())[0].ids == wanted
    if execution == "switch":
        with pytest.raises(ValueError, match="one prompt at a time; got 2"):
            one.generate([ids, ids], max_new_tokens=4)


def test_logits_that_are_no_numbers_do_not_stay():
    model, ids = a_model("gpt2"), prompt(9)
    one = engine(model)
    wanted = one.generate([ids], max_new_tokens=4)
    weight = model.transformer.h[0].attn.c_attn.weight
    kept = weight.data.clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="are NaN or infinite"):
        one.generate([prompt(40)], max_new_tokens=4)
    weight.data.copy_(kept)
    assert one.generate([ids], max_new_tokens=4) == wanted


def test_what_the_engine_cannot_run_is_refused():
    with pytest.raises(
        ValueError, match=r"kernels=True is for models of type llama, .*set model.execution = \"fused\""
    ):
        engine(a_model("gpt2"), kernels=True)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        engine(a_model("gpt2").train()).generate([[1]], max_new_tokens=2)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"the forward of BloomForCausalLM \(bloom\) takes no position_ids"):
        engine(bloom)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    mixed = Qwen3NextConfig(
        **shape, num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"]
    )
    with pytest.raises(ValueError, match="has blocks of type linear_attention, whose state the engine does not keep"):
        engine(Qwen3NextForCausalLM(mixed))
