"""AdaFuseConfig: every setting of an adapter, its default, its check, and its JSON form. Knows nothing of torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields

FORMAT_VERSION = 1
ROUTINGS = ("model", "layer")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdaFuseConfig:
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
            _check_int(name, getattr(self, name), least)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} is more than num_experts={self.num_experts}; allowed: 1 to num_experts"
            )
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing={self.routing!r} is unknown; allowed: {', '.join(map(repr, ROUTINGS))}")
        # None is resolved here, so that no reader of a config ever meets it.
        object.__setattr__(self, "lora_alpha", _number("lora_alpha", self.lora_alpha, 2.0 * self.r))
        object.__setattr__(self, "shared_alpha", _number("shared_alpha", self.shared_alpha, 2.0 * self.shared_rank))
        object.__setattr__(self, "lora_dropout", _number("lora_dropout", self.lora_dropout, 0.0))
        object.__setattr__(self, "aux_loss_coef", _number("aux_loss_coef", self.aux_loss_coef, 0.0))
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout} is not a probability below 1")
        if self.aux_loss_coef < 0.0:
            raise ValueError(f"aux_loss_coef={self.aux_loss_coef} is negative; 0 turns the balance loss off")
        object.__setattr__(self, "target_modules", _targets(self.target_modules))

    @property
    def scale(self) -> float:
        """s = lora_alpha / r."""
        return self.lora_alpha / self.r

    @property
    def shared_scale(self) -> float:
        """s_shared = shared_alpha / shared_rank, 0 without a shared expert."""
        return self.shared_alpha / self.shared_rank if self.shared_rank else 0.0

    def to_dict(self) -> dict:
        """The settings as JSON types: resolved numbers, no nulls."""
        settings = asdict(self)
        if self.target_modules != ALL_LINEAR:
            settings["target_modules"] = list(self.target_modules)
        return settings

    @classmethod
    def from_dict(cls, settings: dict) -> AdaFuseConfig:
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


def _check_int(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not a whole number")
    if value < least:
        raise ValueError(f"{name}={value} is too small; allowed: {least} or more")


def _number(name, value, default):
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}={str(value)[:20]} is not a finite number")
    return number


def _targets(value):
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
