"""Text for the terminal: what is generated, streamed and coloured, and what is refused."""

import pytest
import torch
from byte_models import adapted, save_adapted
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_text import EOS, tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from adafuse import Engine
from adafuse.base import load_adapted
from adafuse.generation import COLOURS, coloured, engine_text, generate_text, legend, run_generation

UNPRINTED = str.maketrans("", "", "\a\b\v\f\r")  # rich leaves out what would move the cursor


@pytest.fixture(scope="module")
def shared_model():
    return adapted(routing="layer")


@torch.no_grad()
def slow_greedy(model, ids, count):
    """The most likely token, one full forward each."""
    ids = list(ids)
    for _ in range(count):
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[-count:]


def slow_colours(model, tok, ids, decision=0, before=()):
    """(character, colour) of each character of the text; a character has the colour of its last byte."""
    experts = model.route(torch.tensor([[*before, *ids]])).experts[0, len(before) :, decision, 0].tolist()
    colours = [COLOURS[expert % len(COLOURS)] for expert in experts]
    found, last = [], -1
    for character in tok.decode(ids):
        last += len(character.encode())
        found.append((character, colours[last]))
    return [(character, colour) for character, colour in found if character.translate(UNPRINTED)]


def characters(text):
    """(character, colour) of each character of a rich Text."""
    return [(c, str(span.style)) for span in text.spans for c in text.plain[span.start : span.end]]


def test_greedy_is_the_loop(shared_model):
    model, tok = shared_model
    ids = generate_text(model, tok, "one ", max_new_tokens=12)
    assert ids == slow_greedy(model, tok("one ").input_ids, 12)
    assert len(set(ids)) > 3


def test_sampling_takes_what_top_p_leaves_and_nothing_else(shared_model):
    """From one prompt, 200 first tokens: of temperature 3 with top_p 1 more than 50 (HuggingFace's own top-k), with a tiny top_p one."""
    model, tok = shared_model
    wide = {generate_text(model, tok, "a", max_new_tokens=1, temperature=3.0)[0] for _ in range(200)}
    narrow = {generate_text(model, tok, "a", max_new_tokens=1, temperature=3.0, top_p=1e-6)[0] for _ in range(5)}
    assert len(wide) > 50
    assert narrow == {generate_text(model, tok, "a", max_new_tokens=1)[0]}


@pytest.mark.parametrize("where", ["tokenizer", "model", "list"])
def test_generation_stops_at_an_end_of_the_model_or_the_tokenizer(shared_model, where):
    model, tok = shared_model[0], tokenizer()
    free = generate_text(model, tok, "one ", max_new_tokens=12)
    end = free[5]
    config = model.get_base_model().generation_config
    try:
        if where == "tokenizer":
            tok.eos_token = tok.convert_ids_to_tokens(end)
        else:
            config.eos_token_id = end if where == "model" else [end, 256]
        assert generate_text(model, tok, "one ", max_new_tokens=12) == free[: free.index(end) + 1]
    finally:
        config.eos_token_id = None


def test_chat_and_empty_prompts(shared_model):
    model, tok = shared_model[0], tokenizer(chat=True)
    written_out = generate_text(model, tok, "<user>hi<assistant>", max_new_tokens=4)
    assert generate_text(model, tok, "hi", max_new_tokens=4, chat=True) == written_out
    assert generate_text(model, tok, "", max_new_tokens=4) == slow_greedy(model, [tok.eos_token_id], 4)
    with pytest.raises(ValueError, match="no chat template"):
        generate_text(*shared_model, "hi", chat=True)


def test_the_last_position_can_be_filled(shared_model):
    assert len(generate_text(*shared_model, "a" * 60, max_new_tokens=4)) == 4
    with pytest.raises(ValueError, match="60 tokens and 5 new ones are more than the 64 the model allows; shorten"):
        generate_text(*shared_model, "a" * 60, max_new_tokens=5)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"max_new_tokens": 0}, {"top_p": 0.0}, {"top_p": 1.5, "temperature": 1.0}]
)
def test_settings_out_of_range_are_refused(shared_model, wrong):
    with pytest.raises(ValueError, match="allowed are"):
        generate_text(*shared_model, "a", **wrong)


def test_a_prompt_without_anything_to_start_from_is_refused(shared_model):
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        generate_text(shared_model[0], tok, "")


def test_the_mode_of_the_model_comes_back_and_dropout_is_off(shared_model):
    model, tok = adapted(routing="layer", lora_dropout=0.9)
    model.train()
    assert generate_text(model, tok, "one ", max_new_tokens=8) == generate_text(*shared_model, "one ", max_new_tokens=8)
    assert model.training


def test_a_stream_prints_the_text(shared_model, capsys):
    model, tok = shared_model
    ids = generate_text(model, tok, "one ", max_new_tokens=20, stream=True)
    assert capsys.readouterr().out == tok.decode(ids, skip_special_tokens=True) + "\n"


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1, max_size=10), decision=st.integers(0, 1))
def test_colouring_is_the_text_each_character_in_its_colour(shared_model, text, decision):
    model, tok = shared_model
    ids = tok(text).input_ids
    got = coloured(model, tok, ids, decision)
    assert got.plain == text.translate(UNPRINTED)
    assert characters(got) == slow_colours(model, tok, ids, decision)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 256), st.sampled_from([0, 163, 227, 131])), min_size=1, max_size=12))
def test_colouring_reproduces_whatever_was_generated(shared_model, ids):
    """Half characters, bytes that are no UTF-8, end tokens: what the tokenizer makes of them, once."""
    model, tok = shared_model
    assert coloured(model, tok, ids).plain == tok.decode(ids, skip_special_tokens=True).translate(UNPRINTED)


def test_a_text_cut_within_a_character_keeps_what_is_there(shared_model):
    model, tok = shared_model
    cut = tok("a🙂").input_ids[:-1]
    assert coloured(model, tok, cut).plain == tok.decode(cut) == "a\N{REPLACEMENT CHARACTER}"


def test_a_half_character_does_not_repeat_the_one_before_it(shared_model):
    """Tokenizers with byte fallback decode a run of bytes as a whole: C3 A9 is é, C3 A9 C3 is three question marks."""
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Tokenizer(models.BPE(names, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tok = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tok.decode([0xC3, 0xA9, 0xC3]) == 3 * "\N{REPLACEMENT CHARACTER}"
    got = coloured(shared_model[0], tok, [0xC3, 0xA9, 0xC3, 0xA9])
    assert got.plain == "éé"
    assert [span.end - span.start for span in got.spans] == [1, 1]


def test_special_tokens_do_not_show(shared_model):
    model, tok = shared_model
    assert coloured(model, tok, tok(f"a{EOS}b").input_ids).plain == "ab"


def test_a_router_that_sees_positions_needs_the_prompt():
    model, tok = adapted("gpt2", num_experts=8, top_k=1)
    before, ids = tok("to be or not").input_ids, tok(" to be").input_ids
    assert characters(coloured(model, tok, ids, before=before)) == slow_colours(model, tok, ids, before=before)
    assert characters(coloured(model, tok, ids)) != slow_colours(model, tok, ids, before=before)


def test_the_legend_names_every_expert_once():
    shown = legend(10)
    assert shown.plain == "first expert of a token: " + "".join(f"{e} " for e in range(10))
    assert [str(span.style) for span in shown.spans] == [f"bold {COLOURS[e % 8]}" for e in range(10)]


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("show_experts", [False, True])
def test_the_command(tmp_path, capsys, show_experts):
    _, adapter = save_adapted(tmp_path)
    console = Console(width=5)
    run_generation(adapter, None, "one ", show_experts=show_experts, console=console, max_new_tokens=24)
    printed = capsys.readouterr().out
    model, tok = load_adapted(adapter)
    text = tok.decode(generate_text(model, tok, "one ", max_new_tokens=24), skip_special_tokens=True)
    assert printed.startswith(text)
    assert ("first" in printed) == show_experts


@pytest.mark.parametrize("show_experts", [False, True])
def test_the_command_by_the_engine_prints_the_same(tmp_path, capsys, monkeypatch, show_experts):
    """As on a GPU; here the engine computes in plain PyTorch."""
    _, adapter = save_adapted(tmp_path)
    printed, engines = [], []
    monkeypatch.setattr("adafuse.generation.Engine", lambda *a, **k: engines.append(Engine(*a, **k)) or engines[-1])
    for on_gpu in (False, True):
        monkeypatch.setattr("adafuse.generation._on_gpu", lambda model, on_gpu=on_gpu: on_gpu)
        run_generation(adapter, None, "one ", show_experts=show_experts, console=Console(width=5), max_new_tokens=24)
        printed.append(capsys.readouterr().out)
        assert len(engines) == on_gpu
    assert printed[0] == printed[1]


@pytest.mark.parametrize("kind", [ValueError, ImportError])
def test_a_model_that_the_engine_does_not_run_is_generated_from_and_it_says_so(tmp_path, capsys, monkeypatch, kind):
    def refuse(*_, **__):
        raise kind("a Linear4bit is no plain nn.Linear")

    _, adapter = save_adapted(tmp_path)
    monkeypatch.setattr("adafuse.generation._on_gpu", lambda model: True)
    monkeypatch.setattr("adafuse.generation.Engine", refuse)
    run_generation(adapter, None, "one ", max_new_tokens=4)
    found = capsys.readouterr()
    assert "not on the engine, but by transformers' generate: a Linear4bit is no plain nn.Linear\n" in found.err
    assert found.out.strip()
    with pytest.raises(ValueError, match="1 new token or more"):
        run_generation(adapter, None, "one ", max_new_tokens=-5)
    assert "not on the engine" not in capsys.readouterr().err


def test_the_engine_gives_the_same_tokens_and_refuses_the_same(shared_model):
    model, tok = shared_model
    one = Engine(model, max_seq_len=64, max_batch=1, tokenizer=tok)
    assert engine_text(one, "one ", max_new_tokens=24) == generate_text(model, tok, "one ", max_new_tokens=24)
    draws = {tuple(engine_text(one, "a", max_new_tokens=3, temperature=3.0)) for _ in range(20)}
    assert len(draws) > 10
    with pytest.raises(ValueError, match="allowed are a temperature of 0 or more"):
        engine_text(one, "a", temperature=-1.0)


def test_the_command_colours_by_what_the_prompt_led_to(monkeypatch, capsys):
    model, tok = adapted("gpt2", num_experts=8, top_k=1)
    monkeypatch.setattr("adafuse.generation.load_adapted", lambda *_, **__: (model, tok))
    console = Console(force_terminal=True, color_system="256", width=100)
    run_generation("adapter", None, "to be ", show_experts=True, console=console, max_new_tokens=12)
    printed = capsys.readouterr().out
    ids = generate_text(model, tok, "to be ", max_new_tokens=12)
    console.print(coloured(model, tok, ids, before=tok("to be ").input_ids), soft_wrap=True)
    assert printed.startswith(capsys.readouterr().out)


def test_the_seed_decides_what_is_sampled(tmp_path, capsys):
    _, adapter = save_adapted(tmp_path)
    printed = []
    for seed in (3, 3, 4):
        run_generation(adapter, None, "one ", seed=seed, temperature=1.0, max_new_tokens=24)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
