"""sampling: the next token of every sequence of a batch from its logits. Each row has its own settings and random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from adafuse.engine.graph import kept_tensors

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """Settings of one sequence, checked when made.

    temperature 0: the likeliest token. Above: sampled from softmax(logits / temperature), cut first to the top_k likeliest tokens
    (0: all), then to the fewest likeliest that together have probability top_p of those left.
    repetition_penalty: the logit of every token of the prompt and the text so far is divided by it if positive, multiplied if not (1:
    none). min_new_tokens: no end token before so many. seed: the same numbers for the same seed; None: new ones, of torch's generator.

    ValueError for a value out of range, and for top_k, top_p with temperature 0, which would mean nothing.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0)):
            self._take_int(name, least)
        self._take_number("temperature", "0 or more", lambda t: t >= 0)
        self._take_number("top_p", "above 0 and up to 1", lambda p: 0 < p <= 1)
        self._take_number("repetition_penalty", "above 0", lambda p: p > 0)
        if self.seed is not None:
            self._take_int("seed", 0)
            if self.seed > MAX_SEED:
                raise ValueError(f"seed={self.seed} is too large; allowed: 0 to {MAX_SEED}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}; lower the one or raise the other"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError(
                f"temperature=0 takes the likeliest token, so top_k={self.top_k} and top_p={self.top_p} would mean nothing; set a "
                "temperature above 0, or leave them out"
            )

    def _take_int(self, name, least):
        """Check a setting, and keep it as Python's own kind of number (NumPy's are taken too)."""
        value = getattr(self, name)
        if not is_whole(value) or value < least:
            raise ValueError(f"{name}={value!r}: allowed is a whole number, {least} or more")
        object.__setattr__(self, name, int(value))

    def _take_number(self, name, allowed, holds):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not holds(value):
            raise ValueError(f"{name}={value!r}: allowed is a number {allowed}")
        object.__setattr__(self, name, float(value))


class Sampler:
    """Settings of a batch as tensors [B, 1], and what has been seen and drawn so far. Computes in fp32.

    settings: a Sampling each row. prompts: their ids. ends: ids that end a text. vocab_size: V, the number of logits.
    Random numbers are drawn when it is made, from a generator of each row's own: a row does not depend on the others.
    """

    @kept_tensors
    def __init__(self, settings, prompts, *, ends, vocab_size: int, device):
        def column(name, dtype=torch.float32):
            return torch.tensor([[getattr(each, name)] for each in settings], dtype=dtype, device=device)

        self.count = torch.zeros(1, dtype=torch.int64, device=device)  # tokens sampled so far
        temperatures = column("temperature")
        self.greedy = temperatures == 0
        self.temperature = temperatures.masked_fill(self.greedy, 1.0)
        self.top_p, self.penalty = column("top_p"), column("repetition_penalty")
        top_k = [[min(each.top_k or vocab_size, vocab_size)] for each in settings]
        self.top_k = torch.tensor(top_k, dtype=torch.int64, device=device)
        self.min_new_tokens = column("min_new_tokens", torch.int64)
        self.ends = self.seen = self.uniform = None
        ends = sorted(end for end in ends if end < vocab_size)
        if ends and any(each.min_new_tokens for each in settings):
            self.ends = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.ends[torch.tensor(ends, device=device)] = True
        if any(each.temperature for each in settings):
            self.uniform = _draw(settings).to(device)
        if any(each.repetition_penalty != 1 for each in settings):
            self.seen = torch.zeros(len(settings), vocab_size, dtype=torch.bool, device=device)
            for row, ids in enumerate(prompts):
                self.seen[row, torch.tensor(ids, device=device)] = True

    @classmethod
    def room(cls, rows: int, longest: int, vocab_size: int, device) -> Sampler:
        """One that has room for whatever `take` is given: up to so many rows, of up to `longest` new tokens."""
        room = cls([Sampling()] * rows, [], ends=(), vocab_size=vocab_size, device=device)
        room.ends = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        room.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        room.uniform = torch.zeros(rows, longest, device=device)
        return room

    def take(self, other: Sampler):
        """Become another in its first rows, in the same buffers. The rows past them go on as they are: nobody reads them."""
        rows = len(other.greedy)
        self.count.copy_(other.count)
        for name in ("greedy", "temperature", "top_p", "penalty", "top_k", "min_new_tokens"):
            getattr(self, name)[:rows].copy_(getattr(other, name))
        self.ends.zero_() if other.ends is None else self.ends.copy_(other.ends)
        self.seen.zero_()
        if other.seen is not None:
            self.seen[:rows].copy_(other.seen)
        if other.uniform is not None:
            self.uniform[:rows, : other.uniform.shape[1]].copy_(other.uniform)

    @property
    def plain(self) -> bool:
        """Whether it takes the largest logit of every row and does nothing else."""
        return self.ends is None and self.seen is None and self.uniform is None

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, V] fp32 -> tokens [B] int64; -1 where the logits are NaN or infinite. No wait for the device."""
        finite = logits.amax(-1).isfinite()
        scores = logits
        if self.seen is not None:
            scores = torch.where(self.seen, penalised(scores, self.penalty), scores)
        if self.ends is not None:
            scores = scores.masked_fill((self.min_new_tokens > self.count) & self.ends, -torch.inf)
        tokens = scores.argmax(-1)
        if self.uniform is not None:
            below = scores - scores.amax(-1, keepdim=True)  # a small temperature must not make them infinite
            now = self.count.clamp(max=self.uniform.shape[1] - 1)  # a step past the last token is thrown away
            drawn = draw(below / self.temperature, self.top_k, self.top_p, self.uniform.index_select(1, now))
            tokens = torch.where(self.greedy[:, 0], tokens, drawn)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.count += 1
        return tokens.where(finite, -1)


def penalised(scores, penalty):
    """scores / penalty where positive, scores * penalty where not."""
    return torch.where(scores > 0, scores / penalty, scores * penalty)


def draw(scores, top_k, top_p, uniform) -> torch.Tensor:
    """A token of each row by the inverse of its cumulative distribution, cut to top_k and then to top_p.

    scores [B, V]: logits over temperature. top_k [B, 1] int64, top_p [B, 1], uniform [B, 1] in [0, 1) -> [B] int64. Equal scores:
    the lower id is kept first. At least one token is kept. The distribution goes by ids, not by scores: two that rounding makes change
    places would be each other's tokens.
    """
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    probabilities = ordered.masked_fill(rank >= top_k, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = ((before < top_p) & (rank < top_k)) | (rank == 0)
    probabilities = torch.zeros_like(scores).scatter(-1, ids, probabilities.masked_fill(~kept, 0.0))
    cumulative = probabilities.cumsum(-1)
    place = (cumulative <= uniform * cumulative[:, -1:]).sum(-1)
    # A rounded-up product may lie past the last: the last with a probability.
    last = torch.where(probabilities > 0, rank, 0).amax(-1)
    return place.minimum(last)


def logprobs(logits, tokens, top: int):
    """log softmax(logits) of the tokens [B], and the ids and values [B, top] of the largest: of the model, before any setting."""
    values = logits.log_softmax(-1)
    largest = values.topk(top, dim=-1)
    return values.gather(-1, tokens[:, None])[:, 0], largest.indices, largest.values


def _draw(settings):
    """[B, longest] fp32 in [0, 1), each row from its seed alone."""
    longest = max(each.max_new_tokens for each in settings)
    rows = torch.zeros(len(settings), longest, dtype=torch.float32)
    for row, each in zip(rows, settings, strict=True):
        if each.temperature:
            generator = torch.Generator()
            generator.manual_seed(int(torch.randint(MAX_SEED, ())) if each.seed is None else each.seed)
            row[: each.max_new_tokens] = torch.rand(each.max_new_tokens, generator=generator, dtype=torch.float32)
    return rows


def is_whole(value) -> bool:
    """Whether it is a whole number, of Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
