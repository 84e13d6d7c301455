"""weights: what the base of an adapted linear keeps: weights that kernels can read as they are, or others; how many bytes."""

from __future__ import annotations

import torch
from torch import nn

from adafuse.costs import Layer

MOST_FEATURES = 65536  # in, of what kernels read themselves


def as_layer(linear, dtype) -> Layer:
    """An AdapterLinear as `costs` know it, for activations of this dtype."""
    base = linear.base_layer
    sizes = linear.bank.in_features, linear.bank.out_features
    if is_plain(linear, dtype):
        return Layer(*sizes)
    return Layer(*sizes, plain=False, stored=stored_bytes(base), copied=not answers_anew(base))


def is_plain(linear, dtype) -> bool:
    """Whether y = W x is all that the base of an AdapterLinear does, on weights of this dtype that a kernel can read."""
    base = linear.base_layer
    if type(base) is not nn.Linear or base.bias is not None or is_watched(base):
        return False
    if linear.training and linear.dropout.p:
        return False
    weight = base.weight
    ours = type(weight) in (nn.Parameter, torch.Tensor) and weight.is_contiguous()
    return ours and weight.dtype == dtype and weight.shape[1] <= MOST_FEATURES


def answers_anew(base) -> bool:
    """Whether the base's output is a tensor that nobody else keeps: neither a hook, nor the base itself."""
    return type(base) is nn.Linear and not is_watched(base)


def is_watched(module) -> bool:
    """Whether calling the module does more than its class says: hooks, or a forward replaced on the object (accelerate)."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks or nn.modules.module._has_any_global_hook() or "forward" in vars(module))


def stored_bytes(base) -> int:
    """Bytes of a linear's weights and buffers as they are stored: of a quantised one what is read, not what it stands for."""
    return sum(_bytes(tensor) for tensor in (*base.parameters(), *base.buffers()))


def _bytes(tensor):
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor made of tensors (torchao): its codes and scales
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
