"""AdapterState: the tensors of an attached adapter, out and in, to files and back; for any method that attaches one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import torch
from peft import PeftModel
from torch import nn

from adafuse import checkpoint
from adafuse.config import Settings
from adafuse.discover import check_causal_lm
from adafuse.experts import ExpertBank
from adafuse.fingerprint import check_same_base, fingerprint
from adafuse.layers import AdapterLinear, RoutedBlock
from adafuse.peft_surface import ADAPTER_NAME, PeftSurface, check_name

# What Trainer, TRL and push_to_hub may pass, of no meaning to one adapter in one file.
IGNORED_WHEN_SAVING = {
    "safe_serialization",
    "max_shard_size",
    "selected_adapters",
    "save_embedding_layers",
    "push_to_hub",
}


class AdapterState(PeftSurface):
    """A PeftModel's saving and loading, over the adapter's parts.

    A subclass names its config's class and what `_expected` says, and attaching sets `adafuse_config` (its config) and:
    `_parts`: prefix of the names in exchange format -> router or bank; `_part_names`: prefix -> name of that module in this
    model; `_linears`: the adapted linears, in order.
    """

    config_class: ClassVar[type[Settings]]

    @classmethod
    def _expected(cls, base, config) -> tuple[dict, dict[str, tuple[int, ...]]]:
        """Fingerprint of the base, not adapted yet, and name and shape of every tensor that an adapter of `config` has on it."""
        raise NotImplementedError

    def _weights_at_rest(self):
        """Inside, the adapter's weights may change."""
        return nullcontext()

    # --- tensors -----------------------------------------------------------------------------------------------------

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
        tensors = {}
        for prefix, part in self._parts.items():
            where = self._part_names[prefix]
            mine = {name: state_dict[f"{where}.{name}"] for name, _ in part.named_parameters()}
            mine = part.tensors(**mine) if isinstance(part, ExpertBank) else mine
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in mine.items()}
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
        with self._weights_at_rest():
            for name, parameter in expected.items():  # views of the parameters
                parameter.copy_(tensors[name])

    def _adapter_parameters(self):
        names = {
            f"{self._part_names[prefix]}.{name}"
            for prefix, part in self._parts.items()
            for name, _ in part.named_parameters()
        }
        return {name: parameter for name, parameter in self.named_parameters() if name in names}

    def _fingerprint(self):
        return fingerprint(self.get_base_model(), self._linears)

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
        config = checkpoint.config_of(description, cls.config_class)
        check_unadapted(model)
        check_causal_lm(model)
        found, shapes = cls._expected(model, config)
        check_same_base(folder, description, found)
        tensors = checkpoint.read_tensors(folder, shapes)
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
        mine = self.adafuse_config.to_dict()
        theirs = checkpoint.config_of(description, self.config_class).to_dict()
        if differing := [f"{key}={theirs[key]!r} (here {mine[key]!r})" for key in mine if mine[key] != theirs[key]]:
            raise ValueError(
                f"{folder} has other settings than this model: {', '.join(differing)}; use {type(self).__name__}.from_pretrained"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in self.adapter_tensors().items()}
        self.load_adapter_tensors(checkpoint.read_tensors(folder, shapes))
        if not is_trainable:
            self.eval()
        elif not any(parameter.requires_grad for parameter in self._adapter_parameters().values()):
            self.set_trainable("all")
        return nn.modules.module._IncompatibleKeys([], [])


def check_unadapted(base):
    """ValueError if the base carries an adapter already, of this library or of PEFT."""
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
