"""Plan: the routing of one step laid out for kernels, made before block 0 and read by the linears of every block.

Knows the routing and the ranks, not the experts' weights. Nothing here waits for the device.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from adafuse.config import AdaFuseConfig
from adafuse.ops.chosen import Chosen
from adafuse.router import Routing

if TYPE_CHECKING:  # it needs Triton, which who reads `experts` and `weights` alone may not have
    from adafuse.ops.layout import Tiles


class Plan:
    """Buffers for D decisions on `tokens` tokens, which `write` fills again for every step: a CUDA graph can hold them.

    experts [D, T, K] int32, best first. weights [D, T, K] fp32: the routing's weights times alpha / r. D is 1 or the number of
    blocks. `gates` and `tiles`, the same routing as other kernels read it, are laid out when they are first asked for.
    """

    def __init__(self, config: AdaFuseConfig, *, decisions: int, tokens: int, device, routing: Routing | None = None):
        self.config, self.tokens = config, tokens
        shape = (decisions, tokens, config.top_k)
        # Experts 0 .. K - 1, not uninitialised memory: a kernel must never follow an index that was not written.
        self.experts = torch.arange(config.top_k, dtype=torch.int32, device=device).expand(shape).contiguous()
        self.weights = torch.zeros(shape, device=device)
        self._copies = {}
        if routing is not None:
            self._write_chosen(routing)

    @classmethod
    def of(cls, routing: Routing, config: AdaFuseConfig) -> Plan:
        """A plan of its own for one routing."""
        batch, seq, decisions, _ = routing.experts.shape
        return cls(config, decisions=decisions, tokens=batch * seq, device=routing.experts.device, routing=routing)

    @cached_property
    def gates(self) -> torch.Tensor:
        """[D, T, E + 1] fp32: the weight of each expert by token, 0 where not chosen; then the shared expert's."""
        from adafuse.ops.layout import dense_gates

        return dense_gates(self.experts, self.weights, self.config.num_experts, self.config.shared_scale)

    @cached_property
    def tiles(self) -> Tiles:
        """The tokens sorted by their experts, in tiles."""
        from adafuse.ops.layout import lay_out

        ranks = {name: getattr(self.config, name) for name in ("num_experts", "r", "shared_rank", "shared_scale")}
        return lay_out(self.experts, self.weights, **ranks)

    @torch.no_grad()
    def write(self, routing: Routing):
        """Lay out a routing of as many tokens and decisions, in place. No host sync: safe inside a CUDA graph."""
        self._write_chosen(routing)
        self._copies.clear()
        laid_out = {name: vars(self).pop(name) for name in ("gates", "tiles") if name in vars(self)}
        if "gates" in laid_out:
            laid_out["gates"].copy_(self.gates)
        if "tiles" in laid_out:
            from adafuse.ops.layout import ROUTING

            for name in ROUTING:
                getattr(laid_out["tiles"], name).copy_(getattr(self.tiles, name))
        vars(self).update(laid_out)

    @torch.no_grad()
    def _write_chosen(self, routing):
        self.experts.copy_(routing.experts.flatten(0, 1).movedim(1, 0))
        torch.mul(routing.weights.flatten(0, 1).movedim(1, 0), self.config.scale, out=self.weights)

    def on(self, device) -> Plan:
        """The plan on a device: itself, or a copy that is made once, for the blocks of a model that is spread over several."""
        if device == self.experts.device:
            return self
        if device not in self._copies:
            copy = Plan(self.config, decisions=len(self.experts), tokens=self.tokens, device=device)
            copy.experts.copy_(self.experts)
            copy.weights.copy_(self.weights)
            self._copies[device] = copy
        return self._copies[device]

    def of_block(self, block: int) -> BlockPlan:
        """The part of block `block`, as views: its own decision, or the one that all blocks share."""
        return BlockPlan(self, block if len(self.experts) > 1 else 0)


class BlockPlan:
    """What the linears of a block read, as views of one decision of a plan."""

    def __init__(self, plan: Plan, decision: int):
        self._plan, self._decision = plan, decision

    @cached_property
    def chosen(self) -> Chosen:
        plan, config = self._plan, self._plan.config
        experts, weights = plan.experts[self._decision], plan.weights[self._decision]
        return Chosen(experts, weights, config.num_experts, config.r, config.shared_rank, config.shared_scale)

    @cached_property
    def gates(self) -> torch.Tensor:
        return self._plan.gates[self._decision]

    @cached_property
    def tiles(self) -> Tiles:
        return self._plan.tiles[self._decision]
