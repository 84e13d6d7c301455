"""Dynamic adapters on vLLM, as a plugin: nothing of vLLM is changed. docs/serving.md says how to use it.

Importing this imports neither vLLM nor torch.
"""
