"""What the kernels for a few tokens can read, and errors for what they cannot."""

from __future__ import annotations

import torch

from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import next_power_of_2

MAX_TOKENS = 8
MAX_FEATURES = 65536


def check(x, chosen, **matrices):
    """ValueError for what the kernels cannot read. `matrices`: by name, tuples of one each linear."""
    refuse_gradients(x, *(m for group in matrices.values() for m in group), *([chosen.weights] if chosen else []))
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_TOKENS or x.shape[1] > MAX_FEATURES or x.stride(1) != 1:
        raise ValueError(
            f"x must be [T, I] of 1 to {MAX_TOKENS} tokens and up to {MAX_FEATURES} features, its last axis contiguous; got "
            f"{list(x.shape)} with strides {x.stride()}"
        )
    dtype, device, features = x.dtype, x.device, x.shape[1]
    for name, group in matrices.items():
        for m in group:
            if m.dtype != dtype or m.device != device:
                raise ValueError(f"{name} is {m.dtype} on {m.device}, x is {x.dtype} on {x.device}; they must agree")
            if m.dim() != 2 or m.stride(1) != 1 or (name != "out" and not m.is_contiguous()):
                raise ValueError(
                    f"{name} has shape {list(m.shape)} and strides {m.stride()}; it must be a contiguous matrix"
                )
            if name in ("base_weights", "banks_a") and m.shape[1] != features:
                raise ValueError(f"{name} has shape {list(m.shape)}, but x has {x.shape[1]} features")
            if chosen and name.startswith("banks") and m.shape[0] != chosen.ranks:
                raise ValueError(f"{name} has {len(m)} rows, but the routing is of {chosen.ranks} ranks")
    if "base_weights" in matrices:
        _check_group(x, chosen, **matrices)
    if chosen:
        check_chosen(x, chosen)


def _check_group(x, chosen, base_weights, banks_a, banks_b, out):
    widths = [w.shape[0] for w in base_weights]
    if out[0].shape != (x.shape[0], sum(widths)):
        raise ValueError(f"out is {list(out[0].shape)}, but {len(x)} token(s) of linears of {widths} features come out")
    if chosen and (len(banks_a) != len(widths) or [b.shape[1] for b in banks_b] != widths):
        raise ValueError(
            f"{len(banks_a)} banks_a, and banks_b of {[b.shape[1] for b in banks_b]} features, for linears of {widths}"
        )


def check_h(name, h, shape):
    """shape: "C" stands for any power of two."""
    found = () if h is None else h.shape
    good = len(found) == len(shape) and all(
        n == of or (of == "C" and n & (n - 1) == 0 < n) for n, of in zip(found, shape, strict=False)
    )
    if not good or h.dtype != torch.int32 or not h.is_contiguous():
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be contiguous int32 [{wanted}] (C a power of two), got {list(found)}")


def check_chosen(x, chosen):
    for name, tensor, dtype in (("experts", chosen.experts, torch.int32), ("weights", chosen.weights, torch.float32)):
        if (
            tensor.shape != chosen.experts.shape
            or tensor.shape[0] != x.shape[0]
            or tensor.dtype != dtype
            or tensor.device != x.device
        ):
            raise ValueError(
                f"{name} must be {dtype} [{len(x)}, K] on {x.device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")


def check_tensor(name, tensor, shape, dtype, device, whole=True):
    """ValueError unless it is that. whole: no gaps between rows."""
    if tensor is None:
        raise ValueError(f"{name} is missing, needs {dtype} {list(shape)} on {device}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, needs {dtype}")
    gaps = whole and not tensor.is_contiguous()
    if tensor.shape != shape or tensor.device != device or tensor.stride(-1) != 1 or gaps:
        raise ValueError(
            f"{name} is {dtype} {list(tensor.shape)} on {tensor.device} with strides {tensor.stride()}, needs {dtype} {list(shape)} on "
            f"{device}, {'contiguous' if whole else 'its last dimension contiguous'}"
        )


def padded(features):
    """A row of W, padded to what a program can hold."""
    return max(next_power_of_2(features), 128)


def aligned_rows(features, *matrices):
    """Whether every row of these contiguous matrices of one dtype starts on a 16-byte boundary."""
    if matrices and features * matrices[0].element_size() % 16:
        return False
    return all(m.data_ptr() % 16 == 0 for m in matrices)
