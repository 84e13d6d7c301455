"""record: log probabilities and routings of a generation, kept on the device until it is over."""

from __future__ import annotations

import torch

from adafuse.engine.sampling import logprobs
from adafuse.engine.sequence import TokenLogprob
from adafuse.router import Routing


class Record:
    """top: how many of the likeliest tokens to keep beside the chosen one; None: no log probabilities. routing: keep routings."""

    def __init__(self, top: int | None = None, routing: bool = False):
        self.steps = [] if routing else None  # Routing of the rows, a step each
        self._top, self._prompts, self._tokens = top, {}, []

    def prompt(self, row: int) -> list | None:
        """Where to put the routings of a prompt, a chunk each; None: nowhere."""
        return None if self.steps is None else self._prompts.setdefault(row, [])

    def token(self, logits, tokens):
        """Note what logits [B, V] say of tokens [B]."""
        if self._top is not None:
            self._tokens.append(logprobs(logits.float(), tokens.clamp(min=0), self._top))

    def of(self, row: int, sequence) -> tuple[list[TokenLogprob] | None, Routing | None]:
        """Those of a sequence that has ended."""
        count = len(sequence.ids)
        return self._logprobs(row, count), self._routing(row, count - 1)

    def _logprobs(self, row, count):
        if self._top is None:
            return None
        chosen, ids, values = (
            torch.stack(part[:count]).tolist()
            for part in zip(*((t[row] for t in each) for each in self._tokens), strict=True)
        )
        return [TokenLogprob(c, tuple(zip(i, v, strict=True))) for c, i, v in zip(chosen, ids, values, strict=True)]

    def _routing(self, row, steps):
        if self.steps is None:
            return None
        parts = {}
        for name in ("experts", "weights"):
            prompt = [getattr(part, name) for part in self._prompts[row]]
            parts[name] = torch.cat([*prompt, *(getattr(step, name)[row : row + 1] for step in self.steps[:steps])])
        return Routing(**parts)
