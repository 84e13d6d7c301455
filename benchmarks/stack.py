"""The linears of all blocks of a model, one after another, as one token (or a batch) meets them in decoding.

Every group's input is made from the output of the group before it, so that no kernel can run ahead of its data. Weights are random
and together far larger than the L2 cache. What a model has between the linears (norms, attention) is left out.
"""

import torch
from shapes import SHAPES, groups

from adafuse.ops.chosen import Chosen
from adafuse.ops.decode import EMPTY, decode, decode_ref
from adafuse.ops.route import route


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
        return max(
            relative_error(y, decode_ref(x.double(), [w.double() for w in self.linears(block, index)]))
            for block, index, _, x, y in self.steps()
        )


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


class Adapters:
    """Router and banks for a stack, random; `run` is a decoding step with them, routing included."""

    def __init__(self, stack, *, num_experts, r, top_k, routing="model", shared_rank=0):
        self.stack, self.num_experts, self.r, self.top_k, self.shared_rank = stack, num_experts, r, top_k, shared_rank
        self.decisions = stack.blocks if routing == "layer" else 1
        tokens = len(stack.x)
        ranks = num_experts * r + shared_rank
        bf16 = {"device": stack.device, "dtype": torch.bfloat16}
        self.a = [
            [
                [torch.empty(ranks, g.features, **bf16).normal_(std=g.features**-0.5) for _ in g.widths]
                for g in stack.groups
            ]
            for _ in range(stack.blocks)
        ]
        self.b = [
            [[torch.empty(ranks, width, **bf16).normal_(std=0.02) for width in g.widths] for g in stack.groups]
            for _ in range(stack.blocks)
        ]
        self.router = (
            torch.randn(self.decisions * num_experts, stack.hidden, device=stack.device) * 2 / stack.hidden**0.5
        )
        self.experts = torch.empty(self.decisions, tokens, top_k, dtype=torch.int32, device=stack.device)
        self.weights = torch.empty(self.decisions, tokens, top_k, device=stack.device)
        self.logits = torch.empty(tokens, self.decisions * num_experts, device=stack.device)
        sizes = [tokens * len(g.widths) * (top_k * r + shared_rank) for g in stack.groups] * stack.blocks
        self.all_h = torch.empty(sum(sizes), device=stack.device, dtype=torch.int32)
        self.h = self.all_h.split(sizes)

    def chosen(self, block):
        decision = block if self.decisions > 1 else 0
        return Chosen(
            self.experts[decision], self.weights[decision], self.num_experts, self.r, self.shared_rank, shared_scale=1.0
        )

    @property
    def num_bytes(self):
        """Bytes of the chosen experts, which one token must read beside the weights. (The router's, far fewer, are not counted.)"""
        active = self.top_k * self.r + self.shared_rank
        linear = sum((g.features + width) for g in self.stack.groups for width in g.widths)
        return 2 * active * linear * self.stack.blocks

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
            h = self.h[step].view(len(x), len(group.widths), -1)
            parts = [(stack.linears(block, index), self.a[block][index], self.b[block][index], h, y)]
            if not grouped:
                parts = list(
                    zip(
                        *(_apart(part) for part in parts[0][:3]),
                        h.split(1, dim=1),
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
        worst = 0.0
        for block, index, _, x, y in self.stack.steps():
            matrices = (self.stack.linears(block, index), self.a[block][index], self.b[block][index])
            double = [[m.double() for m in ms] for ms in matrices]
            worst = max(worst, relative_error(y, decode_ref(x.double(), *double, self.chosen(block))))
        return worst


def _apart(matrices):
    return [[each] for each in matrices]
