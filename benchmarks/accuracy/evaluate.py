"""Scores of multiple-choice items: which are right, by mean log-likelihood per answer token, and the NLL of the right answers."""

from __future__ import annotations

import base64

import numpy as np
import torch

from accuracy.batches import buckets_of, widths_of
from accuracy.forward import Answers
from accuracy.graphs import Replayed
from accuracy.items import CHOICES

WIDTH_SHARES = (0.5, 0.9, 1.0)
TOKENS = 16384  # of a batch, padding included


class Evaluation:
    """The items of one split, laid out once for all models that are scored on them."""

    def __init__(self, split, device, tokens=TOKENS):
        self.split, self.device = split, torch.device(device)
        pairs = split.pairs(right_only=False)
        self.answer_tokens = np.array([len(answer) for _, answer in pairs])
        widths = widths_of([len(prompt) + len(answer) for prompt, answer in pairs], WIDTH_SHARES)
        self.buckets = buckets_of(pairs, widths, [max(1, tokens // width) for width in widths], device=device)

    @torch.no_grad()
    def log_likelihoods(self, model) -> np.ndarray:
        """[n, 4] float64: log p(choice | prompt) in nats, summed over the choice's tokens. `model` is put in eval mode."""
        model.eval()
        answers = Answers(model)
        run = Replayed(lambda batch: _sums(answers, batch), self.device)
        run.prepare([bucket.batches[0] for bucket in self.buckets])
        sums = np.full(CHOICES * len(self.split), np.nan)
        for bucket in self.buckets:
            found = torch.zeros(bucket.members.shape, device=self.device)
            for i in range(len(bucket.batches)):
                found[i].copy_(run(bucket.batches[i]))
            used = bucket.members >= 0
            sums[bucket.members[used]] = found.cpu().double().numpy()[used]
        answers.close()
        return sums.reshape(-1, CHOICES)

    def score(self, model, names) -> dict:
        """Accuracy and NLL by domain, and which items were right.

            pick = argmax_c (1 / |c|) log p(c | prompt), ties to the lower index

        An item whose scores are not all finite counts as wrong. accuracy: share of right items, by domain and "mean" (over domains). nll:
        nats per token over the right answers' tokens, null if not finite. correct: see `pack`. order: `Split.order_hash`.
        """
        sums = self.log_likelihoods(model)
        lengths = self.answer_tokens.reshape(-1, CHOICES)
        means, items = sums / lengths, np.arange(len(self.split))
        finite = np.isfinite(means).all(-1)
        correct = finite & (np.where(finite[:, None], means, 0).argmax(-1) == self.split.answers)
        right, tokens = sums[items, self.split.answers], lengths[items, self.split.answers]
        accuracy, nll = {}, {}
        for number, name in enumerate(names):
            inside = self.split.domains == number
            accuracy[name] = float(correct[inside].mean())
            nll[name] = -float(right[inside].sum() / tokens[inside].sum())
        for found in (accuracy, nll):
            found["mean"] = float(np.mean(list(found.values())))
        return {
            "items": len(self.split),
            "order": self.split.order_hash(),
            "accuracy": accuracy,
            "nll": {name: value if np.isfinite(value) else None for name, value in nll.items()},
            "correct": pack(correct),
        }


def pack(correct: np.ndarray) -> str:
    """Booleans [n] as base64 of one bit each."""
    return base64.b64encode(np.packbits(correct)).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """The inverse of `pack`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=count).astype(bool)


def _sums(answers, batch):
    """[B]: log p of each sequence's answer."""
    nll = answers.nll(batch)
    return torch.zeros(len(batch.ids), device=nll.device).index_add(0, batch.rows, -nll)
