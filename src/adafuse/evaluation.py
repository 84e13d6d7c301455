"""Multiple-choice accuracy and answer NLL of a causal LM, adapted or not. Knows nothing of experts or routing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.functional import cross_entropy

from adafuse.base import load_adapted, load_base
from adafuse.data import prompt_ids, read_jsonl
from adafuse.layers import in_eval_mode

NO_DOMAIN = "(no domain)"


@dataclass(frozen=True)
class ChoiceItem:
    """One question: `choices[answer]` is the right continuation of `prompt`."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    domain: str = ""


@dataclass(frozen=True)
class Score:
    """accuracy: share of `items` whose right choice scored best. nll: nats per token over all `answer_tokens` of right choices."""

    items: int
    accuracy: float
    nll: float
    answer_tokens: int


@dataclass(frozen=True)
class Result:
    """What `evaluate` found. domains: by name, sorted; empty if no item names one. skipped: items longer than `limit` tokens."""

    overall: Score
    domains: dict[str, Score]
    skipped: int
    limit: int | None

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self):
        rows = [*self.domains.items(), ("overall", self.overall)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'':{width}}  items  accuracy  NLL/token"]
        lines += [f"{name:{width}}  {s.items:5d}  {s.accuracy:7.1%}   {s.nll:8.3f}" for name, s in rows]
        if self.skipped:
            lines.append(f"left out: {self.skipped} item(s) longer than the model's {self.limit} tokens")
        return "\n".join(lines)


def read_choices(path) -> list[ChoiceItem]:
    """Read a JSONL file of {"prompt": str, "choices": [str, ...], "answer": int, "domain": str (optional)}; blank lines are skipped.

    Raises ValueError, with the line's number, for broken JSON, a missing key, a value of another type, fewer than two
    choices, an empty choice, or an answer outside them; and for a file without items.
    """
    return [_parse_item(f"{path}, line {number}", record) for number, record in read_jsonl(path)]


@torch.no_grad()
def evaluate(
    model,
    tokenizer,
    items: Sequence[ChoiceItem],
    batch_size: int = 16,
    *,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Accuracy by mean log-likelihood per answer token over the choices, and NLL per token of the right answer.

    pick = argmax_c (1 / |c|) sum_i log p(c_i | prompt, c_<i), ties to the lower index; right if the picked text is the answer's.

    model: a HuggingFace causal LM or an AdaFuseModel; put in eval mode meanwhile. batch_size: sequences (prompt and one choice)
    a forward. chat: wrap each prompt as the user's turn of the tokenizer's chat template. progress(done, total) is called after
    each forward, in sequences. Items longer than the model's limit are left out whole and counted in `Result.skipped`.
    Raises ValueError if no item is left, for tokenizers that cannot do what is asked, and for a model that answers NaN.
    """
    limit = position_limit(model)
    encoded = [_encode(tokenizer, item, chat) for item in items]
    kept = [i for i, pairs in enumerate(encoded) if limit is None or all(len(p) + len(c) <= limit for p, c in pairs)]
    if not kept:
        why = (
            f"each of the {len(items)} item(s) is longer than the model's {limit} tokens"
            if items
            else "no items were given"
        )
        raise ValueError(f"nothing to evaluate: {why}")
    scores = iter(loglikelihoods(model, [pair for i in kept for pair in encoded[i]], batch_size, progress=progress))
    outcomes: dict[str, list] = {}
    for i in kept:
        outcome = _outcome(items[i], encoded[i], [next(scores) for _ in encoded[i]])
        outcomes.setdefault(items[i].domain or NO_DOMAIN, []).append(outcome)
    domains = {name: _score(found) for name, found in sorted(outcomes.items())} if set(outcomes) != {NO_DOMAIN} else {}
    return Result(_score([o for found in outcomes.values() for o in found]), domains, len(items) - len(kept), limit)


@torch.no_grad()
def loglikelihoods(model, pairs, batch_size: int = 16, *, progress=None) -> list[float]:
    """log p(answer | prompt) in nats, summed over the answer's tokens, for each pair (prompt ids, answer ids), in order.

    Both parts need at least one token (ValueError). Softmax in fp32. Sequences are padded on the right and masked by their length, so a pad
    token that is also an end-of-text token costs nothing; the longest go first.
    """
    if not all(prompt and answer for prompt, answer in pairs):
        raise ValueError(
            "a prompt or an answer has no tokens; each needs at least one (see prompt_ids for empty prompts)"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is too small; allowed: 1 or more")
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    sums = [0.0] * len(pairs)
    with in_eval_mode(model):
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            for i, value in zip(chunk, _score_batch(model, [pairs[i] for i in chunk]), strict=True):
                sums[i] = value
            if progress is not None:
                progress(start + len(chunk), len(order))
    if any(math.isnan(value) for value in sums):
        raise ValueError(
            "the model's log-likelihoods are NaN; check its weights and dtype (fp16 overflows where bf16 does not)"
        )
    return sums


def run_evaluation(
    data, adapter=None, base=None, *, batch_size=16, out=None, chat=False, console=None, **load
) -> Result:
    """What `adafuse eval` does: read the items, load the adapter on its base (or the base alone), evaluate, print, write JSON."""
    console = console or Console()
    items = read_choices(data)
    if out is not None and (Path(out).is_dir() or not Path(out).parent.is_dir()):
        raise ValueError(f"--out {out} is not a file in an existing folder; name one")
    model, tokenizer = load_adapted(adapter, base, **load) if adapter else load_base(base, **load)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=None)

        def progress(done, total):
            bar.update(task, completed=done, total=total)

        result = evaluate(model, tokenizer, items, batch_size, chat=chat, progress=progress)
    console.print(str(result), highlight=False, markup=False)
    if out is not None:
        settings = {"data": str(data), "adapter": adapter and str(adapter), "base": base and str(base), "chat": chat}
        Path(out).write_text(json.dumps({**settings, **result.to_dict()}, indent=2) + "\n", encoding="utf-8")
    return result


def position_limit(model) -> int | None:
    """The longest sequence, in tokens, that the model's position embeddings allow; None if its config names none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _parse_item(where, record) -> ChoiceItem:
    if missing := [key for key in ("prompt", "choices", "answer") if key not in record]:
        raise ValueError(
            f'{where}: missing {", ".join(missing)}; needed: "prompt", "choices", "answer" (and "domain", if any)'
        )
    prompt, choices, answer, domain = record["prompt"], record["choices"], record["answer"], record.get("domain", "")
    if not isinstance(prompt, str) or not isinstance(domain, str):
        raise ValueError(f"{where}: prompt and domain must be strings")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"{where}: choices must be a list of non-empty strings")
    if len(choices) < 2:
        raise ValueError(f"{where}: {len(choices)} choice(s); needed: 2 or more")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer {answer!r} is not the index of a choice; allowed: 0 to {len(choices) - 1}")
    return ChoiceItem(prompt, tuple(choices), answer, domain)


def _encode(tokenizer, item, chat) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, choice ids) of each choice. Apart, then joined: so the same prompt tokens precede every choice."""
    prompt = prompt_ids(tokenizer, item.prompt, chat)
    answers = [tokenizer(choice, add_special_tokens=False).input_ids for choice in item.choices]
    if not all(answers):
        raise ValueError(f"the tokenizer makes no token of a choice: {item.choices[answers.index([])]!r}")
    return [(prompt, answer) for answer in answers]


def _score_batch(model, pairs) -> list[float]:
    """`loglikelihoods` of one padded batch. The last token of a sequence is only predicted, so it is not fed."""
    lengths = [len(prompt) + len(answer) - 1 for prompt, answer in pairs]
    input_ids = torch.zeros(len(pairs), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, (prompt, answer) in enumerate(pairs):
        input_ids[row, : lengths[row]] = torch.tensor((prompt + answer)[:-1])
        mask[row, : lengths[row]] = 1
    logits = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    sums = [
        -cross_entropy(logits[row, length - len(answer) : length].float(), _targets(answer, logits), reduction="sum")
        for row, (length, (_, answer)) in enumerate(zip(lengths, pairs, strict=True))
    ]
    return torch.stack(sums).tolist()


def _targets(answer, logits):
    return torch.tensor(answer, device=logits.device)


def _outcome(item, pairs, sums) -> tuple[bool, float, int]:
    """(right?, NLL of the right answer, its tokens)."""
    means = [value / len(answer) for value, (_, answer) in zip(sums, pairs, strict=True)]
    pick = means.index(max(means))
    return item.choices[pick] == item.choices[item.answer], -sums[item.answer], len(pairs[item.answer][1])


def _score(outcomes) -> Score:
    tokens = sum(count for _, _, count in outcomes)
    right, nll = sum(right for right, _, _ in outcomes), sum(nll for _, nll, _ in outcomes)
    return Score(len(outcomes), right / len(outcomes), nll / tokens, tokens)
