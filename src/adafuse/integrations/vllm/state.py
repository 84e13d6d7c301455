"""state: vLLM's second model runner asks a model for the class of its state, and tells that of each request that comes and of each step's
batch. `requests` has the same for the first runner, which asks no model.
"""

from __future__ import annotations

from functools import cache

import torch

from adafuse.integrations.vllm.load import report_of
from adafuse.integrations.vllm.requests import Bare

WARMING_UP = "_warmup_"  # what vLLM calls the requests that it makes itself begin with


@cache
def following(cls: type | None = None) -> type:
    """A ModelState of vLLM's, by default the one of most models, with FollowsRequests in front."""
    if cls is None:
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState as cls
    return type(f"AdaFuse{cls.__name__}", (FollowsRequests, cls), {"__module__": __name__})


class FollowsRequests:
    """Mixed in front of a ModelState: tells the model's Step, in front of each step, which requests of the batch have the adapter.

    Nothing waits for the device, nor for the tokens of the step before.
    """

    def __init__(self, vllm_config, model, *rest):
        super().__init__(vllm_config, model, *rest)
        self._step, self._report = model.adafuse_step, report_of(vllm_config)
        self._is_bare = Bare(vllm_config)
        # By a request's place among the runner's, which it keeps; its place in the batch changes.
        self._adapted = torch.ones(vllm_config.scheduler_config.max_num_seqs, device=self._step.device)
        self._new: dict[int, float] = {}
        self._serving = False

    def add_request(self, req_index, new_req_data):
        super().add_request(req_index, new_req_data)
        self._new[req_index] = 0.0 if self._is_bare(new_req_data.sampling_params) else 1.0
        self._serving |= not new_req_data.req_id.startswith(WARMING_UP)

    def apply_staged_writes(self):
        super().apply_staged_writes()
        if self._new:
            places, values = (self._copied(list(each)) for each in (self._new, self._new.values()))
            self._adapted[places] = values
            self._new.clear()

    def _copied(self, numbers):
        here = torch.tensor(numbers, pin_memory=self._adapted.is_cuda)
        return here.to(self._adapted.device, non_blocking=True)

    def prepare_inputs(self, input_batch, req_states):
        self._step.set_adapted(self._adapted[input_batch.idx_mapping.long()])
        if self._report is not None and self._serving:
            self._report.tick(self._step.load)
        return super().prepare_inputs(input_batch, req_states)
