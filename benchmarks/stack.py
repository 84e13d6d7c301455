"""The linears of all blocks of a model, one after another, as one token (or a batch) meets them in decoding.

Every group's input is made from the output of the group before it, so that no kernel can run ahead of its data. Weights are random
and together far larger than the L2 cache. What a model has between the linears (norms, attention) is left out.
"""

from functools import cached_property

import torch
from shapes import SHAPES, groups

from adafuse.ops.appended import append
from adafuse.ops.batch import add_delta_tiles, lay_out, shrink_tiles
from adafuse.ops.chosen import Chosen
from adafuse.ops.crowd import crowd, cut_for
from adafuse.ops.decode import EMPTY, copies_of_h, decode, decode_ref
from adafuse.ops.gated import add_gated, linear_gated
from adafuse.ops.matmul import matmul_tiles
from adafuse.ops.route import route

MOST_OF_A_CROWD = 256  # tokens
FEWEST_OF_A_MATMUL = 256


class Stack:
    """Weights and activations of the base. `weights[block][group]` [sum of widths, features], bf16."""

    def __init__(self, model, tokens=1, device="cuda"):
        self.model, self.groups, self.device = model, groups(model), device
        self.blocks = SHAPES[model]["num_hidden_layers"]
        self.hidden = SHAPES[model]["hidden_size"]
        options = {"device": device, "dtype": torch.bfloat16}
        total = sum(sum(g.widths) * g.features for g in self.groups) * self.blocks
        self.flat = torch.empty(
            total, **options
        )  # one buffer, so that the read bandwidth is measured on the same bytes
        self.weights, start = [], 0
        for _ in range(self.blocks):
            row = []
            for g in self.groups:
                size = sum(g.widths) * g.features
                w = self.flat[start : start + size].view(-1, g.features)
                row.append(w.normal_(std=g.features**-0.5))
                start += size
            self.weights.append(row)
        self.x = torch.randn(tokens, self.hidden, **options)
        self.inputs = torch.randn(64, tokens, self.hidden, **options)
        self.outputs = [
            [torch.empty(tokens, sum(g.widths), **options) for g in self.groups] for _ in range(self.blocks)
        ]

    def prepare(self, n):
        """Another token for run n."""
        self.x.copy_(self.inputs[n % len(self.inputs)])

    @property
    def num_bytes(self):
        return 2 * self.flat.numel()

    def steps(self):
        """(block, index of the group, group, x, y) in the order of the forward."""
        x = self.x
        for block in range(self.blocks):
            for index, group in enumerate(self.groups):
                y = self.outputs[block][index]
                yield block, index, group, x[:, : group.features], y
                x = y

    def linears(self, block, index):
        return self.weights[block][index].split(self.groups[index].widths)

    def run_cublas(self):
        for block, index, _, x, y in self.steps():
            torch.mm(x, self.weights[block][index].T, out=y)

    def run_backbone(self, pdl=True):
        for block, index, _, x, y in self.steps():
            decode(x, self.linears(block, index), y, pdl=pdl)

    def error(self):
        """Largest relative RMS error of a group's output as the base alone, against float64 on the inputs that it had."""
        return worst(
            relative_error(y, decode_ref(x.double(), [w.double() for w in self.linears(block, index)]))
            for block, index, _, x, y in self.steps()
        )


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def worst(errors):
    """The largest error; NaN if one is (max() of Python passes over it)."""
    return torch.tensor(list(errors)).max().item()


class Banks:
    """The experts of every linear of a stack, random: a and b [block][group][linear]."""

    def __init__(self, stack, *, num_experts, r, top_k, shared_rank=0):
        self.stack, self.num_experts, self.r, self.top_k, self.shared_rank = stack, num_experts, r, top_k, shared_rank
        ranks = num_experts * r + shared_rank

        def matrices(make):
            return [[make(group) for group in stack.groups] for _ in range(stack.blocks)]

        def random(rows, columns, std):
            return torch.empty(rows, columns, device=stack.device, dtype=torch.bfloat16).normal_(std=std)

        # The a of a group lie in one matrix, which all forms may read; only "gated" and "appended" profit.
        self.a = matrices(
            lambda g: random(ranks * len(g.widths), g.features, g.features**-0.5).split([ranks] * len(g.widths))
        )
        self.b = matrices(lambda g: [random(ranks, width, 0.02) for width in g.widths])

    def bytes_of(self, experts):
        """Bytes of so many experts, and of the shared one, in all linears."""
        linear = sum((g.features + width) for g in self.stack.groups for width in g.widths)
        return 2 * (experts * self.r + self.shared_rank) * linear * self.stack.blocks


class Adapters(Banks):
    """Router and banks for a stack, random; `run` is a decoding step with them, routing included."""

    def __init__(self, stack, *, routing="model", copies=None, **mixture):
        super().__init__(stack, **mixture)
        self.decisions = stack.blocks if routing == "layer" else 1
        tokens, num_experts, top_k = len(stack.x), self.num_experts, self.top_k
        self.router = (
            torch.randn(self.decisions * num_experts, stack.hidden, device=stack.device) * 2 / stack.hidden**0.5
        )
        self.experts = torch.empty(self.decisions, tokens, top_k, dtype=torch.int32, device=stack.device)
        self.weights = torch.empty(self.decisions, tokens, top_k, device=stack.device)
        self.logits = torch.empty(tokens, self.decisions * num_experts, device=stack.device)
        active = top_k * self.r + self.shared_rank
        copies = copies or copies_of_h(active)
        sizes = [copies * tokens * len(g.widths) * active for g in stack.groups] * stack.blocks
        self.all_h = torch.empty(sum(sizes), device=stack.device, dtype=torch.int32)
        self.h = [h.view(copies, tokens, -1, active) for h in self.all_h.split(sizes)]

    def chosen(self, block):
        decision = block if self.decisions > 1 else 0
        return Chosen(
            self.experts[decision], self.weights[decision], self.num_experts, self.r, self.shared_rank, shared_scale=1.0
        )

    @property
    def num_bytes(self):
        """Bytes of the chosen experts, which one token must read beside the weights. (The router's, far fewer, are not counted.)"""
        return self.bytes_of(self.top_k)

    def run(self, pdl=True, grouped=True):
        """A step: routing, plan and all linears. grouped=False: a launch for every linear, as HuggingFace's modules call them."""
        stack = self.stack
        self.all_h.fill_(EMPTY.value)
        route(
            stack.x,
            self.router,
            self.experts,
            self.weights,
            num_experts=self.num_experts,
            scale=2.0,
            logits=self.logits,
            pdl=pdl,
        )
        first = True
        for step, (block, index, group, x, y) in enumerate(stack.steps()):
            h = self.h[step]
            parts = [(stack.linears(block, index), self.a[block][index], self.b[block][index], h, y)]
            if not grouped:
                parts = list(
                    zip(
                        *(_apart(part) for part in parts[0][:3]),
                        (h_part.view(len(h), len(x), 1, -1) for h_part in h.flatten().chunk(len(group.widths))),
                        y.split(group.widths, 1),
                        strict=True,
                    )
                )
            for weights, a, b, h_part, out in parts:
                chosen = self.chosen(block)
                decode(x, weights, out, banks_a=a, banks_b=b, chosen=chosen, h=h_part, after_plan=first, pdl=pdl)
                first = False

    def error(self):
        """Largest relative RMS error of a group's output against float64 on the very inputs that the kernels had."""
        errors = []
        for block, index, _, x, y in self.stack.steps():
            matrices = (self.stack.linears(block, index), self.a[block][index], self.b[block][index])
            double = [[m.double() for m in ms] for ms in matrices]
            errors.append(relative_error(y, decode_ref(x.double(), *double, self.chosen(block))))
        return worst(errors)


def _apart(matrices):
    return [[each] for each in matrices]


class Batch(Banks):
    """Banks for a stack of many tokens that choose different experts; each form is a step with the plan's layout included."""

    def __init__(self, stack, **mixture):
        super().__init__(stack, **mixture)
        tokens = len(stack.x)
        self.experts = torch.rand(tokens, self.num_experts, device=stack.device).argsort(-1)[:, : self.top_k].int()
        self.weights = torch.rand(tokens, self.top_k, device=stack.device)

    def forms(self):
        """Name -> a function that runs the step."""
        found = {"tiles": self.run_tiles, "tiles_first": self.run_tiles_first, "dense": self.run_dense}
        found |= {"gated": self.run_gated, "appended": self.run_appended}
        found |= {"matmul": self.run_matmul} if len(self.experts) >= FEWEST_OF_A_MATMUL else {}
        return found | ({"crowd": self.run_crowd} if len(self.experts) <= MOST_OF_A_CROWD else {})

    def ratio_of_bytes(self):
        """Base and the experts that the batch reaches, over the base."""
        return 1 + self.bytes_of(len(self.experts.unique())) / self.stack.num_bytes

    def ratio_of_flops(self):
        """Base and every token's own experts, over the base."""
        return 1 + self.bytes_of(self.top_k) / self.stack.num_bytes

    def tiles(self, **blocks):
        return lay_out(self.experts, self.weights, num_experts=self.num_experts, r=self.r, **blocks)

    def run_tiles(self, **blocks):
        """The vendor's matmul of the base; shrink and expand add to its output. blocks: of the layout."""
        tiles = self.tiles(**blocks)
        for block, index, group, x, y in self.stack.steps():
            torch.mm(x, self.stack.weights[block][index].T, out=y)
            add_delta_tiles(y.split(group.widths, dim=1), x, self.a[block][index], self.b[block][index], tiles)

    def run_tiles_first(self, **blocks):
        """Shrink and expand write the output; the vendor's matmul adds the base while it writes."""
        tiles = self.tiles(**blocks)
        for block, index, group, x, y in self.stack.steps():
            add_delta_tiles(
                y.split(group.widths, dim=1), x, self.a[block][index], self.b[block][index], tiles, add=False
            )
            y.addmm_(x, self.stack.weights[block][index].T)

    def run_matmul(self, **given):
        """Shrink, then base and expand in one kernel. given: keywords of `matmul_tiles`, or blocks of the layout."""
        tiles = self.tiles(**{name: given.pop(name) for name in ("block_t", "block_r") if name in given})
        for block, index, _, x, y in self.stack.steps():
            h = shrink_tiles(x, self.a[block][index], tiles)
            matmul_tiles(x, self.stack.linears(block, index), h, self.b[block][index], tiles, y, **given)

    def run_gated(self, **blocks):
        """The vendor's matmuls of the base and of all ranks, then one kernel that adds what each token chose. blocks: of the layout."""
        tiles = self.tiles(**blocks)
        for block, index, _, x, y in self.stack.steps():
            torch.mm(x, self.stack.weights[block][index].T, out=y)
            add_gated(y, x, self.a[block][index], self.b[block][index], tiles)

    def run_appended(self, **blocks):
        """The same with one matmul: the a lie behind the weights, in copies that are made at the first call."""
        tiles = self.tiles(**blocks)
        for block, index, _, x, y in self.stack.steps():
            weight, *a = self.appended[block][index]
            linear_gated(x, weight, a, self.b[block][index], tiles, out=y)

    @cached_property
    def appended(self):
        weights = self.stack.weights
        return [[append(weights[n][i], a) for i, a in enumerate(row)] for n, row in enumerate(self.a)]

    def run_dense(self):
        """The reference: two matmuls over all ranks, masked between them."""
        mask = self.mask().bfloat16()
        for block, index, group, x, y in self.stack.steps():
            torch.mm(x, self.stack.weights[block][index].T, out=y)
            banks = zip(self.a[block][index], self.b[block][index], strict=True)
            for part, (a, b) in zip(y.split(group.widths, dim=1), banks, strict=True):
                part.addmm_((x @ a.T) * mask, b)

    def run_crowd(self, pdl=True, **given):
        """One launch a group, base included. given: fields of the kernel's Cut."""
        stack, tokens, ranks = self.stack, len(self.experts), len(self.a[0][0][0])
        cuts = [cut_for(tokens, g.features, g.widths, ranks, **given) for g in stack.groups]
        counts = [cut.num_flags(tokens, len(g.widths), ranks) for cut, g in zip(cuts, stack.groups, strict=True)]
        flags = torch.zeros(sum(counts) * stack.blocks, dtype=torch.int32, device=stack.device).split(
            counts * stack.blocks
        )
        partial = [torch.empty(cut.partial_shape, device=stack.device) for cut in cuts]
        hs = [
            torch.empty(cut.h_shape(tokens, len(g.widths), ranks), device=stack.device, dtype=torch.bfloat16)
            for cut, g in zip(cuts, stack.groups, strict=True)
        ]
        gates = torch.zeros(tokens, self.num_experts + 1, device=stack.device)
        gates.scatter_(1, self.experts.long(), self.weights)
        for step, (block, index, _, x, y) in enumerate(stack.steps()):
            scratch = {"h": hs[index], "partial": partial[index], "flags": flags[step], "cut": cuts[index]}
            banks = {"banks_a": self.a[block][index], "banks_b": self.b[block][index], "gates": gates, "r": self.r}
            crowd(x, stack.linears(block, index), y, **banks, **scratch, pdl=pdl)

    def mask(self):
        """[T, R] fp32: the weight of each rank, 0 where not chosen."""
        dense = torch.zeros(len(self.experts), self.num_experts, device=self.stack.device)
        return dense.scatter_(1, self.experts.long(), self.weights).repeat_interleave(self.r, dim=1)

    def error(self):
        """Largest relative RMS error of an output of the first or last block, against fp64 on the inputs that the kernels had."""
        errors, mask = [], self.mask().double()
        for block, index, group, x, y in self.stack.steps():
            if block in (0, self.stack.blocks - 1):
                for m, part in enumerate(y.split(group.widths, dim=1)):
                    w, a, b = self.stack.linears(block, index)[m], self.a[block][index][m], self.b[block][index][m]
                    exact = x.double() @ w.double().T + ((x.double() @ a.double().T) * mask) @ b.double()
                    errors.append(relative_error(part, exact))
        return worst(errors)
