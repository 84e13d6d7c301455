"""The settings of each baseline, with its formula and source. Knows nothing of torch.

x: the input of a linear for one token; E experts of which a token uses K; s = alpha / r; A_e [r, I], B_e [O, r]. Everywhere:

    p = softmax(R x) over all E, fp32;  chosen: the K largest p;  g = p / sum(chosen p)          (K = 1: g = p, as in AdaFuse)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adafuse.config import (
    ALL_LINEAR,
    AdaFuseConfig,
    Settings,
    check_int,
    coefficient,
    number,
    probability,
    targets,
)

FFN_LINEARS = ("gate_proj", "up_proj", "down_proj")
MAX_SEED = 2**32 - 1  # of random routing, whose hash is of 32 bits


@dataclass(frozen=True)
class LayerwiseConfig(Settings):
    """Layer-wise MoE-LoRA: every adapted linear has a router of its own, on its own input.

        y = W x + bias + s sum_k g_k B[e_k] (A[e_k] dropout(x))

    `LayerwiseConfig()`: the plain form, as many experts everywhere. `LayerwiseConfig.mola()`: MoLA (Gao et al., "Higher Layers Need
    More LoRA Experts", arXiv 2402.08562). `LayerwiseConfig.moral()`: MoRAL-style (Yang et al., arXiv 2402.11260, which published no code).

    r, lora_alpha (None: 2 r), lora_dropout, target_modules: as in AdaFuseConfig. num_experts: E, or one E for each part of the blocks: of N
    numbers, block b of L gets number b N // L (MoLA's quarters, where L is a multiple of N). top_k: K, at most the smallest E.
    aux_loss_coef: weight of the balance loss, the mean over all routers of E sum_e f_e P_e / K; off by default, as in MoLA, which has 1e-3
    where it is on.

    Raises ValueError, naming the field, on a value outside its range.
    """

    method: ClassVar[str] = "layerwise"

    r: int = 8
    num_experts: int | tuple[int, ...] = 8
    top_k: int = 2
    lora_alpha: float | None = None
    lora_dropout: float = 0.05
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    aux_loss_coef: float = 0.0

    @classmethod
    def mola(cls, num_experts=(2, 4, 6, 8), **changes) -> LayerwiseConfig:
        """MoLA: all linears, r 8, alpha 16, dropout 0.05, top-2; experts by quarter of the blocks 2-4-6-8 (or 5-5-5-5)."""
        return cls(num_experts=num_experts, **changes)

    @classmethod
    def moral(cls, **changes) -> LayerwiseConfig:
        """MoRAL-style: the linears of the FFN only, 8 experts, top-2."""
        return cls(**{"target_modules": FFN_LINEARS, **changes})

    def __post_init__(self):
        check_int("r", self.r, 1)
        if not isinstance(self.num_experts, int):
            self._resolve("num_experts", _counts(self.num_experts))
        counts = self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts,)
        for count in counts:
            check_int("num_experts", count, 1)
        _check_top_k(self.top_k, min(counts))
        self._resolve("lora_alpha", number("lora_alpha", self.lora_alpha, 2.0 * self.r))
        self._resolve("lora_dropout", probability("lora_dropout", self.lora_dropout))
        self._resolve("target_modules", targets(self.target_modules))
        self._resolve("aux_loss_coef", coefficient("aux_loss_coef", self.aux_loss_coef))

    @property
    def scale(self) -> float:
        """s = lora_alpha / r."""
        return self.lora_alpha / self.r

    def experts_of(self, block: int, num_blocks: int) -> int:
        """E of a block. ValueError if there are fewer blocks than numbers."""
        if isinstance(self.num_experts, int):
            return self.num_experts
        parts = len(self.num_experts)
        if parts > num_blocks:
            raise ValueError(
                f"num_experts={self.num_experts} names {parts} parts of the blocks, and the model has {num_blocks} block(s); give at "
                "most one number a block"
            )
        return self.num_experts[block * parts // num_blocks]


@dataclass(frozen=True)
class PescConfig(Settings):
    """PESC: adapters on the output of each FFN, one router an FFN, on the FFN's input; and a LoRA on every linear of the blocks.

        h = FFN(x);   y = h + sum_k g_k m U[e_k] gelu(D[e_k] dropout(h));   of every linear: W x + bias + (lora_alpha / lora_r) B (A x)

    D_e [bottleneck, H], U_e [H, bottleneck], zero at the start. Source: Wu et al., "Parameter-Efficient Sparsity Crafting from Dense to
    Mixture-of-Experts for Instruction Tuning on General Tasks", arXiv 2401.02731.

    bottleneck: the width between D and U. adapter_scale: m. adapter_dropout: on h; lora_dropout: on the LoRA's x. aux_loss_coef: weight of
    the balance loss, the mean over all routers. The FFN is found by its linears gate_proj, up_proj and down_proj.

    Raises ValueError, naming the field, on a value outside its range.
    """

    method: ClassVar[str] = "pesc"

    num_experts: int = 8
    top_k: int = 2
    bottleneck: int = 64
    adapter_scale: float = 1.0
    adapter_dropout: float = 0.1
    lora_r: int = 64
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    aux_loss_coef: float = 0.01

    def __post_init__(self):
        for name in ("num_experts", "bottleneck", "lora_r"):
            check_int(name, getattr(self, name), 1)
        _check_top_k(self.top_k, self.num_experts)
        for name in ("adapter_scale", "lora_alpha"):
            self._resolve(name, number(name, getattr(self, name)))
        for name in ("adapter_dropout", "lora_dropout"):
            self._resolve(name, probability(name, getattr(self, name)))
        self._resolve("aux_loss_coef", coefficient("aux_loss_coef", self.aux_loss_coef))

    @property
    def lora_scale(self) -> float:
        """lora_alpha / lora_r."""
        return self.lora_alpha / self.lora_r


@dataclass(frozen=True)
class MixLoraConfig(Settings):
    """MixLoRA: an expert is the FFN with a LoRA of its own on gate, up and down; one router an FFN; a LoRA on every other linear.

        y = sum_k g_k FFN_{e_k}(x);   FFN_e(x) = down_e(act(gate_e(x)) * up_e(x));   linear_e(x) = W x + bias + s B_e (A_e dropout(x))

    gate's and up's W x are computed once, down's once for each chosen expert. The static LoRA on the attention's linears has the same r,
    alpha and dropout. Source: Li et al., arXiv 2404.15159.

    aux_loss_coef: weight of the balance loss, the mean over all routers. lora_alpha: None means 2 r. The FFN is found by its linears
    gate_proj, up_proj and down_proj.

    Raises ValueError, naming the field, on a value outside its range.
    """

    method: ClassVar[str] = "mixlora"

    r: int = 16
    num_experts: int = 8
    top_k: int = 2
    lora_alpha: float | None = None
    lora_dropout: float = 0.05
    aux_loss_coef: float = 0.01

    def __post_init__(self):
        for name in ("r", "num_experts"):
            check_int(name, getattr(self, name), 1)
        _check_top_k(self.top_k, self.num_experts)
        self._resolve("lora_alpha", number("lora_alpha", self.lora_alpha, 2.0 * self.r))
        self._resolve("lora_dropout", probability("lora_dropout", self.lora_dropout))
        self._resolve("aux_loss_coef", coefficient("aux_loss_coef", self.aux_loss_coef))

    @property
    def scale(self) -> float:
        """s = lora_alpha / r."""
        return self.lora_alpha / self.r


@dataclass(frozen=True)
class RandomConfig(AdaFuseConfig):
    """Fixed random routing: AdaFuse's experts, chosen by a hash of the token's id, all with the weight 1 / K. Nothing routes by learning.

    A control: what it does not lose against AdaFuse, learned routing did not earn. Fields as in AdaFuseConfig; seed: of the hash.
    There is no router, so router_hidden and aux_loss_coef must be 0.
    """

    method: ClassVar[str] = "random"

    aux_loss_coef: float = 0.0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_int("seed", self.seed, 0)
        if self.seed > MAX_SEED:
            raise ValueError(f"seed={self.seed} is too large; allowed: 0 to {MAX_SEED}")
        for name in ("router_hidden", "aux_loss_coef"):
            if getattr(self, name) != 0:
                raise ValueError(f"{name}={getattr(self, name)}: random routing has no router to train; it must be 0")


def _counts(value):
    try:
        counts = tuple(value)
    except TypeError:
        counts = ()
    if not counts:
        raise ValueError(f"num_experts={value!r} is neither a whole number nor a list of them")
    return counts


def _check_top_k(top_k, num_experts):
    check_int("top_k", top_k, 1)
    if top_k > num_experts:
        raise ValueError(f"top_k={top_k} is more than num_experts={num_experts}; allowed: 1 to num_experts")
