"""fused: the adapted linears of a block through the kernels, unmerged and exact, for tokens that mix different experts."""

from __future__ import annotations

import torch
from torch import nn

from adafuse.ops.batch import add_delta_tiles
from adafuse.ops.decode import EMPTY, MAX_FEATURES, decode, expand, shrink
from adafuse.plan import BlockPlan, Plan


def fused_blocks(routing, config, num_blocks) -> list[FusedBlock]:
    """What each block of a forward needs, from one routing."""
    plan = Plan.of(routing, config)
    return [FusedBlock(plan.of_block(block)) for block in range(num_blocks)]


class FusedBlock:
    """Computes the adapted linears of one block in one forward."""

    def __init__(self, plan: BlockPlan):
        self.plan = plan

    @property
    def tokens(self) -> int:
        return len(self.plan.chosen.experts)

    def linear(self, layer, x, dtype, args, kwargs):
        """The output of an AdapterLinear. x [..., I] -> [..., O]; adapters compute in `dtype`, sums in fp32.

        A few tokens and a plain base linear: one launch, which reads the base's weights itself. Otherwise the base's own kernel, and
        the adapters' beside it. ValueError where a gradient is needed.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{layer.path}: the fused kernels have no backward pass and the input needs a gradient; run under torch.no_grad(), or "
                'set model.execution = "reference"'
            )
        plan = self.plan.to(x.device)
        a, b = layer.bank.matrices(dtype)
        rows = x.reshape(-1, x.shape[-1])
        if plan.tiles is None and not args and not kwargs and _is_plain(layer, x, dtype):
            y = rows.new_empty(len(rows), layer.out_features)
            h = _h(rows, plan.chosen)
            decode(rows, (layer.base_layer.weight,), y, banks_a=(a,), banks_b=(b,), chosen=plan.chosen, h=h)
            return y.view(*x.shape[:-1], -1)
        y = layer.base_layer(x, *args, **kwargs).contiguous()
        rows = layer.dropout(rows).to(dtype)
        if plan.tiles is not None:
            add_delta_tiles(y.view(-1, y.shape[-1]), rows, a, b, plan.tiles)
        else:
            h = shrink(rows, (a,), plan.chosen, _h(rows, plan.chosen))
            expand(h[:, 0], b, plan.chosen, y.view(-1, y.shape[-1]))
        return y


def _h(rows, chosen):
    return torch.full((len(rows), 1, chosen.active), EMPTY.value, dtype=torch.int32, device=rows.device)


def _is_plain(layer, x, dtype):
    """Whether y = W x is all that the base linear does, on weights that a kernel can read."""
    base = layer.base_layer
    if type(base) is not nn.Linear or base.bias is not None or base._forward_hooks or base._forward_pre_hooks:
        return False
    if layer.training and layer.dropout.p:
        return False
    weight = base.weight
    readable = type(weight) in (nn.Parameter, torch.Tensor) and weight.is_contiguous() and weight.device == x.device
    return readable and weight.dtype == x.dtype == dtype and x.shape[-1] <= MAX_FEATURES and x.is_contiguous()
