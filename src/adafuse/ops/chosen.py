"""Chosen: what each token of a step uses of a bank, in the form that kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Chosen(NamedTuple):
    """experts [T, K] int32 and weights [T, K] fp32 (the scale alpha / r folded in), contiguous, and how a bank's ranks are cut up.

    Expert e owns the rows e * r .. e * r + r - 1 of A [R, I] and B [R, O]; the shared expert, with weight `shared_scale` for every
    token, the last `shared_rank`. A token has J = K * r + shared_rank active ranks: its experts' in the order of `experts`, then
    the shared ones.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    r: int
    shared_rank: int = 0
    shared_scale: float = 0.0

    @property
    def active(self) -> int:
        """J."""
        return self.experts.shape[1] * self.r + self.shared_rank

    @property
    def ranks(self) -> int:
        """R."""
        return self.num_experts * self.r + self.shared_rank

    def rows(self) -> torch.Tensor:
        """[T, J] int64: the row of A and B of each active rank."""
        within = torch.arange(self.r, device=self.experts.device)
        routed = (self.experts.long()[..., None] * self.r + within).flatten(-2)
        shared = torch.arange(self.num_experts * self.r, self.ranks, device=routed.device)
        return torch.cat([routed, shared.expand(len(routed), -1)], dim=-1)

    def scales(self) -> torch.Tensor:
        """[T, J] fp32: the weight of each active rank."""
        routed = self.weights.repeat_interleave(self.r, dim=-1)
        return torch.cat([routed, routed.new_full((len(routed), self.shared_rank), self.shared_scale)], dim=-1)
