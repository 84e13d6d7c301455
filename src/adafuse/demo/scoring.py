"""Right or wrong: greedy answers of a model to `tasks` items, judged without regard to the form they come in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adafuse.data import prompt_ids
from adafuse.layers import in_eval_mode

NUMBER = re.compile(r"(?<!\w)-?\d+(?:\.\d+)?")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
PIECE = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Accuracy:
    """`right` of `total` items of a domain."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def standard_error(self) -> float:
        """sqrt(p (1 - p) / n) with p = (right + 1) / (n + 2), so that 0 of n does not look certain."""
        p = (self.right + 1) / (self.total + 2)
        return (p * (1 - p) / self.total) ** 0.5


def contains_answer(text: str, answer: str) -> bool:
    """Whether `answer` stands anywhere in `text`, as a whole: in a sentence, with a unit, in quotes or in bold.

    A number must be there as a number of equal value (12, 12.0 and 1,200 for 1200, but not 112 for 12); anything else as
    the same words and signs in the same case, whatever the spaces between them.
    """
    if NUMBER.fullmatch(answer):
        return float(answer) in map(float, NUMBER.findall(THOUSANDS.sub("", text)))
    found, wanted = PIECE.findall(text), PIECE.findall(answer)
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))


@torch.no_grad()
def answers(
    model, tokenizer, prompts, *, max_new_tokens: int, batch_size: int = 40, progress: Callable | None = None
) -> list[str]:
    """What the model says to each prompt as a user turn: greedy, at most max_new_tokens, in left-padded batches.

    progress: called after each batch with the number of prompts done.
    """
    rows = [prompt_ids(tokenizer, prompt, chat=True) for prompt in prompts]
    said: list[str] = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
    with in_eval_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(rows[i]) for i in chosen)
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(rows[i])) + rows[i] for i in chosen])
            mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in chosen])
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                said[i] = text
            if progress is not None:
                progress(start + len(chosen))
    return said


def accuracy(items, said) -> dict[str, Accuracy]:
    """Domain -> Accuracy, in the order in which the domains come in `items`."""
    right: dict[str, list[bool]] = {}
    for item, text in zip(items, said, strict=True):
        right.setdefault(item.domain, []).append(contains_answer(text, item.answer))
    return {domain: Accuracy(sum(outcomes), len(outcomes)) for domain, outcomes in right.items()}
