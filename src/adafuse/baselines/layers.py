"""The linears of the baselines: a base linear beside its bank, as in `layers.AdapterLinear`, routed in their own ways."""

from __future__ import annotations

from adafuse.baselines.deltas import ADD
from adafuse.config import AdaFuseConfig
from adafuse.execution import gradients_needed
from adafuse.layers import AdapterLinear, compute_dtype, running_share
from adafuse.ops.delta import add_delta


class RoutedLinear(AdapterLinear):
    """y = W x + bias + scale * sum_k g_k B[e_k] (A[e_k] dropout(x)), with e and g of this linear's own router, which reads x.

    x [..., I] -> [..., O], with all tokens of the running forward in order.
    """

    def __init__(self, place, router, bank, *, dropout, scale):
        super().__init__(place.module, bank, place.path, place.block, dropout)
        self.router, self.scale = router.train(place.module.training), scale
        # What the kernels need to know of this one linear.
        sizes = {"r": bank.r, "num_experts": bank.num_experts, "top_k": router.top_k}
        self._kernel_config = AdaFuseConfig(lora_alpha=scale * bank.r, **sizes)

    def forward(self, x, *args, **kwargs):
        share = running_share(self.path)
        if share is None:
            return self.base_layer(x, *args, **kwargs)
        self._check_tokens(x, share.tokens)
        routing = self.router(x)
        share.record(self.path, routing)
        dtype = compute_dtype(x)
        if share.execution == "fused":
            return self._fused(x, share.routing_of(routing), dtype, args, kwargs)
        y = self.base_layer(x, *args, **kwargs)
        x = self.dropout(x) if self.dropout.p else x
        a, b = self.bank.matrices(dtype)
        how = {"num_experts": self.bank.num_experts, "scale": self.scale}
        return ADD[share.execution](y, x.to(dtype), a, b, routing, **how)

    def _fused(self, x, routing, dtype, args, kwargs):
        if gradients_needed(x, (*self.bank.parameters(), *self.router.parameters())):
            raise ValueError(
                'execution="fused" has no gradients, and this forward needs them; set model.execution = "graph" to train, or run under '
                "torch.no_grad()"
            )
        from adafuse.fused import fused_blocks  # here, since it needs Triton

        return fused_blocks(routing, self._kernel_config, 1)[0].linear(self, x, dtype, args, kwargs)


class StaticLinear(AdapterLinear):
    """y = W x + bias + scale * B (A dropout(x)): the LoRA that a mixture has beside its experts, as its bank's shared expert."""

    def __init__(self, place, bank, *, dropout, scale):
        super().__init__(place.module, bank, place.path, place.block, dropout)
        self.scale = scale

    def forward(self, x, *args, **kwargs):
        share = running_share(self.path)
        y = self.base_layer(x, *args, **kwargs)
        if share is None:
            return y
        dtype = compute_dtype(x)
        x = self.dropout(x) if self.dropout.p else x
        a, b = self.bank.matrices(dtype)
        scale = x.new_full((1,), self.scale, dtype=dtype).expand(*x.shape[:-1], len(a))
        return add_delta(y, x.to(dtype), a, b, rank_mask=scale)
