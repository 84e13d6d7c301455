"""switching: the adapter merged into the base's weights, and switched to another token's experts by one kernel launch."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adafuse.fused import refuse_gradient_of_input
from adafuse.ops.switch import Segment, SwitchTable, switch

DRIFT = (
    'switch_source="in_place" adds and subtracts experts in the weights\' own precision: in bf16 and fp16 the errors pile up token by '
    'token, and leaving does not restore the weights exactly; "pristine" merges from an untouched copy instead'
)


class Merged:
    """A block's share while the weights hold the experts of the one token of the forward."""

    tokens = 1

    @staticmethod
    def linear(layer, x, dtype, args, kwargs):
        """The base linear's output: its weights are merged."""
        refuse_gradient_of_input(layer, x)
        return layer.base_layer(x, *args, **kwargs)


class Switcher:
    """The weights of all adapted linears, and which routing they hold.

    layers: the AdapterLinears. decisions: 1, or the number of blocks. source "pristine": a copy of every adapted weight is kept, each
    switch merges from it, `restore` is exact. "in_place": no copy; a switch adds new minus old, so weights drift. One forward at a
    time; `share` is what the blocks of a switched one are given.
    merged: whether the weights hold a routing, `old`. known: False while they are written, and after that was interrupted: nobody can
    tell which launches were made. The next switch then begins with the copies; in place there are none, and it is refused.
    ValueError if a base linear keeps its weights in a form that cannot be merged into (quantised, say).
    """

    share = Merged()

    def __init__(self, base, layers, config, *, decisions, source):
        self.layers, self.config, self.in_place = layers, config, source == "in_place"
        with torch.inference_mode(False):  # later switches may run outside it
            self._lay_out(decisions)
        # Whoever saves the base must get its own weights; the next token merges anew.
        self._hook = base.register_state_dict_pre_hook(lambda *_: self.restore())
        self.merged, self.known = False, True

    def _lay_out(self, decisions):
        layers, config = self.layers, self.config
        self.weights = [_weight_of(layer) for layer in layers]
        if len({weight.device for weight in self.weights}) > 1:
            raise ValueError(
                'execution="switch" needs the adapted linears on one device; use "fused" for a model on several'
            )
        self.copies = None if self.in_place else [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            segments = [self._segment(index, layer, decisions) for index, layer in enumerate(layers)]
            dtypes = dict.fromkeys(s.weight.dtype for s in segments)
            self.tables = [
                SwitchTable([s for s in segments if s.weight.dtype == dtype], top_k=config.top_k) for dtype in dtypes
            ]
        shape, device = (decisions, config.top_k), self.weights[0].device
        self.new, self.old = (
            (torch.zeros(shape, dtype=torch.int32, device=device), torch.zeros(shape, device=device)) for _ in range(2)
        )
        self._state = self._state_now()

    def _state_now(self):
        """What the tables' addresses and factors were made from; it must not change under them."""
        weights = [(w.data_ptr(), w.dtype, w.device) for w in self.weights]
        banks = [(p.data_ptr(), p._version) for layer in self.layers for p in (layer.bank.a, layer.bank.b)]
        now = [
            getattr(layer.base_layer, "weight", None) is weight
            for layer, weight in zip(self.layers, self.weights, strict=True)
        ]
        return weights, banks, now

    def check(self):
        """ValueError if the weights or the experts are no longer where, and what, the tables were made from."""
        if self._state_now() != self._state:
            raise ValueError(
                'the base or the adapter was moved, cast or replaced while execution="switch"; set model.execution to "reference" '
                'before that and to "switch" again afterwards'
            )

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

    @torch.compiler.disable  # a trace would not see that the kernel writes, through addresses in a table
    @torch.no_grad()
    def switch(self, routing):
        """Make the weights those of one token's routing. One launch, or one for each dtype where the adapted weights have several; the
        same routing again: no work."""
        self.check()
        if not self.known:
            self.restore()
        experts, weights = self.new
        experts.copy_(routing.experts[0, 0])
        torch.mul(routing.weights[0, 0], self.config.scale, out=weights)
        old = self.old if self.merged else None
        with self.writing() as written:
            self.launch(written, experts, weights, old=old)
            for old, new in zip(self.old, self.new, strict=True):
                old.copy_(new)
            self.merged = True
        torch.clear_autocast_cache()  # autocast may have kept a cast of the weights as they were

    @contextmanager
    def writing(self):
        """Around what writes weights, and says so in `old` and `merged`. Yields a list, for what has been written."""
        self.known, written = False, []
        try:
            yield written
        except Exception:  # a launch was refused; an interrupt would not tell what was launched
            self.known = not written
            raise
        self.known = True

    def launch(self, written, experts, weights, **options):
        """`ops.switch` with each table. Those that were launched are added to `written`."""
        for table in self.tables:
            switch(table, experts, weights, **{"shared_scale": self.config.shared_scale, **options})
            written.append(table)

    @torch.compiler.disable
    @torch.no_grad()
    def restore(self):
        """The base's own weights again: bit for bit from the copies, or by taking the experts out.

        ValueError in place if a switch was interrupted.
        """
        if self.known and not self.merged:
            return
        if self.in_place and not self.known:
            raise ValueError(
                "a switch of the weights in place was interrupted, so the base's weights are unknown; load the base and the adapter "
                'again (with switch_source="pristine" the copy would have served)'
            )
        with self.writing() as written:
            if self.in_place:
                experts, weights = self.old
                self.launch(written, experts, -weights, shared_scale=-self.config.shared_scale)
            else:
                for weight, copy in zip(self.weights, self.copies, strict=True):
                    weight.copy_(copy)
                    written.append(weight)
            self.merged = False
        torch.clear_autocast_cache()

    def close(self):
        """Restore, and let go of the base."""
        self.restore()
        self._hook.remove()


def _weight_of(layer):
    base, weight = layer.base_layer, getattr(layer.base_layer, "weight", None)
    if type(base) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise ValueError(
            f'execution="switch" merges experts into the weights of the base, and {layer.path} ({type(base).__name__}) does not keep '
            'plain ones; use "fused"'
        )
    return weight
