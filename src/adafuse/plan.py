"""Plan: the routing of one step laid out for kernels, made before block 0 and read by the linears of every block.

Knows the routing and the ranks, not the experts' weights. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from adafuse.config import AdaFuseConfig
from adafuse.ops.batch import ROUTING, Tiles, lay_out
from adafuse.ops.chosen import Chosen
from adafuse.ops.decode import MAX_TOKENS
from adafuse.router import Routing


class BlockPlan(NamedTuple):
    """What the linears of a block read: `chosen` for a few tokens, `tiles` for more (then `chosen` is of use to nobody's kernel)."""

    chosen: Chosen
    tiles: Tiles | None

    def to(self, device) -> BlockPlan:
        """On another device, for the blocks of a model that is spread over several."""
        chosen = self.chosen._replace(experts=self.chosen.experts.to(device), weights=self.chosen.weights.to(device))
        return BlockPlan(chosen, None if self.tiles is None else self.tiles.to(device))


class Plan:
    """Buffers for D decisions on `tokens` tokens, which `write` fills again for every step: a CUDA graph can hold them.

    experts [D, T, K] int32, best first. weights [D, T, K] fp32: the routing's weights times alpha / r. For more than MAX_TOKENS
    tokens also `tiles`, the tokens sorted by their experts. D is 1 or the number of blocks.
    """

    def __init__(self, config: AdaFuseConfig, *, decisions: int, tokens: int, device, routing: Routing | None = None):
        self.config, self.tokens = config, tokens
        shape = (decisions, tokens, config.top_k)
        # Experts 0 .. K - 1, not uninitialised memory: a kernel must never follow an index that was not written.
        self.experts = torch.arange(config.top_k, dtype=torch.int32, device=device).expand(shape).contiguous()
        self.weights = torch.zeros(shape, device=device)
        if routing is not None:
            self._write_chosen(routing)
        self.tiles = self._tiles() if tokens > MAX_TOKENS else None

    @classmethod
    def of(cls, routing: Routing, config: AdaFuseConfig) -> Plan:
        """A plan of its own for one routing."""
        batch, seq, decisions, _ = routing.experts.shape
        return cls(config, decisions=decisions, tokens=batch * seq, device=routing.experts.device, routing=routing)

    @torch.no_grad()
    def write(self, routing: Routing):
        """Lay out a routing of as many tokens and decisions, in place. No host sync: safe inside a CUDA graph."""
        self._write_chosen(routing)
        if self.tiles is not None:
            new = self._tiles()
            for name in ROUTING:
                getattr(self.tiles, name).copy_(getattr(new, name))

    @torch.no_grad()
    def _write_chosen(self, routing):
        self.experts.copy_(routing.experts.flatten(0, 1).movedim(1, 0))
        torch.mul(routing.weights.flatten(0, 1).movedim(1, 0), self.config.scale, out=self.weights)

    def _tiles(self):
        ranks = {name: getattr(self.config, name) for name in ("num_experts", "r", "shared_rank", "shared_scale")}
        return lay_out(self.experts, self.weights, **ranks)

    def of_block(self, block: int) -> BlockPlan:
        """The part of block `block`, as views: its own decision, or the one that all blocks share."""
        decision = block if len(self.experts) > 1 else 0
        config = self.config
        chosen = Chosen(
            self.experts[decision],
            self.weights[decision],
            config.num_experts,
            config.r,
            config.shared_rank,
            config.shared_scale,
        )
        return BlockPlan(chosen, None if self.tiles is None else self.tiles[decision])
