"""requests: which requests of the running batch go without adapter, with vLLM's first model runner. What vLLM calls a logits
processor, since it is told, in front of each step and on the host, how the batch has changed. It leaves the logits alone.
"""

from __future__ import annotations

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from adafuse.integrations.vllm.load import report_of
from adafuse.integrations.vllm.names import ALONE, BARE, STEP


class Bare:
    """Whether a request, by its SamplingParams (None: it samples nothing), is for the base alone. Never where the base is not served: its
    keys and values would lie in the cache as the adapted model's.
    """

    def __init__(self, vllm_config):
        self._never = bool(getattr(vllm_config.model_config.hf_config, ALONE, False))

    def __call__(self, params) -> bool:
        return not self._never and params is not None and (params.extra_args or {}).get(BARE, 0) == 1


class Requests(LogitsProcessor):
    """A request whose `extra_args` hold `adafuse_bare: 1` is answered by the base alone, in the same batch as the
    others.

    Its cached prefixes are not those of the adapted model: whoever sends it must give it a `cache_salt` of its own.
    The server does.
    """

    @classmethod
    def validate_params(cls, sampling_params):
        bare = (sampling_params.extra_args or {}).get(BARE, 0)
        if bare not in (0, 1):
            raise ValueError(f"{BARE}={bare!r} is neither 0 (with the adapter) nor 1 (the base alone)")

    def __init__(self, vllm_config, device, is_pin_memory):
        self._layers = vllm_config.compilation_config.static_forward_context
        self._bare: dict[int, bool] = {}
        self._is_bare = Bare(vllm_config)
        self._report = report_of(vllm_config)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits):
        return logits

    def update_state(self, batch_update):
        step = self._layers.get(STEP)
        if step is None:
            if batch_update is not None and batch_update.added:
                raise ValueError(
                    "the model that runs carries no adapter: something has replaced the overrides of its config"
                )
            return  # the model is not loaded yet
        if batch_update is not None:
            self._follow(batch_update)
            step.set_bare([self._bare.get(place, False) for place in range(batch_update.batch_size)])
        if self._report is not None:
            self._report.tick(step.load)

    def _follow(self, update):
        """The batch's changes, in the order that vLLM prescribes: removed, added, moved."""
        bare = self._bare
        for place in update.removed:
            bare.pop(place, None)
        for place, params, *_ in update.added:
            bare[place] = self._is_bare(params)
        for one, other, direction in update.moved:
            moved = bare.pop(one, False)
            if direction == MoveDirectionality.SWAP:
                bare[one] = bare.pop(other, False)
            bare[other] = moved
