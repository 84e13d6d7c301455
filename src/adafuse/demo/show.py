"""What the demo prints of its results."""

from __future__ import annotations

import shlex

from rich.table import Table
from rich.text import Text

from adafuse.demo.folder import QUESTIONS_FILE
from adafuse.demo.scoring import Accuracy, contains_answer
from adafuse.generation import coloured, generate_text, legend


def show_accuracy(before: dict[str, Accuracy], after: dict[str, Accuracy], max_new_tokens: int, console):
    """A table of both, by domain, each with its standard error."""
    count = min(each.total for each in before.values())
    table = Table(title=f"Right answers to {count} held-out questions a domain", title_justify="left")
    table.add_column("domain")
    for name in ("before", "after", "gain"):
        table.add_column(name, justify="right")
    for domain in before:
        gain = 100 * (after[domain].share - before[domain].share)
        table.add_row(domain, _percent(before[domain]), _percent(after[domain]), f"{gain:+.0f} points")
    console.print(table)
    console.print(
        f"± one standard error. Right: the result stands anywhere in the answer, of {max_new_tokens} tokens at most, before and "
        "after alike."
    )


def _percent(result):
    return f"{100 * result.share:.0f} ± {100 * result.standard_error:.0f} %"


def show_answers(model, tokenizer, items, domains, max_new_tokens, console):
    """The first question of each of `domains` and its answer, coloured by first expert.

    SmolLM2's router sees the token alone, so that a text routes the same inside the chat template and outside.
    """
    console.print()
    for domain in domains:
        item = next(i for i in items if i.domain == domain)
        new = generate_text(model, tokenizer, item.prompt, max_new_tokens=max_new_tokens, chat=True)
        said = coloured(model, tokenizer, new)
        verdict = "right" if contains_answer(said.plain, item.answer) else f"wrong, it is {item.answer}"
        question = coloured(model, tokenizer, tokenizer(item.prompt, add_special_tokens=False).input_ids)
        console.print(Text.assemble(question, "\n  -> ", said, f"  ({verdict})"), highlight=False)
    console.print(legend(model.adafuse_config.num_experts))


def show_times(backbone_ms, adapted_ms, tokens, device, console):
    """Decode times in milliseconds a token, and what they do not say."""
    console.print(
        f"\nDecoding one sequence on {device.type}, median of {tokens} tokens: backbone {backbone_ms:.1f} ms a "
        f"token, adapted {adapted_ms:.1f} ms ({adapted_ms / backbone_ms:.2f}x). This is the reference execution, plain PyTorch; "
        "it says nothing of the fused GPU kernels.",
        highlight=False,
    )


def show_next(out, items, console):
    """Two commands that look at the adapter in `out`."""
    folder, questions, prompt = map(shlex.quote, (str(out), str(out / QUESTIONS_FILE), items[-1].prompt))
    console.print("\nTry next:")
    console.print(
        f"  adafuse generate --adapter {folder} --chat --show-experts --prompt {prompt}\n"
        f"  adafuse inspect --adapter {folder} --text {questions} --out experts.html",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
