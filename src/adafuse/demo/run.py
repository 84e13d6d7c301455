"""`adafuse demo`: train an adapter for SmolLM2-135M on three small domains, check it, and show what it does."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import set_seed
from transformers.utils import logging

from adafuse.base import load_base
from adafuse.config import AdaFuseConfig
from adafuse.data import Example, encode, prompt_ids
from adafuse.demo.folder import check_out, write_record
from adafuse.demo.scoring import Accuracy, accuracy, answers
from adafuse.demo.show import show_accuracy, show_answers, show_next, show_times
from adafuse.demo.smollm2 import NAME, load_smollm2
from adafuse.demo.tasks import make_tasks
from adafuse.demo.timing import decode_ms
from adafuse.model import AdaFuseModel
from adafuse.training import TrainSettings, train

LEAST_MEAN_GAIN = 0.10  # of the held-out accuracy, over the domains; besides, each domain must gain
SAME_LOGITS = 1e-4  # largest difference after a reload, relative to the largest logit; other memory, other rounding


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does with which model. `model`: a HuggingFace folder in place of SmolLM2."""

    model: Path | None = None
    config: AdaFuseConfig = field(default=AdaFuseConfig(r=4, num_experts=4, top_k=2))
    steps: int = 60
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    train_per_domain: int = 160  # one epoch
    test_per_domain: int = 40
    max_new_tokens: int = 64  # the untrained model talks before it answers
    timed_tokens: int = 32
    shown: tuple[str, ...] = ("arithmetic", "python")  # domains of the answers that are printed


def run_demo(out=Path("adafuse-demo"), seed: int = 0, console: Console | None = None, settings=DemoSettings()):
    """Measure, train, measure again, save into `out`, reload, compare, generate, time: a line or a table on each.

    Raises ValueError if `out` holds anything but an earlier demo's adapter (before anything is done), if training brings no
    real gain (nothing is saved then), or if the reloaded model answers differently.
    """
    console, out = console or Console(), Path(out)
    check_out(out)
    with _without_loading_bars():
        _run(out, seed, console, settings)


def _run(out, seed, console, settings):
    folder = settings.model or _smollm2(console)
    training, test = make_tasks(seed, settings.train_per_domain, settings.test_per_domain)
    set_seed(seed)
    base, tokenizer = load_base(folder)
    before = _measure(base, tokenizer, test, settings, console, "before training")

    model = AdaFuseModel(base, settings.config)
    _train(model, tokenizer, training, seed, settings, console)
    after = _measure(model, tokenizer, test, settings, console, "after training")
    show_accuracy(before, after, settings.max_new_tokens, console)
    check_gain(before, after)

    logits = _logits(model, tokenizer, test)
    model.save_pretrained(out)
    write_record(out, test, _results(seed, settings, before, after))
    del model, base  # the reload starts from the files alone
    base, tokenizer = load_base(folder)
    prompt = prompt_ids(tokenizer, test[0].prompt, chat=True)
    backbone_ms = decode_ms(base, prompt, settings.timed_tokens)
    model = AdaFuseModel.from_pretrained(base, out)
    difference = check_reload(logits, _logits(model, tokenizer, test))
    same = f"the same logits, up to {difference:.1g}" if difference else "exactly the same logits"
    console.print(f"\nSaved in {out}; loaded again on a fresh base: {same}.", highlight=False, markup=False)

    show_answers(model, tokenizer, test, settings.shown, settings.max_new_tokens, console)
    adapted_ms = decode_ms(model, prompt, settings.timed_tokens)
    show_times(backbone_ms, adapted_ms, settings.timed_tokens, model.device, console)
    show_next(out, test, console)


def check_gain(before: dict[str, Accuracy], after: dict[str, Accuracy]):
    """ValueError unless every domain's accuracy went up, and by LEAST_MEAN_GAIN on average."""
    gains = [round(after[domain].share - before[domain].share, 9) for domain in before]  # 7/40 - 3/40 is not below 0.1
    if min(gains) > 0 and round(sum(gains) / len(gains), 9) >= LEAST_MEAN_GAIN:
        return
    seen = ", ".join(f"{domain} {before[domain].share:.0%} -> {after[domain].share:.0%}" for domain in before)
    raise ValueError(
        f"no real gain from training: held-out accuracy {seen}; every domain should gain, and {100 * LEAST_MEAN_GAIN:.0f} "
        "points on average. Nothing was saved; try another --seed"
    )


def check_reload(logits: torch.Tensor, again: torch.Tensor) -> float:
    """The largest difference; ValueError if that is more than rounding (NaN included)."""
    difference = (logits - again).abs().max().item()
    if not difference <= SAME_LOGITS * logits.abs().max().item():
        raise ValueError(
            f"the reloaded model is not the trained one: its logits differ by up to {difference:.3g}; please report this"
        )
    return difference


# --- steps -------------------------------------------------------------------------------------------------------------


@contextmanager
def _without_loading_bars():
    """Inside, transformers draws no bars of its own between those of the demo."""
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def _smollm2(console):
    with console.status("SmolLM2-135M-Instruct: converting the weights (once, under a minute)"):
        folder = load_smollm2()
    console.print(f"Model: {NAME}, in {folder}", highlight=False, markup=False)
    return folder


def _measure(model, tokenizer, items, settings, console, when):
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"answers {when}", total=len(items))
        said = answers(
            model,
            tokenizer,
            [item.prompt for item in items],
            max_new_tokens=settings.max_new_tokens,
            progress=lambda done: bar.update(task, completed=done),
        )
    return accuracy(items, said)


def _train(model, tokenizer, items, seed, settings, console):
    examples = [Example(number, item.prompt, item.solution) for number, item in enumerate(items, start=1)]
    rows = encode(examples, tokenizer, None, chat=True).rows
    trained, total = model.get_nb_trainable_parameters()
    config = settings.config
    console.print(
        f"Adapter: {config.num_experts} experts of rank {config.r} on each linear, {config.top_k} a token; {trained:,} of "
        f"{total:,} parameters train, on {len(rows)} made-up examples of {len({i.domain for i in items})} domains.",
        highlight=False,
    )
    how = TrainSettings(
        steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate, seed=seed
    )
    for note in train(model, tokenizer, rows, settings=how, console=console).notes:
        console.print(f"[yellow]warning:[/] {note}")


@torch.no_grad()
def _logits(model, tokenizer, items):
    """[tokens, vocabulary] fp32 on the CPU: one held-out question of each domain, with its answer."""
    firsts = {item.domain: item for item in reversed(items)}.values()
    rows = encode([Example(0, item.prompt, item.solution) for item in firsts], tokenizer, None, chat=True)
    model.eval()
    inputs = [torch.tensor([row["input_ids"]], device=model.device) for row in rows.rows]
    return torch.cat([model(input_ids=ids).logits[0].float().cpu() for ids in inputs])


def _results(seed, settings, before, after):
    return {
        "seed": seed,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "held_out": {d: {"before": asdict(before[d]), "after": asdict(after[d])} for d in before},
    }
