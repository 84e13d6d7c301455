"""The second implementation: one token, one expert at a time, in plain Python. Slow and obvious, on purpose.

`run` computes what an adapted model must compute from three things: the untouched base model, the config, and the
adapter tensors in the exchange format (`router.weight`, `<path>.experts_a`, ...). Adapter arithmetic is in fp64 and
differentiable: give leaf tensors that require gradients and call `backward` on anything in the result.

    x = h0 / sqrt(mean(h0^2) + 1e-6)                     h0: the hidden state entering block 0
    z = weight x     or    weight silu(hidden x)         D decisions of E logits
    p = softmax(z); chosen: the K largest, ties to the lower index
    w = p / sum(chosen p) if K > 1, else p
    y += alpha / r * sum_k w_k B[e_k] (A[e_k] x) + shared_alpha / shared_rank * B_shared (A_shared x)

Knows nothing of the library but the config's field names.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch


@dataclass
class Run:
    """What one forward pass gave. Nested lists are indexed [batch][position][decision].

    output: the base's own output, adapted logits inside. chosen: lists of K experts, best first. weights: theirs.
    probabilities: fp64 tensors [E], the softmax before any are dropped. kept: whether a position is a real token.
    """

    output: object
    chosen: list[list[list[list[int]]]]
    weights: list[list[list[list[torch.Tensor]]]]
    probabilities: list[list[list[torch.Tensor]]]
    kept: list[list[bool]]

    @property
    def logits(self) -> torch.Tensor:
        return self.output.logits

    def experts_tensor(self) -> torch.Tensor:
        """int64 [B, S, D, K]."""
        return torch.tensor(self.chosen)

    def weights_tensor(self) -> torch.Tensor:
        """fp64 [B, S, D, K]."""
        rows = [[[torch.stack(decision) for decision in token] for token in row] for row in self.weights]
        return torch.stack([torch.stack([torch.stack(token) for token in row]) for row in rows])

    def aux_loss(self) -> torch.Tensor:
        """Mean over decisions of E * sum_e f_e P_e / K.

        f_e: share of the real tokens that chose expert e; P_e: its mean probability over the real tokens.
        """
        tokens = [
            (self.chosen[b][t], self.probabilities[b][t])
            for b, row in enumerate(self.kept)
            for t, real in enumerate(row)
            if real
        ]
        decisions = len(tokens[0][0])
        total = torch.zeros((), dtype=torch.float64)
        for d in range(decisions):
            num_experts, top_k = len(tokens[0][1][d]), len(tokens[0][0][d])
            for expert in range(num_experts):
                share = sum(expert in chosen[d] for chosen, _ in tokens) / len(tokens)
                mean_probability = sum(probabilities[d][expert] for _, probabilities in tokens) / len(tokens)
                total = total + num_experts * share * mean_probability / top_k
        return total / decisions


def run(base, blocks: str, config, tensors, **inputs) -> Run:
    """One forward pass of `base` with the adapter `tensors` applied by loops. `base` itself is left alone.

    blocks: module path of the list of blocks. inputs: as the base's forward takes them, with input_ids and perhaps
    attention_mask [B, S] (0: padding, left out of the auxiliary loss).
    """
    model = copy.deepcopy(base).requires_grad_(False)
    state = _State(config, {name: tensor.double() for name, tensor in tensors.items()}, inputs)
    first = model.get_submodule(blocks)[0]
    first.register_forward_pre_hook(state.route, with_kwargs=True)
    for path in sorted({name.rpartition(".")[0] for name in tensors if not name.startswith("router.")}):
        block = int(path.removeprefix(f"{blocks}.").split(".")[0])
        model.get_submodule(path).register_forward_hook(state.adapter(path, block if config.routing == "layer" else 0))
    output = model(**inputs)
    return Run(output, state.chosen, state.weights, state.probabilities, state.kept)


def leaves(tensors) -> dict[str, torch.Tensor]:
    """fp64 copies that require gradients."""
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


def route_token(h0, config, tensors):
    """Chosen, weights and probabilities of one token, each indexed [decision], from its hidden state h0 [H]."""
    x = h0.double() / torch.sqrt((h0.double() ** 2).mean() + 1e-6)
    if config.router_hidden:
        inner = tensors["router.hidden.weight"].double() @ x
        x = inner * torch.sigmoid(inner)
    rows = tensors["router.weight"].double() @ x
    chosen, weights, probabilities = [], [], []
    for start in range(0, len(rows), config.num_experts):
        logits = rows[start : start + config.num_experts]
        exponents = torch.exp(logits - logits.max())
        p = exponents / exponents.sum()
        order = sorted(range(config.num_experts), key=lambda expert, p=p: (-p[expert].item(), expert))[: config.top_k]
        kept = [p[expert] for expert in order]
        chosen.append(order)
        weights.append([weight / sum(kept) for weight in kept] if config.top_k > 1 else kept)
        probabilities.append(p)
    return chosen, weights, probabilities


def token_delta(x, chosen, weights, path, config, tensors):
    """What the adapter at `path` adds to its linear's output for one token: x [in] -> fp64 [out]."""
    a, b = tensors[f"{path}.experts_a"].double(), tensors[f"{path}.experts_b"].double()
    delta = torch.zeros(b.shape[1], dtype=torch.float64)
    for expert, weight in zip(chosen, weights, strict=True):
        delta = delta + weight * (config.lora_alpha / config.r) * (b[expert] @ (a[expert] @ x.double()))
    if config.shared_rank:
        shared_a, shared_b = tensors[f"{path}.shared_a"].double(), tensors[f"{path}.shared_b"].double()
        delta = delta + (config.shared_alpha / config.shared_rank) * (shared_b @ (shared_a @ x.double()))
    return delta


def language_model_loss(logits, labels) -> torch.Tensor:
    """Mean over positions with a label of -log softmax(logits of the position before)[label], in fp64."""
    losses = [
        -torch.log_softmax(logits[b, t - 1].double(), dim=-1)[labels[b, t]]
        for b in range(labels.shape[0])
        for t in range(1, labels.shape[1])
        if labels[b, t] != -100
    ]
    return sum(losses) / len(losses)


class _State:
    """What the hooks of one forward pass share: the routing made at block 0."""

    def __init__(self, config, tensors, inputs):
        self.config, self.tensors, self.mask = config, tensors, inputs.get("attention_mask")
        self.chosen, self.weights, self.probabilities, self.kept = [], [], [], []

    def route(self, _block, args, kwargs):
        h0 = args[0] if args else kwargs["hidden_states"]
        for b in range(h0.shape[0]):
            decided = [route_token(h0[b, t], self.config, self.tensors) for t in range(h0.shape[1])]
            self.chosen.append([each[0] for each in decided])
            self.weights.append([each[1] for each in decided])
            self.probabilities.append([each[2] for each in decided])
            self.kept.append([self.mask is None or bool(self.mask[b, t]) for t in range(h0.shape[1])])

    def adapter(self, path, decision):
        """A forward hook that adds the adapter's output to that of the linear at `path`."""

        def hook(_linear, args, output):
            # Some families flatten [B, S, in] to [B * S, in] first; the order of the tokens is the same.
            tokens = args[0].reshape(-1, args[0].shape[-1])
            chosen = [token for row in self.chosen for token in row]
            weights = [token for row in self.weights for token in row]
            assert len(tokens) == len(chosen), f"{path}: {len(tokens)} tokens, but {len(chosen)} were routed"
            deltas = [
                token_delta(x, chosen[t][decision], weights[t][decision], path, self.config, self.tensors)
                for t, x in enumerate(tokens)
            ]
            return (output.double() + torch.stack(deltas).view(output.shape)).to(output.dtype)

        return hook


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |got - wanted| / max |wanted|; infinite where `got` is not finite."""
    error = (got.double() - wanted.double()).abs().max().item()
    return math.inf if math.isnan(error) else error / max(wanted.double().abs().max().item(), 1e-30)


def relative_rms(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """rms(got - wanted) / rms(wanted)."""
    return ((got.double() - wanted.double()).square().mean() / wanted.double().square().mean()).sqrt().item()
