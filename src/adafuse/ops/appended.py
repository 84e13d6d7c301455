"""appended: the A of experts behind the base's weights in one matrix, so that one matmul of the vendor's makes the outputs of both."""

from __future__ import annotations

import torch


def append(weight, a) -> tuple[torch.Tensor, ...]:
    """weight [O, I] and each a [R, I] again, copied into one matrix: the rows of a behind those of weight."""
    parts = [weight, *a]
    return torch.cat([part.detach() for part in parts]).split([len(part) for part in parts])


def whole(first, others) -> torch.Tensor | None:
    """The matrix [sum of rows, I] of which `first` and `others`, each [rows, I], are the rows; None if they do not lie so."""
    memory, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in (first, *others):
        if (part.untyped_storage().data_ptr(), part.data_ptr()) != (memory, end) or not part.is_contiguous():
            return None
        if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
            return None
        end += part.numel() * part.element_size()
    rows = len(first) + sum(len(part) for part in others)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
