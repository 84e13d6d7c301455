"""requests: what a user asks of the engine, checked, as one Sequence a prompt."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from adafuse.data import prompt_ids
from adafuse.engine.sampling import Sampling, is_whole
from adafuse.engine.sequence import Sequence
from adafuse.engine.text import TextStream


@dataclass(frozen=True)
class Limits:
    """What an engine takes. positions: the longest sequence; vocab_size: ids that have an embedding."""

    positions: int
    batch: int
    vocab_size: int


def read_requests(prompts, settings: dict, *, limits: Limits, tokenizer, ends, stop=()) -> list[Sequence]:
    """A Sequence for each prompt. settings: those of Sampling, each one value for all or a list with one for each prompt.

    ValueError for what cannot be run, naming the prompt.
    """
    if isinstance(prompts, str) or not isinstance(prompts, ListLike):
        advice = "pass [prompt]" if isinstance(prompts, str) else "pass its input_ids as lists, without padding"
        raise ValueError(
            f"prompts must be a list of strings or of lists of token ids, got {type(prompts).__name__}; {advice}"
        )
    if len(prompts) > limits.batch:
        raise ValueError(
            f"{len(prompts)} prompts are more than max_batch={limits.batch}; pass them in parts, or make an Engine with a larger max_batch"
        )
    stop = _stop_strings(stop, tokenizer)
    sequences = []
    for number, prompt in enumerate(prompts):
        sampling = Sampling(**{name: _of_prompt(name, value, number, len(prompts)) for name, value in settings.items()})
        ids = _ids(prompt, number, tokenizer, limits.vocab_size)
        _check_length(ids, sampling, number, limits.positions)
        text = TextStream(tokenizer, stop, sampling.min_new_tokens) if tokenizer is not None else None
        sequences.append(Sequence(ids, sampling, ends, text))
    return sequences


def end_ids(given, base, tokenizer) -> frozenset[int]:
    """Ids that end a text. given: an id or several, `()` for none; None: the base's generation config's, and the tokenizer's EOS,
    which training puts behind answers."""
    if given is not None:
        several = tuple(given) if isinstance(given, (list, tuple, set, frozenset)) else (given,)
        if wrong := [each for each in several if not _is_id(each)]:
            raise ValueError(
                f"eos_token_id={wrong[0]!r}: allowed are token ids, whole numbers from 0, one or a list of them"
            )
        return frozenset(map(int, several))
    configured = getattr(base.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset({*configured, tokenizer.eos_token_id if tokenizer is not None else None} - {None})


def _of_prompt(name, value, number, count):
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != count:
        raise ValueError(
            f"{name} is a list of {len(value)} for {count} prompt(s); pass one value for all, or one for each"
        )
    return value[number]


def _ids(prompt, number, tokenizer, vocab_size) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"prompt {number} is a string and the engine has no tokenizer; pass Engine(..., tokenizer=...) or token ids"
            )
        if not prompt and not _begins(tokenizer):
            raise ValueError(
                f"prompt {number} is empty, and the tokenizer puts no BOS in front of a text; it needs one token or more to continue from"
            )
        prompt = prompt_ids(tokenizer, prompt)
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(ids, (list, tuple)):
        raise ValueError(f"prompt {number} must be a string or a list of token ids, got {type(prompt).__name__}")
    if not ids:
        raise ValueError(f"prompt {number} is empty; it needs one token or more to continue from")
    if wrong := [each for each in ids if not _is_id(each) or each >= vocab_size]:
        raise ValueError(
            f"prompt {number} has the token id {wrong[0]!r}; allowed are whole numbers from 0 to {vocab_size - 1}"
        )
    return [int(each) for each in ids]


def _begins(tokenizer) -> bool:
    """Whether the tokenizer puts a BOS in front of every text: an empty one can be continued from it."""
    return tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


def _is_id(value):
    return is_whole(value) and value >= 0


def _check_length(ids, sampling, number, positions):
    if len(ids) + sampling.max_new_tokens > positions:
        raise ValueError(
            f"prompt {number}: its {len(ids)} tokens and {sampling.max_new_tokens} new ones are more than the {positions} this engine "
            "serves (its max_seq_len, or the model's positions if fewer); shorten the prompt, ask for fewer new tokens, or make an "
            "Engine with a larger max_seq_len"
        )


def _stop_strings(stop, tokenizer) -> tuple[str, ...]:
    if stop is not None and not isinstance(stop, (str, list, tuple)):
        raise ValueError(f"stop must be a string or a list of strings, got {type(stop).__name__}")
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if wrong := [each for each in stop if not isinstance(each, str) or not each]:
        raise ValueError(f"stop={wrong[0]!r}: allowed are strings of one character or more")
    if stop and tokenizer is None:
        raise ValueError(
            f"stop={stop[0]!r} needs the text, and the engine has no tokenizer; pass Engine(..., tokenizer=...)"
        )
    return stop
