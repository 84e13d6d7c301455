"""plugin: what vLLM calls in each of its processes, by the entry point in the group `vllm.general_plugins`."""

from __future__ import annotations

from adafuse.integrations.vllm.names import ARCHITECTURES, PREFIX


def register():
    """Tell vLLM's registry where the adapted classes are. Loads none of them; may be called again."""
    from vllm.model_executor.models.registry import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for architecture in ARCHITECTURES:
        name = PREFIX + architecture
        if architecture in known and name not in known:
            ModelRegistry.register_model(name, f"adafuse.integrations.vllm.models:{name}")
