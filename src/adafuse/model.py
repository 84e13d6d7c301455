"""AdaFuseModel: a dynamic adapter with one routing decision per token, and the ways to execute it."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import torch

from adafuse.attached import AttachedModel, Prepared
from adafuse.config import AdaFuseConfig
from adafuse.costs import Device, costs, explain
from adafuse.discover import find_blocks, find_targets
from adafuse.execution import cheapest, check_available
from adafuse.experts import ExpertBank
from adafuse.fingerprint import fingerprint, tensor_shapes
from adafuse.layers import AdapterLinear, PreGate, device_of, recording
from adafuse.router import Router, Routing, balance_loss

SWITCH_SOURCES = ("pristine", "in_place")


class AdaFuseModel(AttachedModel):
    """`base` with a mixture of LoRA experts on its linears, routed once per token before block 0.

    base: any HuggingFace decoder-only causal LM, quantised or not; it is changed in place (its weights are neither copied nor
    touched) and frozen, and `detach` gives it back. config: AdaFuseConfig; its defaults if left out. The adapter's parameters
    are fp32 and trainable. A `PeftModel`, so that Trainer, TRL and Accelerate treat it as one: checkpoints hold the adapter only.

    Raises ValueError, leaving the base as it was, if the base is not a causal LM, carries adapters already, or has no such targets.
    """

    config_class = AdaFuseConfig

    def __init__(self, base, config: AdaFuseConfig | None = None):
        super().__init__(base, config)
        self._switch_source = "pristine"
        self._told_of_drift = False

    @classmethod
    def _prepare(cls, base, config):
        blocks_path, blocks = find_blocks(base)
        targets = find_targets(base, config)
        banks = {target.path: _bank_for(target, config) for target in targets}
        router = cls._router_for(base, config, len(blocks), device_of(targets[0].module))
        linears = {}
        for target in targets:
            block = int(target.path.removeprefix(f"{blocks_path}.").partition(".")[0])
            bank = banks[target.path]
            linears[target.path] = AdapterLinear(target.module, bank, target.path, block, config.lora_dropout)
        gate = PreGate(router, list(linears.values()), config, len(blocks))
        return Prepared(gate, {"router": router, **banks}, linears, router=router)

    @classmethod
    def _router_for(cls, base, config, num_blocks, device):
        return Router(
            base.config.get_text_config(decoder=True).hidden_size,
            config.num_experts,
            config.top_k,
            num_decisions=num_blocks if config.routing == "layer" else 1,
            router_hidden=config.router_hidden,
            device=device,
        )

    @classmethod
    def _expected(cls, base, config):
        found = fingerprint(base, find_targets(base, config))
        return found, tensor_shapes(found, config)

    def _balance(self, routing, attention_mask):
        return balance_loss(routing, attention_mask)

    # --- execution -------------------------------------------------------------------------------------------------

    @property
    def execution(self) -> str:
        """How adapters are computed. The function is the same.

        "reference": plain PyTorch, differentiable. "fused": unmerged Triton kernels, exact, any batch, no gradients. "switch": the weights
        of the base, merged with one token's experts and switched by one launch a token (each dtype of theirs); one sequence at a time.
        "auto": "reference" or "fused", whichever is expected to take less time (`execution.automatic`). ValueError when set to what
        cannot run here.
        """
        return self._gate.execution

    @execution.setter
    def execution(self, value):
        check_available(value, self.router.device)
        self._leave_switch()
        self._gate.switcher = self._switcher() if value == "switch" else None
        self._gate.execution = value

    @property
    def switch_source(self) -> str:
        """What execution="switch" merges from: "pristine" (an untouched copy, exact) or "in_place" (the weights themselves; drifts)."""
        return self._switch_source

    @switch_source.setter
    def switch_source(self, value):
        if value not in SWITCH_SOURCES:
            raise ValueError(f"switch_source={value!r} is unknown; allowed: {', '.join(map(repr, SWITCH_SOURCES))}")
        if self.execution == "switch" and value != self._switch_source:
            raise ValueError('switch_source cannot change while execution="switch"; set another execution first')
        self._switch_source = value

    def _switcher(self):
        from adafuse.switching import DRIFT, Switcher  # here, since it needs Triton

        base = self.get_base_model()
        layers = [base.get_submodule(path) for path in self.banks]
        decisions, source = self.router.num_decisions, self._switch_source
        switcher = Switcher(base, layers, self.adafuse_config, decisions=decisions, source=source)
        if switcher.in_place and not self._told_of_drift:  # once a model: moving and casting it make a new switcher
            warnings.warn(DRIFT, stacklevel=3)
            self._told_of_drift = True
        return switcher

    def _leave_switch(self):
        """The base's own weights again, if an execution by switching has merged experts into them."""
        if self._gate.switcher is not None:
            self._gate.switcher.close()
            self._gate.execution, self._gate.switcher = "auto", None

    @contextmanager
    def _weights_at_rest(self):
        """Inside, the weights are the base's own and may move or change; afterwards they are switched as before."""
        switching = self.execution == "switch"
        self._leave_switch()
        yield
        if switching:
            self.execution = "switch"

    def __deepcopy__(self, memo):
        """A copy of a model that switches does not switch: execution is "auto"."""
        with self._weights_at_rest():
            twin = memo[id(self)] = type(self).__new__(type(self))
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _apply(self, *args, **kwargs):
        """Moving and casting (`to`, `cuda`, `half`, ...)."""
        self._gate.forget_layers()
        with self._weights_at_rest():
            return super()._apply(*args, **kwargs)

    def detach(self):
        self._leave_switch()
        return super().detach()

    def explain_execution(self, tokens: int = 1) -> str:
        """Print, and return, what a forward of `tokens` tokens without gradients would do, and the bytes, FLOPs and expected time of each
        execution, on this GPU or, for a model elsewhere, on an H100.

        Under "fused", how many linears take which form (`costs.FORMS`); weights of the base are counted as they are stored.
        """
        gate, dtype = self._gate, self.get_base_model().dtype
        layers, device = gate.layers(dtype), self.router.device
        of = gate.config, tokens, dtype.itemsize
        text = explain(costs(layers, *of, Device.of(device)), gate.how(1, tokens, dtype, needs_grad=False), tokens)
        if device.type != "cuda":
            text += f'\nthe model is on {device.type}, where "auto" takes the reference; the times are of an H100'
        elif self.execution == "auto":
            captured = cheapest(layers, *of, True, Device.of(device))
            text += f"\nlaunched from Python, a forward takes the longer of both times; in a CUDA graph, the GPU's alone: {captured}"
        print(text)
        return text

    # --- routing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def route(self, input_ids, attention_mask=None) -> Routing:
        """Routing of each token: experts int64 and weights float32, [batch, seq, D, top_k], best first. Runs no block."""
        return self._record(input_ids, attention_mask).routing

    @torch.no_grad()
    def hidden_before_blocks(self, input_ids, attention_mask=None) -> torch.Tensor:
        """h0 [batch, seq, H]: the hidden states that enter block 0, which is what the router reads."""
        return self._record(input_ids, attention_mask).h0

    def _record(self, input_ids, attention_mask):
        if not self._gate.enabled:
            raise ValueError(
                "the adapter is disabled, so no token is routed; leave the `disable_adapter()` block first"
            )
        with recording(stop=True) as record:
            self.get_base_model()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return record


def _bank_for(target, config):
    return ExpertBank(
        target.in_features,
        target.out_features,
        num_experts=config.num_experts,
        r=config.r,
        shared_rank=config.shared_rank,
        device=device_of(target.module),
    )
