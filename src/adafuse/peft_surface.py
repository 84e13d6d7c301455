"""What PEFT, Trainer, TRL and Accelerate read of a PeftModel, for a model with one dynamic adapter that cannot be merged."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import nn

ADAPTER_NAME = "default"  # PEFT's name for the one adapter a model has
REFERENCE_NAME = "ref"  # TRL's name for the frozen copy that a policy is compared with
ONE_ADAPTER = (
    "a model has one dynamic adapter; its experts are the adapters (num_experts, or import_loras for trained LoRAs)"
)
NO_MERGE = "the experts change with every token, so there is no one set of merged weights; detach() gives the base back"
OWN_TUNERS = "it describes PEFT's own tuners; print(model), model.banks and model.router show this one"


class PeftSurface(PeftModel):
    """Base class of every model with an adapter: PeftModel's attributes and names, and clear refusals of what makes no sense here.

    It does not run PeftModel.__init__, which would inject one of PEFT's own tuners.
    """

    def _init_surface(self, base):
        nn.Module.__init__(self)
        name = getattr(base.config, "_name_or_path", "") or getattr(base, "name_or_path", "")
        self._peft_config = {ADAPTER_NAME: PeftConfig(base_model_name_or_path=name, task_type="CAUSAL_LM")}
        self.active_adapter, self.peft_type = ADAPTER_NAME, None
        self.special_peft_forward_args, self._is_prompt_learning = set(), False
        self.base_model = Backbone(base)

    @property
    def peft_config(self):
        return self._peft_config

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    @torch.no_grad()
    def add_adapter(self, adapter_name, peft_config=None, **_):
        """Keep a frozen copy of this adapter as it is now, called "ref": the reference of TRL's DPO and GRPO. No other name."""
        if adapter_name != REFERENCE_NAME:
            raise ValueError(
                f"add_adapter({adapter_name!r}): {ONE_ADAPTER}; only a frozen copy, {REFERENCE_NAME!r}, can be"
            )
        self._check_default_active("add_adapter")
        self._reference = {name: parameter.detach().clone() for name, parameter in self._adapter_parameters().items()}
        self.peft_config[REFERENCE_NAME] = self.peft_config[ADAPTER_NAME]

    def set_adapter(self, adapter_name, inference_mode=False):
        """Compute with "default", or with the copy "ref" that add_adapter kept (for passes without gradients)."""
        if isinstance(adapter_name, (list, tuple)) and len(adapter_name) == 1:
            adapter_name = adapter_name[0]
        if adapter_name not in self.peft_config:
            check_name(adapter_name)
        if adapter_name == self.active_adapter:
            return
        # Swapped, not copied: a graph that was built before finds its own numbers when they are back.
        for name, parameter in self._adapter_parameters().items():
            parameter.data, self._reference[name] = self._reference[name].to(parameter), parameter.data
        self.active_adapter = adapter_name

    def _check_default_active(self, what):
        if self.active_adapter != ADAPTER_NAME:
            raise ValueError(
                f"{what} while the adapter {self.active_adapter!r} is active would take it for the trained one; call "
                f"set_adapter({ADAPTER_NAME!r}) first"
            )

    def _replicate_for_data_parallel(self):
        raise ValueError(
            "nn.DataParallel is not supported; for several GPUs start one process for each (torchrun), else show the process one "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def create_or_update_model_card(self, output_dir):
        """A README.md that says what the folder is; one that is there already is left alone."""
        path = Path(output_dir) / "README.md"
        if path.exists():
            return
        base = self.peft_config[ADAPTER_NAME].base_model_name_or_path
        head = ["library_name: adafuse", "pipeline_tag: text-generation", "tags: [lora, mixture-of-experts]"]
        head += [f"base_model: {base}"] if base else []
        settings = self.adafuse_config.to_json()
        body = f"A dynamic adapter for `{base or 'its base model'}`, made with adafuse.\n\n```json\n{settings}\n```"
        path.write_text("---\n" + "\n".join(head) + f"\n---\n\n{body}\n", encoding="utf-8")


class Backbone(nn.Module):
    """The `base_model` a PeftModel is expected to have: the HuggingFace model sits at `.model`, attributes fall through to it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def check_name(adapter_name):
    """ValueError for any adapter name but the one there is."""
    if adapter_name != ADAPTER_NAME:
        raise ValueError(f"adapter {adapter_name!r}: {ONE_ADAPTER}; it is called {ADAPTER_NAME!r}")


def _refusal(name, why):
    def refuse(self, *args, **kwargs):
        raise ValueError(f"{name}: {why}")

    refuse.__name__, refuse.__doc__ = name, f"Refused: {why}."
    return refuse


REFUSED = {
    ONE_ADAPTER: ("delete_adapter", "add_weighted_adapter", "set_requires_grad"),
    NO_MERGE: ("merge_and_unload", "merge_adapter", "unmerge_adapter", "unload"),
    OWN_TUNERS: (
        "get_layer_status",
        "get_model_status",
        "get_prompt",
        "get_prompt_embedding_to_save",
        "supports_lora_conversion",
    ),
}
for _why, _names in REFUSED.items():
    for _name in _names:
        setattr(PeftSurface, _name, _refusal(_name, _why))
