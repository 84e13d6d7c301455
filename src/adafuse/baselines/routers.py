"""LinearRouter: the router of one linear, or of one FFN, on the input of its own."""

from __future__ import annotations

import torch
from torch import nn

from adafuse.router import Routing, choose, linear_fp32


class LinearRouter(nn.Module):
    """p = softmax(W x) over E experts; the top_k largest, divided by their sum (`router.choose`). fp32, whatever autocast and TF32 say.

    weight [E, I]. std: of its normal initialisation; None: Kaiming uniform, U(-1/sqrt(I), 1/sqrt(I)), as nn.Linear has it.
    """

    def __init__(self, in_features, num_experts, top_k, *, std=None, device=None):
        super().__init__()
        self.num_experts, self.top_k, self.std = num_experts, top_k, std
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self):
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)
        else:
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> Routing:
        """x [..., I], any float dtype -> experts and weights [..., K], probabilities [..., E]."""
        with torch.autocast(x.device.type, enabled=False):
            return choose(linear_fp32(x.float(), self.weight), self.top_k)

    def extra_repr(self):
        return f"{self.weight.shape[1]} -> {self.num_experts}, top_k={self.top_k}"
