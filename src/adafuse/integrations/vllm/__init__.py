"""Dynamic adapters on vLLM, as a plugin: nothing of vLLM is changed. docs/serving.md says how to use it.

`llm_options` is for users. Importing this package imports neither vLLM nor torch.
"""

__all__ = ["llm_options"]


def __getattr__(name):
    if name == "llm_options":
        from adafuse.integrations.vllm.start import llm_options

        return llm_options
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
