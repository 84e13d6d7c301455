"""What `adafuse train` does: files to examples, a base with an adapter attached, the loop, and a report."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import set_seed

from adafuse import data
from adafuse.base import load_base
from adafuse.checkpoint import CONFIG_FILE
from adafuse.evaluation import position_limit
from adafuse.integrations.peft import import_loras
from adafuse.loop import TrainResult, TrainSettings, check_wishes, checkpoints, train
from adafuse.model import AdaFuseModel

__all__ = ["TrainResult", "TrainSettings", "run_training", "train"]

HELD_OUT_AT_MOST = 200  # examples kept for the eval loss when no eval file is given


def run_training(
    base,
    data_file,
    out,
    *,
    config,
    settings,
    eval_file=None,
    adapter=None,
    experts=None,
    resume=False,
    overwrite=False,
    console=None,
    **load,
):
    """What `adafuse train` does: read and check the data, load the base, attach, train, save, report.

    config: an AdaFuseConfig for a fresh adapter. adapter: go on from this folder instead. experts: PEFT LoRA folders that become
    the experts; config is then a dict of the settings `import_loras` takes. resume, overwrite: what to do with what is in `out`.
    load: dtype, device, quantize of `base.load_base`.
    Nothing is written before the data and the base have been found sound. Returns the TrainResult.
    """
    console = console or Console(quiet=not _is_first_process())
    _check_out(out, resume, overwrite)
    if adapter and experts:
        raise ValueError("an adapter brings its own experts; give either adapter or experts (PEFT LoRA folders)")
    examples = data.read_examples(data_file)
    eval_examples = data.read_examples(eval_file) if eval_file else None
    if eval_examples is None:
        examples, eval_examples = _hold_out(examples, settings.eval_fraction)
    set_seed(settings.seed)
    model, tokenizer = load_base(base, **load)
    limit = _longest(model, settings.max_length)
    encoded = data.encode(examples, tokenizer, limit, settings.chat)
    eval_encoded = data.encode(eval_examples, tokenizer, limit, settings.chat) if eval_examples else None
    for part in (encoded, eval_encoded):
        if part and part.report():
            console.print(f"[yellow]note:[/] {part.report()}")
    model = _attach(model, config, adapter, experts)
    model.set_trainable(settings.only)
    rows, eval_rows = encoded.rows, eval_encoded.rows if eval_encoded else []
    check_wishes(settings, eval_rows, out, resume)
    trained, total = model.get_nb_trainable_parameters()
    console.print(f"{len(rows)} examples, {len(eval_rows)} held out; {trained:,} parameters train, of {total:,}")
    if overwrite and not resume and _is_first_process():
        _remove_checkpoints(out)
    options = {"settings": settings, "eval_rows": eval_rows, "out": out, "console": console, "resume": resume}
    result = train(model, tokenizer, rows, **options)
    print_result(result, out, console)
    return result


def _is_first_process() -> bool:
    """Of those that torchrun started: one of them alone prints and clears."""
    return os.environ.get("RANK", "0") == "0"


def _attach(base, config, adapter, experts):
    if adapter:
        return AdaFuseModel.from_pretrained(base, adapter, is_trainable=True)
    if not experts:
        return AdaFuseModel(base, config)
    allowed = [name for name, p in inspect.signature(import_loras).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if others := sorted(set(config) - set(allowed)):
        raise ValueError(
            f"{', '.join(others)} cannot be set for imported experts: they come from the LoRA files; allowed: {', '.join(allowed)}"
        )
    return import_loras(base, experts, **config)


def _longest(model, asked):
    """Tokens an example may have: what was asked for, else what the model allows (None: any number)."""
    limit = position_limit(model)
    if asked is not None and limit is not None and asked > limit:
        raise ValueError(f"max_length={asked} is more than the {limit} positions the model has; allowed: 2 to {limit}")
    return limit if asked is None else asked


def _check_out(out, resume, overwrite):
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if resume or overwrite:
        return
    if (out / CONFIG_FILE).exists():
        raise ValueError(
            f"--out {out} already holds an adapter; pass --overwrite to replace it, or --resume to go on training"
        )
    if checkpoints(out):
        raise ValueError(
            f"--out {out} holds checkpoints of a run that did not end; pass --resume to go on with it, or --overwrite to start anew"
        )


def _remove_checkpoints(out):
    """Checkpoints of an older run would be mistaken for those of this one."""
    for path in checkpoints(out):
        shutil.rmtree(path)


def _hold_out(examples, fraction):
    """(training, held out): every n-th example, so that a sorted file is sampled evenly; none of a file too small for it."""
    count = min(HELD_OUT_AT_MOST, int(len(examples) * fraction))
    if count == 0:
        return examples, []
    step = len(examples) / count
    chosen = {int(i * step) for i in range(count)}
    return [e for i, e in enumerate(examples) if i not in chosen], [examples[i] for i in sorted(chosen)]


def print_result(result: TrainResult, out, console):
    """Losses, the load of each expert, and a warning for experts that collapsed."""
    eval_loss = "no eval data" if result.eval_loss is None else f"eval loss {result.eval_loss:.4f}"
    train_loss = "nothing left to train" if result.train_loss is None else f"mean training loss {result.train_loss:.4f}"
    console.print(f"{result.steps} steps: {train_loss}, {eval_loss}; adapter saved in {escape(str(out))}")
    load = result.balance["load"].mean(0)
    console.print("load of the experts: " + "  ".join(f"{e}: {share:.0%}" for e, share in enumerate(load.tolist())))
    for note in result.notes:
        console.print(f"[yellow]warning:[/] {note}")
