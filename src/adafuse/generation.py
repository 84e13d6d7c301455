"""Text from an adapted model, for a terminal: as it is generated, and coloured by the experts that each token chose."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console
from rich.text import Text
from transformers import TextStreamer, set_seed

from adafuse.base import load_adapted
from adafuse.data import prompt_ids
from adafuse.engine import Engine
from adafuse.engine.requests import end_ids
from adafuse.evaluation import position_limit
from adafuse.layers import in_eval_mode

# Eight colours of the 256-colour palette that stay apart on light and dark terminals; expert e takes colour e modulo 8.
COLOURS = ("color(33)", "color(166)", "color(35)", "color(162)", "color(136)", "color(98)", "color(37)", "color(160)")
AS_TEXT = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}  # how ids are decoded


@torch.no_grad()
def generate_text(
    model,
    tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat=False,
    stream=False,
) -> list[int]:
    """The ids generated after `prompt` (see `prompt_ids`), up to an EOS of the model or the tokenizer, at most max_new_tokens.

    temperature 0: greedy. Above: sampled from softmax(logits / temperature), cut to the most likely tokens that together have
    probability top_p, and nothing else (no top-k). chat: the prompt is a user turn of the tokenizer's chat template. stream: print
    the text while it comes. ValueError for settings out of range, for an empty prompt if the tokenizer has neither BOS nor EOS, and
    for a prompt that leaves the model no position for max_new_tokens more.
    """
    ids = _checked_prompt(model, tokenizer, prompt, max_new_tokens, temperature, top_p, chat)
    inputs = torch.tensor([ids], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with in_eval_mode(model):
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(end_ids(None, model.get_base_model(), tokenizer)) or None,
            streamer=TextStreamer(tokenizer, skip_prompt=True, **AS_TEXT) if stream else None,
            **(sampling if temperature else {"do_sample": False}),
        )
    return output[0, len(ids) :].tolist()


def _checked_prompt(model, tokenizer, prompt, max_new_tokens, temperature, top_p, chat) -> list[int]:
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}: allowed are a temperature of 0 or more, a "
            "top_p above 0 and up to 1, and 1 new token or more"
        )
    ids = prompt_ids(tokenizer, prompt, chat=chat)
    limit = position_limit(model)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"the prompt's {len(ids)} tokens and {max_new_tokens} new ones are more than the {limit} the model allows; "
            "shorten the prompt or ask for fewer new tokens"
        )
    return ids


def engine_text(
    engine,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat=False,
    stream=False,
) -> list[int]:
    """What `generate_text` does, by an Engine with the model's tokenizer."""
    ids = _checked_prompt(engine.model, engine.tokenizer, prompt, max_new_tokens, temperature, top_p, chat)
    sampling = {"temperature": temperature, "top_p": top_p} if temperature else {}
    pieces = engine.stream(ids, max_new_tokens=max_new_tokens, **sampling)
    for piece in pieces:
        if stream:
            print(piece, end="", flush=True)
    if stream:
        print()
    return pieces.ids


def _on_gpu(model) -> bool:
    return model.device.type == "cuda"


def _engine_of(model, tokenizer, prompt, *, max_new_tokens=128, temperature=0.0, top_p=1.0, chat=False):
    """An Engine for one prompt; None, having said why, for a model that it does not run (a quantised one, say), or without Triton."""
    ids = _checked_prompt(model, tokenizer, prompt, max_new_tokens, temperature, top_p, chat)
    try:
        return Engine(model, max_seq_len=len(ids) + max_new_tokens, max_batch=1, tokenizer=tokenizer)
    except (ValueError, ImportError) as error:
        print(f"not on the engine, but by transformers' generate: {error}", file=sys.stderr)
        return None


@torch.no_grad()
def coloured(model, tokenizer, ids: list[int], decision: int = 0, before: Sequence[int] = ()) -> Text:
    """The text of `ids`, each token in the colour of its first expert in `decision` (0: the model's, or block 0's).

    A character of several tokens has the colour of its last one; control characters that would move the cursor are left out.
    before: the ids in front of `ids` (the prompt), which matter to a model whose router sees positions.
    """
    with in_eval_mode(model):
        routing = model.route(torch.tensor([[*before, *ids]], device=model.device))
    experts = routing.experts[0, len(before) :, decision, 0].tolist()
    whole, text, done = tokenizer.decode(ids, **AS_TEXT), Text(), 0
    for position, expert in enumerate(experts, start=1):
        # A prefix is decoded, not a token: so spaces and multi-byte characters are those of the whole text.
        known = _agreeing(whole, tokenizer.decode(ids[:position], **AS_TEXT))
        end = max(done, known)  # where bytes are tokens, a half character can undo the one before it
        text.append(whole[done:end], style=COLOURS[expert % len(COLOURS)])
        done = end
    return text


def legend(num_experts: int) -> Text:
    """`expert 0  expert 1 ...`, each in its colour."""
    text = Text("first expert of a token: ")
    for expert in range(num_experts):
        text.append(f"{expert} ", style=f"bold {COLOURS[expert % len(COLOURS)]}")
    return text


def run_generation(adapter, base, prompt, *, seed=0, show_experts=False, load=None, console=None, **options):
    """What `adafuse generate` does: load the adapter on its base, generate (on a GPU by the engine), print."""
    console = console or Console()
    model, tokenizer = load_adapted(adapter, base, **(load or {}))
    set_seed(seed)
    engine = _engine_of(model, tokenizer, prompt, **options) if _on_gpu(model) else None
    generate = partial(generate_text, model, tokenizer) if engine is None else partial(engine_text, engine)
    ids = generate(prompt, stream=not show_experts, **options)
    if show_experts:
        before = prompt_ids(tokenizer, prompt, chat=options.get("chat", False))
        console.print(coloured(model, tokenizer, ids, before=before), soft_wrap=True)
        console.print(legend(model.adafuse_config.num_experts))


def _agreeing(a: str, b: str) -> int:
    """The length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
