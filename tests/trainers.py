"""HuggingFace Trainers for tests: adapted tiny models, quiet arguments, the gradients of every optimiser step; comparisons."""

from __future__ import annotations

import io

import torch
from families import family, fill
from reference import relative_error
from rich.console import Console
from transformers import Trainer, TrainerCallback, TrainingArguments

from adafuse import AdaFuseConfig, AdaFuseModel

QUIET = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True, "max_grad_norm": 0.0}


def adapted(name="llama", dtype=torch.float32, **changes) -> AdaFuseModel:
    """A tiny random model with random adapter tensors (a fresh B is zero), the same for the same settings."""
    model = AdaFuseModel(family(name).build(dtype), AdaFuseConfig(**{"r": 2, "num_experts": 4, "top_k": 2, **changes}))
    fill(model)
    return model


def quiet() -> Console:
    """What is printed goes to `.file`."""
    return Console(file=io.StringIO(), width=200)


def assert_close(got, wanted, tolerance):
    """Of two dicts of tensors: the same names, and every error within `tolerance` of the largest value."""
    assert got.keys() == wanted.keys()
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    assert max(errors.values()) < tolerance, errors


def assert_same_bits(got, wanted):
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def train(model, rows, folder, *, collate, resume=None, trainer=Trainer, **changes):
    """Train on `rows` with an unmodified Trainer. Returns it, with `.gradients`: one dict an optimiser step."""
    arguments = {"output_dir": str(folder), "max_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, **QUIET}
    made = trainer(model, TrainingArguments(**{**arguments, **changes}), data_collator=collate, train_dataset=rows)
    return run(made, resume)


def run(trainer, resume=None):
    """`trainer.train()`, with the gradients kept."""
    kept = Gradients(trainer.model)
    trainer.add_callback(kept)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.gradients = kept.steps
    return trainer


class Gradients(TrainerCallback):
    """Copies of the gradients (exchange format) right before each optimiser step."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_pre_optimizer_step(self, *_, **__):
        found = self.model.adapter_tensors(grad=True)
        self.steps.append({name: None if grad is None else grad.clone() for name, grad in found.items()})
