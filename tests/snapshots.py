"""What a module tree looks like from outside, so that "left as it was" can be checked."""

from __future__ import annotations

import torch


def snapshot(model) -> dict[str, object]:
    """Everything observable of `model`, flat: for each module its identity, class, mode, hooks and attributes (by
    identity); for each parameter and buffer its identity, storage, values and whether it trains; the config.

    `nn.Module` keeps submodules, parameters and hooks in dicts of its own: those are listed entry by entry.
    """
    seen: dict[str, object] = {"config": model.config.to_dict(), "state_dict": list(model.state_dict())}
    for path, module in model.named_modules():
        seen[f"{path}: class"] = type(module)
        seen[f"{path}: module"] = id(module)
        seen[f"{path}: attributes"] = sorted(vars(module))
        for name, value in vars(module).items():
            entries = {f"{name}.{key}": id(each) for key, each in value.items()} if isinstance(value, dict) else {}
            seen[f"{path}: {name}"] = value if isinstance(value, bool | int | float | str) else id(value)
            seen.update({f"{path}: {key}": each for key, each in entries.items()})
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[f"{path}: tensor"] = (
            id(tensor),
            tensor.data_ptr(),
            tensor.requires_grad,
            tensor.dtype,
            tuple(tensor.shape),
        )
        seen[f"{path}: values"] = tensor.detach().clone()
    return seen


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What changed, one readable line each; empty: nothing did."""
    lines = [f"gone: {key}" for key in sorted(before.keys() - after.keys())]
    lines += [f"new: {key}" for key in sorted(after.keys() - before.keys())]
    for key in sorted(before.keys() & after.keys()):
        old, new = before[key], after[key]
        same = torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
        if not same:
            lines.append(f"changed: {key}" + ("" if isinstance(old, torch.Tensor) else f": {old} -> {new}"))
    return lines
