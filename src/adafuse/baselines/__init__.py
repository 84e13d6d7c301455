"""The methods that adafuse is compared with, behind the interface of AdaFuseModel.

Each is written from its paper's equations: see the config of a method for formula and source. The names load on first use.
"""

from importlib import import_module

_HOME = {
    "LayerwiseConfig": "adafuse.baselines.config",
    "PescConfig": "adafuse.baselines.config",
    "MixLoraConfig": "adafuse.baselines.config",
    "RandomConfig": "adafuse.baselines.config",
    "LayerwiseModel": "adafuse.baselines.layerwise",
    "PescModel": "adafuse.baselines.pesc",
    "MixLoraModel": "adafuse.baselines.mixlora",
    "RandomModel": "adafuse.baselines.random_routing",
    "static_lora": "adafuse.baselines.lora",
    "lora_config": "adafuse.baselines.lora",
    "account": "adafuse.baselines.accounting",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'adafuse.baselines' has no attribute {name!r}")


def __dir__():
    return __all__
