"""Layer-wise routing on the library's kernels: every linear routes on its own input. How fast the peers' rule can be made.

One token: a launch for each group of linears (`layerwise_token`). Several tokens: two launches. One for all that multiplies the input:
base weights, the A of all experts, and the router's rows. One that chooses, and adds what the chosen experts' B give; its logits are
rounded to the dtype of the weights. All start early. The router's rows are rounded to the dtype of the weights.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from layerwise_token import one_launch

from adafuse.engine.kernels import Step
from adafuse.engine.linears import Linear
from adafuse.engine.runs import Runs
from adafuse.ops.decode import tile_of
from adafuse.ops.launch import cdiv, launch_options, next_power_of_2, wait_for_inputs
from adafuse.ops.ranks import EMPTY, copies_of_h

BLOCK_O = 64


@triton.jit
def _choose_and_add_kernel(
    wide, banks_b, out, scale, stride_wide, stride_out, widths: tl.constexpr, TOTAL: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_O outputs of a linear for a token. wide [T, TOTAL + M (E R + E)]: outputs of the base; h and logits by linear."""
    wait_for_inputs(PDL)
    b, linear, block, column, width = tile_of(tl.program_id(0), banks_b, widths, BLOCK_O)
    wide += tl.program_id(1) * stride_wide
    mine = wide + TOTAL + linear * (E * R + E)
    e, i, o = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_R), block * BLOCK_O + tl.arange(0, BLOCK_O)
    z = tl.load(mine + E * R + e, mask=e < E, other=float("-inf")).to(tl.float32)
    base = tl.load(wide + column + o, mask=o < width, other=0.0).to(tl.float32)
    p = tl.exp(z - tl.max(z, 0))
    p = p / tl.sum(p, 0)
    delta, total = tl.zeros([BLOCK_O], tl.float32), 0.0
    for _ in tl.static_range(K):
        best = tl.max(p, 0)
        expert = tl.min(tl.where(p == best, e, E - 1), 0)
        p = tl.where(e == expert, -1.0, p)
        h = tl.load(mine + expert * R + i, mask=i < R, other=0.0).to(tl.float32)
        rows = b + (expert * R + i).to(tl.int64)[:, None] * width + o[None, :]
        tile = tl.load(rows, mask=(i < R)[:, None] & (o < width)[None, :], other=0.0)
        delta += best * tl.sum(tile.to(tl.float32) * h[:, None], 0)
        total += best
    y = base + scale * (delta / total if K > 1 else delta)
    tl.store(out + tl.program_id(1) * stride_out + column + o, y.to(out.dtype.element_ty), mask=o < width)


class LayerwiseStep(Step):
    """A step of a LayerwiseModel whose linears are all adapted. modules: block, group -> the RoutedLinears, as in a Block."""

    def __init__(self, backbone, modules, config, cache, rotary, logits):
        super().__init__(backbone, None, cache, rotary, logits)
        self.config, dtype = config, cache.dtype

        def of_all(make):
            return [{name: [make(each).to(dtype) for each in group] for name, group in m.items()} for m in modules]

        with torch.no_grad():
            self.inner_rows = of_all(lambda each: torch.cat([each.bank.a, each.router.weight]))
            self.banks_b = of_all(lambda each: each.bank.b)
        if self.rows == 1:
            self._make_h(cache.device)
        else:
            self._make_wide(cache)

    def _make_h(self, device):
        config, blocks = self.config, len(self.banks_b)
        copies, each = copies_of_h(config.top_k * config.r), config.num_experts * (config.r + 1)
        sizes = [copies * len(group) * each for group in self.banks_b[0].values()]
        self.all_h = torch.empty(blocks, sum(sizes), dtype=torch.int32, device=device)
        self.h = [
            {name: h.view(copies, -1, each) for name, h in zip(self.banks_b[0], block.split(sizes), strict=True)}
            for block in self.all_h
        ]

    def _make_wide(self, cache):
        self.wide = {
            name: cache.new_zeros(self.rows, sum(len(each) for each in self._matrices(0, name)))
            for name in self.inner_rows[0]
        }
        groups = [
            ([_as_linear(each) for each in self._matrices(index, name)], None)
            for index in range(len(self.inner_rows))
            for name in self.wide
        ]
        self.wide_runs = Runs(groups, self.rows, None, cache.element_size())
        of_groups = iter(self.wide_runs.of_groups)
        self.wide_blocks = [{name: next(of_groups) for name in self.wide} for _ in self.inner_rows]

    def _matrices(self, index, name):
        """All that multiplies the input of a group."""
        weights = [linear.base.weight for linear in getattr(self.backbone.blocks[index], name)]
        return [*weights, *self.inner_rows[index][name]]

    def run(self, tokens, positions, *, pdl):
        if self.rows == 1:
            self.all_h.fill_(EMPTY.value)
        else:
            self.wide_runs.clear()
        super().run(tokens, positions, pdl=pdl)

    def _linears(self, index, name, x, out, *, after_plan=False, pdl):
        config, banks_b = self.config, self.banks_b[index][name]
        if self.rows == 1:
            weights = [linear.base.weight for linear in getattr(self.backbone.blocks[index], name)]
            one_launch(x, weights, self.inner_rows[index][name], banks_b, self.h[index][name], out, config, pdl=pdl)
            return
        wide = self.wide[name]
        for run in self.wide_blocks[index][name]:
            run(x, wide, after_plan=False, pdl=pdl)
        widths = tuple(b.shape[1] for b in banks_b)
        _choose_and_add_kernel[(sum(cdiv(width, BLOCK_O) for width in widths), self.rows)](
            wide, tuple(banks_b), out, config.scale, wide.stride(0), out.stride(0), widths=widths, TOTAL=sum(widths),
            E=config.num_experts, K=config.top_k, R=config.r, BLOCK_E=next_power_of_2(config.num_experts),
            BLOCK_R=next_power_of_2(config.r), BLOCK_O=BLOCK_O, **launch_options(pdl),
        )  # fmt: skip


def _as_linear(matrix):
    return Linear(SimpleNamespace(weight=matrix), None)


def modules_of(base, num_blocks):
    """The linears of every block of a model of the Llama family, by group: what took their places when an adapter was attached."""
    names = {
        "qkv": [f"self_attn.{n}_proj" for n in "qkv"],
        "o": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    return [
        {
            group: [base.get_submodule(f"model.layers.{block}.{path}") for path in paths]
            for group, paths in names.items()
        }
        for block in range(num_blocks)
    ]
