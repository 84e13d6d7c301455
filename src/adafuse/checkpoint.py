"""Adapter folders: `adapter_config.json` and `adapter_model.safetensors`, written so that an interruption loses nothing.

The weights' header repeats the config, and the weights are renamed into place first: they are the commit point. Reading checks
everything before a model is touched. Never pickle. Knows tensors and dicts, not models.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adafuse.config import FORMAT_VERSION, AdaFuseConfig, Settings

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
# Keys of the JSON beside the settings of the config.
HEADER_KEYS = ("format_version", "base_model_name_or_path", "fingerprint", "method")


def describe(config: Settings, base_name: str, fingerprint: dict) -> dict:
    """The content of adapter_config.json. It names the method of its settings unless that is AdaFuse's own."""
    return {
        **config.to_dict(),
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": base_name or "",
        "fingerprint": fingerprint,
        **({} if config.method == AdaFuseConfig.method else {"method": config.method}),
    }


def write(folder, description: dict, tensors: dict[str, torch.Tensor]):
    """Write both files of an adapter into `folder`, replacing an older adapter as a whole.

    Both are first written under temporary names; a failure up to there leaves the folder as it was.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot save into {folder}: it is a file; name a folder")
    if bad := sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()):
        raise ValueError(
            f"refusing to save: {bad[0]} and {len(bad) - 1} more tensor(s) hold NaN or Inf; the training diverged"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = _to_text(description)
    weights_tmp, config_tmp = (folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS_FILE, CONFIG_FILE))
    try:
        save_file(
            {k: t.contiguous() for k, t in tensors.items()},
            weights_tmp,
            metadata={"format": "pt", "adapter_config": text},
        )
        config_tmp.write_text(text + "\n", encoding="utf-8")
        weights_tmp.chmod(config_tmp.stat().st_mode)  # safetensors creates its file for the owner alone
        for path in (weights_tmp, config_tmp):
            _flush(path)
        os.replace(weights_tmp, folder / WEIGHTS_FILE)
        os.replace(config_tmp, folder / CONFIG_FILE)
        _flush(folder)
    finally:
        for path in (weights_tmp, config_tmp):
            path.unlink(missing_ok=True)


def _to_text(description):
    """Indented JSON with each shape on one line: a large model has hundreds of linears."""
    text = json.dumps(description, indent=2, sort_keys=True)
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def locate(model_id, subfolder: str = "", **hub) -> Path:
    """The local folder of an adapter: `model_id` itself, or a snapshot of that hub repository; subfolder: within it.

    hub: revision, token, cache_dir, ... as huggingface_hub's snapshot_download takes them.
    """
    from huggingface_hub import snapshot_download

    if unknown := sorted(set(hub) - set(inspect.signature(snapshot_download).parameters)):
        raise ValueError(
            f"unknown option(s) {', '.join(unknown)}; allowed beside is_trainable: subfolder, revision, token, ..."
        )
    if Path(model_id).exists():
        return Path(model_id) / subfolder
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        files = [f"{subfolder}/{name}".lstrip("/") for name in (CONFIG_FILE, WEIGHTS_FILE)]
        return Path(snapshot_download(str(model_id), allow_patterns=files, **hub)) / subfolder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"{model_id} is neither a folder here nor an adapter that could be fetched from the hub: {error}"
        ) from error


def read_description(folder) -> dict:
    """The description an adapter folder carries: the weights' header where there is one, else the JSON. Checked for version."""
    folder = Path(folder)
    header = _read_header(folder)
    path = folder / CONFIG_FILE
    on_disk = parse(path.read_bytes(), path) if path.is_file() else None
    if header is None and on_disk is None:
        raise ValueError(f"{folder} is not an adapter: it has no {CONFIG_FILE}")
    if header is not None and header != on_disk:
        warnings.warn(
            f"{path} does not match the weights beside it (an interrupted save?); using the settings stored in {WEIGHTS_FILE}",
            stacklevel=3,
        )
    description = header if header is not None else on_disk
    version = description.get("format_version")
    if version is None and "peft_type" in description:
        raise ValueError(
            f"{folder} is a PEFT {description['peft_type']} adapter; import it with adafuse.integrations.peft.import_loras"
        )
    if type(version) is not int or version < 1:
        raise ValueError(f"{folder}: format_version is {version!r}; this is not an adapter that adafuse wrote")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version {version}, this adafuse reads up to {FORMAT_VERSION}; upgrade adafuse"
        )
    return description


def config_of(description: dict, config_class: type[Settings] = AdaFuseConfig) -> Settings:
    """The config within a description. ValueError if it is one of another method."""
    method = description.get("method", AdaFuseConfig.method)
    if method != config_class.method:
        raise ValueError(
            f"this is an adapter of the method {method!r}, not of {config_class.method!r}; load it with the model class of its method "
            "(AdaFuseModel, or one of adafuse.baselines)"
        )
    return config_class.from_dict({key: value for key, value in description.items() if key not in HEADER_KEYS})


def read_tensors(folder, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """All tensors, on the CPU, in fp32: exactly those `expected` (name -> shape), finite. ValueError otherwise."""
    path = Path(folder) / WEIGHTS_FILE
    with open_weights(path) as file:
        names = set(file.keys())
        if missing := sorted(set(expected) - names):
            raise ValueError(f"{path}: {len(missing)} tensor(s) missing, first {missing[0]}")
        if extra := sorted(names - set(expected)):
            raise ValueError(f"{path}: {len(extra)} tensor(s) this adapter cannot have, first {extra[0]}")
        for name, shape in expected.items():
            if (found := tuple(file.get_slice(name).get_shape())) != tuple(shape):
                raise ValueError(f"{path}: {name} has shape {list(found)}, expected {list(shape)}")
        tensors = {name: file.get_tensor(name) for name in expected}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} has dtype {tensor.dtype}, expected a floating-point one")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or Inf")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _read_header(folder):
    with open_weights(folder / WEIGHTS_FILE) as file:
        text = (file.metadata() or {}).get("adapter_config")
    return None if text is None else parse(text, f"the header of {folder / WEIGHTS_FILE}")


def open_weights(path):
    """The safetensors file, opened for reading. ValueError if it is missing, a pickle stands in its place, or it cannot be read."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder; an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not path.is_file():
        if pickles := [name for name in PICKLES if (path.parent / name).is_file()]:
            raise ValueError(
                f"{path.parent} holds {pickles[0]}, a pickle file, which can run code when read; adafuse reads {path.name} only"
            )
        raise ValueError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file (truncated, or another format): {error}"
        ) from error


def parse(text, where) -> dict:
    """The JSON object in `text` (str, or bytes of UTF-8). ValueError, naming `where`, for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:  # broken JSON, or bytes that are no UTF-8
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, found {type(value).__name__}")
    return value
