"""generic: models of other families, through their own HuggingFace forward on a cache of fixed buffers."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from adafuse.engine.attention import CHANGING
from adafuse.engine.backbone import Embedded, base_of, check_one_device, check_vocabulary, max_positions, ropes_of
from adafuse.engine.runner import Runner
from adafuse.layers import recording
from adafuse.model import AdaFuseModel
from adafuse.router import Routing

ATTENTION = {"full_attention", "sliding_attention"}
ADVICE = "use model.generate"
TRIED = 12  # tokens of the text that a model is tried out with, the last of them one by one
STEPS = 4
# Of logits, relative: two orders of summation, on a GPU perhaps in TF32; in 16 bits a backbone's own experts may change at a token or
# two. A mask read wrongly gave 0.12 with weights that are not trained, 0.23 and more with larger ones.
TOLERANCE, ROUNDED = 1e-2, 0.1


@dataclass(frozen=True)
class Whole(Embedded):
    """A HuggingFace model that is run as a whole (an adapter on it runs along): what the engine asks of a Backbone."""

    base: nn.Module
    embeddings: nn.Module
    head: nn.Module
    max_positions: int

    @property
    def config(self):
        return self.base.config.get_text_config(decoder=True)


def read_whole(model) -> Whole:
    """ValueError for a model whose forward takes no positions, or whose attention is not over a cache of keys and values alone."""
    base = base_of(model)
    check_one_device(model)
    config = base.config.get_text_config(decoder=True)
    name = _name_of(base)
    if other := set(getattr(config, "layer_types", None) or ()) - ATTENTION:
        raise ValueError(f"{name} has blocks of type {min(other)}, whose state the engine does not keep: {ADVICE}")
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        raise ValueError(f"the forward of {name} takes no position_ids, which the engine must give it: {ADVICE}")
    if not getattr(config, "max_position_embeddings", None):
        raise ValueError(
            f"the config of {name} has no max_position_embeddings, so its longest text is unknown: {ADVICE}"
        )
    if base.get_output_embeddings() is None:
        raise ValueError(f"{name} has no head that the engine finds (get_output_embeddings): {ADVICE}")
    check_vocabulary(base)
    return Whole(base, base.get_input_embeddings(), base.get_output_embeddings(), max_positions(config))


def _name_of(base):
    return f"{type(base).__name__} ({base.config.model_type})"


def check_graphs(whole: Whole):
    """ValueError for a model whose forward no graph can hold."""
    if changing := {rope["rope_type"] for rope in ropes_of(whole.config)} & CHANGING:
        raise ValueError(
            f"the frequencies of the model's rotary embedding ({min(changing)}) change with the length, so that its forward waits for the "
            "device, which no CUDA graph can hold; pass Engine(..., graphs=False)"
        )


@torch.no_grad()
def addresses_of(model, dtype) -> tuple:
    """Of all weights of a model, experts' casts included, and the execution it is set to: a captured step is good while they stay."""
    tensors = [*model.parameters(), *model.buffers()]
    execution = None
    if isinstance(model, AdaFuseModel):
        tensors += [matrix for bank in model.banks.values() for matrix in bank.matrices(dtype)]
        execution = model.execution
    return (execution, *(tensor.data_ptr() for tensor in tensors))


class Layer(CacheLayerMixin):
    """Keys and values [rows, heads, length, dim] of a layer. `at` (rows, positions, length): what the forward writes and reads."""

    def __init__(self, keys, values):
        super().__init__()
        self.keys, self.values, self.is_initialized, self.at = keys, values, True, None

    def lazy_initialization(self, key_states, value_states):
        raise AssertionError("the buffers are there")

    def update(self, key_states, value_states, *args, **kwargs):
        rows, positions, length = self.at
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[rows].transpose(1, 2).index_put_(
                (torch.arange(len(positions), device=positions.device)[:, None], positions),
                states.transpose(1, 2).to(buffer.dtype),
            )
        return self.keys[rows, :, :length], self.values[rows, :, :length]

    def get_mask_sizes(self, query_length):
        return self.at[2], 0

    def get_seq_length(self):
        return 0  # positions and masks are given

    def get_max_length(self):
        return self.keys.shape[2]


class HfRunner(Runner):
    """A Runner whose forwards are the model's own, with the adapter in the execution that it is set to."""

    def _make_cache(self, max_batch):
        whole = self.backbone
        self._routed, self._captured = None, {}
        self.layers = [
            Layer(*(torch.zeros(max_batch, *s, dtype=whole.dtype, device=whole.device) for s in shapes))
            for shapes in _cache_shapes(whole, self.length)
        ]
        self._cache = Cache(layers=self.layers)
        self._lowest = torch.finfo(whole.dtype).min
        # A family without kinds of blocks that makes no such mask itself attends to all, whatever its config has beside.
        self._has_windows = hasattr(sys.modules[type(whole.base).__module__], "create_sliding_window_causal_mask")

    def _forward(self, tokens, positions, row, length, adapted, last=None):
        rows = slice(row, row + len(tokens))
        for layer in self.layers:
            layer.at = (rows, positions, length)
        given = {"input_ids": tokens, "position_ids": positions, "attention_mask": self._masks(positions, length)}
        with torch.autocast(tokens.device.type, enabled=False), recording() as record:
            logits = self.backbone.base(**given, past_key_values=self._cache, use_cache=True).logits
        self._routed = record.routing
        return logits.flatten(0, 1) if last is None else logits[0, last]

    @torch.no_grad()
    def try_out(self):
        """ValueError for a model that does not compute, or computes something else, on the engine's cache and with its masks.

        Some families read the shape of a mask, or of the cache, in ways of their own. A short text is run in one forward and on the
        cache; what counts is the median over tokens of ||logits - expected|| / ||expected||.
        """
        name, count = _name_of(self.backbone.base), min(TRIED, self._last + 1)
        prompt = max(1, count - STEPS)
        ids = (torch.arange(count, device=self.tokens.device) * 7 + 3).remainder(self.backbone.vocab_size)[None]
        try:
            with torch.autocast(ids.device.type, enabled=False):
                expected = self.backbone.base(input_ids=ids, use_cache=False).logits[0].float()
            found = self._on_cache(ids, prompt).float()
        except Exception as error:
            raise ValueError(
                f"{name} does not run on the engine's cache ({type(error).__name__}: {error}): {ADVICE}"
            ) from error
        finally:
            self.forget()
        if not expected.isfinite().all():
            return  # the weights are no numbers, which a generation will say
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
        worst = max(part.median().item() for part in errors.split(prompt))
        if worst > (TOLERANCE if self.backbone.dtype.itemsize > 2 else ROUNDED):
            raise ValueError(
                f"{name} computes something else on the engine's cache than by itself (relative error of the logits {worst:.2g}): "
                f"{ADVICE}"
            )

    def _on_cache(self, ids, prompt):
        """Logits [S, V] of ids [1, S]: so many as a prompt, the others step by step."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        parts = [self._forward(ids[:, :prompt], positions[:, :prompt], 0, prompt, False)]
        for place in range(prompt, ids.shape[1]):
            now = slice(place, place + 1)
            parts.append(self._forward(ids[:, now], positions[:, now], 0, self.length, False))
        return torch.cat(parts)

    def _masks(self, positions, length):
        """What is added to the scores: 0 where a token may look, the lowest number elsewhere. Of each kind of attention, if several."""
        config, keys = self.backbone.config, torch.arange(length, device=positions.device)
        own = positions[:, None, :, None]
        kinds = set(getattr(config, "layer_types", None) or [])
        window = getattr(config, "sliding_window", None) if kinds or self._has_windows else None
        seen = {"full_attention": keys <= own}
        if window is not None:
            seen["sliding_attention"] = (keys <= own) & (keys > own - window)
        masks = {
            kind: torch.zeros_like(each, dtype=self.backbone.dtype).masked_fill_(~each, self._lowest)
            for kind, each in seen.items()
        }
        if kinds == ATTENTION:
            return masks
        alone = "full_attention" if kinds == {"full_attention"} or window is None else "sliding_attention"
        return masks[alone]

    def _renew(self, state):
        if state != self._state:
            self._captured.clear()
        super()._renew(state)

    def _step(self, rows, adapted, sampler):
        super()._step(rows, adapted, sampler)
        # A graph writes its routing where it was captured: kept, so that nothing else is put there.
        self._captured[rows, adapted, sampler is not None and sampler.plain] = self._routed

    def _note_routing(self, rows, adapted, plain):
        self._routed = self._captured[rows, adapted, plain]

    def _routing(self, tokens):
        experts, weights = (
            part.flatten(0, 1)[:tokens].clone() for part in (self._routed.experts, self._routed.weights)
        )
        return Routing(experts, weights)

    def forget(self):
        for layer in self.layers:
            layer.reset()


@torch.no_grad()
def _cache_shapes(whole, length):
    """Shapes of keys and values [heads, length, dim] of every layer, from a forward of one token. ValueError for other caches."""
    ones, cache = torch.ones(1, 1, dtype=torch.int64, device=whole.device), DynamicCache(config=whole.base.config)
    whole.base(input_ids=ones, attention_mask=ones, past_key_values=cache, use_cache=True)
    if wrong := [layer for layer in cache.layers if not isinstance(layer, DynamicLayer) or not layer.is_initialized]:
        raise ValueError(
            f"{type(whole.base).__name__} keeps a {type(wrong[0]).__name__}, which is no cache of keys and values: {ADVICE}"
        )
    return [[(part.shape[1], length, part.shape[3]) for part in (layer.keys, layer.values)] for layer in cache.layers]
