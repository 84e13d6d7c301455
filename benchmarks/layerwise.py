"""Layer-wise routing on the library's kernels: every linear routes on its own input. How fast the peers' rule can be made.

A group of linears takes four kinds of launches: one shrink by all experts, with the router's logits as further rows; one that chooses
and gathers what was chosen; one for the base weights; one expand a linear. All A are read, since the choice is not known before.
The router's rows are rounded to the dtype of the weights.
"""

import torch
import triton
import triton.language as tl

from adafuse.engine.kernels import Step
from adafuse.ops.chosen import Chosen
from adafuse.ops.decode import decode, expand, shrink


@triton.jit
def _choose_kernel(
    all_h, h, experts, T, scale, M: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program: a linear of a token. all_h [T, M, E R + E] -> h [M, T, K R], scaled by the weights, and experts [M, T, K]."""
    m, t = tl.program_id(0), tl.program_id(1)
    mine = all_h + (t * M + m) * (E * R + E)
    e, i = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_R)
    z = tl.load(mine + E * R + e, mask=e < E, other=0).to(tl.float32, bitcast=True)
    z = tl.where(e < E, z, float("-inf"))
    p = tl.exp(z - tl.max(z, 0))
    p = p / tl.sum(p, 0)
    left, total = p, 0.0
    for _ in tl.static_range(K):
        best = tl.max(left, 0)
        total += best
        left = tl.where(e == tl.min(tl.where(left == best, e, E - 1), 0), -1.0, left)
    total = total if K > 1 else 1.0
    for k in tl.static_range(K):
        best = tl.max(p, 0)
        expert = tl.min(tl.where(p == best, e, E - 1), 0)
        p = tl.where(e == expert, -1.0, p)
        tl.store(experts + (m * T + t) * K + k, expert)
        values = tl.load(mine + expert * R + i, mask=i < R, other=0).to(tl.float32, bitcast=True)
        scaled = values * (best / total * scale)
        tl.store(h + ((m * T + t) * K + k) * R + i, scaled.to(tl.int32, bitcast=True), mask=i < R)


class LayerwiseStep(Step):
    """A step of a LayerwiseModel whose linears are all adapted. modules: block, group -> the RoutedLinears, as in a Block."""

    def __init__(self, backbone, modules, config, cache, rotary, logits):
        super().__init__(backbone, None, cache, rotary, logits)
        self.config, dtype, device = config, cache.dtype, cache.device
        experts, r, top_k = config.num_experts, config.r, config.top_k
        with torch.no_grad():
            self.banks_a = [
                {
                    name: [torch.cat([each.bank.a, each.router.weight]).to(dtype) for each in group]
                    for name, group in m.items()
                }
                for m in modules
            ]
            self.banks_b = [
                {name: [each.bank.b.to(dtype) for each in group] for name, group in m.items()} for m in modules
            ]
        most = max(len(group) for group in modules[0].values())
        everyone = torch.arange(experts, dtype=torch.int32, device=device).repeat(self.rows, 1)
        self.everything = Chosen(everyone, torch.ones(self.rows, experts, device=device), experts, r, experts, 1.0)
        integers = {"dtype": torch.int32, "device": device}
        self.all_ranks = torch.zeros(self.rows * most * (experts * r + experts), **integers)
        self.ranks = torch.zeros(most, self.rows, top_k * r, **integers)
        self.picked = torch.zeros(most, self.rows, top_k, **integers)
        self.ones = torch.ones(self.rows, top_k, device=device)

    def _linears(self, index, name, x, out, *, after_plan=False, pdl):
        config, group = self.config, getattr(self.backbone.blocks[index], name)
        count, width = len(group), self.everything.active
        all_ranks = self.all_ranks[: self.rows * count * width].view(self.rows, count, width)
        shrink(x, self.banks_a[index][name], self.everything, all_ranks)
        _choose_kernel[(count, self.rows)](
            all_ranks, self.ranks, self.picked, self.rows, config.scale, M=count, E=config.num_experts, K=config.top_k,
            R=config.r, BLOCK_E=triton.next_power_of_2(config.num_experts), BLOCK_R=triton.next_power_of_2(config.r),
            num_warps=1,
        )  # fmt: skip
        weights = [linear.base.weight for linear in group]
        decode(x, weights, out)
        parts = out.split([len(w) for w in weights], dim=1)
        for m, (part, b) in enumerate(zip(parts, self.banks_b[index][name], strict=True)):
            expand(self.ranks[m], b, Chosen(self.picked[m], self.ones, config.num_experts, config.r), part)


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
