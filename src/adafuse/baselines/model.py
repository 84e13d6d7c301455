"""BaselineModel: what the baselines with routers inside their blocks have in common."""

from __future__ import annotations

from typing import ClassVar

import torch

from adafuse.attached import AttachedModel, Prepared
from adafuse.baselines.gate import BaselineGate, Ledger
from adafuse.baselines.places import Place
from adafuse.discover import find_blocks
from adafuse.execution import check_available
from adafuse.fingerprint import fingerprint
from adafuse.layers import device_of, recording


class BaselineModel(AttachedModel):
    """A causal LM with the adapter of a subclass: `_places` says where what is put, `_module` makes what takes a module's place."""

    executions: ClassVar[tuple[str, ...]] = ("graph",)

    @classmethod
    def _places(cls, base, config) -> list[Place]:
        raise NotImplementedError

    @classmethod
    def _module(cls, place, router, bank, config):
        """What takes the place of place.module."""
        raise NotImplementedError

    @classmethod
    def _router(cls, place, config):
        return place.make_router(config.top_k)

    @classmethod
    def _prepare(cls, base, config):
        parts, linears, around = {}, {}, {}
        for place in cls._places(base, config):
            router, bank = cls._router(place, config), place.make_bank()
            named = {f"{place.path}.router": router, place.path: bank}
            parts |= {prefix: part for prefix, part in named.items() if part is not None}
            (around if place.is_ffn else linears)[place.path] = cls._module(place, router, bank, config)
        return Prepared(BaselineGate(len(find_blocks(base)[1])), parts, linears, around)

    @classmethod
    def _expected(cls, base, config):
        places = cls._places(base, config)
        shapes = {name: shape for place in places for name, shape in place.shapes().items()}
        return fingerprint(base, [place for place in places if not place.is_ffn]), shapes

    def _balance(self, routing, attention_mask):
        return routing.balance_loss(attention_mask)

    @property
    def execution(self) -> str:
        """How the experts are computed. The function is the same.

        "graph": no host synchronisation and no shape that depends on the data, so that a CUDA graph can hold it; for training too.
        "published": the loop over experts, with torch.where and index_add, that public implementations use; for latency tables.
        "fused": AdaFuse's Triton kernels, for the chosen experts alone, one routing a linear; no gradients.
        ValueError when set to what this method does not have (`executions` names what it has), or what cannot run here.
        """
        return self._gate.execution

    @execution.setter
    def execution(self, value):
        if value not in self.executions:
            allowed = ", ".join(map(repr, self.executions))
            raise ValueError(f"execution={value!r} is none that {type(self).__name__} has; allowed: {allowed}")
        if value == "fused":
            check_available(value, device_of(self._linears[0]))
        self._gate.execution = value

    @torch.no_grad()
    def routings(self, input_ids, attention_mask=None) -> Ledger:
        """What each router decides, in a forward through all blocks: path of its linear or FFN -> Routing of [batch, seq, 1, .]."""
        if not self._gate.enabled:
            raise ValueError(
                "the adapter is disabled, so no token is routed; leave the `disable_adapter()` block first"
            )
        with recording() as record:
            self.get_base_model()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return record.routing
