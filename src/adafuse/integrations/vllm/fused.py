"""fused: `torch.ops.adafuse.adapted_linear` by kernels that read the base's weights themselves. Needs Triton; imported when it is
used.
"""

from __future__ import annotations

from functools import cache

import torch

from adafuse.costs import CROWD_TOKENS
from adafuse.integrations.vllm.op import Group, Room, Routing, Shape, add_by_kernels, chosen_of, tiles, view
from adafuse.ops.batch import shrink_tiles
from adafuse.ops.crowd import crowd, cut_for
from adafuse.ops.decode import decode
from adafuse.ops.gated import linear_gated
from adafuse.ops.launch import cdiv, processors
from adafuse.ops.matmul import MOST_LINEARS, matmul_tiles, readable
from adafuse.ops.ranks import copies_of_h

ALIGNED = 4  # int32: kernels are compiled once more for what begins elsewhere than on 16 bytes


def linear_by_kernels(x, weight, a, b, routing: Routing, room: Room, row: int, decision: int, shape: Shape):
    """`adapted_linear` in the form that is expected to be cheapest. No host sync: safe inside a CUDA graph.

    x [T, I], weight [O_1 + ... + O_M, I]; for each linear a [R, I] and b [R, O_m], all of one dtype. row: the layer's, of
    `room`. decision: which of the routing's the layer's block follows.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    group = Group.of(x, b, shape)
    weights, form = weight.split(group.widths), group.form(len(x))
    if form == "decode":
        return _decode(x, weights, a, b, chosen_of(routing, decision, len(x), shape), room.h[row])
    if form == "crowd":
        gates = view(routing.gates, shape.decisions, len(x), shape.num_experts + 1)[decision]
        return _crowd(x, weights, a, b, gates, group, room.flags[row])
    if form != "tiles" and len(b) <= MOST_LINEARS and all(map(readable, (*weights, *b))):
        found = tiles(routing, decision, len(x), shape)
        return _matmul(x, weights, a, b, found) if form == "matmul" else linear_gated(x, weight, a, b, found)
    y = torch.nn.functional.linear(x, weight)
    add_by_kernels(y, x, a, b, group.columns, routing, decision, shape)
    return y


def _decode(x, weights, a, b, chosen, h):
    h = view(h, copies_of_h(chosen.active), len(x), len(a), chosen.active)
    return decode(x, weights, _output(x, weights), banks_a=tuple(a), banks_b=tuple(b), chosen=chosen, h=h)


def _crowd(x, weights, a, b, gates, group, flags):
    tokens, modules, shape = len(x), len(weights), group.shape
    cut = _cut(group, tokens, processors(x))
    scratch = {
        "h": x.new_empty(cut.h_shape(tokens, modules, shape.ranks)),
        "partial": x.new_empty(cut.partial_shape, dtype=torch.float32),
        "flags": flags[: cut.num_flags(tokens, modules, shape.ranks)],
    }
    banks = {"banks_a": a, "banks_b": b, "gates": gates, "r": shape.r}
    return crowd(x, weights, _output(x, weights), **banks, **scratch, cut=cut)


def _matmul(x, weights, a, b, found):
    return matmul_tiles(x, weights, shrink_tiles(x, tuple(a), found), tuple(b), found, _output(x, weights))


def _output(x, weights):
    return x.new_empty(len(x), sum(len(w) for w in weights))


@cache
def _cut(group, tokens, num_processors):
    return cut_for(tokens, group.features, group.widths, group.shape.ranks, group.dtype, processors=num_processors)


@cache
def room_of(group: Group, max_tokens: int, num_processors: int) -> tuple[int, ...]:
    """How many int32 of a row of each buffer of `Room` a layer's launches use, in steps of up to max_tokens tokens."""
    sizes = [_handed(group, tokens, num_processors) for tokens in range(1, min(max_tokens, CROWD_TOKENS) + 1)]
    return tuple(cdiv(max(each), ALIGNED) * ALIGNED for each in zip(*sizes, strict=True))


def _handed(group, tokens, num_processors):
    """In how many int32 of each buffer the programs of one launch hand things over."""
    form, modules, shape = group.form(tokens), len(group.widths), group.shape
    if form == "decode":
        active = shape.top_k * shape.r
        return copies_of_h(active) * tokens * modules * active, 0
    if form == "crowd":
        return 0, _cut(group, tokens, num_processors).num_flags(tokens, modules, shape.ranks)
    return 0, 0
