"""A pre-gate whose router knows which token it decides for: a learned embedding of the id beside h0. An experiment of the study."""

from __future__ import annotations

import torch
from torch import nn

from adafuse import AdaFuseModel
from adafuse.router import INIT_STD, RMS_EPS, Router, Routing, choose, linear_fp32

WIDTH = 64  # of a token's embedding


class TokenModel(AdaFuseModel):
    """AdaFuseModel with a TokenRouter. Its forward needs input_ids by name. It trains and is scored; it is never saved or detached."""

    def __init__(self, base, config):
        super().__init__(base, config)
        base.register_forward_pre_hook(self.router.keep_ids, with_kwargs=True)

    @classmethod
    def _router_for(cls, base, config, num_blocks, device):
        sizes = base.config.get_text_config(decoder=True)
        decisions = num_blocks if config.routing == "layer" else 1
        return TokenRouter(
            sizes.vocab_size,
            sizes.hidden_size,
            config.num_experts,
            config.top_k,
            num_decisions=decisions,
            device=device,
        )


class TokenRouter(Router):
    """Logits = W [x ; e[id]] = W_x x + W_e e[id], with x = h0 / sqrt(mean(h0^2) + 1e-6); then softmax and top-k per decision.

    weight [D * E, H] is W_x, token_weight [D * E, 64] is W_e, embedding [V, 64] is e; all fp32. e starts at 0, so that this starts as the
    plain router; W_e does not, or neither of the two would ever get a gradient.
    """

    def __init__(self, vocabulary, hidden_size, num_experts, top_k, *, num_decisions, device=None):
        super().__init__(hidden_size, num_experts, top_k, num_decisions=num_decisions, device=device)
        self.embedding = nn.Parameter(torch.zeros(vocabulary, WIDTH, device=device))
        self.token_weight = nn.Parameter(torch.empty(len(self.weight), WIDTH, device=device))
        nn.init.normal_(self.token_weight, std=INIT_STD / WIDTH**0.5)
        self._ids = None

    def keep_ids(self, base, args, kwargs):
        """Before the base's forward: its input_ids [B, S] are those that `forward` decides for."""
        self._ids = kwargs["input_ids"]

    def forward(self, h0: torch.Tensor) -> Routing:
        """h0 [B, S, H], any float dtype -> Routing of the B * S tokens of the running forward's input_ids."""
        ids, self._ids = self._ids, None
        with torch.autocast(h0.device.type, enabled=False):
            x = h0.float()
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)
            # index_select: its gradient is an index_add, which asks nothing of the device.
            e = self.embedding.index_select(0, ids.flatten()).view(*ids.shape, WIDTH)
            logits = linear_fp32(x, self.weight) + linear_fp32(e, self.token_weight)
            return choose(logits.unflatten(-1, (self.num_decisions, self.num_experts)), self.top_k)

    def unread_bytes(self) -> int:
        """Of the fp32 parameters, those that one token leaves unread: the other tokens' embeddings."""
        return 4 * (self.embedding.numel() - WIDTH)
