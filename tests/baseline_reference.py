"""The second implementation of the baselines: one token, one expert at a time, in plain Python. Slow and obvious, on purpose.

`layerwise`, `pesc` and `mixlora` compute what an adapted model must compute from three things: the untouched base, the config, and the
adapter tensors in exchange format. Adapter arithmetic is in fp64 and differentiable: give leaf tensors (`reference.leaves`).

    z = R x;  p = softmax(z);  chosen: the K largest, ties to the lower index;  g = p / sum(chosen p) if K > 1, else p

    layerwise, of each linear:  W x + bias + alpha / r * sum_k g_k B[e_k] (A[e_k] x)
    pesc, of each linear:       W x + bias + lora_alpha / lora_r * B (A x)
          of each FFN:          h + sum_k g_k m U[e_k] gelu(D[e_k] h),   h = FFN(x), R reads x
    mixlora, of each FFN:       sum_k g_k down_e(act(gate_e(x)) * up_e(x)),   linear_e(x) = W x + alpha / r * B_e (A_e x)
          of other linears:     W x + bias + alpha / r * B (A x)

Knows nothing of the library but the configs' field names.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch


@dataclass
class Run:
    """What one forward gave. routed: path of a router's linear or FFN -> for each token in order (chosen, weights, probabilities)."""

    kept: list[bool]
    output: object = None
    routed: dict[str, list] = field(default_factory=dict)

    @property
    def logits(self) -> torch.Tensor:
        return self.output.logits

    def aux_loss(self) -> torch.Tensor:
        """Mean over the routers of E * sum_e f_e P_e / K, over the tokens that are not padding."""
        losses = []
        for tokens in self.routed.values():
            real = [token for token, kept in zip(tokens, self.kept, strict=True) if kept]
            num_experts, top_k = len(real[0][2]), len(real[0][0])
            loss = 0.0
            for expert in range(num_experts):
                share = sum(expert in chosen for chosen, _, _ in real) / len(real)
                mean_probability = sum(probabilities[expert] for _, _, probabilities in real) / len(real)
                loss = loss + num_experts * share * mean_probability / top_k
            losses.append(loss)
        return sum(losses) / len(losses)


def layerwise(base, config, tensors, **inputs) -> Run:
    def install(model, run, t):
        for path in _paths(t, ".router.weight"):

            def hook(_, args, output, path=path):
                deltas = []
                for x, chosen, weights in _routed(run, path, args[0], t, config.top_k):
                    delta = 0.0
                    for expert, weight in zip(chosen, weights, strict=True):
                        b, a = t[f"{path}.experts_b"][expert], t[f"{path}.experts_a"][expert]
                        delta = delta + weight * (config.lora_alpha / config.r) * (b @ (a @ x))
                    deltas.append(delta)
                return _plus(output, deltas)

            model.get_submodule(path).register_forward_hook(hook)

    return _run(base, tensors, inputs, install)


def pesc(base, config, tensors, **inputs) -> Run:
    def install(model, run, t):
        _static_lora(model, t, config.lora_alpha / config.lora_r)
        for path in _paths(t, ".router.weight"):

            def hook(_, args, output, path=path):
                ffn_outputs, deltas = output.double().reshape(-1, output.shape[-1]), []
                for h, (_, chosen, weights) in zip(
                    ffn_outputs, _routed(run, path, args[0], t, config.top_k), strict=True
                ):
                    delta = 0.0
                    for expert, weight in zip(chosen, weights, strict=True):
                        up, down = t[f"{path}.experts_b"][expert], t[f"{path}.experts_a"][expert]
                        delta = delta + weight * config.adapter_scale * (up @ gelu(down @ h))
                    deltas.append(delta)
                return _plus(output, deltas)

            model.get_submodule(path).register_forward_hook(hook)

    return _run(base, tensors, inputs, install)


def mixlora(base, config, tensors, act=None, **inputs) -> Run:
    """act: the FFN's activation; SiLU if left out."""
    act = act or (lambda z: z * torch.sigmoid(z))

    def install(model, run, t):
        scale = config.lora_alpha / config.r
        _static_lora(model, t, scale)
        for path in _paths(t, ".router.weight"):

            def expert_linear(name, expert, x, path=path):
                weight = model.get_submodule(f"{path}.{name}").weight.double()
                a, b = t[f"{path}.{name}.experts_a"][expert], t[f"{path}.{name}.experts_b"][expert]
                return weight @ x + scale * (b @ (a @ x))

            def hook(_, args, output, path=path, linear=expert_linear):
                rows = []
                for x, chosen, weights in _routed(run, path, args[0], t, config.top_k):
                    y = 0.0
                    for expert, weight in zip(chosen, weights, strict=True):
                        z = act(linear("gate_proj", expert, x)) * linear("up_proj", expert, x)
                        y = y + weight * linear("down_proj", expert, z)
                    rows.append(y)
                return torch.stack(rows).view(output.shape).to(output.dtype)

            model.get_submodule(path).register_forward_hook(hook)

    return _run(base, tensors, inputs, install)


def route(x, weight, top_k):
    """chosen, weights and probabilities of one token."""
    z = weight @ x
    exponents = torch.exp(z - z.max())
    p = exponents / exponents.sum()
    chosen = sorted(range(len(p)), key=lambda expert: (-p[expert].item(), expert))[:top_k]
    kept = [p[expert] for expert in chosen]
    return chosen, [value / sum(kept) for value in kept] if top_k > 1 else kept, p


def gelu(z):
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def _run(base, tensors, inputs, install):
    model = copy.deepcopy(base).requires_grad_(False)
    mask = inputs.get("attention_mask")
    ids = inputs["input_ids"]
    run = Run(kept=[True] * ids.numel() if mask is None else [bool(each) for each in mask.reshape(-1)])
    install(model, run, {name: tensor.double() for name, tensor in tensors.items()})
    run.output = model(**inputs)
    return run


def _paths(tensors, ending):
    return [name.removesuffix(ending) for name in tensors if name.endswith(ending)]


def _routed(run, path, x, tensors, top_k):
    """(x, chosen, weights) of each token; what is routed is noted down."""
    run.routed[path] = []
    for token in x.double().reshape(-1, x.shape[-1]):
        chosen, weights, probabilities = route(token, tensors[f"{path}.router.weight"], top_k)
        run.routed[path].append((chosen, weights, probabilities))
        yield token, chosen, weights


def _plus(output, deltas):
    return (output.double() + torch.stack(deltas).view(output.shape)).to(output.dtype)


def _static_lora(model, tensors, scale):
    for path in _paths(tensors, ".shared_a"):

        def hook(_, args, output, path=path):
            a, b = tensors[f"{path}.shared_a"], tensors[f"{path}.shared_b"]
            tokens = args[0].double().reshape(-1, args[0].shape[-1])
            return _plus(output, [scale * (b @ (a @ x)) for x in tokens])

        model.get_submodule(path).register_forward_hook(hook)
