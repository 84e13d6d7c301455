"""The linears of all blocks of a model, one after another, as one token (or a batch) meets them in decoding.

Every group's input is made from the output of the group before it, so that no kernel can run ahead of its data. Weights are random
and together far larger than the L2 cache. What a model has between the linears (norms, attention) is left out.
"""

import math
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import islice

import torch
from shapes import SHAPES, groups

from adafuse import AdaFuseConfig, fused
from adafuse.costs import FEW_TOKENS, Device, Layer, fused_form
from adafuse.ops.appended import append
from adafuse.ops.batch import add_delta_tiles, shrink_tiles
from adafuse.ops.beside import expand, shrink
from adafuse.ops.chosen import Chosen
from adafuse.ops.crowd import crowd, cut_for
from adafuse.ops.decode import decode, decode_ref
from adafuse.ops.gated import add_gated, linear_gated
from adafuse.ops.layout import dense_gates, lay_out
from adafuse.ops.matmul import matmul_tiles
from adafuse.ops.pair import Tile, h_shape, pair
from adafuse.ops.ranks import EMPTY, copies_of_h
from adafuse.ops.route import route
from adafuse.plan import Plan
from adafuse.router import Router, Routing

MOST_OF_A_CROWD = 256  # tokens
FEWEST_OF_A_MATMUL = 256


class Stack:
    """Weights and activations of the base. `weights[block][group]` [sum of widths, features], bf16.

    ranks: of one of so many tensor-parallel ranks. among: an ordinary kernel ahead of each group, as in an engine whose norms and attention
    know nothing of early launch.
    """

    def __init__(self, model, tokens=1, device="cuda", *, ranks=1, among=False):
        self.model, self.groups, self.device, self.among = model, groups(model, ranks), device, among
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

    def steps(self, only=None):
        """(block, index of the group, group, x, y) in the order of the forward; only: of the group with this index."""
        x = self.x
        for block in range(self.blocks):
            for index, group in enumerate(self.groups):
                y, x = self.outputs[block][index], x[:, : group.features]
                if only in (None, index):
                    yield block, index, group, x * 1.0 if self.among else x, y
                x = y

    def linears(self, block, index):
        return self.weights[block][index].split(self.groups[index].widths)

    def run_cublas(self, only=None):
        """only: the index of the group that is computed, from what its inputs hold; None: all."""
        for block, index, _, x, y in self.steps(only):
            torch.mm(x, self.weights[block][index].T, out=y)

    def poison(self):
        """What is no number into all outputs: a part that a kernel does not write shows in all that follow."""
        for _, _, _, _, y in self.steps():
            y.fill_(math.nan)

    def run_backbone(self, pdl=True):
        for block, index, _, x, y in self.steps():
            decode(x, self.linears(block, index), y, pdl=pdl)

    def error(self, every=1):
        """Largest relative RMS error of every so manyth group's output as the base alone, against float64 on the inputs that it had."""
        return worst(
            relative_error(y, decode_ref(x.double(), [w.double() for w in self.linears(block, index)]))
            for block, index, _, x, y in islice(self.steps(), 0, None, every)
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

        # The a of a group lie in one matrix, as in vLLM.
        self.a = matrices(
            lambda g: random(ranks * len(g.widths), g.features, g.features**-0.5).split([ranks] * len(g.widths))
        )
        self.b = matrices(lambda g: [random(ranks, width, 0.02) for width in g.widths])

    def bytes_of(self, experts):
        """Bytes of so many experts, and of the shared one, in all linears."""
        linear = sum((g.features + width) for g in self.stack.groups for width in g.widths)
        return 2 * (experts * self.r + self.shared_rank) * linear * self.stack.blocks

    def config(self, scale) -> AdaFuseConfig:
        """What the library chooses forms by, and what scales the weights of its plan."""
        numbers = {"num_experts": self.num_experts, "r": self.r, "top_k": self.top_k, "shared_rank": self.shared_rank}
        return AdaFuseConfig(**numbers, lora_alpha=scale * self.r)

    def choice(self, features, width, linears=1, appended=False) -> str:
        """The form that the library takes for linears which read one input; width: of all their outputs."""
        x = self.stack.x
        group = Layer(features, width, linears, appended=appended)
        return fused_form(group, self.config(1), len(x), x.element_size(), Device.of(x.device))

    def separately(self, plan) -> list:
        """The linears one by one, as `adafuse.fused` computes those of HuggingFace's modules: its launches, its fills and buffers, no
        programmatic dependent launch. Returns the outputs of each group."""
        stack, x, found = self.stack, self.stack.x, []
        for block in range(stack.blocks):
            part = plan.of_block(block)
            for index, group in enumerate(stack.groups):
                x = x[:, : group.features]
                matrices = zip(stack.linears(block, index), self.a[block][index], self.b[block][index], strict=True)
                ys = [fused.FORMS[self.choice(group.features, len(w))](x, w, a, b, part) for w, a, b in matrices]
                found.append(ys)
                x = ys[0]
        return found

    def collect(self, outputs):
        """Put what `separately` returned where `error` looks for it."""
        targets = [y for row in self.stack.outputs for y in row]
        for y, parts in zip(targets, outputs, strict=True):
            y.copy_(torch.cat(parts, dim=1))


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
        self.gate = self.separate = None

    def chosen(self, block):
        decision = block if self.decisions > 1 else 0
        return Chosen(
            self.experts[decision], self.weights[decision], self.num_experts, self.r, self.shared_rank, shared_scale=1.0
        )

    @property
    def num_bytes(self):
        """Bytes of the chosen experts, which one token must read beside the weights. (The router's, far fewer, are not counted.)"""
        return self.bytes_of(self.top_k)

    def run(self, pdl=True):
        """A step as the engine launches it: routing, plan and all linears, those of an input in one launch."""
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
        for h, (block, index, _, x, y) in zip(self.h, stack.steps(), strict=True):
            banks = {"banks_a": self.a[block][index], "banks_b": self.b[block][index], "chosen": self.chosen(block)}
            decode(x, stack.linears(block, index), y, **banks, h=h, after_plan=first, pdl=pdl)
            first = False

    def run_beside(self):
        """A step with the experts beside the vendor's matmul of the base, as for bases whose weights our kernels cannot read: routing and
        plan, then for each group the base, a shrink, and an expand a linear."""
        stack = self.stack
        given = {"num_experts": self.num_experts, "scale": 2.0, "logits": self.logits}
        route(stack.x, self.router, self.experts, self.weights, **given)
        for block, index, group, x, y in stack.steps():
            torch.mm(x, stack.weights[block][index].T, out=y)
            chosen, banks_b = self.chosen(block), self.b[block][index]
            h = torch.empty(len(x), len(banks_b), chosen.active, dtype=torch.int32, device=stack.device)
            shrink(x, self.a[block][index], chosen, h)
            for m, part in enumerate(y.split(group.widths, dim=1)):
                expand(h[:, m], banks_b[m], chosen, part)

    def run_as_huggingface(self):
        """A step as HuggingFace's modules launch it: the router in PyTorch, a plan of its own, then every linear for itself."""
        stack = self.stack
        if self.gate is None:
            self.gate = Router(
                stack.hidden, self.num_experts, self.top_k, num_decisions=self.decisions, device=stack.device
            )
            self.gate.weight.copy_(self.router)
        plan = Plan.of(self.gate(stack.x[None]), self.config(2))
        self.separate = plan, self.separately(plan)

    def collect_separate(self):
        """Put what the last run as HuggingFace's left where `error` looks for it."""
        plan, outputs = self.separate
        self.experts.copy_(plan.experts)
        self.weights.copy_(plan.weights)
        self.collect(outputs)

    def error(self, every=1):
        """Largest relative RMS error of every so manyth group's output against float64 on the very inputs that the kernels had."""
        errors = []
        for block, index, _, x, y in islice(self.stack.steps(), 0, None, every):
            matrices = (self.stack.linears(block, index), self.a[block][index], self.b[block][index])
            double = [[m.double() for m in ms] for ms in matrices]
            errors.append(relative_error(y, decode_ref(x.double(), *double, self.chosen(block))))
        return worst(errors)


class Batch(Banks):
    """Banks for a stack of many tokens that choose different experts; each form is a step with the plan's layout included."""

    def __init__(self, stack, **mixture):
        super().__init__(stack, **mixture)
        tokens = len(stack.x)
        self.experts = torch.rand(tokens, self.num_experts, device=stack.device).argsort(-1)[:, : self.top_k].int()
        self.weights = torch.rand(tokens, self.top_k, device=stack.device)

    def forms(self):
        """Name -> a function that runs the step with all groups in that form."""
        tokens = len(self.experts)
        names = ["tiles", "gated", "gated_apart", "dense"]
        names += ["matmul"] if tokens >= FEWEST_OF_A_MATMUL else []
        names += ["crowd"] if tokens <= MOST_OF_A_CROWD else []
        names += ["decode"] if tokens <= FEW_TOKENS else []
        return {name: partial(self.run, name) for name in names}

    def choices(self):
        """The form of each group that the library takes in vLLM, where the a lie behind the weights."""
        return [self.choice(g.features, sum(g.widths), len(g.widths), appended=True) for g in self.stack.groups]

    def ratio_of_bytes(self):
        """Base and the experts that the batch reaches, over the base."""
        return 1 + self.bytes_of(len(self.experts.unique())) / self.stack.num_bytes

    def ratio_of_flops(self):
        """Base and every token's own experts, over the base."""
        return 1 + self.bytes_of(self.top_k) / self.stack.num_bytes

    def tiles(self, **blocks):
        return lay_out(self.experts, self.weights, num_experts=self.num_experts, r=self.r, **blocks)

    def run(self, form=None, only=None, **given):
        """A step: all groups in one form, or each in its own (a list), by default in the one that the library takes. only: the index of the
        group that is computed; None: all. given: keywords of the form's kernel, blocks of the layout, or fields of `crowd`'s Cut. Early
        launch is the engine's, which runs few tokens."""
        stack, blocks = (
            self.stack,
            {name: given.pop(name) for name in ("block_t", "block_r") if name in given and form != "crowd"},
        )
        names = [form] * len(stack.groups) if isinstance(form, str) else form or self.choices()
        tiles = cache(lambda: self.tiles(**blocks))
        gates = cache(lambda: dense_gates(self.experts, self.weights, self.num_experts))
        launch = {name: getattr(self, f"_{name}")(tiles, gates, **given) for name in set(names)}
        for block, index, group, x, y in stack.steps(only):
            launch[names[index]](block * len(stack.groups) + index, block, index, group, x, y)

    # Each: what a step prepares, and the function that then computes a group.

    def _tiles(self, tiles, _):
        found = tiles()

        def launch(step, block, index, group, x, y):
            torch.mm(x, self.stack.weights[block][index].T, out=y)
            add_delta_tiles(y.split(group.widths, dim=1), x, self.a[block][index], self.b[block][index], found)

        return launch

    def _gated_apart(self, tiles, _):
        """As HuggingFace's modules have it: the a where they are."""
        found = tiles()

        def launch(step, block, index, group, x, y):
            torch.mm(x, self.stack.weights[block][index].T, out=y)
            add_gated(y, x, self.a[block][index], self.b[block][index], found)

        return launch

    def _gated(self, tiles, _, **given):
        """As in vLLM: the a behind the weights."""
        found = tiles()

        def launch(step, block, index, group, x, y):
            weight, *a = self.appended[block][index]
            linear_gated(x, weight, a, self.b[block][index], found, out=y, **given)

        return launch

    @cached_property
    def appended(self):
        """Copies of the weights with the a behind them."""
        weights = self.stack.weights
        return [[append(weights[n][i], a) for i, a in enumerate(row)] for n, row in enumerate(self.a)]

    def _matmul(self, tiles, _, **given):
        found = tiles()

        def launch(step, block, index, group, x, y):
            h = shrink_tiles(x, self.a[block][index], found)
            matmul_tiles(x, self.stack.linears(block, index), h, self.b[block][index], found, y, **given)

        return launch

    def _dense(self, *_):
        """In plain PyTorch: two matmuls over all ranks, masked between them."""
        mask = self.mask().bfloat16()

        def launch(step, block, index, group, x, y):
            torch.mm(x, self.stack.weights[block][index].T, out=y)
            banks = zip(self.a[block][index], self.b[block][index], strict=True)
            for part, (a, b) in zip(y.split(group.widths, dim=1), banks, strict=True):
                part.addmm_((x @ a.T) * mask, b)

        return launch

    def _decode(self, *_, pdl=True):
        stack, active, tokens = self.stack, self.top_k * self.r, len(self.experts)
        chosen = Chosen(self.experts, self.weights, self.num_experts, self.r, 0, shared_scale=1.0)
        shapes = [(copies_of_h(active), tokens, len(g.widths), active) for g in stack.groups] * stack.blocks
        sizes = [torch.Size(shape).numel() for shape in shapes]
        room = torch.full((sum(sizes),), EMPTY.value, dtype=torch.int32, device=stack.device).split(sizes)

        def launch(step, block, index, group, x, y):
            banks = {"banks_a": self.a[block][index], "banks_b": self.b[block][index], "chosen": chosen}
            h = room[step].view(shapes[step])
            decode(x, stack.linears(block, index), y, **banks, h=h, pdl=pdl, after_plan=step == 0)

        return launch

    def _crowd(self, _, gates, bare=False, **given):
        """bare: the base alone."""
        stack, tokens, ranks = self.stack, len(self.experts), 0 if bare else len(self.a[0][0][0])
        pdl = given.pop("pdl", tokens <= FEW_TOKENS)
        cuts = [cut_for(tokens, g.features, g.widths, ranks, **given) for g in stack.groups]
        counts = [cut.num_flags(tokens, len(g.widths), ranks) for cut, g in zip(cuts, stack.groups, strict=True)]
        flags = torch.zeros(sum(counts) * stack.blocks, dtype=torch.int32, device=stack.device).split(
            counts * stack.blocks
        )
        partials = [torch.empty(cut.partial_shape, device=stack.device) for cut in cuts]
        hs = [
            torch.empty(cut.h_shape(tokens, len(g.widths), ranks), device=stack.device, dtype=torch.bfloat16)
            for cut, g in zip(cuts, stack.groups, strict=True)
        ]
        found = None if bare else gates()

        def launch(step, block, index, group, x, y):
            scratch = {"h": hs[index], "partial": partials[index], "flags": flags[step], "cut": cuts[index]}
            banks = {"banks_a": self.a[block][index], "banks_b": self.b[block][index], "gates": found, "r": self.r}
            crowd(x, stack.linears(block, index), y, **({} if bare else banks), **scratch, pdl=pdl)

        return launch

    def _pair(self, _, gates, bare=False, pdl=True, **tile):
        """bare: the base alone. tile: fields of the second launch's."""
        stack, tokens = self.stack, len(self.experts)
        one = {"experts": self.experts} if tokens == 1 else {}
        ranks = self.top_k * self.r if one else len(self.a[0][0][0])
        hs = [stack.x.new_empty(h_shape(tokens, len(g.widths), ranks)) for g in stack.groups]
        found, tile = {} if bare else {"gates": gates(), "r": self.r, **one}, replace(Tile.default(tokens), **tile)

        def launch(step, block, index, group, x, y):
            banks = {"banks_a": self.a[block][index], "banks_b": self.b[block][index], "h": hs[index], **found}
            pair(x, stack.linears(block, index), y, **({} if bare else banks), pdl=pdl, tile=tile)

        return launch

    def run_as_huggingface(self):
        """A step with every linear for itself, as HuggingFace's modules launch it."""
        routing = Routing(self.experts.long()[None, :, None], self.weights[None, :, None])
        self.separate = self.separately(Plan.of(routing, self.config(1)))

    def collect_separate(self):
        """Put what the last run as HuggingFace's left where `error` looks for it."""
        self.collect(self.separate)

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
