"""models: vLLM's model classes with a dynamic adapter. `AdaFuse<Architecture>` is made of the class of that name when
it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.registry import ModelRegistry

from adafuse import checkpoint
from adafuse.costs import MANY_TOKENS
from adafuse.fingerprint import tensor_shapes
from adafuse.integrations.vllm.linears import adapt, compile_ahead, give_room, pieces, place
from adafuse.integrations.vllm.names import ALONE, DIGEST, FALLBACK, INTERVAL, PREFIX, STEP
from adafuse.integrations.vllm.routing import Step
from adafuse.integrations.vllm.start import (
    Served,
    check_engine,
    check_fallback,
    check_fingerprint,
    digest,
    does_not_say,
    follows_batch,
)
from adafuse.router import Router


def __getattr__(name):
    if name.startswith(PREFIX):
        return adapted_class(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def adapted_class(architecture: str) -> type:
    """vLLM's class for `architecture`, with AdaptedModel in front."""
    cls = ModelRegistry.models[architecture].load_model_cls()
    return type(PREFIX + architecture, (AdaptedModel, cls), {"__module__": __name__})


class AdaptedModel:
    """Mixed in front of a model class of vLLM's: loads the adapter that the model's config names, and routes each
    step before block 0.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs):
        config = vllm_config.model_config.hf_config
        served = Served.of(config)
        check_engine(vllm_config)
        # vLLM keeps compiled graphs by a hash of the model's config: another adapter in the same folder must not meet
        # those of the last.
        setattr(config, DIGEST, served.digest or digest(served.adapter))
        if type(self).__name__ == PREFIX + FALLBACK:
            _give_back_name(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.adafuse_step = attach(self, served, vllm_config)
        self._follows = follows_batch(getattr(config, ALONE, False), getattr(config, INTERVAL, 0))
        vllm_config.compilation_config.static_forward_context[STEP] = self.adafuse_step

    def get_model_state_cls(self) -> type:
        """Asked for by vLLM's second model runner."""
        from adafuse.integrations.vllm.state import following

        of_model = getattr(super(), "get_model_state_cls", None)
        return following(of_model and of_model())

    # Not `forward`: some of vLLM's classes compile theirs, and the routing must run in front of what is compiled.
    def __call__(self, input_ids=None, positions=None, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        h0 = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        otherwise = None if self._follows else partial(self.adafuse_step.one_request, len(h0))
        h0 = self.adafuse_step.route(h0, request_starts(otherwise))
        return super().__call__(
            input_ids=None,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=h0,
            **kwargs,
        )


def _give_back_name(config):
    """Under the Transformers backend the model's own architecture decides how its weights are called."""
    from transformers import AutoModelForCausalLM

    cls = AutoModelForCausalLM._model_mapping.get(type(config), None)
    named = "none" if cls is None else cls.__name__
    check_fallback(named, config)
    config.architectures = [named]


def request_starts(otherwise: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
    """[requests + 1] int32: where in the running step each request's tokens begin, and their number; None in a step
    without requests.

    otherwise: makes what to take where the attention backend does not say so. None: ValueError.
    """
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return None
    first = next(iter(metadata.values())) if isinstance(metadata, dict) else None
    starts = getattr(first, "query_start_loc", None)
    if starts is None and otherwise is None:
        raise ValueError(does_not_say(f"this attention backend ({type(first).__name__})"))
    return otherwise() if starts is None else starts


def attach(model, served: Served, vllm_config: VllmConfig) -> Step:
    """Read the adapter and give every adapted linear of `model` its shard of the experts; the step they read their
    routing from.

    ValueError if the folder is not an adapter of this base, or names a linear that vLLM does not run as one.
    """
    description, config = served.read()
    print_ = description["fingerprint"]
    check_fingerprint(served.adapter, print_, vllm_config.model_config.hf_config)
    tensors = checkpoint.read_tensors(served.adapter, tensor_shapes(print_, config))
    step = _step(print_, config, tensors, vllm_config)
    banks = {place(path): _bank(tensors, path) for path in print_["linears"]}
    shapes = {place(path): tuple(shape) for path, shape in print_["linears"].items()}
    adapted, numbers = set(), {}
    for path, layer, found in _linears(model, shapes):
        _check_shapes(path, found, shapes)
        decision = found[0].place[0] if step.shape.decisions > 1 else 0
        numbers[layer] = adapt(layer, found, banks, step, decision)
        adapted |= {piece.place for piece in found}
    _check_all(served.adapter, shapes, adapted)
    for layer, number in numbers.items():
        give_room(layer, step.room_of(number))
    served.check_unchanged()
    check_same_on_all_ranks(served.adapter, getattr(vllm_config.model_config.hf_config, DIGEST))
    if step.device.type == "cuda":
        compile_ahead(numbers, step.max_tokens)
        for tokens in (min(MANY_TOKENS, step.max_tokens), step.max_tokens):  # what sorts tokens into tiles, too
            step.route(step.h0[:tokens], None)
        torch.cuda.empty_cache()  # vLLM measures what is left
    return step


def check_same_on_all_ranks(adapter, own):
    """ValueError if the ranks, on whatever machines, have read different adapters. own: the digest of this rank's."""
    group = get_tp_group()
    if group.world_size == 1:
        return
    found = [None] * group.world_size
    torch.distributed.all_gather_object(found, own, group=group.cpu_group)
    if len(set(found)) > 1:
        raise ValueError(
            f"the tensor-parallel ranks have different adapters at {adapter}: SHA-256 of {checkpoint.WEIGHTS_FILE} by rank "
            f"{', '.join(each[:12] for each in found)}; give all machines the same"
        )


def _step(print_, config, tensors, vllm_config) -> Step:
    decisions = print_["num_hidden_layers"] if config.routing == "layer" else 1
    # On the device that vLLM has made the default one for building a model.
    router = Router(
        print_["hidden_size"],
        config.num_experts,
        config.top_k,
        num_decisions=decisions,
        router_hidden=config.router_hidden,
    )
    for name, parameter in router.named_parameters():
        parameter.requires_grad_(False).copy_(tensors[f"router.{name}"])
    scheduler = vllm_config.scheduler_config
    return Step(
        router,
        config,
        hidden_size=print_["hidden_size"],
        max_tokens=scheduler.max_num_batched_tokens,
        max_requests=scheduler.max_num_seqs,
        dtype=vllm_config.model_config.dtype,
    )


def _bank(tensors, path):
    return {
        name: tensors[f"{path}.{name}"]
        for name in ("experts_a", "experts_b", "shared_a", "shared_b")
        if f"{path}.{name}" in tensors
    }


def _linears(model, shapes):
    """(path, layer, its adapted pieces) of each linear of the model that the adapter has experts for."""
    packed = getattr(model, "packed_modules_mapping", None) or {}
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LinearBase) and place(path) is not None:
            found = [piece for piece in pieces(path, layer, packed) if piece.place in shapes]
            if found:
                yield path, layer, found


def _check_shapes(path, found, shapes):
    for piece in found:
        if piece.features != shapes[piece.place]:
            raise ValueError(
                f"the adapter was made on another base: {path} holds a linear of [out, in] {list(piece.features)}, the "
                f"adapter has experts for {list(shapes[piece.place])}"
            )


def _check_all(adapter, shapes, adapted):
    if missing := sorted(set(shapes) - adapted):
        block, path = missing[0]
        raise ValueError(
            f"{adapter} has experts for {len(missing)} linear(s) that vLLM does not run as one (first: {path} of block {block}); "
            "train an adapter with target_modules that leaves them out, or serve with HuggingFace"
        )
