"""start: what is checked before an adapter is served, and the options that make vLLM serve it. Needs transformers,
not vLLM.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from adafuse import checkpoint
from adafuse.config import AdaFuseConfig
from adafuse.integrations.vllm.names import ADAPTER, DIGEST, FALLBACK, NATIVE, PREFIX

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers
MIXTURE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def llm_options(base, adapter) -> dict:
    """Keyword arguments for `vllm.LLM` that serve `base` with the adapter in folder `adapter`:
    LLM(**llm_options(base, adapter), ...).

    base: folder, or hub id, of a HuggingFace causal LM. Raises ValueError if the adapter is not one of this base, or
    its architecture cannot be served.
    """
    from adafuse.discover import find_targets
    from adafuse.fingerprint import check_same_base, fingerprint

    config = base_config(base)
    name = architecture(config)
    adapter = checkpoint.locate(adapter).resolve()
    description, settings = Served(adapter).read()
    _check_model_type(adapter, description["fingerprint"], config)
    model = empty_model(config)
    check_same_base(adapter, description, fingerprint(model, find_targets(model, settings)))
    overrides = {"architectures": [PREFIX + name], ADAPTER: str(adapter), DIGEST: digest(adapter)}
    return {"model": str(base), "hf_overrides": overrides}


@dataclass(frozen=True)
class Served:
    """The adapter that a server serves: its folder, and what its weights file was when the server was started ("" if
    unknown).
    """

    adapter: Path
    digest: str = ""

    @classmethod
    def of(cls, hf_config) -> Served:
        """What the overrides of a model's config name. ValueError if they name none."""
        adapter = getattr(hf_config, ADAPTER, None)
        if not adapter:
            raise ValueError(
                "this model is to carry a dynamic adapter, but its config names none: pass hf_overrides with "
                f"{ADAPTER!r} (the adapter's folder), as adafuse.integrations.vllm.start.llm_options gives them"
            )
        return cls(Path(adapter), getattr(hf_config, DIGEST, "") or "")

    def read(self) -> tuple[dict, AdaFuseConfig]:
        """The adapter's description and config. ValueError if the folder is none of ours."""
        description = checkpoint.read_description(self.adapter)
        print_ = description.get("fingerprint")
        if not isinstance(print_, dict) or not isinstance(print_.get("linears"), dict):
            raise ValueError(
                f"{self.adapter}: its adapter_config.json has no fingerprint of the base; was it written by adafuse?"
            )
        return description, checkpoint.config_of(description)

    def check_unchanged(self):
        """ValueError if the weights file is another than when the server was started: ranks must not read different
        adapters.
        """
        if self.digest and digest(self.adapter) != self.digest:
            raise ValueError(
                f"{self.adapter / checkpoint.WEIGHTS_FILE} changed while the server was starting; start it again"
            )


def digest(adapter) -> str:
    """SHA-256 of an adapter's weights file, whose header repeats the config."""
    path = Path(adapter) / checkpoint.WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; an adapter is a folder that adafuse wrote")
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def base_config(base):
    """The HuggingFace config of a base. ValueError if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{base} cannot be loaded as a HuggingFace causal LM: {first}") from error


def architecture(config) -> str:
    """The class of vLLM's for models of this HuggingFace config. ValueError if no adapter can be served on them."""
    named = (getattr(config, "architectures", None) or ["none"])[0]
    if named in NATIVE:
        return named
    check_fallback(named, config)
    return FALLBACK


def check_fallback(named, config):
    """ValueError if vLLM's Transformers backend serves no adapter on models of this config, an architecture `named` so."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    if count := next((n for key in MIXTURE if (n := getattr(text, key, None))), None):
        raise ValueError(
            f"{named} ({config.model_type}) is a mixture backbone of {count} experts, which vLLM does not run as "
            "linears; a dynamic adapter cannot be served on it"
        )
    if config.is_encoder_decoder or config is not text:
        raise ValueError(
            f"{named} ({config.model_type}) is not a decoder of text alone, and cannot be served with an "
            f"adapter; served are {', '.join(NATIVE)}, and text models of transformers"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{named} ({config.model_type}) is no causal LM of transformers, and cannot be served with an "
            f"adapter; served are {', '.join(NATIVE)}, and text models of transformers"
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - ATTENTION
    if kinds or not AutoModelForCausalLM._model_mapping[type(config)].is_backend_compatible():
        how = f"has layers of {', '.join(sorted(kinds))}" if kinds else "computes attention in a way of its own"
        raise ValueError(
            f"{named} ({config.model_type}) {how}, which vLLM's Transformers backend does not run; a dynamic adapter cannot be served on it"
        )
    if not enters_unchanged(empty_model(config)):
        raise ValueError(
            f"{named} ({config.model_type}) changes its embeddings before block 0 (adds positions, say): tokens cannot "
            "be routed before the model runs, so vLLM cannot serve an adapter on it; use `adafuse generate`"
        )


def enters_unchanged(model) -> bool:
    """Whether block 0 of a model without weights is given the very embeddings that the decoder is given."""
    import torch

    from adafuse.discover import find_blocks

    seen = []

    def look(_, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise StopIteration

    _, blocks = find_blocks(model)
    blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    with torch.device("meta"), torch.no_grad():
        width = model.get_input_embeddings().weight.shape[1]
        embeddings = torch.empty(1, 4, width, dtype=model.dtype)
        mask = torch.zeros(1, 1, 4, 4, dtype=model.dtype)  # ready made, since making one reads values
        given = {"attention_mask": mask, "position_ids": torch.arange(4)[None], "use_cache": False}
        with contextlib.suppress(StopIteration):
            model.get_decoder()(inputs_embeds=embeddings, **given)
    return bool(seen) and seen[0] is embeddings


def empty_model(config):
    """The HuggingFace model of a config, without weights (on the meta device)."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def check_fingerprint(adapter, print_: dict, config):
    """ValueError unless the adapter was made on a base like the one of this HuggingFace config. Its linears are
    compared elsewhere.
    """
    _check_model_type(adapter, print_, config)
    text = config.get_text_config(decoder=True)
    for key in ("hidden_size", "num_hidden_layers"):
        _check_same(adapter, print_, key, getattr(text, key))


def _check_model_type(adapter, print_, config):
    _check_same(adapter, print_, "model_type", config.model_type)


def _check_same(adapter, print_, key, value):
    if print_.get(key) != value:
        raise ValueError(
            f"{adapter} was made on another base: {key} is {print_.get(key, 'absent')} there and {value} in this model"
        )


def follows_batch(adapted_only: bool, load_interval: float) -> bool:
    """Whether somebody asks whose a token is: to leave the base's without adapter, or to report the load."""
    return not adapted_only or load_interval > 0


def does_not_say(backend: str) -> str:
    """Of an attention backend, for an error."""
    return (
        f"{backend} does not say where a request's tokens begin; choose FLASH_ATTN or TRITON_ATTN with --attention-backend, or serve the "
        "adapted model alone: --adapted-only --load-interval 0"
    )


def switched_on(variable) -> bool:
    """Whether one of vLLM's environment variables says yes."""
    return os.environ.get(variable, "").lower() in ("1", "true")


def check_engine(vllm_config):
    """ValueError for settings of vLLM's that an adapted model does not work with."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}: tokens are routed from the embeddings, which only "
            "the first stage has; use tensor parallelism (--tensor-parallel-size)"
        )
    if vllm_config.lora_config is not None:
        raise ValueError("enable_lora: vLLM's own LoRAs and a dynamic adapter exclude each other; start without it")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise ValueError("prefill_context_parallel_size is not supported with a dynamic adapter; start without it")
    if switched_on("VLLM_USE_BREAKABLE_CUDAGRAPH"):  # vLLM does that by itself for some models
        raise ValueError(
            "VLLM_USE_BREAKABLE_CUDAGRAPH: such graphs would hold the routing of the step they were captured in; set it to 0"
        )
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False):
        raise ValueError("batches split in two (enable_dbo) are not supported with a dynamic adapter; start without it")
