"""Places: where a baseline puts what, before anything is put there. Names and shapes of its tensors follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from adafuse.baselines.config import FFN_LINEARS
from adafuse.baselines.routers import LinearRouter
from adafuse.discover import find_blocks, find_targets, linear_features
from adafuse.experts import ExpertBank
from adafuse.layers import device_of


class Size(NamedTuple):
    """Of a bank: num_experts experts of rank r, and one of rank shared_rank that every token uses (a static LoRA)."""

    num_experts: int = 0
    r: int = 0
    shared_rank: int = 0


@dataclass(frozen=True)
class Place:
    """A linear or an FFN of block `block`, at module path `path`, and what is put there.

    experts: of a router on its input, 0: no router. size: of its bank, None: no bank. is_ffn: it is an FFN, whose bank is on its output.
    """

    path: str
    module: nn.Module
    in_features: int
    out_features: int
    block: int
    experts: int = 0
    size: Size | None = None
    is_ffn: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor in exchange format."""
        shapes = {f"{self.path}.router.weight": (self.experts, self.in_features)} if self.experts else {}
        if self.size is not None:
            bank = ExpertBank.shapes(self.in_features, self.out_features, self.size)
            shapes |= {f"{self.path}.{name}": shape for name, shape in bank.items()}
        return shapes

    def make_router(self, top_k, std=None) -> LinearRouter | None:
        if not self.experts:
            return None
        return LinearRouter(self.in_features, self.experts, top_k, std=std, device=self._device())

    def make_bank(self) -> ExpertBank | None:
        if self.size is None:
            return None
        return ExpertBank(self.in_features, self.out_features, device=self._device(), **self.size._asdict())

    def _device(self):
        return device_of(getattr(self.module, FFN_LINEARS[0]) if self.is_ffn else self.module)


class Linears(NamedTuple):
    """All that `target_modules` may say to `discover.find_targets`."""

    target_modules: str | tuple[str, ...]


def find_linears(base, target_modules) -> list[Place]:
    """The linears that target_modules names, in module order, nothing put there yet."""
    prefix = f"{find_blocks(base)[0]}."
    return [
        Place(
            target.path,
            target.module,
            target.in_features,
            target.out_features,
            block=int(target.path.removeprefix(prefix).partition(".")[0]),
        )
        for target in find_targets(base, Linears(target_modules))
    ]


def find_ffns(base) -> list[Place]:
    """The FFN of each block: its one child with linears gate_proj, up_proj and down_proj. ValueError where there is none, or two."""
    path, blocks = find_blocks(base)
    places = []
    for index, block in enumerate(blocks):
        found = [(name, child) for name, child in block.named_children() if _is_ffn(child)]
        if len(found) != 1:
            raise ValueError(
                f"{type(base).__name__} ({base.config.model_type}) has no FFN that this method knows: each block needs one child with "
                f"linears {', '.join(FFN_LINEARS)} (Llama, Mistral, Qwen2, Qwen3, Gemma); block {index} has {_children(block)}"
            )
        name, ffn = found[0]
        features = linear_features(ffn.gate_proj)[0], linear_features(ffn.down_proj)[1]
        places.append(Place(f"{path}.{index}.{name}", ffn, *features, block=index, is_ffn=True))
    return places


def _is_ffn(module):
    return all(linear_features(getattr(module, name, None)) is not None for name in FFN_LINEARS)


def _children(block):
    described = []
    for name, child in block.named_children():
        inner = ", ".join(each for each, _ in child.named_children())
        described.append(f"{name} ({inner})" if inner else name)
    return "; ".join(described)
