"""What travels with a forward through a model that routes inside its blocks: how to execute, and where routings are kept.

As in `layers.py`, each block is called with its share as a keyword argument, so that a gradient checkpoint keeps it with the call: a
recompute runs as its own forward did, with the adapter on or off, in the same execution, whatever happened to the model meanwhile.
"""

from __future__ import annotations

import weakref

import torch

from adafuse.layers import check_hidden, running_recorder
from adafuse.router import Routing, balance_loss


class Ledger(dict):
    """The routings of one forward: path of the router's linear or FFN -> Routing of [B, S, 1, .]."""

    def balance_loss(self, attention_mask) -> torch.Tensor:
        """Mean over the routers of E * sum_e f_e * P_e / K (`router.balance_loss`), padding left out. Scalar, fp32."""
        groups: dict[int, list[Routing]] = {}
        for routing in self.values():
            groups.setdefault(routing.probabilities.shape[-1], []).append(routing)
        device = next(iter(self.values())).probabilities.device
        total = 0.0
        for routings in groups.values():  # of as many experts: one pass over all of them
            experts, probabilities = (
                torch.cat([getattr(routing, name).to(device) for routing in routings], dim=2)
                for name in ("experts", "probabilities")
            )
            total = total + len(routings) * balance_loss(Routing(experts, None, probabilities), attention_mask)
        return total / len(self)


class Share:
    """What the blocks of one forward are called with: its shape, its execution, and a way to its ledger."""

    def __init__(self, batch, seq, execution, ledger=None):
        self.shape, self.tokens, self.execution = (batch, seq), batch * seq, execution
        # Weak: the graph of a checkpointed forward holds this object, and the ledger holds that graph. And a recompute, when
        # the forward is over and its ledger gone, finds nothing to write into.
        self._ledger = (lambda: None) if ledger is None else weakref.ref(ledger)

    def record(self, path, routing: Routing):
        """Keep the routing of all tokens of this forward, if someone asked for it. routing: [..., K], [..., E]."""
        ledger = self._ledger()
        if ledger is not None:
            ledger[path] = self.routing_of(routing)

    def routing_of(self, routing: Routing) -> Routing:
        """A routing of all tokens, in whatever shape they came, as one of [B, S, 1, .]."""
        parts = (routing.experts, routing.weights, routing.probabilities)
        return Routing(*(part.reshape(*self.shape, 1, part.shape[-1]) for part in parts))


class BaselineGate:
    """`layers.PreGate`'s place in a model whose routers sit inside the blocks: nothing is decided before block 0."""

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.enabled = True
        self.execution = "graph"

    def shares(self, h0: torch.Tensor) -> list:
        """h0 [B, S, H] -> the share of each block; None where adapters are off."""
        if not self.enabled:
            return [None] * self.num_blocks
        check_hidden(h0)
        recorder = running_recorder()
        ledger = None
        if recorder is not None:
            ledger = recorder.routing = Ledger()
        return [Share(*h0.shape[:2], self.execution, ledger)] * self.num_blocks
