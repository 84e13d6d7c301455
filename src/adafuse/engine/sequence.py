"""sequence: one prompt and what becomes of it: its tokens, its text, why it ended, and the result handed to the user."""

from __future__ import annotations

from dataclasses import dataclass

from adafuse.engine.sampling import Sampling
from adafuse.engine.text import TextStream
from adafuse.router import Routing


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a generated token's probability under the model, and of the likeliest tokens': (id, logprob), best first.

    Of softmax(logits), before temperature, cuts and penalties.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    ids: the generated tokens, an end token included. text: theirs, without special tokens, up to the stop string; None without a
    tokenizer. finish_reason: "stop" (an end token or a stop string) or "length". logprobs: one for each of ids, if asked for.
    routing: if asked for, of the tokens that were processed, the prompt and all of ids but the last: experts int64 and weights float32
    [len(prompt_ids) + len(ids) - 1, D, K].
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    routing: Routing | None = None


class Sequence:
    """A prompt while it is continued. `append` takes the next token and returns the piece of text it makes certain."""

    def __init__(self, prompt: list[int], sampling: Sampling, ends: frozenset[int], text: TextStream | None):
        self.prompt, self.sampling, self.ends, self.text = prompt, sampling, ends, text
        self.ids, self.finish_reason = [], None

    def append(self, token: int) -> str:
        self.ids.append(token)
        piece = self.text.push(token) if self.text else ""
        if token in self.ends or (self.text and self.text.stopped):
            self.finish_reason = "stop"
        elif len(self.ids) == self.sampling.max_new_tokens:
            self.finish_reason = "length"
        if self.text and self.finish_reason:
            piece += self.text.finish()
            if self.text.stopped:  # by what was held back
                self.finish_reason = "stop"
        return piece

    def result(self, logprobs=None, routing=None) -> Generation:
        text = self.text.text if self.text else None
        return Generation(self.prompt, self.ids, text, self.finish_reason, logprobs, routing)
