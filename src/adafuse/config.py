"""AdaFuseConfig: every setting of an adapter, its default, its check, and its JSON form. Knows nothing of torch.

`Settings` is the JSON form alone, for any method's config.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

FORMAT_VERSION = 1
ROUTINGS = ("model", "layer")
ALL_LINEAR = "all-linear"


class Settings:
    """JSON in and out of a config: a frozen dataclass whose fields are resolved when it is made.

    method: the name under which a checkpoint says which method its settings are of.
    """

    method: ClassVar[str]

    def to_dict(self) -> dict:
        """The settings as JSON types: resolved numbers, no nulls."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: dict):
        """The inverse of `to_dict`. Raises ValueError for a setting this version does not know, or one left out."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"unknown adapter setting(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if missing := sorted(known - set(settings)):
            raise ValueError(f"adapter setting(s) {', '.join(missing)} are missing from the checkpoint")
        if nulls := sorted(name for name, value in settings.items() if value is None):
            raise ValueError(f"adapter setting(s) {', '.join(nulls)} are null; a checkpoint holds resolved values")
        return cls(**settings)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    def _resolve(self, name, value):
        """Set a field of a frozen config, in __post_init__: None becomes a number there, so that no reader ever meets it."""
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class AdaFuseConfig(Settings):
    """Settings of one dynamic adapter: a mixture of `num_experts` LoRA experts on each adapted linear.

    r: rank of an expert. num_experts: E, experts per adapted linear. top_k: K, experts a token uses, 1 <= K <= E.
    lora_alpha: an expert's output is scaled by lora_alpha / r; None means 2 * r.
    lora_dropout: probability of zeroing an input of the adapters in training, 0 <= p < 1.
    shared_rank: rank S of an expert that every token uses, beside the routed ones; 0: none.
    shared_alpha: its scale is shared_alpha / shared_rank; None means 2 * shared_rank.
    target_modules: "all-linear" (every linear of the blocks, never the head) or a list of name suffixes, as in PEFT.
    routing: "model" (one decision per token for all blocks) or "layer" (a decision per token and block).
    router_hidden: width of the router's hidden layer; 0: the router is linear.
    aux_loss_coef: weight of the balance loss that training adds to the language-model loss, >= 0.

    Raises ValueError, naming the field, on a value outside its range.
    """

    method: ClassVar[str] = "adafuse"

    r: int = 16
    num_experts: int = 8
    top_k: int = 2
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    shared_rank: int = 0
    shared_alpha: float | None = None
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    routing: str = "model"
    router_hidden: int = 0
    aux_loss_coef: float = 0.01

    def __post_init__(self):
        for name, least in (("r", 1), ("num_experts", 1), ("top_k", 1), ("shared_rank", 0), ("router_hidden", 0)):
            check_int(name, getattr(self, name), least)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} is more than num_experts={self.num_experts}; allowed: 1 to num_experts"
            )
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing={self.routing!r} is unknown; allowed: {', '.join(map(repr, ROUTINGS))}")
        self._resolve("lora_alpha", number("lora_alpha", self.lora_alpha, 2.0 * self.r))
        self._resolve("shared_alpha", number("shared_alpha", self.shared_alpha, 2.0 * self.shared_rank))
        self._resolve("lora_dropout", probability("lora_dropout", self.lora_dropout))
        self._resolve("aux_loss_coef", coefficient("aux_loss_coef", self.aux_loss_coef))
        self._resolve("target_modules", targets(self.target_modules))

    @property
    def scale(self) -> float:
        """s = lora_alpha / r."""
        return self.lora_alpha / self.r

    @property
    def shared_scale(self) -> float:
        """s_shared = shared_alpha / shared_rank, 0 without a shared expert."""
        return self.shared_alpha / self.shared_rank if self.shared_rank else 0.0


def check_int(name, value, least):
    """ValueError unless the value is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not a whole number")
    if value < least:
        raise ValueError(f"{name}={value} is too small; allowed: {least} or more")


def number(name, value, default=None) -> float:
    """The value as a finite float, `default` for None. ValueError for anything else."""
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is not a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name}={str(value)[:20]} is not a finite number")
    return found


def probability(name, value) -> float:
    """The value as a float, 0 for None. ValueError unless 0 <= value < 1."""
    found = number(name, value, 0.0)
    if not 0.0 <= found < 1.0:
        raise ValueError(f"{name}={found} is not a probability below 1")
    return found


def coefficient(name, value) -> float:
    """The value as a float, 0 for None. ValueError if it is negative."""
    found = number(name, value, 0.0)
    if found < 0.0:
        raise ValueError(f"{name}={found} is negative; 0 turns the balance loss off")
    return found


def targets(value) -> str | tuple[str, ...]:
    """target_modules, checked: "all-linear", or the names sorted and without repeats."""
    if value == ALL_LINEAR:
        return ALL_LINEAR
    if isinstance(value, str):
        raise ValueError(
            f"target_modules={value!r} is neither 'all-linear' nor a list of names; did you mean [{value!r}]?"
        )
    try:
        names = tuple(value)
    except TypeError:
        names = ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"target_modules={value!r} must be 'all-linear' or a non-empty list of module name suffixes")
    return tuple(sorted(set(names)))
