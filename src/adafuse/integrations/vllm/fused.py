"""fused: `torch.ops.adafuse.adapted_linear` by kernels that read the base's weights themselves. Needs Triton; imported when it is
used.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from adafuse.costs import CROWD_TOKENS
from adafuse.integrations.vllm.op import (
    Group,
    Room,
    Routing,
    Shape,
    add_by_kernels,
    aligned,
    chosen_of,
    gates_of,
    tiles,
    view,
)
from adafuse.ops.batch import shrink_tiles
from adafuse.ops.crowd import crowd, cut_for
from adafuse.ops.decode import decode
from adafuse.ops.gated import linear_gated
from adafuse.ops.launch import processors, since_hopper
from adafuse.ops.matmul import matmul_tiles
from adafuse.ops.pair import h_shape, pair
from adafuse.ops.ranks import copies_of_h

# By a layer's weight, as long as that is there.
_layers = WeakTensorKeyDictionary()


def linear_by_kernels(x, weight, a, b, routing: Routing, room: Room, shape: Shape):
    """`adapted_linear` in the form that is expected to be cheapest. No host sync: safe inside a CUDA graph.

    x [T, I], weight [O_1 + ... + O_M, I]; for each linear a [R, I] and b [R, O_m], all of one dtype. routing: of the
    decision that the layer's block follows. room: the layer's.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    group, tokens = Group.of(x, b, shape), x.shape[0]
    form = group.form(tokens)
    if form == "decode":
        return _decode(x, weight, a, b, group, chosen_of(routing, tokens, shape), room.h)
    if form == "crowd":
        return _crowd(x, weight, a, b, group, gates_of(routing, tokens, shape), room.flags)
    if form == "pair":
        return _pair(x, weight, a, b, group, routing)
    if form == "tiles":
        y = torch.nn.functional.linear(x, weight)
        add_by_kernels(y, x, a, b, group.columns, routing, shape)
        return y
    found, layer = tiles(routing, tokens, shape), Matrices.of(weight, a, b, group)
    if form == "gated":
        return linear_gated(x, layer.weight, a, b, found, known=layer.known)
    h = shrink_tiles(x, layer.a, found, known=layer.known)
    return matmul_tiles(x, layer.weights, h, b, found, _output(x, weight), known=layer.known)


class Matrices:
    """A layer's matrices as launches take them, and what those found out of them (`known`): to do so for each takes the host as long as
    all else.

    Without a reference to the weight that a layer is known by: it would never be freed.
    """

    def __init__(self, weight, a, b, group, addresses):
        self.addresses, self.known = addresses, {}
        self.weight, self.a, self.b = weight.data, tuple(a), tuple(b)
        self.weights = self.weight.split(group.widths)

    @classmethod
    def of(cls, weight, a, b, group) -> Matrices:
        """Those of an earlier call, unless a matrix has been replaced since."""
        addresses = group, *(matrix.data_ptr() for matrix in (weight, *a, *b))
        found = _layers.get(weight)
        if found is None or found.addresses != addresses:
            found = _layers[weight] = cls(weight, a, b, group, addresses)
        return found


def _decode(x, weight, a, b, group, chosen, h):
    h = view(h, copies_of_h(chosen.active), x.shape[0], len(a), chosen.active)
    weights = weight.split(group.widths)
    return decode(x, weights, _output(x, weight), banks_a=tuple(a), banks_b=tuple(b), chosen=chosen, h=h)


def _crowd(x, weight, a, b, group, gates, flags):
    tokens, modules, shape = x.shape[0], len(b), group.shape
    cut = _cut(group, tokens, processors(x))
    scratch = {
        "h": x.new_empty(cut.h_shape(tokens, modules, shape.ranks)),
        "partial": x.new_empty(cut.partial_shape, dtype=torch.float32),
        "flags": flags[: cut.num_flags(tokens, modules, shape.ranks)],
    }
    banks = {"banks_a": a, "banks_b": b, "gates": gates, "r": shape.r}
    return crowd(x, weight.split(group.widths), _output(x, weight), **banks, **scratch, cut=cut)


def _pair(x, weight, a, b, group, routing):
    tokens, shape, banks = x.shape[0], group.shape, {"banks_a": a, "banks_b": b, "r": group.shape.r}
    experts, ranks = None, shape.ranks
    if tokens == 1:
        experts, ranks = view(routing.experts, 1, shape.top_k), shape.top_k * shape.r + shape.shared_rank
    routed = {
        "gates": gates_of(routing, tokens, shape),
        "experts": experts,
        "h": x.new_empty(h_shape(tokens, len(b), ranks)),
    }
    return pair(x, weight.split(group.widths), _output(x, weight), **banks, **routed, pdl=since_hopper(x))


def _output(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


@cache
def _cut(group, tokens, num_processors):
    return cut_for(tokens, group.features, group.widths, group.shape.ranks, group.dtype, processors=num_processors)


@cache
def room_of(group: Group, max_tokens: int, num_processors: int) -> tuple[int, ...]:
    """How many int32 of a row of each buffer of `Room` a layer's launches use, in steps of up to max_tokens tokens."""
    sizes = [_handed(group, tokens, num_processors) for tokens in range(1, min(max_tokens, CROWD_TOKENS) + 1)]
    return tuple(aligned(max(each)) for each in zip(*sizes, strict=True))


def _handed(group, tokens, num_processors):
    """In how many int32 of each buffer the programs of one launch hand things over."""
    form, modules, shape = group.form(tokens), len(group.widths), group.shape
    if form == "decode":
        active = shape.top_k * shape.r
        return copies_of_h(active) * tokens * modules * active, 0
    if form == "crowd":
        return 0, _cut(group, tokens, num_processors).num_flags(tokens, modules, shape.ranks)
    return 0, 0
