"""linears: the linears of a block that share an input, with their experts; and the routing they read."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from adafuse.engine.graph import kept_tensors
from adafuse.experts import ExpertBank
from adafuse.layers import AdapterLinear
from adafuse.ops.chosen import Chosen
from adafuse.ops.delta import add_delta
from adafuse.plan import Plan
from adafuse.router import Routing


class Linear(NamedTuple):
    """A base linear and its bank of experts; None where it is not adapted."""

    base: nn.Module
    bank: ExpertBank | None

    @classmethod
    def of(cls, module) -> Linear:
        return cls(module.base_layer, module.bank) if isinstance(module, AdapterLinear) else cls(module, None)


class Share:
    """A decision of the running step, for the blocks that follow it: `chosen` for kernels, `rank_mask` for the reference."""

    def __init__(self, chosen: Chosen, dtype: torch.dtype):
        self.chosen, self._dtype = chosen, dtype

    @cached_property
    def rank_mask(self) -> torch.Tensor:
        """[T, R]: weight and scale of the expert each rank belongs to, 0 where it was not chosen."""
        chosen = self.chosen
        scales = chosen.scales().to(self._dtype)
        return scales.new_zeros(len(scales), chosen.ranks).scatter_(1, chosen.rows(), scales)


class Gate:
    """Routes the tokens of a step, before block 0, into a plan whose buffers stay where they are."""

    def __init__(self, router, config, num_blocks):
        self.router, self.config, self.num_blocks = router, config, num_blocks
        self.routing = None  # of the last forward in plain PyTorch: a Routing [1, T, D, K]
        self.written = None  # the plan that kernels wrote last, if they ran since
        self._plans = {}

    @kept_tensors
    def plan(self, tokens: int) -> Plan:
        """The plan of steps of so many tokens: always the same one."""
        if tokens not in self._plans:
            decisions, device = self.router.num_decisions, self.router.weight.device
            self._plans[tokens] = Plan(self.config, decisions=decisions, tokens=tokens, device=device)
        return self._plans[tokens]

    def route(self, h0: torch.Tensor) -> list[Share]:
        """h0 [T, H], the hidden states that enter block 0 -> the share of each block."""
        plan = self.plan(len(h0))
        self.routing, self.written = self.router(h0[None]), None
        plan.write(self.routing)
        shares = [Share(plan.of_block(d).chosen, h0.dtype) for d in range(self.router.num_decisions)]
        return shares * self.num_blocks if len(shares) == 1 else shares

    def last(self, tokens: int) -> Routing:
        """A copy of the routing of the first `tokens` tokens of the last forward: [tokens, D, K]."""
        if self.written is None:
            return Routing(self.routing.experts[0, :tokens].clone(), self.routing.weights[0, :tokens].clone())
        experts, weights = (part[:, :tokens].movedim(1, 0) for part in (self.written.experts, self.written.weights))
        return Routing(experts.long(), weights / self.config.scale)


def linears(x: torch.Tensor, group: tuple[Linear, ...], share: Share | None) -> torch.Tensor:
    """y = W_m x + bias_m + s sum_k w_k B_m[e_k] (A_m[e_k] x) + the shared expert's, of each linear m of a group, side by side.

    x [T, I] -> [T, O_1 + ... + O_M], in the dtype of x. share None: the base linears alone. The reference, in plain PyTorch.
    """
    ys = [_linear(x, linear, share) for linear in group]
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)


def _linear(x, linear, share):
    y = linear.base(x)
    if linear.bank is None or share is None:
        return y
    a, b = linear.bank.matrices(x.dtype)
    return add_delta(y, x, a, b, rank_mask=share.rank_mask)
