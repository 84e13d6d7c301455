"""Train an adapter: settings, the HuggingFace Trainer with a progress bar, and a word on the balance of the experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

from adafuse import data
from adafuse.base import load_base
from adafuse.checkpoint import CONFIG_FILE
from adafuse.inspection import summarise
from adafuse.model import AdaFuseModel
from adafuse.router import Routing

PARTS = ("all", "router", "experts")
HELD_OUT_AT_MOST = 200  # examples kept for the eval loss when no eval file is given


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Learning rate decays linearly to 0 after a warm-up of 5 % of the steps; AdamW without weight decay.

    steps: optimisation steps; 0: as many as `epochs` take. batch_size: examples a micro-batch; accumulation: micro-batches a step.
    only: "all", "router" (over frozen experts) or "experts". max_length: tokens an example may have; None: what the model allows.
    bf16: mixed precision. eval_every, save_every: steps between evaluations and checkpoints; 0: at the end alone.
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
        for name, least in (("steps", 0), ("batch_size", 1), ("accumulation", 1), ("eval_every", 0), ("save_every", 0)):
            if getattr(self, name) < least:
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
    """train_loss: mean over the run; eval_loss: at the end, None without eval data; balance: see `inspection.summarise`."""

    train_loss: float
    eval_loss: float | None
    steps: int
    balance: dict
    notes: list[str] = field(default_factory=list)


def train(model, tokenizer, rows, *, settings=TrainSettings(), eval_rows=None, out=None, console=None, resume=False):
    """Train `model` (an AdaFuseModel) on encoded rows ({"input_ids", "labels"}) with the HuggingFace Trainer.

    out: folder for checkpoints and, at the end, the adapter; None: nothing is written. Returns a TrainResult.
    """
    console = console or Console()
    model.set_trainable(settings.only)
    trainer = Trainer(
        model=model,
        args=_arguments(settings, out, bool(eval_rows)),
        train_dataset=rows,
        eval_dataset=eval_rows or None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=None, label_pad_token_id=data.IGNORED),
    )
    for callback in ("ProgressCallback", "PrinterCallback", "NotebookProgressCallback"):
        trainer.callback_handler.callbacks = [
            c for c in trainer.callback_handler.callbacks if type(c).__name__ != callback
        ]
    trainer.add_callback(_RichProgress(console))
    outcome = trainer.train(resume_from_checkpoint=resume or None)
    eval_loss = trainer.evaluate()["eval_loss"] if eval_rows else None
    if out is not None:
        model.save_pretrained(out, is_main_process=trainer.is_world_process_zero())
    balance = balance_of(model, tokenizer, eval_rows or rows)
    return TrainResult(outcome.training_loss, eval_loss, trainer.state.global_step, balance, balance_warnings(balance))


def _arguments(settings, out, has_eval):
    def every(steps):
        return {"strategy": "steps", "steps": steps} if steps else {"strategy": "no", "steps": None}

    evaluate, save = every(settings.eval_every if has_eval else 0), every(settings.save_every if out else 0)
    return TrainingArguments(
        output_dir=str(out) if out else "unused",
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
        **({"gradient_checkpointing": True} if settings.gradient_checkpointing else {}),
        seed=settings.seed,
        eval_strategy=evaluate["strategy"],
        eval_steps=evaluate["steps"],
        save_strategy=save["strategy"],
        save_steps=save["steps"] or 500,
        save_total_limit=2,
        logging_steps=10,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


class _RichProgress(TrainerCallback):
    """One bar for the run with the newest loss beside it; evaluations are printed above it."""

    def __init__(self, console):
        self.console, self.progress = console, None

    def on_train_begin(self, args, state, control, **_):
        if not state.is_world_process_zero:
            return
        columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")]
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, loss="")
        self.progress.start()

    def on_step_end(self, args, state, control, **_):
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **_):
        if self.progress and logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {float(logs['loss']):.3f}")
        if self.progress and logs and "eval_loss" in logs:
            self.progress.console.print(f"step {state.global_step}: eval loss {float(logs['eval_loss']):.4f}")

    def on_train_end(self, args, state, control, **_):
        if self.progress:
            self.progress.stop()
            self.progress = None


@torch.no_grad()
def balance_of(model, tokenizer, rows, limit: int = 256) -> dict:
    """How the experts share the tokens of (at most `limit`) rows: `inspection.summarise` of their routing."""
    was_training, parts = model.training, []
    model.eval()
    for row in rows[:limit]:
        routing = model.route(torch.tensor([row["input_ids"]], device=model.device))
        parts.append((routing.experts[0], routing.weights[0]))
    model.train(was_training)
    experts, weights = (torch.cat(part)[None] for part in zip(*parts, strict=True))
    return summarise(Routing(experts, weights), num_experts=model.adafuse_config.num_experts)


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
    resume=False,
    overwrite=False,
    console=None,
    **load,
):
    """What `adafuse train` does: read and check the data, load the base, attach (or load `adapter`), train, save, report.

    Nothing is written before the data and the base have been found sound. Returns the TrainResult.
    """
    console = console or Console()
    _check_out(out, resume, overwrite)
    examples = data.read_examples(data_file)
    eval_examples = data.read_examples(eval_file) if eval_file else None
    if eval_examples is None:
        examples, eval_examples = _hold_out(examples, settings.eval_fraction)
    set_seed(settings.seed)
    model, tokenizer = load_base(base, **load)
    limit = data.max_length_of(model, settings.max_length)
    encoded = data.encode(examples, tokenizer, limit, settings.chat)
    eval_encoded = data.encode(eval_examples, tokenizer, limit, settings.chat) if eval_examples else None
    for part in (encoded, eval_encoded):
        if part and part.report():
            console.print(f"[yellow]note:[/] {part.report()}")
    model = AdaFuseModel.from_pretrained(model, adapter, is_trainable=True) if adapter else AdaFuseModel(model, config)
    eval_rows = eval_encoded.rows if eval_encoded else None
    trained, total = model.get_nb_trainable_parameters()
    console.print(
        f"{len(encoded.rows)} examples, {len(eval_rows or [])} held out; {trained:,} adapter parameters of {total:,}"
    )
    result = train(
        model, tokenizer, encoded.rows, settings=settings, eval_rows=eval_rows, out=out, console=console, resume=resume
    )
    print_result(result, out, console)
    return result


def _check_out(out, resume, overwrite):
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if (out / CONFIG_FILE).exists() and not (resume or overwrite):
        raise ValueError(
            f"--out {out} already holds an adapter; pass --overwrite to replace it, or --resume to go on training"
        )
    if resume and not any(out.glob("checkpoint-*")):
        raise ValueError(f"--resume: {out} holds no checkpoint to go on from (train with --save-every)")


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
    console.print(
        f"{result.steps} steps: mean training loss {result.train_loss:.4f}, {eval_loss}; adapter saved in {out}"
    )
    load = result.balance["load"].mean(0)
    console.print("load of the experts: " + "  ".join(f"{e}: {share:.0%}" for e, share in enumerate(load.tolist())))
    for note in result.notes:
        console.print(f"[yellow]warning:[/] {note}")
