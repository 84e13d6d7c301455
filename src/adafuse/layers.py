"""AdapterLinear and the routed block: where base linear, bank and routing meet.

How a routing travels: block 0 routes (`PreGate`), before its own forward and outside any gradient checkpoint. Each block is then
called with its share as a keyword argument, so that a checkpoint keeps it with the call: a recompute in the backward pass uses
the routing of its own forward, however many forwards came after. Inside the block's forward, its linears read it.

A block's share is a rank mask (reference execution), a FusedBlock (fused), Merged (switch: the weights hold the experts), or None:
the adapter is off.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from adafuse.costs import Layer
from adafuse.execution import automatic, gradients_needed, resolve
from adafuse.ops.delta import add_delta
from adafuse.router import Routing
from adafuse.weights import as_layer

OUTSIDE = object()  # no forward is running
# Per thread, so that two may run one model (but under switch, which rewrites its weights). `_forward_shares`: of each block of the
# running forward, from block 0 to the last; `_block_share`: that of the running block.
_forward_shares: ContextVar = ContextVar("adafuse_forward_shares", default=OUTSIDE)
_block_share: ContextVar = ContextVar("adafuse_block_share", default=OUTSIDE)
_recorder: ContextVar = ContextVar("adafuse_recorder", default=None)


class StopAfterRouting(Exception):
    """Raised out of a forward whose caller wants no more than the routing."""


class Recorder:
    """What `recording` yields: h0 and Routing of the forward run inside it, None if none was routed."""

    def __init__(self, stop):
        self.stop, self.h0, self.routing = stop, None, None


@contextmanager
def recording(stop=False):
    """Keep h0 and the routing of the forward run inside; with `stop`, end that forward as soon as they are known."""
    recorder = Recorder(stop)
    token = _recorder.set(recorder)
    # Of its own: neither what an earlier forward left behind, nor that of one within which this one runs (in a hook, say).
    shares = _forward_shares.set(OUTSIDE)
    try:
        yield recorder
    except StopAfterRouting:
        if not stop:
            raise
    finally:
        _recorder.reset(token)
        _forward_shares.reset(shares)


def running_recorder() -> Recorder | None:
    """The recorder of the forward that is running, if someone records it."""
    return _recorder.get()


def running_share(path):
    """The share of the block that is running, for the module of its at `path`; None: adapters are off."""
    share = _block_share.get()
    if share is OUTSIDE:
        raise RuntimeError(f"{path} was called outside the forward of its block, so no routing is known for it")
    return share


def check_hidden(h0):
    """ValueError unless block 0 was given one hidden state a token."""
    if h0.dim() != 3:
        raise ValueError(
            f"block 0 was given hidden states of shape {list(h0.shape)}; routing needs [batch, seq, hidden]"
        )


class PreGate:
    """The one routing decision of a forward: h0 -> the share of every block. Owned by the model, shared by its blocks."""

    def __init__(self, router, linears, config, num_blocks):
        """linears: the AdapterLinears of all blocks."""
        self.router, self.linears, self.config, self.num_blocks = router, linears, config, num_blocks
        self.enabled = True
        self.execution = "auto"
        self.switcher = None  # of execution "switch": a Switcher
        self._layers = {}

    def shares(self, h0: torch.Tensor) -> list:
        """h0 [B, S, H] -> the share of each block."""
        recorder = running_recorder()
        if not self.enabled and recorder is None:
            return self._base_alone()
        check_hidden(h0)
        # A model spread over devices may have its embeddings on another one than its first block.
        routing = self.router(h0.to(self.router.device)) if self.enabled else None
        if recorder is not None:
            recorder.h0, recorder.routing = h0, routing
            if recorder.stop:
                raise StopAfterRouting
        if routing is None:
            return self._base_alone()
        return self._shares_of(routing, h0)

    def _shares_of(self, routing, h0):
        parameters = (
            p for module in (self.router, *(linear.bank for linear in self.linears)) for p in module.parameters()
        )
        how = self.how(*h0.shape[:2], compute_dtype(h0), gradients_needed(h0, parameters))
        if how == "switch":
            if self.config.lora_dropout and self.router.training:
                raise ValueError(
                    'execution="switch" has no dropout: call model.eval(), or set model.execution = "reference" to train'
                )
            self.switcher.switch(routing)
            return [self.switcher.share] * self.num_blocks
        if self.switcher is not None:
            self.switcher.restore()
        if how == "fused":
            from adafuse.fused import fused_blocks  # here, since it needs Triton

            return fused_blocks(routing, self.config, self.num_blocks)
        masks = self._rank_masks(routing, compute_dtype(h0))
        return masks * self.num_blocks if len(masks) == 1 else masks

    def how(self, batch, seq, dtype, needs_grad) -> str:
        """What a forward of batch x seq tokens does: "reference", "fused" or "switch"."""
        if self.execution == "auto":
            layers = self._layers.get((dtype, self.router.training)) or self.layers(dtype)
            return automatic(layers, self.config, batch * seq, dtype.itemsize, self.router.device, needs_grad)
        return resolve(self.execution, batch, seq, needs_grad)

    def layers(self, dtype) -> tuple[Layer, ...]:
        """The linears as `costs` know them, for activations of this dtype. Kept for the choices of forwards, which are not worth
        a look at every linear: a hook that is added later changes what is computed, not what is expected of it."""
        found = self._layers[dtype, self.router.training] = tuple(as_layer(linear, dtype) for linear in self.linears)
        return found

    def forget_layers(self):
        """The linears have moved to another device or dtype."""
        self._layers.clear()

    def _base_alone(self):
        if self.switcher is not None:
            self.switcher.restore()
        return [None] * self.num_blocks

    def _rank_masks(self, routing: Routing, dtype) -> list[torch.Tensor]:
        """One mask a decision, [B, S, E*r + S_shared]: scale * weight over the r ranks of each expert, then the shared expert's scale."""
        config = self.config
        weights = (routing.dense().movedim(-2, 0) * config.scale).to(dtype)
        masks = weights.repeat_interleave(config.r, dim=-1)
        if config.shared_rank:
            masks = torch.cat(
                [masks, masks.new_full((*masks.shape[:-1], config.shared_rank), config.shared_scale)], dim=-1
            )
        return list(masks.unbind(0))


class RoutedBlock:
    """Mixed in front of the class of a block: adds the routing to its call, and opens it to the linears inside its forward.

    `__call__` runs once, in the forward, outside gradient checkpointing (transformers checkpoints inside it); `forward` runs
    again in a recompute, with the keyword argument that the checkpoint kept.
    """

    def __call__(self, *args, **kwargs):
        _refuse_reentrant(self)
        gate, index = self._adafuse_gate, self._adafuse_index
        if index == 0:
            _forward_shares.set(gate.shares(args[0] if args else kwargs["hidden_states"]))
        shares = _forward_shares.get()
        if shares is OUTSIDE:
            raise RuntimeError(
                f"block {index} was called outside a forward of its model, so no routing is known for it. Checkpointing that wraps "
                "whole blocks from outside (torch's checkpoint_wrapper) does this; use model.gradient_checkpointing_enable() instead"
            )
        if index == gate.num_blocks - 1:
            _forward_shares.set(OUTSIDE)
        return super().__call__(*args, adafuse_share=shares[index], **kwargs)

    def forward(self, *args, adafuse_share, **kwargs):
        token = _block_share.set(adafuse_share)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _block_share.reset(token)


class AdapterLinear(nn.Module):
    """y = W x + bias + sum_k w_k * s * B[e_k] (A[e_k] dropout(x)) + the shared expert: a base linear beside its bank.

    x [..., I] -> [..., O], with the tokens of the running block in order (flattened or not).
    """

    def __init__(self, base_layer, bank, path, block, dropout=0.0):
        super().__init__()
        self.base_layer, self.bank = base_layer, bank
        self.path, self.block = path, block
        self.dropout = nn.Dropout(dropout)  # a module, because trainers that want no noise look for those
        self.train(base_layer.training)

    def forward(self, x, *args, **kwargs):
        share = running_share(self.path)
        if share is None:
            return self.base_layer(x, *args, **kwargs)
        masked = isinstance(share, torch.Tensor)
        self._check_tokens(x, share.shape[:-1].numel() if masked else share.tokens)
        dtype = compute_dtype(x)
        if not masked:
            return share.linear(self, x, dtype, args, kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.dropout.p:
            x = self.dropout(x)
        a, b = self.bank.matrices(dtype)
        return add_delta(y, x.to(dtype), a, b, rank_mask=share.to(x.device))

    def _check_tokens(self, x, routed):
        if routed != x.shape[:-1].numel():
            raise ValueError(
                f"{self.path} was given {x.shape[:-1].numel()} tokens while the routing is of {routed}: it does not "
                "process the block's own tokens (a cross-attention, an expert of a mixture, a linear over the cache?); leave it out "
                "of target_modules"
            )

    # What code of the base may read of its linear, as if it were still there.
    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return getattr(self.base_layer, "bias", None)

    @property
    def in_features(self):
        return self.bank.in_features

    @property
    def out_features(self):
        return self.bank.out_features


@contextmanager
def in_eval_mode(model):
    """Dropout off inside; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(module) -> torch.device:
    """Where a module computes: the device of its weights; for one that accelerate offloads (they are on "meta"), its hook's."""
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # a SequentialHook has several
    execution = next((h.execution_device for h in hooks if getattr(h, "execution_device", None) is not None), None)
    return torch.device(execution) if device.type == "meta" and execution is not None else device


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a matmul of x runs in: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _refuse_reentrant(block):
    if not (getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled()):
        return
    if getattr(block._gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False:
        raise ValueError(
            "reentrant gradient checkpointing would lose the gradient of the router; use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def check_blocks(blocks):
    """ValueError if something has replaced a block's own forward, which then would not hand the routing on."""
    for block in blocks:
        if "forward" in vars(block) and not hasattr(block, "_old_forward"):
            raise ValueError(
                f"the forward of a {type(block).__name__} was replaced on the object (a patch for speed?), so routing cannot reach its "
                "linears; attach the adapter to an unpatched model"
            )


def route_blocks(blocks, gate):
    """Give each block its place in `gate` and put RoutedBlock in front of its class."""
    # One class for all blocks of a class, so that torch.compile does not take each block for another kind of module. It keeps
    # the name: transformers and accelerate know blocks by it (_no_split_modules).
    routed = {cls: type(cls.__name__, (RoutedBlock, cls), {"__module__": cls.__module__}) for cls in map(type, blocks)}
    for index, block in enumerate(blocks):
        block._adafuse_gate, block._adafuse_index = gate, index
        _change_class(block, routed[type(block)])


def unroute_blocks(blocks):
    """Undo `route_blocks`."""
    for block in blocks:
        routed, mixin, original = type(block).__mro__[:3]
        assert mixin is RoutedBlock, f"the class of a block was changed after attaching: {routed}"
        _change_class(block, original)
        del block._adafuse_gate, block._adafuse_index


def _change_class(block, cls):
    block.__class__ = cls
    if hasattr(block, "_old_forward"):  # accelerate's hooks hold on to the forward of the class the block had
        block._old_forward = cls.forward.__get__(block)
