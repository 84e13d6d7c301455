"""The fingerprint of a base: what it must share with the base an adapter was made on. Also the tensors an adapter of it has."""

from __future__ import annotations

from adafuse.experts import ExpertBank


def fingerprint(base, linears) -> dict:
    """model_type, hidden size, number of blocks, and path -> [out, in] of the adapted linears.

    linears: objects with path, in_features and out_features. Nothing here changes when a base is quantised or renamed.
    """
    text = base.config.get_text_config(decoder=True)
    return {
        "model_type": base.config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "linears": {linear.path: [linear.out_features, linear.in_features] for linear in linears},
    }


def check_same_base(folder, description: dict, found: dict):
    """ValueError, naming the first difference, unless the adapter in `folder` was made on a base with fingerprint `found`."""
    saved = description.get("fingerprint")
    if saved == found:
        return
    if not isinstance(saved, dict) or not isinstance(saved.get("linears"), dict):
        raise ValueError(
            f"{folder}: its adapter_config.json has no fingerprint of the base; was it written by adafuse?"
        )
    where = next((key for key in found if key != "linears" and saved.get(key) != found[key]), None)
    if where is None:
        saved, found = saved["linears"], found["linears"]
        where = next(path for path in (*found, *saved) if saved.get(path) != found.get(path))
    raise ValueError(
        f"{folder} was made on another base: {where} is {saved.get(where, 'absent')} there and {found.get(where, 'absent')} in this "
        f"model (it names {description.get('base_model_name_or_path') or 'no base'})"
    )


def tensor_shapes(print_, config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the checkpoint of an adapter with settings `config` on a base with fingerprint `print_`."""
    decisions = print_["num_hidden_layers"] if config.routing == "layer" else 1
    hidden = print_["hidden_size"]
    shapes = {"router.weight": (decisions * config.num_experts, config.router_hidden or hidden)}
    if config.router_hidden:
        shapes["router.hidden.weight"] = (config.router_hidden, hidden)
    for path, (out_features, in_features) in print_["linears"].items():
        bank = ExpertBank.shapes(in_features, out_features, config)
        shapes |= {f"{path}.{name}": shape for name, shape in bank.items()}
    return shapes
