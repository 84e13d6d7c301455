"""delta: what the experts add to the output of a linear, for tokens that mix different experts.

The reference, in plain PyTorch: one matmul with the A of all experts, the routing as a mask in rank space, one matmul with all
B. Differentiable; it costs the FLOPs of a LoRA of rank R whatever the routing.
"""

import torch
from torch.nn.functional import linear


def add_delta(y, x, a, b, *, rank_mask, activation=None):
    """y[t] + (activation(x[t] @ a.T) * rank_mask[t]) @ b; without an activation, the plain product.

    y [..., O], x [..., I], rank_mask [..., R] with the same number of tokens; a [R, I], b [R, O]. rank_mask holds the weight
    and scale of the expert each rank belongs to, 0 where the token did not choose it. Computed in the dtype of x (of autocast,
    where it is on); the result has y's shape and dtype.
    """
    h = linear(x, a)
    if activation is not None:
        h = activation(h)
    h = (h * rank_mask.to(h.dtype).reshape(h.shape)).flatten(0, -2)
    if y.dtype != h.dtype:  # a quantised base may answer in a dtype of its own: its precision is kept
        return y + (h @ b).to(y.dtype).view(y.shape)
    # addmm adds while it writes: no second pass over the output.
    return torch.addmm(y.reshape(-1, y.shape[-1]), h, b).view(y.shape)


def add_delta_gated(y, x, a, b, gates, r):
    """y[t] += ((x[t] @ a.T) * gate) @ b in place, with the routing as `ops.batch.dense_gates` has it: for kernels' plans, no gradients.

    y [T, O], x [T, I], a [R, I], b [R, O] of one dtype; gates [T, E + 1] fp32. Every r ranks are an expert's, the rest the shared one's.
    """
    h = linear(x, a)
    experts = gates.shape[1] - 1
    h[:, : experts * r].unflatten(1, (experts, r)).mul_(gates[:, :-1, None])
    if h.shape[1] > experts * r:
        h[:, experts * r :].mul_(gates[:, -1:])
    y.addmm_(h, b)
