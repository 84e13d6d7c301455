"""Load what commands work on: a base model with its tokenizer, and an adapter on it."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError

from adafuse import checkpoint
from adafuse.model import AdaFuseModel

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = ("4bit", "8bit")


def load_base(path, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None):
    """(model, tokenizer) of a HuggingFace causal LM in a folder or hub repository.

    dtype: "auto" (that of the files), "float32", "bfloat16", "float16". device: "auto" (a GPU if there is one: under torchrun
    that of this process), "cpu", "cuda", ...
    quantize: None, "4bit" (NF4) or "8bit", by bitsandbytes. ValueError for what is no causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = _own_device() if device == "auto" else _checked(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    try:
        AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            device_map={"": device},
            quantization_config=_quantization(quantize),
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be loaded as a HuggingFace causal LM: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: padding is told by its position, never by its id
    return model, tokenizer


def load_adapted(adapter, base=None, **options):
    """(AdaFuseModel, tokenizer) of an adapter folder or hub repository; its base is `base`, or the one its config names."""
    if base is None:
        base = checkpoint.read_description(checkpoint.locate(adapter))["base_model_name_or_path"]
        if not base:
            raise ValueError(f"{adapter} does not name its base model; pass --base")
    model, tokenizer = load_base(base, **options)
    return AdaFuseModel.from_pretrained(model, adapter), tokenizer


def _checked(device):
    """`device`, if this machine has it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown to torch; known, but not in this build or machine
        raise ValueError(f"device={device!r} cannot be used here: {_first_line(error)}") from error
    return device


def _own_device():
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _quantization(quantize):
    if quantize is None:
        return None
    if quantize not in QUANTIZED:
        raise ValueError(f"quantize={quantize!r} is unknown; allowed: {', '.join(QUANTIZED)}")
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
