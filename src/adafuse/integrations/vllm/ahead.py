"""ahead: for how many tokens a layer's kernels are to be launched while the model loads, so that Triton compiles none while requests wait.

vLLM compiles what it captures. A step of more tokens than that, of prompts that come together, is launched kernel by kernel, and a kernel
that is compiled first holds up all requests for a second or more. Needs Triton; imported when it is used.
"""

from __future__ import annotations

from adafuse.costs import CROWD_TOKENS, MANY_TOKENS
from adafuse.integrations.vllm.op import Group, Routing, Shape, beside_form, tiles
from adafuse.ops.batch import compiled_for
from adafuse.ops.gated import takes_in_order

STEP = 16  # tokens, beyond 512: what is launched changes with tiles, of 128 tokens there, or where the estimate takes another form


def numbers_of_tokens(x, b, routing: Routing, shape: Shape, max_tokens: int) -> list[int]:
    """Of the steps of more than 64 tokens and at most max_tokens, one for each set of kernels that they are compiled for.

    For a layer that computes base and experts together. x [.., I], b: for each linear [R, O_m], routing: the layer's.
    """
    group, found = Group.of(x, b, shape), {}
    numbers = [*range(CROWD_TOKENS + 1, MANY_TOKENS + 1), *range(MANY_TOKENS + 1, max_tokens, STEP), max_tokens]
    for tokens in (n for n in numbers if CROWD_TOKENS < n <= max_tokens):
        laid_out = tiles(routing, tokens, shape)
        found.setdefault((group.form(tokens), *_numbers(group, x, laid_out)), tokens)
    return list(found.values())


def _numbers(group, x, laid_out):
    """What the kernels of so many tokens' form are compiled for."""
    tokens, form = laid_out.tokens, group.form(laid_out.tokens)
    in_order = takes_in_order(laid_out.num_tiles, laid_out.top_k, laid_out.num_experts)
    if form == "gated":
        return laid_out.block_t, in_order
    numbers = compiled_for(x, group.widths, laid_out)
    if form == "matmul":
        return numbers[:2]
    return in_order, beside_form(x, tokens, sum(group.widths), len(group.widths), group.shape), *numbers
