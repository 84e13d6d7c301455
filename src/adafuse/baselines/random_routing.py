"""RandomModel: AdaFuse with a hash of the token's id in place of the router."""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import nn

from adafuse.baselines.config import RandomConfig
from adafuse.discover import find_targets
from adafuse.fingerprint import fingerprint, tensor_shapes
from adafuse.model import AdaFuseModel
from adafuse.router import Routing

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: spreads consecutive numbers
# input_ids of the base's forward that is running, per thread; None: it was given embeddings.
_running_ids: ContextVar = ContextVar("adafuse_random_ids", default=None)


class RandomModel(AdaFuseModel):
    """`base` with experts that a hash of the token's id chooses, for ever the same: see RandomConfig.

    All that AdaFuseModel does, it does: `execution`, `route`, one decision for all blocks or one a block. Its forward needs input_ids.
    """

    config_class = RandomConfig

    def __init__(self, base, config: RandomConfig | None = None):
        super().__init__(base, config)
        self._ids_hook = base.register_forward_pre_hook(_keep_ids, with_kwargs=True)

    @classmethod
    def _router_for(cls, base, config, num_blocks, device):
        return HashRouter(config, num_blocks if config.routing == "layer" else 1, device)

    @classmethod
    def _expected(cls, base, config):
        found = fingerprint(base, find_targets(base, config))
        shapes = tensor_shapes(found, config)
        del shapes["router.weight"]
        return found, shapes

    def set_trainable(self, part: str = "all"):
        """Choose what trains: "all" or "experts", which are the same here, or "none"."""
        if part == "router":
            raise ValueError(
                'set_trainable("router"): random routing has no router to train; allowed: "all", "experts", "none"'
            )
        super().set_trainable(part)

    def detach(self):
        self._ids_hook.remove()
        return super().detach()


def _keep_ids(base, args, kwargs):
    _running_ids.set(kwargs.get("input_ids", args[0] if args else None))


class HashRouter(nn.Module):
    """score[d, e] = mix(id * GOLDEN ^ key[d, e]): of a decision d, the K experts with the largest scores, each with the weight 1 / K.

    mix: a bijection of 32-bit integers in which each bit of the input moves each bit of the output (the finaliser of a hash).
    key [D, E]: from the config's seed. Integers throughout: the same experts on every device. Nothing here trains.
    """

    def __init__(self, config, num_decisions, device=None):
        super().__init__()
        self.num_experts, self.top_k, self.num_decisions = config.num_experts, config.top_k, num_decisions
        places = torch.arange(num_decisions * config.num_experts, device=device)
        keys = mix(mix(torch.full_like(places, config.seed)) + places).view(num_decisions, -1)
        self.register_buffer("keys", keys, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def forward(self, h0: torch.Tensor) -> Routing:
        """The routing of the running forward's input_ids [B, S]; of h0 [B, S, H] the shape alone is read."""
        ids = _running_ids.get()
        _running_ids.set(None)
        if ids is None or ids.shape != h0.shape[:2]:
            raise ValueError(
                "random routing hashes token ids, and this forward has none for its hidden states; pass input_ids, not inputs_embeds"
            )
        return self.of(ids.to(h0.device))

    def of(self, ids: torch.Tensor) -> Routing:
        """Routing of ids [B, S]."""
        scores = mix(ids[..., None, None] * GOLDEN ^ self.keys)
        experts = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        even = torch.ones(experts.shape, device=ids.device)
        everyone = torch.ones(scores.shape, device=ids.device) / self.num_experts
        return Routing(experts, even / self.top_k, everyone)

    def extra_repr(self):
        return f"num_experts={self.num_experts}, top_k={self.top_k}, num_decisions={self.num_decisions}"


def mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser "lowbias32" of the lower 32 bits of x (int64)."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)
