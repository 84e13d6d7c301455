"""fused: the adapted linears of a block through the kernels, unmerged and exact, for tokens that mix different experts."""

from __future__ import annotations

from functools import lru_cache

import torch

from adafuse.costs import Device, Layer, fused_form
from adafuse.ops.batch import add_delta_tiles, shrink_tiles
from adafuse.ops.beside import expand, shrink
from adafuse.ops.crowd import crowd, cut_for
from adafuse.ops.decode import decode
from adafuse.ops.gated import add_gated, linear_gated
from adafuse.ops.launch import processors, since_hopper
from adafuse.ops.matmul import matmul_tiles, readable
from adafuse.ops.ranks import EMPTY, copies_of_h
from adafuse.plan import Plan
from adafuse.weights import answers_anew, is_plain


@torch.compiler.disable  # the kernels write into what they are given, which a trace of them need not see
def fused_blocks(routing, config, num_blocks) -> list[FusedBlock]:
    """What each block of a forward needs, from one routing. In a plan of this forward's own: another may be under way."""
    plan = Plan.of(routing, config)
    return [FusedBlock(plan, block) for block in range(num_blocks)]


class FusedBlock:
    """Computes the adapted linears of one block in one forward."""

    def __init__(self, plan: Plan, block: int):
        self._plan, self._block, self.tokens = plan, block, plan.tokens
        self._parts = {}

    def _part(self, device):
        """The block's part of the plan on a device, laid out once for all its linears."""
        if device not in self._parts:
            self._parts[device] = self._plan.on(device).of_block(self._block)
        return self._parts[device]

    @torch.compiler.disable
    def linear(self, layer, x, dtype, args, kwargs):
        """The output of an AdapterLinear. x [..., I] -> [..., O]; adapters compute in `dtype`, sums in fp32.

        A plain base linear: by the cheapest of our kernels, most of which read the base's weights themselves. Otherwise the base's
        own kernel, and the adapters' beside it. ValueError where a gradient is needed.
        """
        refuse_gradient_of_input(layer, x)
        plan, base = self._part(x.device), layer.base_layer
        a, b = layer.bank.matrices(dtype)
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        if not args and not kwargs and is_plain(layer, dtype) and x.dtype == dtype and base.weight.device == x.device:
            form = self._form(rows, layer.out_features)
            if (form == "matmul" and not readable(base.weight)) or (form in ("matmul", "gated") and not readable(b)):
                form = "tiles"
            return FORMS[form](rows, base.weight, a, b, plan).view(*x.shape[:-1], -1)
        y = base(x, *args, **kwargs)
        # What is added in place must be ours: neither kept by a hook, nor a buffer of the base's.
        y = y.contiguous() if answers_anew(base) else y.clone(memory_format=torch.contiguous_format)
        rows, pdl = layer.dropout(rows).to(dtype), since_hopper(rows)
        form, flat = self._form(rows, layer.out_features, plain=False), y.view(-1, y.shape[-1])
        if form == "beside":
            h = shrink(rows, (a,), plan.chosen, _h(rows, plan.chosen)[0], pdl=pdl)
            expand(h[:, 0], b, plan.chosen, flat, pdl=pdl)
        elif form == "beside_gated" and readable(b) and y.dtype == dtype:
            add_gated(flat, rows, (a,), (b,), plan.tiles)
        else:
            add_delta_tiles(flat, rows, a, b, plan.tiles, pdl=pdl)
        return y

    def _form(self, rows, out_features, plain=True):
        layer, device = Layer(rows.shape[1], out_features, plain=plain), Device.of(rows.device)
        return fused_form(layer, self._plan.config, len(rows), rows.element_size(), device)


def refuse_gradient_of_input(layer, x):
    """ValueError if a forward without gradients of the adapter would still need one through this linear."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            f"{layer.path}: this execution has no backward pass and the input needs a gradient; run under torch.no_grad(), or "
            'set model.execution = "reference"'
        )


def _decode(rows, weight, a, b, plan):
    y, h = rows.new_empty(len(rows), len(weight)), _h(rows, plan.chosen).fill_(EMPTY.value)
    return decode(rows, (weight,), y, banks_a=(a,), banks_b=(b,), chosen=plan.chosen, h=h)


_cut_for = lru_cache(cut_for)


def _crowd(rows, weight, a, b, plan):
    tokens, ranks, y = len(rows), len(a), rows.new_empty(len(rows), len(weight))
    cut = _cut_for(tokens, rows.shape[1], (len(weight),), ranks, rows.dtype, processors=processors(rows))
    scratch = {
        "h": rows.new_empty(cut.h_shape(tokens, 1, ranks)),
        "partial": rows.new_empty(cut.partial_shape, dtype=torch.float32),
        "flags": torch.zeros(cut.num_flags(tokens, 1, ranks), dtype=torch.int32, device=rows.device),
    }
    return crowd(rows, (weight,), y, banks_a=(a,), banks_b=(b,), gates=plan.gates, r=plan.chosen.r, cut=cut, **scratch)


def _matmul(rows, weight, a, b, plan):
    h = shrink_tiles(rows, a, plan.tiles)
    return matmul_tiles(rows, (weight,), h, (b,), plan.tiles, rows.new_empty(len(rows), len(weight)))


def _tiles(rows, weight, a, b, plan):
    y = torch.nn.functional.linear(rows, weight)
    add_delta_tiles(y, rows, a, b, plan.tiles, pdl=since_hopper(rows))
    return y


def _gated(rows, weight, a, b, plan):
    return linear_gated(rows, weight, (a,), (b,), plan.tiles)


# Those of `costs.FORMS` that take a plain linear. Each: x [T, I], W [O, I], A [R, I], B [R, O], the block's plan -> y [T, O].
FORMS = {
    "decode": _decode,
    "crowd": _crowd,
    "tiles": _tiles,
    "gated": _gated,
    "matmul": _matmul,
}


def _h(rows, chosen):
    return torch.empty(copies_of_h(chosen.active), len(rows), 1, chosen.active, dtype=torch.int32, device=rows.device)
