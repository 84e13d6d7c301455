"""What every kernel without a backward pass asks before it runs."""

import torch


def refuse_gradients(*tensors):
    """ValueError if autograd would want gradients of any of these tensors: the result would silently have none."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "this kernel has no backward pass, and gradients are needed: run it under torch.no_grad(), or compute adapters with the "
            "reference (add_delta)"
        )
