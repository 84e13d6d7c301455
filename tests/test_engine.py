"""The engine against HuggingFace: the same tokens, whatever the family, the adapter, the batch and the chunks."""

import gc
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from engine_models import NAMES, adapted, bare, generated, logits_of, prompt, roomy
from engine_uses import KINDS, whatever_a_user_does
from families import VOCAB, fill
from reference import relative_error
from tiny_text import tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from adafuse import AdaFuseConfig, AdaFuseModel, Engine
from adafuse.demo.smollm2 import load_smollm2

ADAPTERS = {
    "model": {"routing": "model"},
    "layer": {"routing": "layer"},
    "shared": {"routing": "layer", "shared_rank": 3, "router_hidden": 6, "num_experts": 5, "r": 3, "top_k": 1},
    "partial": {"target_modules": ["q_proj", "o_proj", "up_proj"], "top_k": 4},
}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.1, 2.2, 2.3],
        "original_max_position_embeddings": 256,
    },
}


def engine(model, **options) -> Engine:
    return Engine(model, **{"max_seq_len": 256, "max_batch": 4, "prefill_chunk": 32, **options})


# --- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_two_hundred_greedy_tokens_are_those_of_huggingface(name, adapter):
    model = bare(name) if adapter is None else adapted(name, **ADAPTERS[adapter])
    ids = prompt(41)
    wanted = generated(model, ids, 200)
    (got,) = engine(model).generate([ids], max_new_tokens=200)
    assert got.ids == wanted
    assert len(set(wanted)) > 4  # a text of one token would show nothing
    assert (got.prompt_ids, got.finish_reason, got.text) == (ids, "length", None)


def test_two_hundred_greedy_tokens_of_smollm2():
    """The real model, with experts that change its text."""
    try:
        folder = load_smollm2()
    except ImportError as missing:
        pytest.skip(str(missing))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time, at the edge of a large forest,").input_ids
    model = AdaFuseModel(base, AdaFuseConfig(r=2, num_experts=4, top_k=2)).eval()
    fill(model)
    model.load_adapter_tensors(
        {name: t / 8 if "experts_b" in name else t for name, t in model.adapter_tensors().items()}
    )
    wanted = generated(model, ids, 200)
    assert Engine(model, max_seq_len=256).generate([ids], max_new_tokens=200)[0].ids == wanted
    assert len(set(wanted)) > 4
    assert wanted[:20] != generated(model.detach(), ids, 20)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_scalings(rope):
    model, ids = bare(rope_parameters=ROPES[rope]), prompt(41)
    plain = generated(bare(), ids, 200)
    wanted = generated(model, ids, 200)
    assert engine(model).generate([ids], max_new_tokens=200)[0].ids == wanted
    assert rope == "dynamic" or wanted != plain


def test_frequencies_that_grew_with_a_long_text_do_not_stay():
    model = bare(rope_parameters=ROPES["dynamic"], max_position_embeddings=64)
    ids = prompt(20)
    wanted = generated(model, ids, 40)
    logits_of(model, prompt(100))
    got = Engine(model, prefill_chunk=16)
    assert got.max_seq_len == 64
    assert got.generate([ids], max_new_tokens=40)[0].ids == wanted


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 70}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "layer_types": None}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "layer_types": None}),
    ],
)
def test_variants_of_the_families(name, changes):
    model, ids = adapted(name, base=changes, routing="layer"), prompt(37)
    assert engine(model).generate([ids], max_new_tokens=120)[0].ids == generated(model, ids, 120)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_huggingface(name, dtype):
    """Log probabilities of the engine's own tokens, against the same weights in fp32."""
    model, ids = adapted(name, dtype, routing="layer"), prompt(40)
    (got,) = engine(model).generate([ids], max_new_tokens=30, logprobs=0)
    whole = ids + got.ids
    exact = adapted(name, routing="layer")
    exact.get_base_model().load_state_dict(model.get_base_model().state_dict())
    picked = torch.tensor(got.ids)[:, None]

    def of(other):
        return logits_of(other, whole[:-1])[39:].log_softmax(-1).gather(-1, picked)[:, 0]

    wanted = of(exact)
    mine = (torch.tensor([each.logprob for each in got.logprobs]) - wanted).square().mean().sqrt()
    theirs = (of(model) - wanted).square().mean().sqrt()
    assert mine < 1.5 * theirs + 1e-4


@pytest.mark.parametrize("model", [bare("mistral"), adapted("qwen3", routing="layer", shared_rank=2)])
def test_a_batch_of_different_lengths_is_each_alone(model):
    prompts = [prompt(length, seed) for seed, length in enumerate((1, 70, 33, 32))]
    lengths = [60, 20, 40, 1]
    together = engine(model).generate(prompts, max_new_tokens=lengths)
    for ids, length, got in zip(prompts, lengths, together, strict=True):
        assert got.ids == generated(model, ids, length)
    alone = engine(model)
    assert [alone.generate([ids], n)[0] for ids, n in zip(prompts, lengths, strict=True)] == together


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 199])
def test_chunks_of_a_prompt_are_the_whole(length):
    model, ids = adapted("mistral", routing="layer"), prompt(length)
    logits = []
    for chunk in (1, 7, 64, 256):
        one = engine(model, prefill_chunk=chunk, max_seq_len=200)
        one.generate([ids], max_new_tokens=1)
        logits.append(one._runner.logits[0])
    for other in logits:
        assert relative_error(other, logits_of(model, ids)[-1]) < 1e-5


def test_the_last_position_can_be_filled_and_no_more():
    model, ids = bare(), prompt(50)
    one = engine(model, max_seq_len=100, prefill_chunk=64)
    assert one.generate([ids], max_new_tokens=50)[0].ids == generated(model, ids, 50)
    with pytest.raises(ValueError, match="50 tokens and 51 new ones are more than the 100 this engine serves"):
        one.generate([ids], max_new_tokens=51)


def test_a_full_row_stays_where_it_is_while_others_go_on():
    model, prompts = bare(), [prompt(90), prompt(5, 1)]
    got = engine(model, max_seq_len=96).generate(prompts, max_new_tokens=[6, 60])
    assert [each.ids for each in got] == [generated(model, prompts[0], 6), generated(model, prompts[1], 60)]


def test_padding_of_a_prompt_is_a_token_of_it():
    """Attention gives it the weight 0, which would not hide a NaN."""
    model, ids = bare(), prompt(20)
    model.model.embed_tokens.weight.data[0] = torch.nan
    assert engine(model).generate([ids], max_new_tokens=20)[0].ids == generated(model, ids, 20)


def test_what_an_earlier_generation_left_behind_is_not_seen():
    model, ids = adapted(routing="layer"), prompt(20)
    one = engine(model)
    one.generate([prompt(200, 5), prompt(150, 6)], max_new_tokens=20)
    assert one.generate([ids], max_new_tokens=60)[0].ids == generated(model, ids, 60)


# --- the model as it is ----------------------------------------------------------------------------------------------


def test_weights_that_change_later_count():
    model, ids = adapted(), prompt(20)
    one = engine(model)
    before = one.generate([ids], max_new_tokens=40)[0].ids
    for tensor in model.adapter_tensors().values():
        tensor.data.mul_(-0.7)
    model.get_base_model().lm_head.weight.data.roll(1, 0)
    after = one.generate([ids], max_new_tokens=40)[0].ids
    assert after == generated(model, ids, 40) != before


def test_weights_that_change_past_autograd_count_in_half_precision():
    model, ids = adapted(dtype=torch.bfloat16), prompt(20)
    one = engine(model)
    before = one.generate([ids], max_new_tokens=40)[0].ids
    for bank in model.banks.values():
        bank.b.data.mul_(-3)
    assert one.generate([ids], max_new_tokens=40)[0].ids == engine(model).generate([ids], 40)[0].ids != before


def test_a_disabled_adapter_is_the_backbone():
    model, ids = adapted(), prompt(20)
    one = engine(model)
    with_adapter = one.generate([ids], max_new_tokens=40)[0].ids
    with model.disable_adapter():
        assert one.generate([ids], max_new_tokens=40)[0].ids == generated(bare(), ids, 40) != with_adapter
        with pytest.raises(ValueError, match="no token is routed"):
            one.generate([ids], return_routing=True)
    assert one.generate([ids], max_new_tokens=40)[0].ids == with_adapter


def test_training_mode_and_dropout_do_not_matter():
    model, ids = adapted(lora_dropout=0.9), prompt(20)
    wanted = engine(model).generate([ids], max_new_tokens=40)[0].ids
    assert engine(model.train()).generate([ids], max_new_tokens=40)[0].ids == wanted
    assert model.training


@pytest.mark.parametrize("model", [bare, adapted, partial(roomy, "gpt2")], ids=["bare", "adapted", "another family"])
@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_leaves_the_engine_usable(model, made_inside):
    model, settings = model(), {"max_new_tokens": 4, "temperature": 1.0, "seed": 3, "repetition_penalty": 1.5}
    wanted = engine(model).generate([prompt(20)], **settings)
    with torch.inference_mode(made_inside):
        one = engine(model)
    with torch.inference_mode():
        assert one.generate([prompt(20)], **settings) == wanted
    assert one.generate([prompt(20)], **settings) == wanted


def test_a_model_without_a_generation_config_runs():
    model = bare()
    wanted = engine(model).generate([prompt(9)], max_new_tokens=4, eos_token_id=())
    model.generation_config = None
    assert engine(model).generate([prompt(9)], max_new_tokens=4) == wanted


def test_autocast_does_not_matter():
    model, ids = adapted(), prompt(20)
    with torch.autocast("cpu", torch.bfloat16):
        got = engine(model).generate([ids], max_new_tokens=40)[0].ids
    assert got == generated(model, ids, 40)


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["model", "layer", "shared"])
def test_routing_is_that_of_the_model(adapter):
    model = adapted("qwen2", **ADAPTERS[adapter])
    prompts, lengths = [prompt(50), prompt(3, 1)], [4, 30]
    for got in engine(model).generate(prompts, max_new_tokens=lengths, return_routing=True):
        wanted = model.route(torch.tensor([got.prompt_ids + got.ids[:-1]]))
        assert torch.equal(got.routing.experts, wanted.experts[0])
        torch.testing.assert_close(got.routing.weights, wanted.weights[0])
        assert got.routing.experts.shape[0] == len(got.prompt_ids) + len(got.ids) - 1


# --- buffers ---------------------------------------------------------------------------------------------------------


class NoWait(TorchDispatchMode):
    """Fails on what makes the host wait for the device, or makes shapes of values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in func.__name__ for name in self.REFUSED), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", [bare("mistral"), adapted("qwen3", routing="layer", shared_rank=2, router_hidden=4)])
def test_a_step_neither_waits_nor_moves_a_buffer(model):
    one = engine(model)
    one.generate([prompt(9), prompt(4)], max_new_tokens=3)
    runner = one._runner
    names = ("cache", "tokens", "positions", "advance", "rotary", "logits")
    before = [getattr(runner, name).data_ptr() for name in names]
    runner.advance.fill_(1)
    at, logits = runner.positions.clone(), runner.logits.clone()
    with NoWait(), torch.no_grad():
        for _ in range(3):
            runner.step(2, adapted=runner.gate is not None)
    assert [getattr(runner, name).data_ptr() for name in names] == before
    assert (runner.positions - at).tolist() == [3, 3, 0, 0]
    assert not torch.equal(logits[:2], runner.logits[:2])
    assert torch.equal(logits[2:], runner.logits[2:])
    with pytest.raises(AssertionError, match="waits for the device"), NoWait():
        runner.positions[0].item()


def test_the_plan_of_the_steps_stays_where_it_is():
    model = adapted(routing="layer")
    one = engine(model)
    one.generate([prompt(9)], max_new_tokens=3)
    plan = one._runner.gate.plan(1)
    where, before = plan.experts.data_ptr(), plan.weights.clone()
    one.generate([prompt(9, 1)], max_new_tokens=3)
    assert one._runner.gate.plan(1) is plan
    assert plan.experts.data_ptr() == where
    assert not torch.equal(before, plan.weights)


def live_bytes():
    gc.collect()
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) in (torch.Tensor, torch.nn.Parameter)  # fake tensors of other tests have no storage
    }
    return sum(storages.values())


def test_memory_is_flat():
    one = engine(adapted(dtype=torch.bfloat16, routing="layer"), max_seq_len=64, max_batch=2, tokenizer=tokenizer())

    def generations(count):
        for n in range(count):
            whatever_a_user_does(one, n)
        return live_bytes()

    assert generations(2 * KINDS) == generations(20 * KINDS)


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize(("method", "call"), [("begin", 1), ("prefill", 2), ("step", 2), ("halt", 2)])
def test_an_error_in_the_middle_leaves_the_engine_usable(monkeypatch, error, method, call):
    model, ids = adapted(), prompt(40)
    one = engine(model)
    one.generate([ids] * 2, max_new_tokens=20)
    wanted = one.generate([ids], max_new_tokens=20)
    before, calls = live_bytes(), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error("stop")
        return original(*args, **kwargs)

    original = getattr(one._runner, method)
    monkeypatch.setattr(one._runner, method, fails)
    with pytest.raises(error, match="stop") as caught:
        one.generate([ids, prompt(90, 1)], max_new_tokens=[20, 10])
    monkeypatch.undo()
    assert one.generate([ids], max_new_tokens=20) == wanted  # while the traceback still lives
    del caught
    assert live_bytes() == before


def test_ctrl_c_while_the_engine_is_taken_leaves_it_usable():
    """A signal, right behind the moment in which a generation makes the engine its own."""
    one, ids = engine(bare()), prompt(10)
    wanted = one.generate([ids], max_new_tokens=3)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it

    class Interrupted:
        def __enter__(self):
            turn.acquire()

        def __exit__(self, *_):
            turn.release()
            signal.raise_signal(signal.SIGINT)

    turn, one._turn = one._turn, Interrupted()
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            one.generate([ids], max_new_tokens=3)
    finally:
        signal.signal(signal.SIGINT, before)
    one._turn = turn
    assert one.generate([ids], max_new_tokens=3) == wanted  # while the traceback still lives
    del caught


def test_logits_that_are_no_numbers_are_reported_and_do_not_stay():
    model, ids = bare(), prompt(40)
    one = engine(model)
    wanted = one.generate([ids], max_new_tokens=20)
    weight = model.model.layers[0].self_attn.v_proj.weight
    kept = weight.data.clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits of prompt 0 after 0 new tokens are NaN or infinite"):
        one.generate([prompt(200), prompt(3)], temperature=[0.0, 1.0], top_p=[1.0, 0.5], max_new_tokens=20)
    weight.data.copy_(kept)
    assert one.generate([ids], max_new_tokens=20) == wanted


def test_an_interrupt_while_a_token_is_read_hides_no_spoilt_cache(monkeypatch):
    model, ids = bare(), prompt(20)
    one = engine(model)
    wanted = one.generate([ids], max_new_tokens=5)
    weight = model.model.layers[0].self_attn.v_proj.weight
    kept = weight.data.clone()
    weight.data.fill_(torch.nan)
    fetch, calls = one._fetch, []

    def interrupted(*given):
        read = fetch(*given)

        def wait():
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return read()

        return wait

    with monkeypatch.context() as patch:
        patch.setattr(one, "_fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.generate([prompt(30)], max_new_tokens=5)
    weight.data.copy_(kept)
    assert one.generate([ids], max_new_tokens=5) == wanted


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_row_that_has_ended_spoils_nothing_for_the_next(ahead):
    """Its last token, whose embedding is no number, is run once more while the other row goes on, or in a step that is thrown away."""
    model, prompts = bare(), [prompt(20), prompt(30, 1)]
    texts = [generated(model, ids, 30) for ids in prompts]
    end = next(token for token in texts[0] if token not in [*texts[1], *prompts[0], *prompts[1]])
    at = texts[0].index(end)
    model.model.embed_tokens.weight.data[end] = torch.nan
    one = engine(model)
    one._ahead = ahead  # as with graphs
    wanted = one.generate([[1, 2, 3]], max_new_tokens=5, eos_token_id=())[0].ids
    lengths = [30, at + 1 + (not ahead)]
    results = one.generate(prompts, max_new_tokens=lengths, eos_token_id=end)
    assert [each.finish_reason for each in results] == ["stop", "length"]
    assert not one._runner.cache.isfinite().all()
    assert one.generate([[1, 2, 3]], max_new_tokens=5, eos_token_id=())[0].ids == wanted


def test_an_interrupted_prompt_spoils_nothing_for_the_next(monkeypatch):
    model = bare()
    one = engine(model)
    wanted = one.generate([[1, 2, 3]], max_new_tokens=5)[0].ids
    kept = model.model.embed_tokens.weight.data[90].clone()
    model.model.embed_tokens.weight.data[90] = torch.nan
    with monkeypatch.context() as patch:
        patch.setattr(one._runner, "sample", lambda sampler: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.generate([[90] * 20])
    model.model.embed_tokens.weight.data[90] = kept
    assert one.generate([[1, 2, 3]], max_new_tokens=5)[0].ids == wanted


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "settings", "says"),
    [
        ("abc", {}, r"prompts must be a list of strings or of lists of token ids, got str; pass \[prompt\]"),
        (torch.ones(1, 3), {}, "got Tensor; pass its input_ids as lists, without padding"),
        (7, {}, "got int"),
        ([5, 6], {}, "prompt 0 must be a string or a list of token ids, got int"),
        (["abc"], {}, "prompt 0 is a string and the engine has no tokenizer"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [3, VOCAB]], {}, f"prompt 1 has the token id {VOCAB}; allowed are whole numbers from 0 to {VOCAB - 1}"),
        ([[-1]], {}, "token id -1"),
        ([[1.5]], {}, "token id 1.5"),
        ([[True]], {}, "token id True"),
        ([[1]] * 5, {}, "5 prompts are more than max_batch=4"),
        ([[1] * 129], {}, "prompt 0: its 129 tokens and 128 new ones are more than the 256 this engine serves"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: allowed is a whole number, 1 or more"),
        ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        ([[1]], {"max_new_tokens": [1, 2]}, r"max_new_tokens is a list of 2 for 1 prompt\(s\)"),
        ([[1]], {"min_new_tokens": -1}, "min_new_tokens=-1"),
        ([[1]], {"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is more than max_new_tokens=8"),
        ([[1]], {"temperature": -0.1}, "temperature=-0.1: allowed is a number 0 or more"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"temperature": "1"}, "temperature='1'"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: allowed is a number above 0 and up to 1"),
        ([[1]], {"temperature": 1.0, "top_p": 1.1}, "top_p=1.1"),
        ([[1]], {"temperature": 1.0, "top_k": -1}, "top_k=-1"),
        ([[1]], {"top_k": 5}, "temperature=0 takes the likeliest token, so top_k=5 and top_p=1.0 would mean nothing"),
        ([[1]], {"top_p": 0.5}, "would mean nothing"),
        ([[1], [2]], {"top_p": 0.5, "temperature": [1.0, 0.0]}, "would mean nothing"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty=0: allowed is a number above 0"),
        ([[1]], {"seed": -1}, "seed=-1"),
        ([[1]], {"seed": 2**63}, "seed=9223372036854775808 is too large"),
        ([[1]], {"seed": "a"}, "seed='a'"),
        ([[1]], {"stop": "a"}, "stop='a' needs the text, and the engine has no tokenizer"),
        ([[1]], {"stop": [""]}, "stop='': allowed are strings of one character or more"),
        ([[1]], {"stop": 3}, "stop must be a string or a list of strings, got int"),
        ([[1]], {"logprobs": -1}, f"logprobs=-1: allowed is None or a whole number from 0 to {VOCAB}"),
        ([[1]], {"logprobs": True}, "logprobs=True"),
        ([[1]], {"logprobs": VOCAB + 1}, "logprobs=98"),
        ([[1]], {"eos_token_id": "x"}, "eos_token_id='x'"),
        ([[1]], {"eos_token_id": [3, -1]}, "eos_token_id=-1"),
        ([[1]], {"return_routing": True}, "the model has no adapter, or it is disabled, so no token is routed"),
    ],
)
def test_bad_input_is_refused(bare_engine, prompts, settings, says):
    with pytest.raises(ValueError, match=says):
        bare_engine.generate(prompts, **settings)
    assert bare_engine.generate([[1, 2]], max_new_tokens=2)[0].finish_reason == "length"


@pytest.fixture(scope="module")
def bare_engine():
    return engine(bare())


def test_no_prompts_give_no_results(bare_engine):
    assert bare_engine.generate([]) == []


def test_tensors_are_prompts_too(bare_engine):
    ids = prompt(9)
    assert bare_engine.generate([torch.tensor(ids)])[0].ids == bare_engine.generate([tuple(ids)])[0].ids


def test_numbers_of_numpy_are_numbers(bare_engine):
    ids, whole, real = prompt(9), np.int64, np.float32
    settings = {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.75, "top_k": 7, "seed": 3, "logprobs": 2}
    settings |= {"repetition_penalty": 1.5, "min_new_tokens": 1, "eos_token_id": 5}
    given = {name: (real if isinstance(value, float) else whole)(value) for name, value in settings.items()}
    (got,) = bare_engine.generate([[whole(each) for each in ids]], **given)
    assert got == bare_engine.generate([ids], **settings)[0]
    assert {type(each) for each in (*got.prompt_ids, *got.ids)} == {int}
    with pytest.raises(ValueError, match="allowed are whole numbers"):
        bare_engine.generate([[np.float64(3)]])


def test_any_number_may_be_top_k(bare_engine):
    settings = {"temperature": 1.0, "seed": 3, "max_new_tokens": 5}
    assert bare_engine.generate([[1]], top_k=10**30, **settings) == bare_engine.generate([[1]], **settings)


def test_streaming_needs_a_tokenizer(bare_engine):
    with pytest.raises(ValueError, match="stream yields text, and the engine has no tokenizer"):
        bare_engine.stream([1, 2])


def test_what_is_no_such_model_is_refused():
    with pytest.raises(ValueError, match="must be a HuggingFace causal LM"):
        Engine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pass the AdaFuseModel itself"):
        Engine(adapted().get_base_model())
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        Engine(bare(hidden_act="gelu"))
    model = bare()
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=r"lacks 1 module\(s\) of its family, first blocks.1.mlp.up_proj"):
        Engine(model)
    wide = bare()
    wide.lm_head = torch.nn.Linear(wide.lm_head.in_features, VOCAB + 1, bias=False)
    with pytest.raises(ValueError, match=f"has {VOCAB + 1} logits for {VOCAB} embeddings"):
        Engine(wide)
    half = bare()
    half.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="is on cpu, meta; the engine needs all of it in the memory of one device"):
        Engine(half)


@pytest.mark.parametrize("size", ["max_seq_len", "max_batch", "prefill_chunk"])
def test_sizes_are_checked(size):
    for value in (0, 1.5, True, "8"):
        with pytest.raises(ValueError, match=f"{size}={value!r}: allowed is a whole number, 1 or more"):
            Engine(bare(), **{size: value})


def test_a_model_that_was_cast_or_detached_is_refused():
    model = adapted()
    one = engine(model)
    model.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"was moved or cast \(torch.float32 on cpu before, torch.bfloat16 on cpu now\)"
    ):
        one.generate([[1]])
    model.detach()
    with pytest.raises(RuntimeError, match="detached"):
        one.generate([[1]])


def test_a_model_whose_modules_were_replaced_is_refused():
    resized, attached = bare(), bare()
    engines = [engine(resized), engine(attached)]
    resized.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(ValueError, match="modules of the model were replaced since the engine was made"):
        engines[0].generate([[1]])
    AdaFuseModel(attached)
    with pytest.raises(ValueError, match="pass the AdaFuseModel itself"):
        engines[1].generate([[1]])


def test_a_model_that_switches_needs_kernels():
    pytest.importorskip("triton")
    model = adapted()
    one = engine(model)
    model.execution = "switch"
    with pytest.raises(
        ValueError, match=r'in plain PyTorch; set model.execution = "auto", or make an Engine with kernels'
    ):
        one.generate([[1]])
    model.execution = "auto"
    assert one.generate([[1]], max_new_tokens=2)[0].ids


def test_the_engine_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; sys.path.insert(0, 'tests')\n"
        "from engine_models import adapted; from adafuse import Engine\n"
        "print(len(Engine(adapted(), max_seq_len=64).generate([[1, 2, 3]], 5)[0].ids))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip().endswith("5"), found.stderr
