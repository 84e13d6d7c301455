"""Models of other families in the engine, by their own forward on its cache, against HuggingFace's generate."""

import pytest
import torch
from engine_models import NAMES as OWN
from engine_models import generated, logits_of, prompt, roomy
from families import NAMES, fill
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)  # fmt: skip

from adafuse import AdaFuseConfig, AdaFuseModel, Engine

OTHERS = [name for name in NAMES if name not in OWN]


def a_model(name, dtype=torch.float32, **settings):
    model = roomy(name, dtype)
    if not settings:
        return model
    model = AdaFuseModel(model, AdaFuseConfig(**{"r": 2, "num_experts": 4, **settings}))
    fill(model)
    return model.eval()


def engine(model, **options):
    return Engine(model, **{"max_seq_len": 256, "max_batch": 4, "prefill_chunk": 16, **options})


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("settings", [{}, {"routing": "layer", "shared_rank": 2}], ids=["bare", "adapted"])
def test_a_batch_of_different_lengths_gives_the_tokens_of_huggingface(name, settings):
    model, prompts = a_model(name, **settings), [prompt(20), prompt(5, 1), prompt(33, 2)]
    wanted = [generated(model, ids, count) for ids, count in zip(prompts, (200, 8, 30), strict=True)]
    one = engine(model)
    for counts in ([200, 8, 30], [30, 8, 30]):
        got = one.generate(prompts, max_new_tokens=counts, eos_token_id=())
        assert [each.ids for each in got] == [ids[:count] for ids, count in zip(wanted, counts, strict=True)]


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


SHORT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHORT |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def changing(rope_type):
    """A model whose rotary embedding has other frequencies beyond 64 positions."""
    torch.manual_seed(0)
    if rope_type == "longrope":
        rope = {"rope_type": rope_type, "rope_theta": 500.0, "original_max_position_embeddings": 64}
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
        config = Phi3Config(
            **SHORT, max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=rope
        )
        model = Phi3ForCausalLM(config)
    else:
        rope = {"rope_type": rope_type, "rope_theta": 500.0, "factor": 4.0}
        model = OlmoForCausalLM(OlmoConfig(**SHORT, max_position_embeddings=64, rope_parameters=rope))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_frequencies_do_not_change_within_what_is_served(rope_type):
    """A chunk's padding would lie beyond 64 positions, and so would a row that has ended at the last of them and goes on."""
    model = changing(rope_type)
    one = engine(model, max_seq_len=128, prefill_chunk=40)
    assert one.max_seq_len == 64
    prompts, counts = [prompt(20), prompt(60, 1)], [30, 4]
    got = one.generate(prompts, max_new_tokens=counts, eos_token_id=())
    for ids, count, each in zip(prompts, counts, got, strict=True):
        assert each.ids == generated(model, ids, count)
        assert one.generate([ids], max_new_tokens=count, eos_token_id=())[0].ids == each.ids
    with pytest.raises(ValueError, match="more than the 64 this engine"):
        one.generate([prompt(60)], max_new_tokens=5)
    model(input_ids=torch.tensor([prompt(100)]))  # which changes the frequencies
    assert one.generate(prompts[:1], max_new_tokens=30, eos_token_id=())[0].ids == got[0].ids


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_no_graph_can_hold_frequencies_that_change(rope_type):
    with pytest.raises(ValueError, match=rf"\({rope_type}\) change with the length.*graphs=False"):
        engine(changing(rope_type), graphs=True)


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


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("window", [8, 128])
def test_a_model_that_reads_the_mask_in_a_way_of_its_own_is_refused(window, wrapped):
    """Its local attention takes the rows of its mask from the length of the keys, which are the whole buffer."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512}
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, window_size=window, attention_types=[[["global", "local"], 1]]))
    with torch.no_grad():
        for parameter in model.parameters():  # weights as of a trained model: attention matters
            parameter.add_(0.08 * torch.randn_like(parameter))
    if wrapped:
        model = AdaFuseModel(model, AdaFuseConfig(r=2, num_experts=4))
    with pytest.raises(ValueError, match=r"\(gpt_neo\) computes something else on the engine's cache than by itself"):
        engine(model.eval())


def test_a_model_that_does_not_run_on_the_cache_is_refused():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = FalconForCausalLM(FalconConfig(**sizes, alibi=True, max_position_embeddings=512))
    with pytest.raises(
        ValueError, match=r"\(falcon\) does not run on the engine's cache \(ValueError: .*use model.gen"
    ):
        engine(model.eval())


def test_a_window_that_a_family_does_not_look_at_changes_nothing():
    config = OlmoConfig(**SHORT, max_position_embeddings=256, sliding_window=10)
    model, ids = OlmoForCausalLM(config).eval(), prompt(40)
    got = engine(model).generate([ids], max_new_tokens=20, eos_token_id=())[0].ids
    assert logits_of(model, ids + got)[39:-1].argmax(-1).tolist() == got


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_engine_for_a_few_tokens_is_tried_out_too(count):
    model = a_model("gpt2")
    (got,) = engine(model, max_seq_len=count + 1).generate([prompt(count)], max_new_tokens=1, eos_token_id=())
    assert got.ids == generated(model, prompt(count), 1)


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
    mixed = Qwen3NextConfig(**SHORT, head_dim=8, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ValueError, match="has blocks of type linear_attention, whose state the engine does not keep"):
        engine(Qwen3NextForCausalLM(mixed))
