"""The choices-only control: a reader that never sees the prompt. What it scores above 25 % is given away by the choices.

A second number, without a limit, says what the choice most like the prompt scores: how far a domain can be solved by spelling.

score(choice) = sum of the weights of its hashed character 1- to 4-grams, its length, and its rank among the four by length
and (if all are numbers) by size; softmax over the four; trained on train, by epochs chosen on validation, scored on test.
"""

from __future__ import annotations

import zlib

import torch

CHANCE = 0.25
LIMIT = 0.35
HASHES = 1 << 15
EXTRA = 32  # features after the hashes: length, rank by length, rank by size


def features(choices) -> list[list[int]]:
    """Indices of the features of each choice."""
    texts = [choice.strip() for choice in choices]
    ranks = [_rank(list(map(len, texts)))]
    values = list(map(_number, texts))
    if None not in values:
        ranks.append(_rank(values))
    found = []
    for place, text in enumerate(texts):
        padded = f"^{text}$"
        grams = {padded[start : start + n] for n in (1, 2, 3, 4) for start in range(len(padded) - n + 1)}
        hashed = sorted({zlib.crc32(gram.encode()) % HASHES for gram in {*grams, f"whole {text}"}})
        extra = [min(len(text), 19), *(20 + 4 * kind + rank[place] for kind, rank in enumerate(ranks))]
        found.append(hashed + [HASHES + index for index in extra])
    return found


def _rank(values):
    return [sum(other < value for other in values) for value in values]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return None


class Reader(torch.nn.Module):
    """A weight a feature; logits [N, 4] of items whose features are given as one flat list with offsets."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.EmbeddingBag(HASHES + EXTRA, 1, mode="sum")
        torch.nn.init.zeros_(self.weights.weight)

    def forward(self, rows):
        flat = torch.tensor([index for row in rows for choice in row for index in choice])
        lengths = torch.tensor([len(choice) for row in rows for choice in row])
        return self.weights(flat, lengths.cumsum(0) - lengths).view(-1, 4)


def choices_only(splits: dict[str, list[dict]], epochs: int = 8, batch: int = 64) -> float:
    """The reader's accuracy on test."""
    torch.manual_seed(0)
    rows = {split: [features(item["choices"]) for item in items] for split, items in splits.items()}
    answers = {split: torch.tensor([item["answer"] for item in items]) for split, items in splits.items()}
    reader = Reader()
    optimizer = torch.optim.Adam(reader.parameters(), lr=0.01)
    best = (-1.0, 0.0)  # (accuracy on validation, on test)
    for _ in range(epochs):
        for picked in torch.randperm(len(rows["train"])).split(batch):
            loss = torch.nn.functional.cross_entropy(
                reader([rows["train"][i] for i in picked.tolist()]), answers["train"][picked]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        best = max(best, tuple(_accuracy(reader, rows[split], answers[split]) for split in ("validation", "test")))
    return best[1]


def overlap(items) -> float:
    """The accuracy of taking the choice that shares most character 3-grams with the prompt: what an echo would score."""

    def grams(text):
        text = text.casefold()
        return {text[start : start + 3] for start in range(len(text) - 2)}

    def shares(item):
        prompt = grams(item["prompt"])
        return [len(grams(choice) & prompt) / max(1, len(grams(choice))) for choice in item["choices"]]

    right = 0.0
    for item in items:
        scores = shares(item)
        if scores[item["answer"]] == max(scores):
            right += 1 / scores.count(max(scores))  # a tie is settled by chance
    return right / len(items)


@torch.no_grad()
def _accuracy(reader, rows, answers):
    return (reader(rows).argmax(1) == answers).float().mean().item()
