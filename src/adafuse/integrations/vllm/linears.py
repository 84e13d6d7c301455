"""linears: each adapted linear of vLLM's model gets its tensor-parallel shard of the experts, and adds them to its
output.

A mixin goes in front of the class of the layer's own `quant_method`. One computes base and experts together, from
plain weights on a GPU; the other adds the experts to what the method makes, so any quantisation keeps working:
y = base(x) + delta(x). Nothing is communicated for it: a column-parallel linear has all of A and its rows of B; a
row-parallel one its columns of A and all of B, and its delta is part of the sum over ranks that follows anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from adafuse.costs import Device
from adafuse.integrations.vllm.op import Group, Room, Routing, Shape
from adafuse.integrations.vllm.routing import Step
from adafuse.ops.appended import append


class Piece(NamedTuple):
    """One linear of the HuggingFace model, as a part of a linear of vLLM's on this rank.

    place: (block, path within the block), in HuggingFace's names. column: where its outputs begin in those of vLLM's
    linear. rows: which of its own outputs these are; columns: which of its inputs. features: its (out, in), whole.
    """

    place: tuple[int, str]
    column: int
    rows: slice
    columns: slice
    features: tuple[int, int]


class AddedMethod:
    """Mixed in front of a layer's linear method: the experts' part is added to what the method computes."""

    def apply(self, layer, x, bias=None):
        y = super().apply(layer, x, bias)
        adapter = layer.adafuse
        a, b, routing = (_buffers(layer, names) for names in adapter[:3])
        torch.ops.adafuse.add_delta(y, x, a, b, adapter.columns, routing, adapter.shape)
        return y


class WholeMethod:
    """Mixed in front of a layer's linear method: base and experts are computed together, without the method."""

    def apply(self, layer, x, bias=None):
        adapter = layer.adafuse
        a, b, routing, room = (_buffers(layer, names) for names in adapter[:4])
        y = torch.ops.adafuse.adapted_linear(x, layer.weight, a, b, routing, room, adapter.shape)
        return y if bias is None else y + bias


class Adapter(NamedTuple):
    """What a layer knows of its adapter: names of its buffers, and numbers.

    columns: where the outputs of each piece begin.
    """

    a: list[str]
    b: list[str]
    routing: list[str]
    room: list[str]
    columns: list[int]
    shape: list[int]


def _buffers(layer, names):
    return [getattr(layer, name) for name in names]


def place(path: str) -> tuple[int, str] | None:
    """(block, path within it) of a module's path: what follows the first number; None if there is no number."""
    names = path.split(".")
    at = next((i for i, name in enumerate(names) if name.isdigit()), None)
    return None if at is None else (int(names[at]), ".".join(names[at + 1 :]))


def pieces(path: str, layer: LinearBase, packed: dict[str, list[str]]) -> list[Piece]:
    """The linears of the HuggingFace model that a layer of vLLM's holds.

    packed: name of a fused linear -> names of its parts.
    """
    block, inside = place(path)
    parent, _, leaf = inside.rpartition(".")
    names = packed.get(leaf, [leaf])
    starts, sizes, whole = _outputs(layer)
    if len(names) != len(sizes):
        if len(names) > 1:
            raise ValueError(f"{path}: vLLM fuses {len(sizes)} linears there, its model names {', '.join(names)}")
        return _one_piece(path, block, inside, starts, sizes, whole, layer)
    columns = _inputs(layer)
    found, column = [], 0
    for name, start, size, out_features in zip(names, starts, sizes, whole, strict=True):
        at = (block, f"{parent}.{name}" if parent else name)
        found.append(Piece(at, column, slice(start, start + size), columns, (out_features, layer.input_size)))
        column += size
    return found


def _one_piece(path, block, inside, starts, sizes, whole, layer):
    """A linear that is one in HuggingFace's model too, though vLLM knows it as several: the same, on one rank."""
    if getattr(layer, "tp_size", 1) > 1:
        raise ValueError(
            f"{path}: a linear of {len(sizes)} parts cannot be split over ranks with its adapter yet; use one GPU"
        )
    out_features = sum(whole)
    return [Piece((block, inside), 0, slice(0, out_features), _inputs(layer), (out_features, layer.input_size))]


def _inputs(layer) -> slice:
    if isinstance(layer, RowParallelLinear):
        size = layer.input_size_per_partition
        return slice(layer.tp_rank * size, (layer.tp_rank + 1) * size)
    return slice(0, layer.input_size)


def _outputs(layer) -> tuple[list[int], list[int], list[int]]:
    """Of each part of a layer: where this rank's outputs begin, how many it has, how many there are in all."""
    sizes = list(layer.output_partition_sizes)
    if isinstance(layer, QKVParallelLinear):
        key_rank = layer.tp_rank // layer.num_kv_head_replicas
        starts = [layer.tp_rank * sizes[0], key_rank * sizes[1], key_rank * sizes[2]]
        heads = layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads
        mine = layer.num_heads, layer.num_kv_heads, layer.num_kv_heads
        return starts, sizes, [size // n * total for size, n, total in zip(sizes, mine, heads, strict=True)]
    if isinstance(layer, ColumnParallelLinear):
        return [layer.tp_rank * size for size in sizes], sizes, [layer.tp_size * size for size in sizes]
    if isinstance(layer, (RowParallelLinear, ReplicatedLinear)):
        return [0] * len(sizes), sizes, sizes
    raise ValueError(f"{type(layer).__name__} is a kind of linear whose sharding this version does not know")


def adapt(layer: LinearBase, found: list[Piece], tensors: dict, step: Step, decision: int) -> int:
    """Give `layer` its shard of the experts of the pieces in `found`, in the dtype of the activations; its number in the step.

    tensors: of each piece, by its place, the exchange tensors of its bank (experts_a [E, r, I], experts_b [E, O, r],
    ...). Before it runs it must be given its room, when all layers have joined the step.
    """
    a, b = (list(parts) for parts in zip(*(_shard(tensors[piece.place], piece, step) for piece in found), strict=True))
    group = _group(layer, found, step)
    a = append(a[0], a[1:]) if group is None else _append(layer, a)
    names = [
        _register(layer, {f"{name}{n}": part for n, part in enumerate(parts)}) for name, parts in (("a", a), ("b", b))
    ]
    routing = _register(layer, step.by_decision[decision]._asdict())
    columns = [piece.column for piece in found]
    layer.adafuse = Adapter(*names, routing, _names(Room._fields), columns, list(step.shape))
    layer.quant_method = _adapted(layer.quant_method, AddedMethod if group is None else WholeMethod)
    layer.requires_unquantized_input = group is None  # newer vLLMs would hand over an input that is quantised already
    return step.join(group)


@torch.no_grad()
def compile_ahead(layers, max_tokens: int):
    """Launch, on zeros, what steps of more than 64 tokens launch, once for each kind of layer: else Triton compiles it while requests
    wait. layers: adapted, with their room. Left out are those beside a base of another kind, quantised say."""
    from adafuse.integrations.vllm.ahead import numbers_of_tokens

    kinds = {
        (layer.weight.shape, tuple(b.shape for b in _buffers(layer, layer.adafuse.b))): layer
        for layer in layers
        if isinstance(layer.quant_method, WholeMethod)
    }
    for layer in kinds.values():
        adapter, weight = layer.adafuse, layer.weight
        b, routing = _buffers(layer, adapter.b), Routing(*_buffers(layer, adapter.routing))
        for tokens in numbers_of_tokens(weight, b, routing, Shape(*adapter.shape), max_tokens):
            layer.quant_method.apply(layer, weight.new_zeros(tokens, weight.shape[1]))


def give_room(layer: LinearBase, room: Room):
    """What `adapt` has left to do."""
    _register(layer, room._asdict())


def _register(layer, buffers: dict) -> list[str]:
    """The buffers' names in the layer."""
    names = _names(buffers)
    for name, buffer in zip(names, buffers.values(), strict=True):
        layer.register_buffer(name, buffer, persistent=False)
    return names


def _names(buffers) -> list[str]:
    return [f"adafuse_{name}" for name in buffers]


def _append(layer, a):
    """`a` anew, behind the layer's weights, which move for it: then one matmul makes the outputs of both (`ops.gated`)."""
    layer.weight.data, *a = append(layer.weight, a)
    if layer.weight.is_cuda:
        torch.cuda.empty_cache()  # no later matrix is as small as the one that is left behind: the memory would stay unused
    return a


def _group(layer, found, step) -> Group | None:
    """The linears of a layer that computes base and experts together; None for a layer that does not."""
    widths = tuple(piece.rows.stop - piece.rows.start for piece in found)
    if not _is_plain(layer, step) or sum(widths) != len(layer.weight):  # each of its linears must be adapted
        return None
    weight = layer.weight
    return Group(weight.shape[1], widths, weight.dtype, step.shape, Device.of(weight.device))


def _is_plain(layer, step) -> bool:
    """Whether y = W x is all that the base does, with a W that the kernels can read."""
    plain = step.device.type == "cuda" and type(layer.quant_method) is UnquantizedLinearMethod
    return plain and layer.weight.dtype == step.h0.dtype and layer.weight.is_contiguous()


def _shard(bank: dict, piece: Piece, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, I] and B [R, O] of a piece, on the step's device: its columns and rows, the shared expert's ranks last."""

    def there(tensor):
        return tensor.to(step.device, step.h0.dtype)

    a = there(bank["experts_a"][..., piece.columns]).flatten(0, 1)
    b = there(bank["experts_b"][:, piece.rows]).transpose(1, 2).flatten(0, 1)
    if "shared_a" in bank:
        a = torch.cat([a, there(bank["shared_a"][:, piece.columns])])
        b = torch.cat([b, there(bank["shared_b"][piece.rows]).T])
    # Its own memory: what was read may be a view of the file.
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in (a, b))


def _adapted(method, mixin):
    """The same method, of a class with the mixin in front. The name stays: vLLM knows some methods by it."""
    cls = type(method)
    adapted = object.__new__(type(cls.__name__, (mixin, cls), {"__module__": cls.__module__}))
    adapted.__dict__.update(method.__dict__)
    return adapted
