"""Text from an adapted model, for a terminal: as it is generated, and coloured by the experts that each token chose."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.text import Text
from transformers import TextStreamer, set_seed

from adafuse.base import load_adapted
from adafuse.evaluation import position_limit, prompt_ids

# Eight colours of the 256-colour palette that stay apart on light and dark terminals; expert e takes colour e modulo 8.
COLOURS = ("color(33)", "color(166)", "color(35)", "color(162)", "color(136)", "color(98)", "color(37)", "color(160)")


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
    """The ids generated after `prompt` (greedy at temperature 0), ended by EOS at the latest after max_new_tokens.

    chat: the prompt is a user turn of the tokenizer's chat template. stream: print the text while it comes. ValueError for an
    empty prompt, a negative temperature, or a prompt that leaves the model no position for max_new_tokens more.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise ValueError(f"temperature={temperature} must be at least 0 and max_new_tokens={max_new_tokens} at least 1")
    ids = prompt_ids(tokenizer, prompt, chat=chat)
    limit = position_limit(model)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise ValueError(
            f"the prompt's {len(ids)} tokens and {max_new_tokens} new ones are more than the {limit} the model allows"
        )
    inputs = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        **({"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}),
    )
    return output[0, len(ids) :].tolist()


@torch.no_grad()
def coloured(model, tokenizer, ids: list[int], decision: int = 0) -> Text:
    """The text of `ids`, each token in the colour of its first expert in `decision` (0: the model's, or block 0's)."""
    experts = model.route(torch.tensor([ids], device=model.device)).experts[0, :, decision, 0].tolist()
    text, done = Text(), ""
    for position, expert in enumerate(experts):
        # Decoding the whole prefix keeps spaces and multi-byte characters as they stand in the text.
        whole = tokenizer.decode(ids[: position + 1], skip_special_tokens=True)
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            text.append(whole[len(done) :], style=COLOURS[expert % len(COLOURS)])
            done = whole
    return text


def legend(num_experts: int) -> Text:
    """`expert 0  expert 1 ...`, each in its colour."""
    text = Text("first expert of a token: ")
    for expert in range(num_experts):
        text.append(f"{expert} ", style=f"bold {COLOURS[expert % len(COLOURS)]}")
    return text


def run_generation(adapter, base, prompt, *, seed=0, show_experts=False, load=None, console=None, **options):
    """What `adafuse generate` does: load the adapter on its base, generate, print."""
    console = console or Console()
    model, tokenizer = load_adapted(adapter, base, **(load or {}))
    set_seed(seed)
    ids = generate_text(model, tokenizer, prompt, stream=not show_experts, **options)
    if show_experts:
        console.print(coloured(model, tokenizer, ids))
        console.print(legend(model.adafuse_config.num_experts))
