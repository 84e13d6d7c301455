"""AttachedModel: what every method with an adapter on the linears of a causal LM has in common. Attach, run, detach."""

from __future__ import annotations

import inspect
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from adafuse.adapter_state import AdapterState, check_unadapted
from adafuse.aux_loss import NO_BALANCE, config_with_aux_loss, share_of_labels, with_aux_loss, with_loss_added
from adafuse.discover import check_causal_lm, find_blocks
from adafuse.experts import ExpertBank
from adafuse.layers import check_blocks, recording, route_blocks, unroute_blocks
from adafuse.packing import allow_packing, forbid_packing, refuse_packed


@dataclass
class Prepared:
    """An adapter made for a base that has not been changed yet.

    gate: decides before block 0 what each block is called with (`layers.PreGate`, or one like it). parts: prefix of the names in
    exchange format -> router or bank. linears: path -> the module that takes the linear's place there. around: path -> one that
    takes the place of a module which holds linears. router: the one router of the model, None where each sits beside its linear.
    """

    gate: object
    parts: dict[str, nn.Module]
    linears: dict[str, nn.Module]
    around: dict[str, nn.Module] = field(default_factory=dict)
    router: nn.Module | None = None


class AttachedModel(AdapterState):
    """A HuggingFace causal LM with an adapter that a subclass makes: `_prepare` builds it, `_balance` balances its routing.

    Raises ValueError, leaving the base as it was, if the base is not a causal LM, carries adapters already, or lacks what the
    adapter sits on.
    """

    def __init__(self, base, config=None):
        config = self.config_class() if config is None else config
        if not isinstance(config, self.config_class) or config.method != self.config_class.method:
            raise ValueError(f"config must be {_a(self.config_class.__name__)}, got {type(config).__name__}")
        if torch.is_inference_mode_enabled():
            raise ValueError("an adapter attached inside torch.inference_mode() could never train; attach it outside")
        check_unadapted(base)
        check_causal_lm(base)
        _, blocks = find_blocks(base)
        check_blocks(blocks)
        # Everything that can fail comes before the first change to the base.
        prepared = self._prepare(base, config)
        self._init_surface(base)
        self.adafuse_config = config
        self.config = config_with_aux_loss(base.config, config.aux_loss_coef)
        self._trained_before = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
        self._forward_names = [name for name in inspect.signature(type(base).forward).parameters if name != "self"]
        self._gate, self._parts, self._linears = prepared.gate, prepared.parts, list(prepared.linears.values())
        self.banks = {path: part for path, part in prepared.parts.items() if isinstance(part, ExpertBank)}
        base.requires_grad_(False)
        self._kept_unpacked = forbid_packing(base)
        self._replaced = {**prepared.linears, **prepared.around}
        for path, module in self._replaced.items():
            base.set_submodule(path, module)
        route_blocks(blocks, self._gate)
        if prepared.router is not None:
            self.router = prepared.router.train(base.training)
        names = {id(module): name for name, module in self.named_modules()}
        self._part_names = {prefix: names[id(part)] for prefix, part in self._parts.items()}
        # Not self.train(): that would also set the modes of the base's own modules.
        self.training = self.base_model.training = base.training

    @classmethod
    def _prepare(cls, base, config) -> Prepared:
        """The adapter for a base, which is left alone."""
        raise NotImplementedError

    def _balance(self, routing, attention_mask) -> torch.Tensor:
        """The balance loss, unweighted, of what the recorder of a forward found as its routing."""
        raise NotImplementedError

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self._gate.enabled

    # --- running ---------------------------------------------------------------------------------------------------

    def forward(self, *args, output_router_logits: bool | None = None, **kwargs):
        """The base's forward, adapters included.

        In training mode `.loss` holds  coefficient * balance loss,  the coefficient being self.config.router_aux_loss_coef (at
        first aux_loss_coef). Under gradient accumulation (Trainer passes `num_items_in_batch`) it is weighted with this
        micro-batch's share of the label tokens, as the language-model loss is.
        output_router_logits=True (HuggingFace's protocol for mixtures; None: as self.config says): the output carries `.aux_loss`,
        unweighted, and `.loss` is left alone, unless `num_items_in_batch` tells that a trainer takes it as it is (TRL before 1.15).
        """
        if output_router_logits is None:
            output_router_logits = self.config.get_text_config(decoder=True).output_router_logits
        given = {**dict(zip(self._forward_names, args, strict=False)), **kwargs}
        uncached = getattr(self.config, "use_cache", None) is False and "use_cache" in self._forward_names
        if uncached and "use_cache" not in given:
            # Trainer turns the cache off in self.config, which the base, having its own, does not see. With a cache,
            # transformers takes packed sequences for one.
            kwargs["use_cache"] = False
        with recording() as record:
            output = self.get_base_model()(*args, **kwargs)
        return self._with_balance(output, record.routing, given, output_router_logits)

    def _with_balance(self, output, routing, given, apart):
        """The output with the balance loss: in its `.loss`, or as `.aux_loss` where asked for `apart`, or both."""
        trains = self.training and routing is not None
        coefficient = self.config.get_text_config(decoder=True).router_aux_loss_coef if trains else 0.0
        labelled = given.get("labels") is not None
        joined = coefficient and labelled and (not apart or given.get("num_items_in_batch") is not None)
        if coefficient and not (labelled or apart) and torch.is_grad_enabled():
            warnings.warn(NO_BALANCE, stacklevel=3)
        if not (joined or apart):
            return output
        if routing is None:  # adapters are off
            aux_loss = torch.zeros((), device=next(iter(self._adapter_parameters().values())).device)
        else:
            aux_loss = self._balance(routing, given.get("attention_mask"))
        if joined:
            output = with_loss_added(output, coefficient * share_of_labels(given) * aux_loss)
        return with_aux_loss(output, aux_loss) if apart else output

    def train(self, mode: bool = True):
        if mode:
            refuse_packed(self.get_base_model())
        self._drop_packs()
        return super().train(mode)

    def _drop_packs(self):
        for bank in self.banks.values():
            bank.drop_pack()

    def generate(self, *args, **kwargs):
        """HuggingFace's `generate` of the adapted model."""
        self._drop_packs()
        return self.get_base_model().generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self):
        """Inside, the model is its backbone (the reference pass of DPO and GRPO)."""
        before, self._gate.enabled = self._gate.enabled, False
        try:
            yield
        finally:
            self._gate.enabled = before

    # --- parts -----------------------------------------------------------------------------------------------------

    def get_base_model(self):
        """The HuggingFace model, with its linears wrapped. `detach` gives it back untouched."""
        if self.base_model is None:
            raise RuntimeError("this adapter was detached from its base")
        return self.base_model.model

    def resize_token_embeddings(self, *args, **kwargs):
        """The base's; `config`, a copy, follows."""
        embeddings = self.get_base_model().resize_token_embeddings(*args, **kwargs)
        self.config = config_with_aux_loss(self.get_base_model().config, self.adafuse_config.aux_loss_coef)
        return embeddings

    def set_trainable(self, part: str = "all"):
        """Choose what trains: "all" of the adapter, "router" (over frozen experts) or "experts" (under a frozen router)."""
        parts = {"all": (True, True), "router": (True, False), "experts": (False, True), "none": (False, False)}
        if part not in parts:
            raise ValueError(f"set_trainable({part!r}): unknown part; allowed: {', '.join(map(repr, parts))}")
        routers, experts = parts[part]
        for module in self._parts.values():
            module.requires_grad_(experts if isinstance(module, ExpertBank) else routers)

    def detach(self):
        """Take the adapter off: the base as it was before, same modules, same flags. This object is of no use afterwards."""
        base = self.get_base_model()
        _, blocks = find_blocks(base)
        unroute_blocks(blocks)
        allow_packing(self._kept_unpacked)
        for path, module in reversed(self._replaced.items()):  # what holds linears goes before the linears it holds
            base.set_submodule(path, module.base_layer)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in self._trained_before)
        self.base_model = None
        return base


def _a(name):
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"
