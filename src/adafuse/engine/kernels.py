"""kernels: the step of a token on the kernels of `adafuse.ops`, eight launches a block. Needs Triton; imported when it is used.

Where a linear has a bias, the kernel behind it adds it: the launch of the linears reads weights and experts only. What cannot run here
is refused (`check_kernels`), not computed in another way.
"""

from __future__ import annotations

import torch
from torch import nn

from adafuse.engine.backbone import Backbone, Block
from adafuse.engine.linears import Gate, Linear
from adafuse.engine.runs import Runs
from adafuse.ops.attend import MAX_GROUP, MAX_HEAD_DIM, Heads, Room, attend
from adafuse.ops.checks import MAX_FEATURES, MAX_TOKENS
from adafuse.ops.norm import MAX_HIDDEN, add_norm, embed_norm, swiglu
from adafuse.ops.pick import pick, room
from adafuse.ops.route import route

ADVICE = "pass Engine(..., kernels=False) to compute it in plain PyTorch"
_GROUPS = ("qkv", "o", "gate_up", "down")


class Step:
    """The step of as many tokens as the cache has rows, in buffers that are made once.

    cache [L, 2, T, kv_heads, length, head_dim], logits [T, V] and rotary as in `Runner`, of the model's dtype. gate: routes the tokens;
    None: the backbone alone. switcher: merges the one token's experts into the weights, which the linears then read alone.
    """

    def __init__(self, backbone: Backbone, gate: Gate | None, cache, rotary, logits, switcher=None):
        self.backbone, self.gate, self.switcher = backbone, gate, switcher
        self.cache, self.rotary, self.logits = cache, rotary, logits
        self.rows = cache.shape[2]
        self.plan = gate.plan(self.rows) if gate else None
        self.room = Room.make(cache[0], backbone.num_heads)
        self.pick_room = room(*logits.shape, logits.device)
        self._make_buffers(backbone.blocks[0])
        if gate is not None:
            self._make_router_room(gate.router)
        self._lay_out()

    def _make_buffers(self, block):
        def rows(features):
            return torch.zeros(self.rows, features, dtype=self.cache.dtype, device=self.cache.device)

        hidden = self.backbone.embeddings.weight.shape[1]
        self.residual, self.x, self.y = rows(hidden), rows(hidden), rows(hidden)
        widths = {name: sum(_width(linear) for linear in getattr(block, name)) for name in _GROUPS}
        self.qkv, self.gate_up = rows(widths["qkv"]), rows(widths["gate_up"])
        self.attended, self.inner = (rows(linear.base.in_features) for linear in (*block.o, *block.down))

    def _make_router_room(self, router):
        self.gates = self.plan.gates
        hidden = router.hidden
        self.router_logits = torch.zeros(self.rows, len(router.weight), device=self.cache.device)
        self.router_hidden = None
        if hidden is not None:
            self.router_hidden = torch.zeros(self.rows, len(hidden.weight), device=self.cache.device)

    def _lay_out(self):
        """The launches of every group of linears, and of the head."""
        unmerged = self.gate is not None and self.switcher is None
        blocks, itemsize = self.backbone.blocks, self.cache.element_size()
        parts = [self.plan.of_block(d) if unmerged else None for d in range(len(blocks))]
        groups = [(getattr(block, name), part) for block, part in zip(blocks, parts, strict=True) for name in _GROUPS]
        groups.append(([Linear(self.backbone.head, None)], None))
        self.runs = Runs(groups, self.rows, self.gate.config if unmerged else None, itemsize)
        of_groups = iter(self.runs.of_groups)
        self.blocks = [{name: next(of_groups) for name in _GROUPS} for _ in blocks]
        (self.head,) = next(of_groups)

    # --- the step --------------------------------------------------------------------------------------------------

    def run(self, tokens, positions, *, pdl: bool):
        """tokens [T] at positions [T] -> logits. No host sync: safe inside a CUDA graph. pdl: kernels start early, and wait."""
        blocks, backbone = self.backbone.blocks, self.backbone
        self.runs.clear()
        norm = blocks[0].attention_norm
        embed_norm(tokens, backbone.embeddings.weight, self.residual, norm.weight, self.x, eps=norm.variance_epsilon)
        if self.gate is not None:
            self._route(pdl and self.switcher is None)
        for index, block in enumerate(blocks):
            after = blocks[index + 1].attention_norm if index + 1 < len(blocks) else backbone.norm
            self._block(index, block, after, positions, pdl)
        self.head(self.x, self.logits, after_plan=False, pdl=pdl)

    def _route(self, pdl):
        router, plan = self.gate.router, self.plan
        hidden = router.hidden
        route(
            self.residual,
            router.weight,
            plan.experts,
            plan.weights,
            num_experts=router.num_experts,
            scale=plan.config.scale,
            logits=self.router_logits,
            hidden=None if hidden is None else hidden.weight,
            hidden_out=self.router_hidden,
            gates=self.gates,
            pdl=pdl,
        )
        self.gate.written = plan
        if self.switcher is not None:
            self._merge(plan)

    def _merge(self, plan):
        merge(self.switcher, plan)

    def _block(self, index, block: Block, after, positions, pdl):
        # What was launched last wrote the plan (or, switching, the weights): see the rules in docs/kernels.md.
        first = index == 0 and self.gate is not None
        merged = first and self.switcher is not None
        self._linears(index, "qkv", self.x, self.qkv, after_plan=first and not merged, pdl=pdl and not merged)
        self._attend(index, block, positions, pdl)
        self._linears(index, "o", self.attended, self.y, pdl=pdl)
        self._add_norm(block.o[0], block.mlp_norm, pdl)
        self._linears(index, "gate_up", self.x, self.gate_up, pdl=pdl)
        self._activate(block, pdl)
        self._linears(index, "down", self.inner, self.y, pdl=pdl)
        self._add_norm(block.down[0], after, pdl)

    def _attend(self, index, block, positions, pdl):
        attend(
            self.qkv,
            self.cache[index],
            positions,
            self.rotary,
            self.attended,
            self.room,
            scaling=block.scaling,
            window=block.window,
            heads=_heads(block),
            pdl=pdl,
        )

    def _activate(self, block, pdl):
        gate, up = (linear.base.bias for linear in block.gate_up)
        swiglu(self.gate_up, self.inner, gate_bias=gate, up_bias=up, pdl=pdl)

    def _add_norm(self, linear, norm, pdl):
        eps = norm.variance_epsilon
        add_norm(self.y, self.residual, norm.weight, self.x, eps=eps, bias=linear.base.bias, pdl=pdl)

    def _linears(self, index, name, x, out, *, after_plan=False, pdl):
        for run in self.blocks[index][name]:
            run(x, out, after_plan=after_plan, pdl=pdl)
            after_plan = False

    def pick(self, picked, tokens, **moves):
        """The likeliest tokens of the logits; moves: `positions`, `advance`, `last`, `pdl` of `ops.pick`."""
        pick(self.logits, picked, tokens, self.pick_room, **moves)


def merge(switcher, plan):
    """Switch the weights to the plan's one token, on top of a routing that they hold. No host sync."""
    experts, weights = plan.experts[:, 0], plan.weights[:, 0]
    with switcher.writing() as written:
        switcher.launch(written, experts, weights, old=switcher.old)
        for old, new in zip(switcher.old, (experts, weights), strict=True):
            old.copy_(new)


def begin_merging(switcher):
    """Weights that hold a routing, whatever it is, so that every step of a generation is the same: new minus old."""
    switcher.restore()
    experts, weights = switcher.old
    experts.copy_(torch.arange(experts.shape[1], dtype=experts.dtype, device=experts.device).expand_as(experts))
    weights.zero_()
    with switcher.writing() as written:
        switcher.launch(written, experts, weights)
        switcher.merged = True


def _width(linear):
    return linear.base.weight.shape[0]


def _heads(block) -> Heads:
    norms = (block.q_norm, block.k_norm)
    if block.q_norm is None:
        return Heads(*(linear.base.bias for linear in block.qkv))
    biases, eps = (linear.base.bias for linear in block.qkv), block.q_norm.variance_epsilon
    return Heads(*biases, *(norm.weight for norm in norms), eps)


# --- what runs here ------------------------------------------------------------------------------------------------------


def check_kernels(backbone: Backbone, gate: Gate | None, max_batch: int):
    """ValueError for a model that the kernels do not compute as it is."""
    if max_batch > MAX_TOKENS:
        raise ValueError(f"max_batch={max_batch}: the kernels take up to {MAX_TOKENS} sequences; lower it, or {ADVICE}")
    group = backbone.num_heads // backbone.num_kv_heads
    if group > MAX_GROUP or backbone.head_dim > MAX_HEAD_DIM or group > backbone.head_dim:
        raise ValueError(
            f"{group} heads a key-value head, of {backbone.head_dim} features: the kernels take up to {MAX_GROUP} heads and "
            f"{MAX_HEAD_DIM} features; {ADVICE}"
        )
    hidden = backbone.embeddings.weight.shape[1]
    if hidden > MAX_HIDDEN:
        raise ValueError(f"hidden states of {hidden} features: the kernels take up to {MAX_HIDDEN}; {ADVICE}")
    if gate is not None and not gate.config.scale:
        raise ValueError(f"lora_alpha=0 switches the experts off; {ADVICE}")
    for index, block in enumerate(backbone.blocks):
        for name in _GROUPS:
            _check_group(f"block {index}, {name}", getattr(block, name), backbone.dtype)
    _check_linear("the head", backbone.head, backbone.dtype)
    if backbone.head.bias is not None:
        raise ValueError(f"the head has a bias, which the kernels do not add; {ADVICE}")


def _check_group(name, group, dtype):
    for linear in group:
        _check_linear(name, linear.base, dtype)
    if len({linear.base.bias is None for linear in group}) > 1:
        raise ValueError(f"{name}: some of the linears have a bias and some have none; {ADVICE}")


def _check_linear(name, base, dtype):
    if type(base) is not nn.Linear:
        raise ValueError(
            f"{name}: a {type(base).__name__} is no plain nn.Linear, whose weights the kernels read; {ADVICE}"
        )
    if base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base):
        raise ValueError(f"{name}: the linear has hooks, which the kernels would not run; {ADVICE}")
    weight = base.weight
    if weight.dtype != dtype or not weight.is_contiguous():
        raise ValueError(
            f"{name}: its weight is {weight.dtype} with strides {weight.stride()}, the model {dtype}; {ADVICE}"
        )
    if weight.shape[1] > MAX_FEATURES:
        raise ValueError(f"{name}: {weight.shape[1]} features in; the kernels take up to {MAX_FEATURES}; {ADVICE}")
