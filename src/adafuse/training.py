"""Train an adapter: settings, the HuggingFace Trainer with a progress bar, and a word on the balance of the experts."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from adafuse import data
from adafuse.base import load_base
from adafuse.checkpoint import CONFIG_FILE
from adafuse.evaluation import in_eval_mode, position_limit
from adafuse.inspection import summarise
from adafuse.integrations.peft import import_loras
from adafuse.model import AdaFuseModel
from adafuse.router import Routing

PARTS = ("all", "router", "experts")
HELD_OUT_AT_MOST = 200  # examples kept for the eval loss when no eval file is given


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Learning rate decays linearly to 0 after a warm-up of 5 % of the steps; AdamW without weight decay.

    steps: optimisation steps; 0: as many as `epochs` take. batch_size: examples a micro-batch; accumulation: micro-batches a step.
    only: "all", "router" (over frozen experts) or "experts". max_length: tokens an example may have; None: what the model allows.
    chat: prompts go through the tokenizer's chat template. bf16: mixed precision. eval_every: steps between evaluations; 0: one
    at the end. save_every: steps between checkpoints to resume from (the newest two are kept); 0: none. eval_fraction: share of
    the examples held out where no eval data is given.
    """

    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    seed: int = 0
    only: str = "all"
    max_length: int | None = None
    chat: bool = False
    bf16: bool = False
    gradient_checkpointing: bool = False
    eval_every: int = 0
    save_every: int = 0
    eval_fraction: float = 0.05

    def __post_init__(self):
        least_of = {"steps": 0, "batch_size": 1, "accumulation": 1, "eval_every": 0, "save_every": 0, "max_length": 2}
        for name, least in least_of.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; allowed: {least} or more")
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(f"epochs={self.epochs} trains nothing; give epochs > 0 or steps > 0")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")
        if self.only not in PARTS:
            raise ValueError(f"only={self.only!r} is unknown; allowed: {', '.join(PARTS)}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must be at least 0 and below 1")


@dataclass(frozen=True)
class TrainResult:
    """train_loss: mean over the steps of this run (not those before a resume), None if there were none left to do. eval_loss: at
    the end, None without eval data. steps: of the whole training. balance: see `balance_of`. notes: warnings for the user."""

    train_loss: float | None
    eval_loss: float | None
    steps: int
    balance: dict
    notes: list[str] = field(default_factory=list)


def train(model, tokenizer, rows, *, settings=TrainSettings(), eval_rows=None, out=None, console=None, resume=False):
    """Train `model` (an AdaFuseModel) on encoded rows ({"input_ids", "labels"}) with the HuggingFace Trainer.

    out: folder for checkpoints and, at the end, the adapter; None: nothing is written. resume: go on from the newest complete
    checkpoint in `out`, to the same parameters that an uninterrupted run reaches, bit for bit. Returns a TrainResult.
    """
    _check_wishes(settings, eval_rows, out, resume)
    checkpoint = newest_checkpoint(out) if resume else None
    first_step = _step_of(checkpoint) if checkpoint else 0
    model.set_trainable(settings.only)
    with _folder_for(out) as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(settings, folder),
            train_dataset=rows,
            eval_dataset=eval_rows or None,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=None, label_pad_token_id=data.IGNORED),
        )
        trainer.remove_callback(PrinterCallback)
        with _progress(console or Console(), trainer.is_world_process_zero()) as progress:
            trainer.add_callback(_ShowProgress(progress))
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        eval_loss = trainer.evaluate()["eval_loss"] if eval_rows else None
        if out is not None:
            model.save_pretrained(out, is_main_process=trainer.is_world_process_zero())
    steps = trainer.state.global_step
    # The Trainer divides the loss summed since a resume by all steps, those before it too.
    train_loss = outcome.training_loss * steps / (steps - first_step) if steps > first_step else None
    balance = balance_of(model, eval_rows or rows)
    return TrainResult(train_loss, eval_loss, steps, balance, balance_warnings(balance))


def _check_wishes(settings, eval_rows, out, resume):
    if settings.eval_every and not eval_rows:
        raise ValueError(
            f"eval_every={settings.eval_every}, but there is nothing to evaluate on: give eval data (--eval-data), or more "
            "examples, so that some are held out"
        )
    if out is None and (settings.save_every or resume):
        raise ValueError("checkpoints (save_every, resume) need a folder: give out")
    if resume and newest_checkpoint(out) is None:
        raise ValueError(f"{out} holds no complete checkpoint to resume from (--save-every N writes one every N steps)")


@contextmanager
def _folder_for(out):
    """`out`; where it is None, one that is gone afterwards (the Trainer insists on a folder)."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def _arguments(settings, folder):
    def every(steps, name):
        return {f"{name}_strategy": "steps", f"{name}_steps": steps} if steps else {f"{name}_strategy": "no"}

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.05,  # a share of the steps
        weight_decay=0.0,
        bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
        **every(settings.eval_every, "eval"),
        **every(settings.save_every, "save"),
        save_total_limit=2,
        logging_steps=10,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def _progress(console, shown):
    """One bar for the run with the newest loss beside it."""
    columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")]
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not shown)


class _ShowProgress(TrainerCallback):
    """Tells the bar of what the Trainer does; eval losses are printed above it."""

    def __init__(self, progress):
        self.progress, self.task, self.training = progress, None, False

    def on_train_begin(self, args, state, control, **_):
        self.training = True
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args, state, control, **_):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.progress.update(self.task, loss=f"loss {float(logs['loss']):.3f}")
        if "eval_loss" in logs and self.training and not self.progress.disable:
            self.progress.console.print(f"step {state.global_step}: eval loss {float(logs['eval_loss']):.4f}")

    def on_train_end(self, args, state, control, **_):
        self.training = False


@torch.no_grad()
def balance_of(model, rows, limit: int = 256) -> dict:
    """How the experts share the tokens of (at most `limit`) rows: `inspection.summarise` of their routing."""
    with in_eval_mode(model):
        routings = [model.route(torch.tensor([row["input_ids"]], device=model.device)) for row in rows[:limit]]
    experts, weights = (
        pad_sequence([getattr(routing, name)[0] for routing in routings], batch_first=True)
        for name in ("experts", "weights")
    )
    mask = pad_sequence([torch.ones(routing.experts.shape[1]) for routing in routings], batch_first=True)
    return summarise(Routing(experts, weights), model.adafuse_config.num_experts, mask)


def balance_warnings(balance: dict) -> list[str]:
    """A line if experts have collapsed (they get under a tenth of an even share of the tokens), none if all is well."""
    collapsed = balance["collapsed"]
    if not collapsed:
        return []
    decisions, experts = balance["load"].shape
    first = ", ".join(f"expert {e}" + (f" of block {d}" if decisions > 1 else "") for d, e in collapsed[:4])
    more = ", ..." if len(collapsed) > 4 else ""
    return [
        f"{len(collapsed)} of {decisions * experts} experts have collapsed, almost no token chooses them ({first}{more}); raise "
        "aux_loss_coef, or use fewer experts"
    ]


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
    console = console or Console()
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
    _check_wishes(settings, eval_rows, out, resume)
    trained, total = model.get_nb_trainable_parameters()
    console.print(f"{len(rows)} examples, {len(eval_rows)} held out; {trained:,} parameters train, of {total:,}")
    if overwrite and not resume:
        _remove_checkpoints(out)
    options = {"settings": settings, "eval_rows": eval_rows, "out": out, "console": console, "resume": resume}
    result = train(model, tokenizer, rows, **options)
    print_result(result, out, console)
    return result


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
    if _checkpoints(out):
        raise ValueError(
            f"--out {out} holds checkpoints of a run that did not end; pass --resume to go on with it, or --overwrite to start anew"
        )


def newest_checkpoint(out) -> Path | None:
    """The newest checkpoint in `out` that was written to its end: a run may have been stopped in the middle of a save."""
    return max(filter(_is_complete, _checkpoints(out)), key=_step_of, default=None)


def _checkpoints(out) -> list[Path]:
    return [path for path in Path(out).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


def _step_of(checkpoint) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_complete(checkpoint) -> bool:
    """The Trainer writes its state last; a truncated one is no JSON."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def _remove_checkpoints(out):
    """Checkpoints of an older run would be mistaken for those of this one."""
    for path in _checkpoints(out):
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
