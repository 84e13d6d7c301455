"""What users do with an engine, in turn: batches, samples, streams that end early, errors in the middle. For tests of what stays."""

from unittest import mock

import pytest

PROMPTS = [[1, 2, 3], [4], list(range(5, 25))]
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
KINDS = 8


def whatever_a_user_does(engine, n):
    """Number n of a series; it repeats after KINDS. The engine has a tokenizer, an adapter, and room for two sequences of 64 tokens."""
    kind, given = n % KINDS, {"max_new_tokens": 4, "eos_token_id": ()}
    if kind == 0:
        engine.generate(PROMPTS[:1], **given)
    elif kind == 1:
        engine.generate(PROMPTS[1:], **given, **SAMPLED)
    elif kind == 2:
        engine.generate(PROMPTS[:2], **given, logprobs=2, return_routing=True)
    elif kind == 3:
        list(engine.stream(PROMPTS[0], **given))
    elif kind == 4:
        _left_early(engine, "close")
    elif kind == 5:
        _left_early(engine, "cancel")
    elif kind == 6:
        _fails(engine, "step", KeyboardInterrupt)
    else:
        _fails(engine, "prefill", RuntimeError)
        with pytest.raises(ValueError, match="more than the 64 this engine serves"):
            engine.generate([[1] * 64], **given)


def _left_early(engine, how):
    stream = engine.stream(PROMPTS[2], max_new_tokens=20, eos_token_id=())
    next(stream, None)
    getattr(stream, how)()
    assert list(stream) == []


def _fails(engine, method, error):
    """At the second call, with the first done and, in graphs, a step under way."""
    original, calls = getattr(engine._runner, method), []

    def fails(*given, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error("stop")
        return original(*given, **options)

    with mock.patch.object(engine._runner, method, fails), pytest.raises(error, match="stop"):
        engine.generate(PROMPTS[1:], max_new_tokens=4, eos_token_id=())
