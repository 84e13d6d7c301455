"""op: the operations that an adapted linear is in a model's graph, one a layer. Knows no vLLM.

    y[t, columns of m] += sum_j scale(t, j) * B_m[row(t, j)] (A_m[row(t, j)] x[t])    for each linear m that reads x

`torch.ops.adafuse.add_delta` adds this to what the base made; on a CUDA device by the kernels of `ops.beside` for few
tokens, of `ops.gated` and `ops.batch` beyond. `adapted_linear` makes y = W x and adds it, for weights that our kernels can read;
on a CUDA device by those of `fused`. Elsewhere both have a dense form in plain PyTorch. The routing comes in the
buffers of a `Step`, which stay where they are, so that a CUDA graph can hold the operations.
"""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from adafuse.costs import CROWD_TOKENS, FEW_TOKENS, H100, MANY_TOKENS, Device, Layer, fused_form

# Up to here `ops.crowd` may read all experts, of the base's weights: with 0.17 it took 0.83 of the time of "tiles" and 0.92 of that of
# "gated" (32 tokens of Llama-2-7B, r 64, docs/kernels.md).
CROWD_READS = 0.25
ALIGNED = 4  # numbers of 4 bytes
# Up to so many tokens `ops.pair` computes what it can read. 0, since it has not been timed yet; `ours_pair` of serve_models.py does that.
PAIR_TOKENS = int(os.environ.get("ADAFUSE_PAIR_TOKENS", "0"))
FORMS = ("decode", "crowd", "gated", "tiles", "matmul")  # of `costs.FORMS`
# The same for more tokens than vLLM captures by itself, in 16 bits and with several experts a token: "tiles" is compiled for a dozen
# numbers of tokens, each a second of the load, and would save 1 to 2 % (2 of 8 experts of r 64, Llama-3.1-8B's linears, by the estimate;
# of one linear up to 6 %). With one expert a token it would save 4 to 16 %, and in fp32, which `matmul` does not take, more.
MANY_FORMS = ("decode", "crowd", "gated", "matmul")
_library = torch.library.Library("adafuse", "FRAGMENT")
_library.define(
    "add_delta(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, int[] columns, Tensor[] routing, int[] shape) -> ()"
)
# Functional for a graph, though programs of one launch hand things over in `room`: no other operation reads the layer's. Nothing but
# tensors tells a layer from the next, not even the decision that it follows: vLLM compiles all layers' graphs as one (Llama-2-13B
# took 98 s with a number a layer, the bare base 46: results/h200/exploration.json, run 5).
_library.define(
    "adapted_linear(Tensor x, Tensor weight, Tensor[] a, Tensor[] b, Tensor[] routing, Tensor[] room, "
    "int[] shape) -> Tensor"
)


class Shape(NamedTuple):
    """The numbers of an adapter that its buffers are read by."""

    decisions: int
    num_experts: int
    top_k: int
    r: int
    shared_rank: int

    @property
    def ranks(self) -> int:
        """R."""
        return self.num_experts * self.r + self.shared_rank


class Routing(NamedTuple):
    """The buffers of a step, a row for each decision [D, size], or those of one decision [size]. Each has room for the largest step: T
    tokens use the first elements of a row.

    Of a decision: experts [T, K] int32 and weights [T, K] fp32 (times alpha / r); gates [T, E + 1] fp32: each expert's weight by
    token, then the shared expert's. All weights of tokens without adapter are 0. order [T], counts [tiles], blocks [tiles, num_blocks]
    int32: the tokens sorted into tiles (`ops.layout.Tiles`). What a device has no use for is empty. shared [T] fp32, of all decisions:
    the shared expert's scale.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    shared: torch.Tensor
    gates: torch.Tensor
    order: torch.Tensor
    counts: torch.Tensor
    blocks: torch.Tensor

    def each(self) -> list[Routing]:
        """Those of each decision, as the operations take them."""
        rows = zip(*(getattr(self, name) for name in self._fields if name != "shared"), strict=True)
        return [Routing(*row[:2], self.shared, *row[2:]) for row in rows]


class Room(NamedTuple):
    """The buffers in which programs of one launch hand things over, int32: a layer's, flat; of a step [layers, of the one that needs most].

    h: holds EMPTY before a launch of `ops.decode`. flags: hold 0 before one of `ops.crowd`.
    """

    h: torch.Tensor
    flags: torch.Tensor


class Group(NamedTuple):
    """The linears of a layer that computes base and experts together: they read one input, and all are adapted.

    widths: outputs of each, on this rank; their weights lie one below the other in the layer's. device: its rates.
    """

    features: int
    widths: tuple[int, ...]
    dtype: torch.dtype
    shape: Shape
    device: Device = H100

    @classmethod
    def of(cls, x, b, shape: Shape) -> Group:
        """From the input and the linears' b."""
        return cls(x.shape[1], tuple(b_m.shape[1] for b_m in b), x.dtype, shape, Device.of(x.device))

    @property
    def columns(self) -> list[int]:
        """Where the outputs of each begin."""
        return [0, *accumulate(self.widths[:-1])]

    @lru_cache(maxsize=4096)  # noqa: B019 - of tuples of numbers
    def form(self, tokens: int) -> str:
        """What computes so many tokens, by its key in `costs.FORMS`; "tiles" also for what the others cannot read, and for a few
        tokens of which `decode` is unfit. Or "pair"."""
        if tokens <= PAIR_TOKENS and self.dtype.itemsize == 2 and self.features % 8 == 0:
            return "pair"
        layer = Layer(self.features, sum(self.widths), len(self.widths), appended=True)
        without_tiles = self.shape.top_k > 1 and self.dtype.itemsize == 2 and self._can_be_described
        forms = MANY_FORMS if tokens > MANY_TOKENS and without_tiles else FORMS
        form = fused_form(layer, self.shape, tokens, self.dtype.itemsize, self.device, forms)
        # `decode` has one shared scale for all tokens, but some have no adapter.
        unfit = form == "decode" and self.shape.shared_rank
        if form in ("gated", "matmul") and not self._can_be_described:
            form = "tiles"
        if tokens > CROWD_TOKENS or not (unfit or form in ("gated", "tiles")):
            return form
        # The estimate leaves out that a step's tokens are sorted for these.
        read = self.shape.ranks * (layer.in_features + layer.out_features) / (layer.in_features * layer.out_features)
        if read <= CROWD_READS:
            return "crowd"
        return "tiles" if unfit else form

    @property
    def _can_be_described(self) -> bool:
        from adafuse.ops.matmul import can_be_described

        return can_be_described(self.features, self.widths, self.dtype)


def view(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first elements of a flat buffer, as a tensor of this shape. In one call, for the host's sake."""
    size, strides = 1, []
    for n in reversed(shape):
        strides.append(size)
        size *= n
    if size > buffer.numel():
        raise ValueError(f"{list(shape)} do not fit into a buffer of {buffer.numel()}")
    return buffer.as_strided(shape, strides[::-1])


def views(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The same of each row of a buffer [D, size]: [D, *shape]."""
    first = view(buffer[0], *shape)
    return buffer.as_strided((len(buffer), *shape), (buffer.stride(0), *first.stride()))


def aligned(size: int) -> int:
    """A row's size, rounded up so that the next begins on 16 bytes: kernels are compiled once more for what begins elsewhere."""
    return -(-size // ALIGNED) * ALIGNED


def few(tokens: int) -> bool:
    """Whether a step of so many tokens is computed token by token, by the kernels of `ops.beside`."""
    return tokens <= FEW_TOKENS


def add_dense(y, x, a, b, columns, routing: Routing, shape: Shape):
    """`add_delta` in plain PyTorch: all experts computed, masked in rank space.

    y [T, O], changed in place, x [T, I]; for each linear a [R, I] and b [R, O_m], of x's dtype, and the first of its
    columns in y. routing: of the decision that the linears' block follows.
    """
    gates = gates_of(routing, len(x), shape).to(x.dtype)
    mask = gates[:, :-1].repeat_interleave(shape.r, dim=1)
    if shape.shared_rank:
        mask = torch.cat([mask, gates[:, -1:].expand(-1, shape.shared_rank)], dim=1)
    for a_m, b_m, column in zip(a, b, columns, strict=True):
        h = torch.nn.functional.linear(x, a_m) * mask
        part = y[:, column : column + b_m.shape[1]]
        if y.dtype == h.dtype:
            part.addmm_(h, b_m)
        else:  # a quantised base may answer in a dtype of its own
            part.add_(h @ b_m)


def linear_dense(x, weight, a, b, routing: Routing, shape: Shape):
    """`adapted_linear` in plain PyTorch. x [T, I], weight [O_1 + ... + O_M, I], the others as of `add_dense` -> y."""
    y = torch.nn.functional.linear(x, weight)
    add_dense(y, x, a, b, Group.of(x, b, shape).columns, routing, shape)
    return y


def add_by_kernels(y, x, a, b, columns, routing: Routing, shape: Shape):
    """`add_delta` by the Triton kernels: arguments as of `add_dense`. No host sync: safe inside a CUDA graph."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    parts = [y[:, column : column + b_m.shape[1]] for b_m, column in zip(b, columns, strict=True)]
    if few(len(x)):
        _add_few(parts, x, a, b, routing, shape)
    else:
        _add_many(y, parts, x, a, b, tiles(routing, len(x), shape), shape)


def _add_many(y, parts, x, a, b, found, shape):
    from adafuse.ops.batch import add_delta_tiles
    from adafuse.ops.gated import MOST_LINEARS, add_gated
    from adafuse.ops.launch import since_hopper
    from adafuse.ops.matmul import readable

    all_adapted = sum(part.shape[1] for part in parts) == y.shape[1] and y.dtype == x.dtype and y.stride(1) == 1
    form = beside_form(x, len(x), y.shape[1], len(b), shape)
    if form == "beside_gated" and all_adapted and len(b) <= MOST_LINEARS and all(map(readable, b)):
        add_gated(y, x, a, b, found)
    else:
        add_delta_tiles(tuple(parts), x, tuple(a), tuple(b), found, pdl=since_hopper(x))


def beside_form(x, tokens, outputs, linears, shape) -> str:
    """What adds the experts of more than a few tokens to a base's own output, by its key in `costs.FORMS`. x [.., I]."""
    layer = Layer(x.shape[1], outputs, linears, plain=False)
    return fused_form(layer, shape, tokens, x.element_size(), Device.of(x.device), ("beside_gated", "beside_tiles"))


def _add_few(parts, x, a, b, routing, shape):
    from adafuse.ops.beside import expand, shrink
    from adafuse.ops.launch import since_hopper

    chosen, pdl = chosen_of(routing, len(x), shape), since_hopper(x)
    h = torch.empty(len(x), len(a), chosen.active, dtype=torch.int32, device=x.device)
    shrink(x, tuple(a), chosen, h, pdl=pdl)
    if shape.shared_rank:  # the kernel knows one scale for all tokens, but some have no adapter
        shared = h[..., shape.top_k * shape.r :].view(torch.float32)
        shared.mul_(view(routing.shared, len(x))[:, None, None])
    for m, (b_m, part) in enumerate(zip(b, parts, strict=True)):
        expand(h[:, m], b_m, chosen, part, pdl=pdl)


def chosen_of(routing: Routing, tokens: int, shape: Shape):
    """The `ops.chosen.Chosen` of a step, as views of its buffers. The shared expert's scale is 1."""
    from adafuse.ops.chosen import Chosen

    experts, weights = (view(buffer, tokens, shape.top_k) for buffer in (routing.experts, routing.weights))
    return Chosen(experts, weights, shape.num_experts, shape.r, shape.shared_rank, shared_scale=1.0)


def gates_of(routing: Routing, tokens: int, shape: Shape) -> torch.Tensor:
    """[T, E + 1] fp32 of a step, as a view of its buffer."""
    return view(routing.gates, tokens, shape.num_experts + 1)


def tiles(routing: Routing, tokens: int, shape: Shape):
    """The `ops.layout.Tiles` of a step, as views of its buffers."""
    from adafuse.ops.layout import Tiles

    block_t, block_r, num_tiles, num_blocks = tile_counts(tokens, shape)
    return Tiles(
        order=view(routing.order, tokens),
        gates=gates_of(routing, tokens, shape),
        counts=view(routing.counts, num_tiles),
        blocks=view(routing.blocks, num_tiles, num_blocks),
        r=shape.r,
        shared_rank=shape.shared_rank,
        top_k=shape.top_k,
        block_t=block_t,
        block_r=block_r,
    )


@lru_cache(maxsize=4096)
def tile_counts(tokens: int, shape: Shape) -> tuple[int, int, int, int]:
    """block_t, block_r, number of tiles and of rank blocks of a step of so many tokens."""
    from adafuse.ops.layout import tile_shape

    block_t, block_r = tile_shape(tokens, shape.r, shape.ranks)
    return block_t, block_r, -(-tokens // block_t), -(-shape.ranks // block_r)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _add_on_cpu(y, x, a, b, columns, routing, shape):
    add_dense(y.view(-1, y.shape[-1]), _rows(x), a, b, columns, Routing(*routing), Shape(*shape))


def _add_on_cuda(y, x, a, b, columns, routing, shape):
    add_by_kernels(y.view(-1, y.shape[-1]), _rows(x), a, b, columns, Routing(*routing), Shape(*shape))


def _linear_on_cpu(x, weight, a, b, routing, room, shape):
    return linear_dense(_rows(x), weight, a, b, Routing(*routing), Shape(*shape)).view(*x.shape[:-1], -1)


def _linear_on_cuda(x, weight, a, b, routing, room, shape):
    from adafuse.integrations.vllm.fused import linear_by_kernels

    step = Routing(*routing), Room(*room)
    return linear_by_kernels(_rows(x), weight, a, b, *step, Shape(*shape)).view(*x.shape[:-1], -1)


def _linear_of_fakes(x, weight, *_):
    return x.new_empty(*x.shape[:-1], len(weight))


_library.impl("add_delta", _add_on_cpu, "CPU")
_library.impl("add_delta", _add_on_cuda, "CUDA")
torch.library.register_fake("adafuse::add_delta", lambda *_: None, lib=_library)
_library.impl("adapted_linear", _linear_on_cpu, "CPU")
_library.impl("adapted_linear", _linear_on_cuda, "CUDA")
torch.library.register_fake("adafuse::adapted_linear", _linear_of_fakes, lib=_library)
