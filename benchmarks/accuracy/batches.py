"""Sequences in batches of a few fixed shapes. Knows token ids and lengths, no text and no model.

Padding is on the right and told by position, never by id. A sequence's last token is only predicted, so it is not fed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

MULTIPLE = 8  # widths and numbers of slots are multiples of it


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences of S tokens, and the N places whose next token counts; or `n` such batches, with a further axis in front.

    ids [B, S] int64. mask [B, S] int64: 1 at tokens, 0 at padding. slots [N] int64: a place in the B * S tokens. targets [N] int64: the
    token that follows there. rows [N] int64: its sequence. weights [N] float32: 1, or 0 for a slot that is not used.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    slots: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def map(self, function) -> Batch:
        return Batch(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def __getitem__(self, i) -> Batch:
        return self.map(lambda tensor: tensor[i])

    def __len__(self):
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Batches of one shape. members [n, B] int64 on the CPU: the number of the sequence in each row, -1 in empty rows."""

    batches: Batch
    members: np.ndarray


def widths_of(lengths, shares) -> list[int]:
    """Widths that hold these shares of sequences (increasing, the last 1), each up to the next multiple of 8, without repeats."""
    fed = np.asarray(lengths) - 1
    found = np.quantile(fed, shares, method="inverted_cdf")
    return sorted({int(-(-max(width, 1) // MULTIPLE) * MULTIPLE) for width in found})


def buckets_of(pairs, widths, sizes, order=None, device="cpu") -> list[Bucket]:
    """One bucket a width that has sequences: each goes into the narrowest that holds it, in the given order.

    pairs: (prompt ids, answer ids) of each sequence. sizes: rows of a batch, by width (fewer where a width has fewer).
    order: the sequences' numbers, with repeats if some are to come again; None: by length.
    """
    lengths = np.array([len(prompt) + len(answer) - 1 for prompt, answer in pairs])
    order = np.argsort(lengths, kind="stable") if order is None else np.asarray(order)
    place = np.searchsorted(widths, lengths[order])
    return [
        _bucket(pairs, order[place == i], width, sizes[i], device)
        for i, width in enumerate(widths)
        if (place == i).any()
    ]


def _bucket(pairs, numbers, width, rows, device):
    rows = min(rows, len(numbers))
    members = np.full(-(-len(numbers) // rows) * rows, -1)
    members[: len(numbers)] = numbers
    members = members.reshape(-1, rows)
    counts = [sum(len(pairs[i][1]) for i in batch if i >= 0) for batch in members]
    slots = -(-max(counts) // MULTIPLE) * MULTIPLE
    batches = [_batch(pairs, batch, width, slots) for batch in members]
    stacked = Batch(*(torch.from_numpy(np.stack(arrays)).to(device) for arrays in zip(*batches, strict=True)))
    return Bucket(stacked, members)


def _batch(pairs, members, width, slots):
    """The arrays of one Batch."""
    ids, mask = np.zeros((2, len(members), width), dtype=np.int64)
    places, targets, rows = np.zeros((3, slots), dtype=np.int64)
    weights = np.zeros(slots, dtype=np.float32)
    used = 0
    for row, member in enumerate(members):
        if member < 0:
            continue
        prompt, answer = pairs[member]
        fed, end = len(prompt) + len(answer) - 1, used + len(answer)
        ids[row, :fed] = np.concatenate([prompt, answer])[:-1]
        mask[row, :fed] = 1
        places[used:end] = row * width + np.arange(len(prompt) - 1, fed)
        targets[used:end], rows[used:end], weights[used:end] = answer, row, 1
        used = end
    return ids, mask, places, targets, rows, weights
