"""ExpertBank: the stacked A and B of all experts of one adapted linear. Knows its layouts, bytes and FLOPs; not the routing."""

from __future__ import annotations

import torch
from torch import nn


class ExpertBank(nn.Module):
    """E experts of rank r and one shared expert of rank S (either may be 0), for a linear from I to O features.

    In training, `a` [E*r + S, I] and `b` [E*r + S, O], fp32: the rows of expert e are e*r .. e*r + r - 1, the shared expert's come
    last, so that the reference computes all of them in two matmuls. `tensors` and `load` speak the exchange layout of
    checkpoints: experts_a [E, r, I], experts_b [E, O, r], shared_a [S, I], shared_b [O, S].
    A starts Kaiming uniform as in PEFT (U(-1/sqrt(I), 1/sqrt(I))), B at zero: a fresh bank adds nothing.
    """

    def __init__(self, in_features, out_features, *, num_experts, r, shared_rank=0, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.num_experts, self.r, self.shared_rank = num_experts, r, shared_rank
        rank = num_experts * r + shared_rank
        self.a = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.empty(rank, out_features, dtype=torch.float32, device=device))
        self._pack = None
        self.reset_parameters()

    def reset_parameters(self):
        bound = self.in_features**-0.5
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)

    # --- exchange layout -----------------------------------------------------------------------------------------

    @staticmethod
    def shapes(in_features, out_features, config) -> dict[str, tuple[int, ...]]:
        """Name and shape of each exchange tensor of a bank with these features and the config's num_experts, r and shared_rank."""
        experts, r, shared = config.num_experts, config.r, config.shared_rank
        shapes = {}
        if experts:
            shapes = {"experts_a": (experts, r, in_features), "experts_b": (experts, out_features, r)}
        if shared:
            shapes |= {"shared_a": (shared, in_features), "shared_b": (out_features, shared)}
        return shapes

    def tensors(self, a=None, b=None) -> dict[str, torch.Tensor]:
        """The exchange tensors of this bank's parameters, or of tensors laid out like them (gradients, a gathered state)."""
        a, b = self.a.detach() if a is None else a, self.b.detach() if b is None else b
        routed = self.num_experts * self.r
        split = (self.num_experts, self.r)
        tensors = {}
        if self.num_experts:
            tensors = {
                "experts_a": a[:routed].unflatten(0, split),
                "experts_b": b[:routed].unflatten(0, split).transpose(1, 2),
            }
        if self.shared_rank:
            tensors |= {"shared_a": a[routed:], "shared_b": b[routed:].T}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]):
        """Write exchange tensors of the right names and shapes into the parameters, in place."""
        for name, target in self.tensors().items():
            target.copy_(tensors[name])

    # --- what the layers compute with ------------------------------------------------------------------------------

    def matrices(self, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b in `dtype`. In training a cast that gradients flow through; otherwise one kept until the weights change.

        A write through `.data` shows in nothing that could be checked: call `drop_pack` after one (train(), eval() and generate()
        of the model do).
        """
        if self.a.dtype == dtype:
            return self.a, self.b
        if torch.is_grad_enabled() and (self.a.requires_grad or self.b.requires_grad):
            self.drop_pack()
            return self.a.to(dtype), self.b.to(dtype)
        key = self._pack_key(dtype)
        if self._pack is None or self._pack[0] != key:
            # Outside inference_mode: its tensors could not take part in a later backward pass of the router.
            with torch.inference_mode(False), torch.no_grad():
                self._pack = (key, self.a.to(dtype), self.b.to(dtype))
        return self._pack[1:]

    def drop_pack(self):
        """Forget the copy for inference; the next forward without gradients makes it anew."""
        self._pack = None

    @torch.no_grad()
    def renew_pack(self, dtype):
        """Cast the weights anew for `matrices`, whoever changed them and however, into the same memory if there is such a copy."""
        if self.a.dtype == dtype:
            return
        pack, self._pack = self._pack, None
        if pack is not None and pack[0][0] == dtype and pack[1].device == self.a.device:
            for mine, weight in zip(pack[1:], (self.a, self.b), strict=True):
                mine.copy_(weight)
            self._pack = (self._pack_key(dtype), *pack[1:])
        self.matrices(dtype)

    def _pack_key(self, dtype):
        return (dtype, *((p.data_ptr(), p._version, p.device) for p in (self.a, self.b)))

    def num_bytes(self) -> int:
        """Bytes held: the trained parameters, and the copy packed for inference if there is one."""
        held = [self.a, self.b, *(self._pack[1:] if self._pack else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def flops(self, tokens: int) -> int:
        """FLOPs of the reference execution: 2 * tokens * R * (I + O), all experts computed, R = E*r + S."""
        return 2 * tokens * self.a.shape[0] * (self.in_features + self.out_features)

    def extra_repr(self):
        shared = f", shared_rank={self.shared_rank}" if self.shared_rank else ""
        return f"{self.in_features} -> {self.out_features}, num_experts={self.num_experts}, r={self.r}{shared}"
