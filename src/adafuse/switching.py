"""switching: the adapter merged into the base's weights, and switched to another token's experts by one kernel launch."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adafuse.ops.switch import Segment, SwitchTable, switch

DRIFT = (
    'switch_source="in_place" adds and subtracts experts in the weights\' own precision: in bf16 and fp16 the errors pile up token by '
    'token, and leaving does not restore the weights exactly; "pristine" merges from an untouched copy instead'
)


class Switcher:
    """The weights of all adapted linears, and which routing they hold.

    layers: the AdapterLinears. decisions: 1, or the number of blocks. source "pristine": a copy of every adapted weight is kept, each
    switch merges from it, `restore` is exact. "in_place": no copy; a switch adds new minus old, so weights drift.
    ValueError if a base linear keeps its weights in a form that cannot be merged into (quantised, say).
    """

    def __init__(self, layers, config, *, decisions, source):
        self.config, self.in_place = config, source == "in_place"
        self.weights = [_weight_of(layer) for layer in layers]
        self.copies = None if self.in_place else [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            segments = [self._segment(index, layer, decisions) for index, layer in enumerate(layers)]
            kinds = dict.fromkeys((s.weight.device, s.weight.dtype) for s in segments)
            self.tables = [
                SwitchTable([s for s in segments if (s.weight.device, s.weight.dtype) == kind], top_k=config.top_k)
                for kind in kinds
            ]
        if len({weight.device for weight in self.weights}) > 1:
            raise ValueError(
                'execution="switch" needs the adapted linears on one device; use "fused" for a model on several'
            )
        shape, device = (decisions, config.top_k), self.weights[0].device
        self.new, self.old = (
            (torch.zeros(shape, dtype=torch.int32, device=device), torch.zeros(shape, device=device)) for _ in range(2)
        )
        self.merged = False
        if self.in_place:
            warnings.warn(DRIFT, stacklevel=3)

    def _segment(self, index, layer, decisions):
        weight = self.weights[index].detach()
        a, b = layer.bank.matrices(weight.dtype)
        left, right = (a, b) if isinstance(layer.base_layer, Conv1D) else (b, a)
        return Segment(
            weight,
            left.detach(),
            right.detach(),
            self.config.r,
            self.config.num_experts,
            source=None if self.in_place else self.copies[index],
            shared_rank=self.config.shared_rank,
            decision=layer.block if decisions > 1 else 0,
        )

    @torch.no_grad()
    def switch(self, routing):
        """Make the weights those of one token's routing. One launch (per dtype of the weights); the same routing again: no work."""
        experts, weights = self.new
        experts.copy_(routing.experts[0, 0])
        torch.mul(routing.weights[0, 0], self.config.scale, out=weights)
        for table in self.tables:
            switch(
                table, experts, weights, old=self.old if self.merged else None, shared_scale=self.config.shared_scale
            )
        for old, new in zip(self.old, self.new, strict=True):
            old.copy_(new)
        self.merged = True

    @torch.no_grad()
    def restore(self):
        """The base's own weights again: bit for bit from the copies, or by taking the experts out."""
        if not self.merged:
            return
        if self.in_place:
            experts, weights = self.old
            for table in self.tables:
                switch(table, experts, -weights, shared_scale=-self.config.shared_scale)
        else:
            for weight, copy in zip(self.weights, self.copies, strict=True):
                weight.copy_(copy)
        self.merged = False


def _weight_of(layer):
    base, weight = layer.base_layer, getattr(layer.base_layer, "weight", None)
    if type(base) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise ValueError(
            f'execution="switch" merges experts into the weights of the base, and {layer.path} ({type(base).__name__}) does not keep '
            'plain ones; use "fused"'
        )
    return weight
