"""AdaFuseModel: a dynamic adapter attached to a HuggingFace causal LM. Attach, run, save, load, detach."""

from __future__ import annotations

import copy
import inspect
import warnings
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from adafuse import checkpoint
from adafuse.aux_loss import NO_BALANCE, config_with_aux_loss, share_of_labels, with_aux_loss, with_loss_added
from adafuse.config import AdaFuseConfig
from adafuse.discover import check_causal_lm, find_blocks, find_targets
from adafuse.execution import check_available, costs, explain, resolve
from adafuse.experts import ExpertBank
from adafuse.fingerprint import check_same_base, fingerprint, tensor_shapes
from adafuse.layers import AdapterLinear, PreGate, RoutedBlock, check_blocks, recording, route_blocks, unroute_blocks
from adafuse.packing import allow_packing, forbid_packing, refuse_packed
from adafuse.peft_surface import ADAPTER_NAME, PeftSurface, check_name
from adafuse.router import Router, Routing, balance_loss

SWITCH_SOURCES = ("pristine", "in_place")
# What Trainer, TRL and push_to_hub may pass, of no meaning to one adapter in one file.
IGNORED_WHEN_SAVING = {
    "safe_serialization",
    "max_shard_size",
    "selected_adapters",
    "save_embedding_layers",
    "push_to_hub",
}


class AdaFuseModel(PeftSurface):
    """`base` with a mixture of LoRA experts on its linears, routed once per token before block 0.

    base: any HuggingFace decoder-only causal LM, quantised or not; it is changed in place (its weights are neither copied nor
    touched) and frozen, and `detach` gives it back. config: AdaFuseConfig; its defaults if left out. The adapter's parameters
    are fp32 and trainable. A `PeftModel`, so that Trainer, TRL and Accelerate treat it as one: checkpoints hold the adapter only.

    Raises ValueError, leaving the base as it was, if the base is not a causal LM, carries adapters already, or has no such targets.
    """

    def __init__(self, base, config: AdaFuseConfig | None = None):
        config = AdaFuseConfig() if config is None else config
        if not isinstance(config, AdaFuseConfig):
            raise ValueError(f"config must be an AdaFuseConfig, got {type(config).__name__}")
        if torch.is_inference_mode_enabled():
            raise ValueError("an adapter attached inside torch.inference_mode() could never train; attach it outside")
        _check_unadapted(base)
        check_causal_lm(base)
        blocks_path, blocks = find_blocks(base)
        check_blocks(blocks)
        targets = find_targets(base, config)
        # Everything that can fail comes before the first change to the base.
        banks = {target.path: _bank_for(target, config) for target in targets}
        router = Router(
            base.config.get_text_config(decoder=True).hidden_size,
            config.num_experts,
            config.top_k,
            num_decisions=len(blocks) if config.routing == "layer" else 1,
            router_hidden=config.router_hidden,
            device=_device_of(targets[0].module),
        )
        self._init_surface(base)
        self.adafuse_config, self.banks = config, banks
        self.config = config_with_aux_loss(base.config, config.aux_loss_coef)
        self._switch_source = "pristine"
        self._trained_before = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
        self._forward_names = [name for name in inspect.signature(type(base).forward).parameters if name != "self"]
        self._gate = PreGate(router, list(banks.values()), config, len(blocks))
        base.requires_grad_(False)
        self._kept_unpacked = forbid_packing(base)
        for target in targets:
            block = int(target.path.removeprefix(f"{blocks_path}.").partition(".")[0])
            linear = AdapterLinear(target.module, banks[target.path], target.path, block, config.lora_dropout)
            base.set_submodule(target.path, linear)
        route_blocks(blocks, self._gate)
        self.router = router.train(base.training)
        # Not self.train(): that would also set the modes of the base's own modules.
        self.training = self.base_model.training = base.training

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self._gate.enabled

    # --- running ---------------------------------------------------------------------------------------------------

    @property
    def execution(self) -> str:
        """How adapters are computed. The function is the same.

        "reference": plain PyTorch, differentiable. "fused": unmerged Triton kernels, exact, any batch, no gradients. "switch": the weights
        of the base, merged with one token's experts and switched by one launch a token; one sequence at a time. "auto": chooses;
        now always the reference. ValueError when set to what cannot run here.
        """
        return self._gate.execution

    @execution.setter
    def execution(self, value):
        check_available(value, self.router.weight.device)
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
        from adafuse.switching import Switcher  # here, since it needs Triton

        base = self.get_base_model()
        layers = [base.get_submodule(path) for path in self.banks]
        decisions, source = self.router.num_decisions, self._switch_source
        return Switcher(base, layers, self.adafuse_config, decisions=decisions, source=source)

    def _leave_switch(self):
        """The base's own weights again, if an execution by switching has merged experts into them."""
        if self._gate.switcher is not None:
            self._gate.switcher.close()
            self._gate.execution, self._gate.switcher = "auto", None

    @contextmanager
    def _outside_switch(self):
        """Inside, the weights are the base's own and may move or change; afterwards they are switched as before."""
        switching = self.execution == "switch"
        self._leave_switch()
        yield
        if switching:
            self.execution = "switch"

    def __deepcopy__(self, memo):
        """A copy of a model that switches does not switch: execution is "auto"."""
        with self._outside_switch():
            twin = memo[id(self)] = type(self).__new__(type(self))
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _apply(self, *args, **kwargs):
        """Moving and casting (`to`, `cuda`, `half`, ...)."""
        with self._outside_switch():
            return super()._apply(*args, **kwargs)

    def explain_execution(self, tokens: int = 1) -> str:
        """Print, and return, what a forward of `tokens` tokens without gradients would do, and the bytes and FLOPs of each execution."""
        layers = [(bank.in_features, bank.out_features) for bank in self.banks.values()]
        found = costs(layers, self.adafuse_config, tokens, self.get_base_model().dtype.itemsize)
        text = explain(found, resolve(self.execution, 1, tokens, needs_grad=False), tokens)
        print(text)
        return text

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
        aux_loss = self._aux_loss(routing, given)
        if joined:
            output = with_loss_added(output, coefficient * share_of_labels(given) * aux_loss)
        return with_aux_loss(output, aux_loss) if apart else output

    def _aux_loss(self, routing, given):
        if routing is None:  # adapters are off
            return torch.zeros((), device=self.router.weight.device)
        return balance_loss(routing, given.get("attention_mask"))

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
        router, experts = parts[part]
        self.router.requires_grad_(router)
        for bank in self.banks.values():
            bank.requires_grad_(experts)

    def detach(self):
        """Take the adapter off: the base as it was before, same modules, same flags. This object is of no use afterwards."""
        base = self.get_base_model()
        self._leave_switch()
        _, blocks = find_blocks(base)
        unroute_blocks(blocks)
        allow_packing(self._kept_unpacked)
        for path in self.banks:
            base.set_submodule(path, base.get_submodule(path).base_layer)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in self._trained_before)
        self.base_model = None
        return base

    def adapter_tensors(self, grad: bool = False, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """The adapter in exchange format: name -> tensor, detached.

        grad: the gradients instead (zeros where there is none). state_dict: taken from there.
        """
        self.get_base_model()  # a detached adapter has no parameters left
        if state_dict is None:
            state_dict = self._adapter_parameters()
            if grad:
                state_dict = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in state_dict.items()}
            state_dict = {name: tensor.detach() for name, tensor in state_dict.items()}
        if absent := sorted(set(self._adapter_parameters()) - set(state_dict)):
            raise ValueError(f"the state_dict lacks {len(absent)} parameter(s) of the adapter, first {absent[0]}")
        tensors = {"router.weight": state_dict["router.weight"]}
        if self.router.hidden is not None:
            tensors["router.hidden.weight"] = state_dict["router.hidden.weight"]
        for path, bank in self.banks.items():
            a, b = (state_dict[f"{_bank_name(path)}.{which}"] for which in "ab")
            tensors |= {f"{path}.{name}": tensor for name, tensor in bank.tensors(a, b).items()}
        return tensors

    @torch.no_grad()
    def load_adapter_tensors(self, tensors: dict[str, torch.Tensor]):
        """Write tensors in exchange format into the parameters, in place. ValueError unless names and shapes are exact."""
        expected = self.adapter_tensors()
        if wrong := set(expected) ^ set(tensors):
            raise ValueError(f"{len(wrong)} tensor(s) are missing or unknown, first {min(wrong)}")
        for name, parameter in expected.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(f"{name} has shape {list(tensors[name].shape)}, expected {list(parameter.shape)}")
        with self._outside_switch():
            for name, parameter in expected.items():  # views of the parameters
                parameter.copy_(tensors[name])

    def _adapter_parameters(self):
        names = {f"router.{name}" for name, _ in self.router.named_parameters()}
        names |= {f"{_bank_name(path)}.{which}" for path in self.banks for which in "ab"}
        return {name: parameter for name, parameter in self.named_parameters() if name in names}

    def _fingerprint(self):
        base = self.get_base_model()
        return fingerprint(base, (base.get_submodule(path) for path in self.banks))

    # --- saving and loading ------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, dtype=torch.float32, **kwargs):
        """Write the adapter (config and weights, megabytes) into a folder, as a whole or not at all.

        dtype: of the saved weights; fp32 unless asked otherwise. state_dict: gathered by a sharded trainer, used instead of the
        parameters. is_main_process=False writes nothing.
        """
        if kwargs.get("safe_serialization", True) is False:
            raise ValueError("safe_serialization=False would write a pickle file; adafuse writes safetensors only")
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained(push_to_hub=True) is not supported; call model.push_to_hub(repo_id)")
        if unknown := sorted(set(kwargs) - IGNORED_WHEN_SAVING):
            raise ValueError(f"save_pretrained: unknown option(s) {', '.join(unknown)}; allowed: state_dict, dtype")
        self._check_default_active("save_pretrained")
        if not is_main_process:
            return
        tensors = self.adapter_tensors(state_dict=state_dict or None)
        tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
        name = self.peft_config[ADAPTER_NAME].base_model_name_or_path
        checkpoint.write(save_directory, checkpoint.describe(self.adafuse_config, name, self._fingerprint()), tensors)

    @classmethod
    def from_pretrained(cls, model, model_id, adapter_name=ADAPTER_NAME, is_trainable=False, **hub):
        """Attach the adapter in folder (or hub repository) `model_id` to the base `model`.

        For inference (frozen, in eval mode) unless is_trainable. hub: revision, token, cache_dir, ... of huggingface_hub.
        Raises ValueError, leaving the base as it was, if anything is wrong with the files or they belong to another base.
        """
        check_name(adapter_name)
        folder = checkpoint.locate(model_id, **hub)
        description = checkpoint.read_description(folder)
        config = checkpoint.config_of(description)
        _check_unadapted(model)
        check_causal_lm(model)
        found = fingerprint(model, find_targets(model, config))
        check_same_base(folder, description, found)
        tensors = checkpoint.read_tensors(folder, tensor_shapes(found, config))
        adapted = cls(model, config)
        adapted.load_adapter_tensors(tensors)
        if not is_trainable:
            adapted.set_trainable("none")
            adapted.eval()
        return adapted

    def load_adapter(self, model_id, adapter_name=ADAPTER_NAME, is_trainable=False, **hub):
        """Replace the weights of this adapter by those of a checkpoint with the same settings (Trainer resumes with it)."""
        check_name(adapter_name)
        self._check_default_active("load_adapter")
        folder = checkpoint.locate(model_id, **hub)
        description = checkpoint.read_description(folder)
        check_same_base(folder, description, self._fingerprint())
        mine, theirs = self.adafuse_config.to_dict(), checkpoint.config_of(description).to_dict()
        if differing := [f"{key}={theirs[key]!r} (here {mine[key]!r})" for key in mine if mine[key] != theirs[key]]:
            raise ValueError(
                f"{folder} has other settings than this model: {', '.join(differing)}; use AdaFuseModel.from_pretrained"
            )
        self.load_adapter_tensors(
            checkpoint.read_tensors(folder, tensor_shapes(self._fingerprint(), self.adafuse_config))
        )
        if not is_trainable:
            self.eval()
        elif not any(parameter.requires_grad for parameter in self._adapter_parameters().values()):
            self.set_trainable("all")
        return nn.modules.module._IncompatibleKeys([], [])


def _check_unadapted(base):
    if isinstance(base, PeftModel) or getattr(base, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the base is already adapted ({type(base).__name__}); attach to the bare model (detach() or unload() it first)"
        )
    if isinstance(base, nn.Module) and any(
        isinstance(module, (AdapterLinear, RoutedBlock)) for module in base.modules()
    ):
        raise ValueError(
            "the base already carries a dynamic adapter; call detach() on that one first, or load a second copy of the base"
        )


def _bank_for(target, config):
    return ExpertBank(
        target.in_features,
        target.out_features,
        num_experts=config.num_experts,
        r=config.r,
        shared_rank=config.shared_rank,
        device=_device_of(target.module),
    )


def _bank_name(path):
    return f"base_model.model.{path}.bank"


def _device_of(module):
    """Where a linear computes: the device of its weight; for one that accelerate offloads (its weight is on "meta"), its hook's."""
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # a SequentialHook has several
    execution = next((h.execution_device for h in hooks if getattr(h, "execution_device", None) is not None), None)
    return torch.device(execution) if device.type == "meta" and execution is not None else device
