"""Mixtures of LoRA experts with one routing decision per token, made before the token is processed.

The public names load on first use, so that `import adafuse` needs neither torch nor a GPU.
"""

from importlib import import_module

__version__ = "0.1.0.dev0"

_HOME = {
    "AdaFuseConfig": "adafuse.config",
    "AdaFuseModel": "adafuse.model",
    "Engine": "adafuse.engine",
    "Routing": "adafuse.router",
}

__all__ = ["AdaFuseConfig", "AdaFuseModel", "Engine", "Routing", "__version__"]


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'adafuse' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
