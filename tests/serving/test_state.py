"""How the second model runner's batch is followed, by a runner that is made up: vLLM's needs a GPU."""

from types import SimpleNamespace

import pytest
import torch

from adafuse.integrations.vllm.models import AdaptedModel
from adafuse.integrations.vllm.names import ALONE, BARE, INTERVAL
from adafuse.integrations.vllm.state import FollowsRequests, following

REQUESTS = 4


class State:
    """What the mixin finds behind it."""

    def __init__(self, vllm_config, model, encoder_cache, device):
        self.seen = []

    def add_request(self, req_index, new_req_data):
        self.seen.append(req_index)

    def apply_staged_writes(self):
        self.seen.append("written")

    def prepare_inputs(self, input_batch, req_states):
        return {"of": "vLLM"}


class Step:
    device, load = torch.device("cpu"), torch.zeros(1, 2, dtype=torch.int64)

    def set_adapted(self, adapted):
        self.adapted = adapted.tolist()


def make(**overrides):
    model = SimpleNamespace(adafuse_step=Step())
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS),
        parallel_config=SimpleNamespace(rank=0),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(**overrides)),
    )
    return following(State)(config, model, None, model.adafuse_step.device), model.adafuse_step


def request(extra_args, req_id="1"):
    return SimpleNamespace(req_id=req_id, sampling_params=SimpleNamespace(extra_args=extra_args))


def batch(*places):
    return SimpleNamespace(idx_mapping=torch.tensor(places, dtype=torch.int32))


def test_a_step_knows_its_requests_by_their_place_in_the_batch():
    state, step = make()
    for place, extra in ((2, {BARE: 1}), (0, None), (3, {BARE: 0, "other": 1})):
        state.add_request(place, request(extra))
    state.apply_staged_writes()
    assert state.seen == [2, 0, 3, "written"]
    assert state.prepare_inputs(batch(3, 2, 0), None) == {"of": "vLLM"}
    assert step.adapted == [1.0, 0.0, 1.0]
    state.prepare_inputs(batch(2, 3), None)
    assert step.adapted == [0.0, 1.0]


@pytest.mark.parametrize(("overrides", "mark"), [({ALONE: True}, 1), ({}, "0"), ({}, 7)])
def test_a_mark_that_counts_for_nothing(overrides, mark):
    state, step = make(**overrides)
    state.add_request(0, request({BARE: mark}))
    state.apply_staged_writes()
    state.prepare_inputs(batch(0), None)
    assert step.adapted == [1.0]


def test_a_place_is_used_again():
    state, step = make()
    state.add_request(1, request({BARE: 1}))
    state.apply_staged_writes()
    state.add_request(1, request({}))
    state.add_request(0, SimpleNamespace(req_id="2", sampling_params=None))
    state.prepare_inputs(batch(1), None)
    assert step.adapted == [0.0], "not before it is written"
    state.apply_staged_writes()
    state.prepare_inputs(batch(0, 1), None)
    assert step.adapted == [1.0, 1.0]


def test_the_load_is_reported_where_it_is_asked_for():
    assert make()[0]._report is None
    state, step = make(**{INTERVAL: 1e-9})
    step.load = torch.ones(1, 2, dtype=torch.int64)
    state.add_request(0, request({}, req_id="_warmup_0_"))
    state.prepare_inputs(batch(0), None)
    assert state._report._copy is None
    state.add_request(0, request({}))
    state.prepare_inputs(batch(0), None)
    assert state._report._copy is not None
    assert not step.load.any(), "what was counted while warming up is forgotten"


def test_a_model_names_the_class():
    class OfVllm:
        def get_model_state_cls(self):
            return State

    class Adapted(AdaptedModel, OfVllm):
        def __init__(self):
            pass

    found = Adapted().get_model_state_cls()
    assert found.__mro__[1:3] == (FollowsRequests, State)
    assert found is following(State)
