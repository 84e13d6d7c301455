"""Router: from a token's hidden state before block 0 (`h0`) to its experts and weights, for every block at once.

Also the balance loss, and the vocabulary table of models whose h0 depends on the token id alone. Knows nothing of experts or blocks.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import silu

RMS_EPS = 1e-6
INIT_STD = 0.5  # of the logits at the start, whatever the hidden size


@dataclass(frozen=True)
class Routing:
    """The decisions for some tokens: which experts, with which weights.

    experts [B, S, D, K] int64 and weights [B, S, D, K] float32, best first; D is 1 (one decision for all blocks) or the
    number of blocks. probabilities [B, S, D, E] float32 is the softmax they were chosen from.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    probabilities: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """[B, S, D, E] float32: an expert's weight where it was chosen, 0 elsewhere. Gradients reach the weights."""
        return torch.zeros_like(self.probabilities).scatter(-1, self.experts, self.weights)


class Router(nn.Module):
    """Logits = W x, or W silu(W_hidden x), with x = h0 / sqrt(mean(h0^2) + 1e-6); then softmax and top-k per decision.

    weight [D * E, H or router_hidden], decision-major; hidden.weight [router_hidden, H] if router_hidden > 0. Initialised
    normal with standard deviation 0.5 / sqrt(fan_in). All arithmetic is fp32, whatever the autocast and TF32 settings.
    """

    def __init__(self, hidden_size, num_experts, top_k, *, num_decisions=1, router_hidden=0, device=None):
        super().__init__()
        self.num_experts, self.top_k, self.num_decisions = num_experts, top_k, num_decisions
        fp32 = {"dtype": torch.float32, "device": device}
        self.hidden = nn.Linear(hidden_size, router_hidden, bias=False, **fp32) if router_hidden else None
        self.weight = nn.Parameter(torch.empty(num_decisions * num_experts, router_hidden or hidden_size, **fp32))
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        """Where tokens are routed."""
        return self.weight.device

    def reset_parameters(self):
        for weight in self.parameters():
            nn.init.normal_(weight, std=INIT_STD / weight.shape[1] ** 0.5)

    def forward(self, h0: torch.Tensor) -> Routing:
        """h0 [B, S, H], any float dtype -> Routing of B * S tokens."""
        with torch.autocast(h0.device.type, enabled=False):
            x = h0.float()
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)
            if self.hidden is not None:
                x = silu(linear_fp32(x, self.hidden.weight))
            logits = linear_fp32(x, self.weight)
            return choose(logits.unflatten(-1, (self.num_decisions, self.num_experts)), self.top_k)

    def table(self, model) -> Routing:
        """`table` of this module, for the model this router belongs to."""
        return table(model)


def choose(logits: torch.Tensor, top_k: int) -> Routing:
    """Softmax over the last axis, keep top_k; ties go to the lower index.

    logits [..., E] fp32. For top_k > 1 the kept weights are divided by their sum. For top_k = 1 the probability itself is the
    weight: divided by itself it would be 1 for ever, and the router would get no gradient.
    """
    probabilities = logits.softmax(-1)
    # A stable sort, not topk: topk does not say which of two equal values it takes.
    experts = probabilities.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    weights = probabilities.gather(-1, experts)
    if top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights, probabilities)


def balance_loss(routing: Routing, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over decisions of E * sum_e f_e * P_e / K: 1 when the load is even, up to E / K when it is not.

    f_e: share of tokens that chose expert e; P_e: mean probability of e. attention_mask [B, S'] with S' >= S (a KV cache
    makes it longer: its last S columns count), 0 at padding, which is left out of both. A mask of another shape (4-D, say) is
    refused: it does not tell which tokens are padding. Returns a scalar, fp32.
    """
    probabilities, experts = routing.probabilities, routing.experts
    real = _real_tokens(attention_mask, probabilities)
    chosen = torch.zeros_like(probabilities).scatter(-1, experts, 1.0)
    count = real.sum().clamp(min=1)
    share, mean_probability = (chosen * real).sum((0, 1)) / count, (probabilities * real).sum((0, 1)) / count
    return probabilities.shape[-1] * (share * mean_probability).sum(-1).mean() / experts.shape[-1]


def _real_tokens(attention_mask, probabilities):
    """[B, S, 1, 1] float: 1 for tokens, 0 for padding."""
    batch, seq = probabilities.shape[:2]
    if attention_mask is None:
        return probabilities.new_ones(batch, seq, 1, 1)
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < seq:
        raise ValueError(
            f"the balance loss needs to know which tokens are padding, and an attention_mask of shape "
            f"{list(attention_mask.shape)} does not tell: pass one of shape [{batch}, {seq}] (or none, if nothing is padded)"
        )
    # Not its values: packers number their documents in it.
    return (attention_mask[:, -seq:, None, None] != 0).to(probabilities)


@torch.no_grad()
def table(model, chunk: int = 4096) -> Routing:
    """The routing of every token id: experts and weights [V, D, K], exact for models whose h0 depends on the id alone.

    So are RoPE models, whose h0 is the embedding: one decision per token is then a function of the vocabulary, and can be
    looked up before the forward. Models that add positions to their embeddings (GPT-2, OPT) raise ValueError.
    """
    embeddings = model.get_base_model().get_input_embeddings()
    vocabulary, device = embeddings.weight.shape[0], embeddings.weight.device
    ids = torch.arange(vocabulary, device=device)
    _check_depends_on_id_alone(model, ids)
    parts = [model.route(part[:, None]) for part in ids.split(chunk)]
    return Routing(*(torch.cat([getattr(part, name)[:, 0] for part in parts]) for name in ("experts", "weights")))


def _check_depends_on_id_alone(model, ids):
    """Probe: some ids, alone and at several places of a sequence, must enter block 0 with the very same h0."""
    step = max(1, len(ids) // 16)
    probe = ids[::step][:16]
    alone = model.hidden_before_blocks(probe[:, None])[:, 0]
    for sequence in (probe, probe.flip(0)):
        inside = model.hidden_before_blocks(sequence[None])[0]
        if not torch.equal(inside, alone if sequence is probe else alone.flip(0)):
            family = model.get_base_model().config.model_type
            raise ValueError(
                f"the hidden state that enters the blocks of this {family} model depends on more than the token id (its position, "
                "say), so there is no table over the vocabulary; use model.route(input_ids)"
            )


def linear_fp32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T in full fp32, forward and backward, whatever the TF32 setting. Call it outside autocast. x fp32 [..., I], w [O, I]."""
    return _LinearFp32.apply(x, w.float())


class _LinearFp32(torch.autograd.Function):
    """x @ w.T in full fp32, forward and backward: neither TF32 nor autocast, which a plain matmul would follow."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        with _full_precision(x.device.type):
            return x @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False), _full_precision(x.device.type):
            grad_x = grad @ w if ctx.needs_input_grad[0] else None
            grad_w = grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w


@contextmanager
def _full_precision(device_type):
    """Matmuls in IEEE fp32 inside; the setting found is put back."""
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device_type)
    if backend is None or backend.matmul.fp32_precision == "ieee":
        yield
        return
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before
