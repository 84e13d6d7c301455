"""Text of the engine: pieces that join to the text, whole characters, stop strings across tokens; streams and their ends."""

import threading
import time

import pytest
import torch
from byte_models import adapted
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import EOS, tokenizer
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from adafuse import Engine
from adafuse.engine.text import TextStream

HALF = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def engine():
    model, tok = adapted(routing="layer")
    return Engine(model, max_seq_len=64, tokenizer=tok, prefill_chunk=16)


def pieces_of(tok, ids, stop=(), min_tokens=0):
    """(pieces, the stream) of tokens pushed one by one until the stream stops."""
    stream, pieces = TextStream(tok, stop, min_tokens), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=20), stop=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_pieces_are_whole_characters_up_to_the_first_stop_string(text, stop):
    tok = tokenizer()
    pieces, stream = pieces_of(tok, tok(text).input_ids, tuple(stop))
    places = [place for each in stop if (place := text.find(each)) >= 0]
    assert "".join(pieces) == stream.text == text[: min(places, default=len(text))]
    assert stream.stopped == bool(places)
    assert not any(HALF in piece for piece in pieces) or HALF in text


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 256), st.sampled_from([0, 163, 227, 131])), max_size=12))
def test_whatever_bytes_come_the_pieces_are_what_the_tokenizer_makes_of_them(ids):
    tok = tokenizer()
    pieces, stream = pieces_of(tok, ids)
    assert "".join(pieces) == stream.text == tok.decode(ids, skip_special_tokens=True)


def test_every_character_comes_as_soon_as_it_is_whole():
    tok = tokenizer()
    pieces, _ = pieces_of(tok, tok("aé🙂b").input_ids)
    assert pieces == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_a_text_cut_within_a_character_says_so_at_its_end():
    tok = tokenizer()
    pieces, _ = pieces_of(tok, tok("a🙂").input_ids[:-1])
    assert pieces == ["a", "", "", "", HALF]


def test_what_may_begin_a_stop_string_is_held_back():
    tok = tokenizer()
    assert pieces_of(tok, tok("xENxEND.").input_ids, ("END",))[0] == ["x", "", "", "ENx", "", "", "", ""]
    assert pieces_of(tok, tok("aaab").input_ids, ("aab",))[0] == ["", "", "a", "", ""]
    assert pieces_of(tok, tok("xEN").input_ids, ("END",))[0] == ["x", "", "", "EN"]


def test_the_earliest_of_several_stop_strings_counts():
    tok = tokenizer()
    assert pieces_of(tok, tok("one two").input_ids, ("two", "e t", " t"))[1].text == "on"


def test_stop_strings_count_from_the_minimum_on():
    tok = tokenizer()
    assert pieces_of(tok, tok("a.b.c.").input_ids, (".",), min_tokens=2)[1].text == "a.b"


def test_a_stop_string_that_began_before_the_minimum_counts():
    tok = tokenizer()
    ids = [tok("a").input_ids[0], tok("b").input_ids[0], tok("c").input_ids[0]]
    pieces, text = pieces_of(tok, ids, ("bc",), min_tokens=2)
    assert text.text == "a" == "".join(pieces)
    assert pieces_of(tok, ids, ("bc",), min_tokens=3)[1].text == "abc"


def words():
    """A tokenizer of words that begin with their space, which decoding takes from the first, as Llama 2's."""
    vocabulary = {"<unk>": 0, "▁one": 1, "▁two": 2, "x": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>")


def test_spaces_between_words_are_those_of_the_whole():
    tok, ids = words(), [1, 2, 3, 0, 2, 1]
    pieces, stream = pieces_of(tok, ids)
    assert stream.text == tok.decode(ids, skip_special_tokens=True) == "one twox two one"
    assert pieces == ["one", " two", "x", "", " two", " one", ""]


def test_byte_fallback_gives_each_character_once():
    tok, ids = words(), [4 + byte for byte in "é🙂é".encode()]
    assert pieces_of(tok, ids)[0] == ["", "é", "", "", "", "🙂", "", "é", ""]
    # A half character makes the tokenizer doubt the one in front of it; what was given out stays.
    assert tok.decode(ids[:3]) == 3 * HALF
    assert pieces_of(tok, ids[:3])[0] == ["", "é", "", 2 * HALF]


# --- in the engine ---------------------------------------------------------------------------------------------------


def test_texts_are_those_of_the_ids(engine):
    for got in engine.generate(["one ", "to be or not", "é"], max_new_tokens=40):
        assert got.text == engine.tokenizer.decode(got.ids, skip_special_tokens=True)
        assert got.prompt_ids in [engine.tokenizer(text).input_ids for text in ("one ", "to be or not", "é")]


def test_strings_and_ids_are_the_same_prompts(engine):
    ids = engine.tokenizer("one ").input_ids
    assert engine.generate(["one "], max_new_tokens=9) == engine.generate([ids], max_new_tokens=9)


def test_an_empty_prompt_is_refused_unless_the_tokenizer_begins_it():
    model, tok = adapted()
    one = Engine(model, max_seq_len=64, tokenizer=tok)
    with pytest.raises(ValueError, match="prompt 1 is empty, and the tokenizer puts no BOS in front of a text"):
        one.generate(["a", ""], max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        one.stream("", max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt 0 is empty; it needs one token or more"):
        one.generate([[]])
    tok.bos_token = EOS
    with pytest.raises(ValueError, match="puts no BOS"):  # it has one, and does not use it
        one.generate([""])
    tok._tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, tok.bos_token_id)])
    assert one.generate([""], max_new_tokens=3)[0].prompt_ids == [tok.bos_token_id]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.5, "seed": 4, "top_k": 30}])
def test_a_stream_joins_to_the_text(engine, options):
    (got,) = engine.generate(["one "], max_new_tokens=50, **options)
    pieces = list(engine.stream("one ", max_new_tokens=50, **options))
    assert "".join(pieces) == got.text
    assert all(pieces)
    assert len(pieces) > 5


def test_the_tokenizers_end_token_ends_a_text():
    model, tok = adapted()
    one = Engine(model, max_seq_len=64, tokenizer=tok)
    free = one.generate(["one "], max_new_tokens=30, eos_token_id=())[0].ids
    tok.eos_token = tok.convert_ids_to_tokens(free[10])
    (got,) = one.generate(["one "], max_new_tokens=30)
    assert got.finish_reason == "stop"
    assert got.ids == free[: free.index(free[10]) + 1]
    assert tok.eos_token != EOS


def test_stop_strings_end_a_text(engine):
    (free,) = engine.generate(["one "], max_new_tokens=40, temperature=1.0, seed=5)
    stop = free.text[12:15]
    (got,) = engine.generate(["one "], max_new_tokens=40, temperature=1.0, seed=5, stop=["never there", stop])
    assert got.finish_reason == "stop"
    assert got.text == free.text[: free.text.find(stop)]
    assert got.ids == free.ids[: len(got.ids)]
    assert stop in engine.tokenizer.decode(got.ids)
    streamed = "".join(engine.stream("one ", max_new_tokens=40, temperature=1.0, seed=5, stop=stop))
    assert streamed == got.text
    later = engine.generate(["one "], 40, temperature=1.0, seed=5, stop=stop, min_new_tokens=len(got.ids))[0]
    assert len(later.ids) > len(got.ids)


def test_a_closed_stream_frees_the_engine(engine):
    wanted = engine.generate(["one "], max_new_tokens=20)
    stream = engine.stream("to be", max_new_tokens=40)
    next(stream)
    with pytest.raises(ValueError, match="one generation at a time; exhaust or close"):
        engine.generate(["one "], max_new_tokens=20)
    with pytest.raises(ValueError, match="one generation at a time"):
        next(engine.stream("one ", max_new_tokens=20))
    stream.close()
    assert engine.generate(["one "], max_new_tokens=20) == wanted
    unstarted = engine.stream("to be", max_new_tokens=40)
    assert engine.generate(["one "], max_new_tokens=20) == wanted
    assert "".join(unstarted) == engine.generate(["to be"], max_new_tokens=40)[0].text


@pytest.mark.parametrize("method", ["cancel", "close"])
def test_a_stream_can_be_ended_from_another_thread(engine, monkeypatch, method):
    wanted, whole = (engine.generate([text], max_new_tokens=40)[0] for text in ("one ", "to be"))
    in_a_step, go_on, pieces = threading.Event(), threading.Event(), []
    step = engine._runner.step

    def slow(*given, **options):
        if len(stream.ids) == 5:
            in_a_step.set()
            assert go_on.wait(30)
        return step(*given, **options)

    monkeypatch.setattr(engine._runner, "step", slow)
    stream = engine.stream("to be", max_new_tokens=40)
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    assert in_a_step.wait(30)
    ending = threading.Thread(target=getattr(stream, method))
    ending.start()
    if method == "cancel":
        ending.join(30)
        assert not ending.is_alive()  # it waits for nothing
    else:
        while not stream._cancelled.is_set():
            time.sleep(0.001)
    go_on.set()
    for thread in (ending, reader):
        thread.join(30)
        assert not thread.is_alive()
    assert stream.ids == whole.ids[:6]
    assert whole.text.startswith("".join(pieces))
    with pytest.raises(StopIteration):
        next(stream)
    assert engine.generate(["one "], max_new_tokens=40)[0] == wanted


def test_a_stream_that_is_closed_within_a_step_frees_the_engine(engine, monkeypatch):
    """As a signal's handler may do it, in the thread that reads."""
    step = engine._runner.step

    def closing(*given, **options):
        stream.close()
        return step(*given, **options)

    stream = engine.stream("to be", max_new_tokens=40)
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "step", closing)
        next(stream)
    assert engine.generate(["one "], max_new_tokens=5)[0].ids
    with pytest.raises(StopIteration):
        next(stream)


def test_a_stream_that_was_cancelled_between_pieces_is_at_its_end(engine):
    stream = engine.stream("to be", max_new_tokens=40)
    next(stream)
    stream.cancel()
    assert list(stream) == []
    stream.close()
    assert engine.generate(["one "], max_new_tokens=5)[0].ids


def test_a_stream_that_is_dropped_frees_the_engine(engine):
    for _ in engine.stream("to be", max_new_tokens=40):
        break
    assert engine.generate(["one "], max_new_tokens=5)[0].ids


def test_an_error_of_the_consumer_frees_the_engine(engine):
    def consume():
        for _ in engine.stream("to be", max_new_tokens=40):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert engine.generate(["one "], max_new_tokens=5)[0].ids


def test_a_stream_is_checked_before_it_begins(engine):
    with pytest.raises(ValueError, match="top_k=5"):
        engine.stream("one", top_k=5)
    with pytest.raises(ValueError, match=r"more than the 64 this engine serves"):
        engine.stream("one", max_new_tokens=62)
    with pytest.raises(TypeError, match="unexpected keyword"):
        engine.stream("one", beams=4)
    for asked in ({"logprobs": 0}, {"return_routing": True}):
        with pytest.raises(ValueError, match=r"stream yields text only; .* are settings of generate"):
            engine.stream("one", **asked)


def test_gradients_of_the_consumer_are_left_alone(engine):
    for _ in engine.stream("abc", max_new_tokens=8):
        assert torch.is_grad_enabled()
