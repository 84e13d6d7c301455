"""The training loop: settings, the HuggingFace Trainer with a progress bar, and a word on the balance of the experts."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from adafuse.data import IGNORED
from adafuse.inspection import summarise
from adafuse.layers import in_eval_mode
from adafuse.router import Routing

PARTS = ("all", "router", "experts")


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
        for name in ("epochs", "learning_rate", "eval_fraction"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} is not a finite number")
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
    the end, mean over batches weighted by their examples; None without eval data. steps: of the whole training. balance: see
    `balance_of`. notes: warnings for the user.
    """

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
    check_wishes(settings, eval_rows, out, resume)
    checkpoint = str(newest_checkpoint(out)) if resume else None
    model.set_trainable(settings.only)
    with _folder_for(out) as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(settings, folder, on_cpu=model.device.type == "cpu"),
            train_dataset=rows,
            eval_dataset=eval_rows or None,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=None, label_pad_token_id=IGNORED),
        )
        trainer.remove_callback(PrinterCallback)
        with _progress(console or Console(), trainer.is_world_process_zero()) as progress:
            shown = _ShowProgress(progress)
            trainer.add_callback(shown)
            with suppress(_NothingLeft):
                trainer.train(resume_from_checkpoint=checkpoint)
        eval_loss = trainer.evaluate()["eval_loss"] if eval_rows else None
        if out is not None:
            model.save_pretrained(out, is_main_process=trainer.is_world_process_zero())
    balance = balance_of(model, eval_rows or rows)
    # Not the Trainer's own mean: some versions divide the losses since a resume by all steps, those before it too.
    train_loss = sum(shown.losses) / len(shown.losses) if shown.losses else None
    return TrainResult(train_loss, eval_loss, trainer.state.global_step, balance, balance_warnings(balance))


def check_wishes(settings, eval_rows, out, resume):
    """ValueError if the settings ask for what the rest does not allow."""
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


def _arguments(settings, folder, on_cpu):
    def every(steps, name):
        return {f"{name}_strategy": "steps", f"{name}_steps": steps} if steps else {f"{name}_strategy": "no"}

    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=on_cpu,  # else the Trainer would move the model to a GPU wherever there is one
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
        # Named only when asked for: newer versions of transformers warn that they are renaming it.
        **({"gradient_checkpointing": True} if settings.gradient_checkpointing else {}),
        seed=settings.seed,
        **every(settings.eval_every, "eval"),
        **every(settings.save_every, "save"),
        save_total_limit=2,
        logging_steps=1,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def _progress(console, shown):
    """One bar for the run with the newest loss beside it."""
    columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")]
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not shown)


class _NothingLeft(Exception):
    """The checkpoint resumed from was made at the last step."""


class _ShowProgress(TrainerCallback):
    """Tells the bar of what the Trainer does; eval losses are printed above it."""

    def __init__(self, progress):
        self.progress, self.task, self.training = progress, None, False
        self.losses = []  # of each step of this run

    def on_train_begin(self, args, state, control, **_):
        self.training = state.global_step < state.max_steps
        if not self.training:  # the Trainer would do one step too many
            raise _NothingLeft
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args, state, control, **_):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.progress.update(self.task, loss=f"loss {self.losses[-1]:.3f}")
        if "eval_loss" in logs and self.training and not self.progress.disable:
            self.progress.console.print(f"step {state.global_step}: eval loss {float(logs['eval_loss']):.4f}")

    def on_train_end(self, args, state, control, **_):
        self.training = False


def newest_checkpoint(out) -> Path | None:
    """The newest checkpoint in `out` that was written to its end: a run may have been stopped in the middle of a save."""
    return max(filter(_is_complete, checkpoints(out)), key=_step_of, default=None)


def checkpoints(out) -> list[Path]:
    """The Trainer's checkpoint folders in `out`, complete or not."""
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
