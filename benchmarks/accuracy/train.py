"""Training of one adapter for a fixed number of steps: each step (forward, backward, clipping, AdamW) one CUDA graph on a GPU."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from accuracy.batches import buckets_of, widths_of
from accuracy.forward import Answers, divergence_of, nll_of
from accuracy.graphs import Replayed

SCHEDULES = ("linear", "cosine")
WIDTH_SHARES = (0.5, 0.9, 1.0)  # few widths, so that a batch is a mixture of several domains
TEACHER_SHARE = 0.5  # of a distilled student's loss
TAIL = 0.1  # share of the steps whose mean is called the final loss


@dataclass(frozen=True)
class TrainSettings:
    """epochs: times each example is seen. batch: examples a step. learning_rate: at its peak, after a warm-up over the share `warmup`
    of the steps; then it falls to 0 (schedule: "linear" or "cosine"). router_lr_ratio: routers' learning rate by that of the rest.
    clip: largest norm of the gradient.
    """

    learning_rate: float = 1e-3
    router_lr_ratio: float = 1.0
    epochs: int = 2
    batch: int = 128
    warmup: float = 0.05
    schedule: str = "linear"
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("learning_rate", "router_lr_ratio", "epochs", "batch", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number above 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is unknown; allowed: {', '.join(SCHEDULES)}")

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at a step, 0 to steps - 1."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return (step + 1) / warm
        left = (steps - step) / (steps - warm)
        return left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def train(model, pairs, settings: TrainSettings, teacher=None) -> dict:
    """Train what is trainable in `model` on pairs of (prompt ids, answer ids), in place.

        loss = sum over the batch's answer tokens of l / (batch * mean answer tokens of an example)  +  balance loss
        l = -log p,     with a teacher    l = (1 - 0.5) (-log p) + 0.5 KL(teacher || model)

    so that every answer token weighs the same, in whichever batch it is. The order depends on the seed and the pairs alone.
    teacher: a model of the same vocabulary, which is put in eval mode and does not train.

    Returns steps, losses (-log p per answer token, in nats, means of the first and the last tenth; None if not finite) and seconds.
    Nothing is evaluated meanwhile.
    """
    started, device = time.perf_counter(), next(model.parameters()).device
    buckets, schedule = plan_order(pairs, settings, device)
    batches = [bucket.batches for bucket in buckets]
    model.train()
    normaliser = settings.batch * float(np.mean([len(answer) for _, answer in pairs]))
    step = _Step(model, settings, normaliser, device, teacher)
    step.prepare([batch[0] for batch in batches])
    prepared = time.perf_counter()
    losses = torch.zeros(len(schedule), device=device)
    for i, (bucket, number) in enumerate(schedule):
        step.set_factor(settings.factor(i, len(schedule)))
        losses[i].copy_(step.run(batches[bucket][number]))
    losses = losses.cpu().double()
    step.close()
    tail = max(1, round(TAIL * len(losses)))
    return {
        "steps": len(schedule),
        "first_loss": _finite(losses[:tail].mean().item()),
        "final_loss": _finite(losses[-tail:].mean().item()),
        "shapes": [list(batch.ids.shape[1:]) for batch in batches],
        "capture_s": round(prepared - started, 2),
        "steps_s": round(time.perf_counter() - prepared, 2),
    }


def plan_order(pairs, settings, device="cpu"):
    """(buckets, schedule): the batches of all epochs, and the order to take them in, as (bucket, number of the batch)."""
    generator = np.random.default_rng(settings.seed)
    order = np.concatenate([generator.permutation(len(pairs)) for _ in range(settings.epochs)])
    widths = widths_of([len(prompt) + len(answer) for prompt, answer in pairs], WIDTH_SHARES)
    buckets = buckets_of(pairs, widths, [settings.batch] * len(widths), order, device)
    schedule = [(b, number) for b, bucket in enumerate(buckets) for number in range(len(bucket.batches))]
    # Each bucket's batches keep their order, so that epochs follow each other; buckets are interleaved evenly.
    schedule.sort(key=lambda entry: (entry[1] + 0.5) / len(buckets[entry[0]].batches))
    return buckets, schedule


def _finite(value):
    return value if math.isfinite(value) else None


class _Step:
    """One optimisation step, captured for each shape of batch."""

    def __init__(self, model, settings, normaliser, device, teacher=None):
        self._answers, self._settings, self._normaliser = Answers(model), settings, normaliser
        # In eval mode before anything is captured: changing modes drops the casts of its weights, which the graphs read.
        self._teacher = None if teacher is None else Answers(teacher.eval())
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        routers = [p for name, p in named if "router" in name.split(".")]
        others = [p for name, p in named if "router" not in name.split(".")]
        self._parameters, self._device = [p for _, p in named], device
        peaks = [(others, settings.learning_rate), (routers, settings.learning_rate * settings.router_lr_ratio)]
        self._peaks = [peak for group, peak in peaks if group]
        groups = [
            {"params": group, "lr": torch.tensor(peak, dtype=torch.float32, device=device)}
            for group, peak in peaks
            if group
        ]
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True, capturable=on_gpu)
        self.run = Replayed(self._run, device, self._optimizer.zero_grad)
        self._loss = torch.zeros((), device=device)

    def set_factor(self, factor):
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"].fill_(factor * peak)

    def prepare(self, batches):
        """Capture, and undo what the warm-up did to the parameters, the optimiser and the random generator."""
        before = [p.detach().clone() for p in self._parameters]
        self.run.prepare(batches)
        with torch.no_grad():
            for parameter, value in zip(self._parameters, before, strict=True):
                parameter.copy_(value)
        for state in self._optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        torch.manual_seed(self._settings.seed)

    def close(self):
        self._answers.close()
        if self._teacher is not None:
            self._teacher.close()
        self._optimizer.zero_grad()

    def _run(self, batch):
        """Returns the mean loss a token, in a tensor that outlasts the graph."""
        taught = self._taught(batch)
        logits, balance = self._answers.logits(batch)
        nll = lost = nll_of(logits, batch)
        if taught is not None:
            lost = (1 - TEACHER_SHARE) * nll + TEACHER_SHARE * divergence_of(taught, logits, batch)
        loss = lost.sum() / self._normaliser + balance
        loss.backward()
        clip_grad_norm_(self._parameters, self._settings.clip, foreach=True)
        self._optimizer.step()
        with torch.no_grad():
            self._loss.copy_(nll.sum() / batch.weights.sum())
        return self._loss

    @torch.no_grad()
    def _taught(self, batch):
        """The teacher's logits [N, V], before the student's forward fills the memory; None without a teacher."""
        return None if self._teacher is None else self._teacher.logits(batch)[0]
