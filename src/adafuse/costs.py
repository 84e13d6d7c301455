"""costs: what each way of computing adapted linears reads, writes and computes, and what that is expected to take.

A form is one way in which the kernels compute a linear and its experts. `FORMS` says of each when it can be taken and what it costs;
`fused_form` takes the cheapest. Whoever adds one adds it here and, under the same name, to `fused.FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from math import log2
from typing import NamedTuple

import torch

FEW_TOKENS = 8  # up to here a program of the fused kernels takes all tokens
CROWD_TOKENS = 64  # up to here they may read the base's weights themselves
MANY_TOKENS = 512  # from here on again

# All of what follows was measured on one kind of GPU, an H100 (benchmarks/results/h100: kernels.json, exploration.json), with the linears
# of Llama-2-7B. Other GPUs get its shares of their own peaks (`Device.of`), and its seconds as they are.
READ_SHARE, FLOPS_SHARE = 0.954, 0.654  # of the peaks, by reading and by the vendor's bf16 matmul
LAUNCH = 2e-6  # seconds from one kernel that fills the device to the next
SMALL = 4e-6  # of a kernel that does not, from its start to the next one's: it fills and drains
# Shares of a device's rate of reading that are reached
VENDOR = 0.84  # by the vendor's matmul with few tokens
CROWD = 0.82  # by ops/crowd.py
ACTIVATIONS = 0.7  # by kernels on activations
LATE = 0.77  # while a kernel multiplies nothing
# and of its FLOPs
MATMUL = 0.99  # by ops/matmul.py, of what the vendor's reaches
TILES = 0.7  # by ops/batch.py
DENSE = 0.7  # by the vendor's matmuls over the ranks of all experts
# ops/decode.py reads at full rate with one token. With several each further one adds so much of the base's time, and each reads its own
# experts, mostly from the L2 cache, at that share of memory's rate.
DECODE_MORE, DECODE_EACH = 0.033, 0.75
# Without tensor cores a further token adds so much of all its time, without and with adapters.
DECODE_WITHOUT = (0.18, 0.33)
# FLOPs of bf16 matmuls, a clock and multiprocessor, by compute capability: what NVIDIA states (fp32 sums, no sparsity).
TENSOR_FLOPS = {
    (7, 5): 1024,
    (8, 0): 2048,
    (8, 6): 1024,
    (8, 9): 1024,
    (9, 0): 4096,
    (10, 0): 8192,
    (10, 3): 8192,
    (12, 0): 1024,
}


class Device(NamedTuple):
    """Bytes a second from memory and FLOPs a second of a bf16 matmul that are reached, multiprocessors, whether `ops.fragments` runs."""

    read: float
    flops: float
    processors: int
    fragments: bool = True

    @classmethod
    @cache
    def of(cls, device: torch.device) -> Device:
        """Of a GPU by what torch knows of it (clocks, width of memory, multiprocessors, capability); else an H100's."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return H100
        return cls.by(torch.cuda.get_device_properties(device))

    @classmethod
    def by(cls, found) -> Device:
        """From a device's properties. Clocks in kHz, the memory's at two transfers a clock."""
        memory = 2e3 * getattr(found, "memory_clock_rate", 0) * getattr(found, "memory_bus_width", 0) / 8
        tensor = TENSOR_FLOPS.get((found.major, found.minor), TENSOR_FLOPS[9, 0])
        peak = 1e3 * getattr(found, "clock_rate", 0) * found.multi_processor_count * tensor
        return cls(
            READ_SHARE * memory or H100.read,
            FLOPS_SHARE * peak or H100.flops * found.multi_processor_count / H100.processors,
            found.multi_processor_count,
            found.major >= 8,
        )


H100 = Device(3.2e12, 7e14, 132)


class Layer(NamedTuple):
    """An adapted linear, or several that read one input (`linears`; out_features of all).

    plain: y = W x is all that the base does, on weights that a kernel can read. stored: bytes of the base's weights, if they are not those
    of the activations' dtype. copied: the base's output is copied before the experts are added to it. appended: the A of the experts
    lie behind the weights in one matrix.
    """

    in_features: int
    out_features: int
    linears: int = 1
    plain: bool = True
    stored: int | None = None
    copied: bool = False
    appended: bool = False


class Kernel(NamedTuple):
    """What one kernel reads and writes, and computes; rate, filled: the shares of the device's rates that it reaches at most.

    late: those of the bytes that are read or written while it multiplies nothing.
    """

    bytes: float
    flops: float
    rate: float = 1.0
    filled: float = 1.0
    launch: float = LAUNCH
    late: float = 0.0

    def seconds(self, device: Device) -> float:
        """What it is expected to take. To compare ways of doing the same, not to predict."""
        read = (self.bytes - self.late) / (device.read * self.rate)
        return max(read, self.flops / (device.flops * self.filled)) + self.late / (device.read * LATE) + self.launch


@dataclass(frozen=True)
class Step:
    """A forward of so many tokens through adapters of a config (None: the base alone), in a dtype of itemsize bytes.

    Routing is taken as uniform: of E experts, n tokens with K each reach E (1 - (1 - K/E)^n) on average.
    """

    config: object
    tokens: int
    itemsize: int
    device: Device = H100

    @cached_property
    def active(self) -> int:
        """Ranks of a token."""
        return self._ranks(self.config.top_k if self.config else 0)

    @cached_property
    def reached(self) -> float:
        """Ranks that some token needs."""
        return self._ranks(self._hit(self.tokens))

    @cached_property
    def all(self) -> int:
        return self._ranks(self.config.num_experts if self.config else 0)

    @cached_property
    def of_tile(self) -> float:
        """Ranks that a tile of sorted tokens needs: each of n tiles is a piece of the order of sets (`ops.batch`).

        With one expert a token, a tile has its part of them, and one that the next begins with; with K of E, it settles some log2(n)
        experts, most of which are then out: 4.2 of 8 for 2 of 8 in 16 tiles (found: 3.7), and 6.1 in 4 (6.8). Where more sets are
        possible than tokens come, fewer are needed than this says: 56 of 64 for 2 of 64 in 4 tiles, where 40 are.
        """
        if self.config is None:
            return 0
        experts, k, n = self.config.num_experts, self.config.top_k, self.tiles
        one, several = self._hit(self.tokens) / n + (n > 1), max(k, experts - log2(n) * (1 - (k / experts) ** 2))
        piece = one if k == 1 else several
        return self._ranks(min(piece, self._hit(self.block_t)))

    @property
    def block_t(self) -> int:
        """Tokens of a tile (`ops.layout.tile_shape`)."""
        return 128 if self.tokens > 512 else min(64, max(16, 1 << (self.tokens - 1).bit_length()))

    @property
    def _tiled(self) -> float:
        """The share of FLOPs that `ops.batch` reaches: less in tiles of few tokens."""
        return TILES * min(1, self.block_t / 128)

    @property
    def tiles(self) -> int:
        return -(-self.tokens // self.block_t)

    def _hit(self, tokens):
        if self.config is None:
            return 0
        return self.config.num_experts * (1 - (1 - self.config.top_k / self.config.num_experts) ** tokens)

    def _ranks(self, experts):
        return experts * self.config.r + self.config.shared_rank if self.config else 0

    # --- kernels that several forms have -----------------------------------------------------------------------------

    def kernel(self, numbers, products, **limits) -> Kernel:
        return Kernel(self.itemsize * numbers, 2 * products, **limits)

    def small(self, numbers, products=0, **limits) -> Kernel:
        """A kernel on activations."""
        return self.kernel(numbers, products, **{"rate": ACTIVATIONS, "launch": SMALL, **limits})

    def base(self, layer: Layer, more=0) -> Kernel:
        """The base's own matmul; more: rows behind its weights."""
        i, o = layer.in_features, layer.out_features
        stored = self.itemsize * i * o if layer.stored is None else layer.stored
        moved = self.itemsize * (self.tokens * (i + o + more) + i * more)
        return Kernel(stored + moved, 2 * self.tokens * i * (o + more), rate=VENDOR)

    def shrink(self, layer: Layer) -> list[Kernel]:
        """Of sorted tokens; with a second kernel for the sum where programs share the features, to fill the device."""
        i, n, ranks = layer.in_features, layer.linears, layer.linears * self.of_tile
        found = [
            self.small(n * self.reached * i + self.tokens * (i + ranks), self.tokens * ranks * i, filled=self._tiled)
        ]
        if 2 * self.tiles * -(-ranks // 128) <= self.device.processors:
            found.append(self.small(4 * self.tokens * ranks))
        return found

    def expand(self, layer: Layer) -> Kernel:
        o = layer.out_features
        output = 2 * self.tokens * o  # a program reads and writes its part before and after its products
        read = self.reached * o + self.tokens * layer.linears * self.of_tile
        late = self.itemsize * output
        return self.small(read + output, self.tokens * self.of_tile * o, filled=self._tiled, late=late)


# --- forms ----------------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """how: in words. fits(step, layer): whether it can be taken. kernels(step, layer): what it launches. host: seconds that Python
    takes for it and a linear, on a host of 9 us a launch (benchmarks/results/h100/executions.json; those marked are guesses)."""

    how: str
    fits: Callable[[Step, Layer], bool]
    kernels: Callable[[Step, Layer], list[Kernel]]
    host: float
    plain: bool = True  # reads the base's weights, or calls the vendor's matmul on them


def _one_launch(step, layer, read, computed, rate):
    i, o, tokens = layer.in_features, layer.out_features, step.tokens
    numbers = i * o + read * (layer.linears * i + o) + tokens * (i + o)
    return [
        step.kernel(0, 0),  # a small fill of what is handed over
        step.kernel(numbers, tokens * (i * o + computed * (layer.linears * i + o)), rate=rate),
    ]


def _decode(step, layer):
    return _one_launch(step, layer, step.reached, step.active, 1 / _longer(step, layer))


def _longer(step, layer):
    """How many times as long as reading what is needed, once, `ops.decode` takes."""
    i, o, n, more = *layer[:3], step.tokens - 1
    if not (step.device.fragments and step.itemsize == 2 and _on_16_bytes(step, i)):
        return 1 + DECODE_WITHOUT[step.config is not None] * more
    if more == 0:
        return 1
    of_a_rank = n * i + o
    taken = i * o * (1 + DECODE_MORE * more) + step.tokens * step.active * of_a_rank / DECODE_EACH
    return taken / (i * o + step.reached * of_a_rank)


def _crowd(step, layer):
    return _one_launch(step, layer, step.all, step.all, CROWD)


def _tiles(step, layer):
    return [step.base(layer), *step.shrink(layer), step.expand(layer)]


def _gated(step, layer):
    """Every token's h of all experts by the vendor's matmul: the base's, if the A lie behind its weights."""
    i, tokens, ranks = layer.in_features, step.tokens, layer.linears * step.all
    if layer.appended:
        return [step.base(layer, more=ranks), step.expand(layer)]
    apart = step.small(ranks * i + tokens * (i + ranks), tokens * ranks * i, filled=DENSE)
    return [step.base(layer), apart, step.expand(layer)]


def _matmul(step, layer):
    i, o, n, tokens = *layer[:3], step.tokens
    numbers = i * o + step.reached * o + tokens * (i + n * step.of_tile + o)
    whole = step.kernel(numbers, tokens * o * (i + step.of_tile), rate=VENDOR, filled=MATMUL * _waves(step, o))
    return [*step.shrink(layer), whole]


def _waves(step, features):
    """The share of the device's processors that tiles of `ops.matmul` keep busy: they take turns, and the last is rarely full."""
    tiles, places = -(-step.tokens // 128) * -(-features // 256), step.device.processors
    return tiles / (places * -(-tiles // places))


def _own_output(step, layer):
    return [step.small(2 * step.tokens * layer.out_features)] if layer.copied else []


def _beside(step, layer):
    i, o, tokens = layer.in_features, layer.out_features, step.tokens
    shrink = step.small(step.reached * i + tokens * (i + step.active), tokens * step.active * i)
    expand = step.small(step.reached * o + tokens * (step.active + 2 * o), tokens * step.active * o)
    return [step.base(layer), *_own_output(step, layer), shrink, expand]


def _with_own_output(form):
    """A form whose base answers into memory that is not ours."""

    def kernels(step, layer):
        base, *experts = form(step, layer)
        return [base, *_own_output(step, layer), *experts]

    return kernels


def _many(step, layer):
    """Where our own matmul pays. fp32 has no tensor cores, where the vendor's is far better."""
    return (
        step.itemsize == 2 and step.tokens >= MANY_TOKENS and _on_16_bytes(step, layer.in_features, layer.out_features)
    )


def _on_16_bytes(step, *rows):
    """Whether rows of so many numbers all begin on 16 bytes, as tensor descriptors need."""
    return not any(step.itemsize * row % 16 for row in rows)


def _some_on_16_bytes(step, layer):
    return _some(step, layer) and _on_16_bytes(step, layer.out_features)


def _some(step, layer):
    return step.tokens > FEW_TOKENS


FORMS = {
    "decode": Form(
        "base weights and chosen experts in one pass", lambda step, _: step.tokens <= FEW_TOKENS, _decode, host=3.4e-4
    ),
    "crowd": Form(
        "base weights and all experts in one pass",
        lambda step, _: 1 < step.tokens <= CROWD_TOKENS and (step.itemsize == 2 or step.tokens > FEW_TOKENS),
        _crowd,
        host=3.4e-4,
    ),
    "tiles": Form("base matmul, then the experts of sorted tokens", _some, _tiles, host=6.6e-4),  # a guess
    "gated": Form("base matmul, that of all A, then the chosen experts", _some_on_16_bytes, _gated, host=5e-4),  # a guess
    "matmul": Form("base and experts of sorted tokens in one matmul", _many, _matmul, host=6.6e-4),
    "beside": Form(
        "the base as it is, then the chosen experts",
        lambda step, _: step.tokens <= FEW_TOKENS,
        _beside,
        host=5e-4,  # a guess
        plain=False,
    ),
    "beside_gated": Form(
        "the base as it is, the matmul of all A, then the chosen experts",
        _some_on_16_bytes,
        _with_own_output(_gated),
        host=5e-4,  # a guess
        plain=False,
    ),
    "beside_tiles": Form(
        "the base as it is, then the experts of sorted tokens", _some, _with_own_output(_tiles), host=6.6e-4, plain=False  # a guess
    ),
}  # fmt: skip
REFERENCE_HOST = 2e-4


@lru_cache(maxsize=4096)
def fused_form(layer, config, tokens, itemsize, device=H100, among=None) -> str:
    """The form of "fused" that is expected to take least for a layer, by its key in FORMS. layer: a Layer, or the first of its fields.

    config: of its adapters; None: the base alone. among: the forms that the caller can run.
    """
    return common_form([(layer, config)], tokens, itemsize, device, among)


def common_form(layers, tokens, itemsize, device=H100, among=None) -> str:
    """The one form that is expected to take least for all of these layers. layers: pairs of a layer and a config, as in `fused_form`."""
    steps = [(Step(config, tokens, itemsize, device), Layer(*layer)) for layer, config in layers]
    able = [
        name
        for name, form in FORMS.items()
        if (among is None or name in among)
        and all(form.plain == layer.plain and form.fits(step, layer) for step, layer in steps)
    ]
    return min(able, key=lambda name: sum(_seconds(FORMS[name].kernels(*each), device) for each in steps))


def _seconds(kernels, device):
    return sum(kernel.seconds(device) for kernel in kernels)


# --- executions -----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """The linears of a forward that take one form, and what they launch."""

    form: str
    how: str
    linears: int
    kernels: list[Kernel]

    @property
    def bytes(self) -> float:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> float:
        return sum(kernel.flops for kernel in self.kernels)


class Cost(NamedTuple):
    """Of one forward's adapted linears, base weights included. host: seconds that Python takes to launch it all."""

    execution: str
    parts: list[Part]
    device: Device
    host: float = 0.0

    @property
    def kernels(self) -> list[Kernel]:
        return [kernel for part in self.parts for kernel in part.kernels]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def seconds(self) -> float:
        """On the device."""
        return _seconds(self.kernels, self.device)


def costs(layers, config, tokens, itemsize, device=H100) -> list[Cost]:
    """What each execution of a forward moves between memory and processors, and computes. layers: as `fused_form` takes them."""
    layers, step = [Layer(*layer) for layer in layers], Step(config, tokens, itemsize, device)
    found = [_fused(layers, step), _reference(layers, step)]
    if tokens == 1 and config is not None:
        found.append(_switch(layers, step))
    return found


def _fused(layers, step) -> Cost:
    """Each layer by the form that it takes."""
    taken = {}
    for layer in layers:
        form = fused_form(layer, step.config, step.tokens, step.itemsize, step.device)
        taken.setdefault(form, []).append(layer)
    parts = [
        Part(name, FORMS[name].how, len(some), [k for layer in some for k in FORMS[name].kernels(step, layer)])
        for name, some in taken.items()
    ]
    return Cost("fused", parts, step.device, sum(FORMS[part.form].host * part.linears for part in parts))


def _reference(layers, step) -> Cost:
    def kernels(layer):
        i, o, tokens, ranks = layer.in_features, layer.out_features, step.tokens, step.all
        return [
            step.base(layer),
            step.small(ranks * i + tokens * (i + ranks), tokens * ranks * i, filled=DENSE),
            step.small(2 * tokens * ranks),  # the mask
            step.small(ranks * o + tokens * (ranks + o), tokens * ranks * o, filled=DENSE),
            step.small(2 * tokens * o),  # the output is read, and written anew
        ]

    part = Part(
        "",
        "base matmul, two matmuls over all experts",
        len(layers),
        [kernel for layer in layers for kernel in kernels(layer)],
    )
    return Cost("reference", [part], step.device, REFERENCE_HOST * len(layers))


def _switch(layers, step) -> Cost:
    """All merged in one launch."""
    merged = [
        (2 * i * o + step.active * (i + o), step.active * i * o)
        for i, o in ((x.in_features, x.out_features) for x in layers)
    ]
    kernels = [step.kernel(*map(sum, zip(*merged, strict=True))), *map(step.base, layers)]
    return Cost("switch", [Part("", "experts merged from a copy, then the base", len(layers), kernels)], step.device)


def explain(found: list[Cost], chosen: str, tokens: int) -> str:
    """A table of the costs, the chosen one marked, each with the forms that its linears take and the time that is expected."""
    lines = [f"{tokens} token(s) a forward, adapted linears only:"]
    for cost in found:
        mark = "->" if cost.execution == chosen else "  "
        lines.append(f"{mark} {cost.execution:10} {_numbers(cost)}   {_expected(cost)}")
        lines += [f"   {part.linears:5} linears {_numbers(part)}   {_name(part)}" for part in cost.parts]
    return "\n".join(lines)


def _numbers(what):
    return f"{what.bytes / 1e9:9.3f} GB {what.flops / 1e9:12.1f} GFLOP {len(what.kernels):5} launches"


def _expected(cost):
    host = f", launched from Python in {1e3 * cost.host:.1f}" if cost.host else ""
    return f"expected: {1e3 * cost.seconds:.2f} ms on the GPU{host}"


def _name(part):
    return f"{part.form}: {part.how}" if part.form else part.how
