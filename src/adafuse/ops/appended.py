"""appended: the A of experts behind the base's weights in one matrix, so that one matmul of the vendor's makes the outputs of both."""

from __future__ import annotations

import torch


def append(weight, a) -> tuple[torch.Tensor, ...]:
    """weight [O, I] and each a [R, I] again, copied into one matrix: the rows of a behind those of weight."""
    parts = [weight, *a]
    return torch.cat([part.detach() for part in parts]).split([len(part) for part in parts])


def whole(first, others) -> torch.Tensor | None:
    """The matrix [sum of rows, I] of which `first` and `others`, each [rows, I], are the rows; None if they do not lie so."""
    rows, features = first.shape
    row, start, dtype = features * first.element_size(), first.data_ptr(), first.dtype
    for part in others:
        if part.data_ptr() != start + rows * row or part.shape[1] != features or part.dtype != dtype:
            return None
        if not part.is_contiguous():
            return None
        rows += part.shape[0]
    memory = first.untyped_storage()
    if not first.is_contiguous() or start + rows * row > memory.data_ptr() + memory.nbytes():
        return None  # or what lies behind it by chance
    return first.detach().as_strided((rows, features), (features, 1))
