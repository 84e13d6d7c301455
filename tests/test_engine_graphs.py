"""What the engine keeps for captured steps, without a GPU: a stand-in for CUDA graphs runs again what it was given at the capture.

Also the step that is queued before the host has read the token of the one before it, as on a GPU.
"""

import pytest
import torch
from engine_models import adapted, bare, generated, prompt
from test_engine_generic import a_model as other_family

from adafuse import Engine

SAMPLED = {"temperature": 0.8, "top_k": 30, "repetition_penalty": 1.3, "seed": 3, "min_new_tokens": 4}


class Replayed:
    """Stands for Graphs: `capture` warms up and keeps the run, `replay` runs it again; what Python notes meanwhile is undone."""

    def __init__(self, runner):
        self.runner, self.runs, self.captured, self.replayed = runner, {}, [], []

    def __contains__(self, name):
        return name in self.runs

    @torch.no_grad()
    def capture(self, name, run):
        for _ in range(3):
            run()
        self.runs[name] = run
        self.captured.append(name)

    @torch.no_grad()
    def replay(self, name):
        self.replayed.append(name)
        gate = self.runner.gate
        noted = vars(gate).copy() if gate is not None else {}
        self.runs[name]()
        if gate is not None:
            vars(gate).update(noted)

    def clear(self):
        self.runs.clear()


def engines(model, **options):
    """One that captures and runs ahead, and a plain one."""
    options = {"max_seq_len": 64, "max_batch": 5, "prefill_chunk": 16, **options}
    one = Engine(model, **options)
    one._runner._graphs, one._ahead = Replayed(one._runner), 1
    return one, Engine(model, **options)


def same(got, wanted):
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.ids == theirs.ids
        assert mine.finish_reason == theirs.finish_reason
        if theirs.routing is not None:
            assert torch.equal(mine.routing.experts, theirs.routing.experts)
            torch.testing.assert_close(mine.routing.weights, theirs.routing.weights)


MODELS = {
    "llama": lambda: adapted("llama", routing="layer"),
    "bare": lambda: bare("mistral"),
    "gemma3": lambda: other_family("gemma3", routing="layer"),
    "gpt2": lambda: other_family("gpt2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_batches_and_settings_in_turn(name):
    model = MODELS[name]()
    one, plain = engines(model)
    graphs = one._runner._graphs
    routed = {"return_routing": True} if hasattr(model, "router") else {}
    for _ in range(2):
        for lengths in ((20,), (9, 33, 5), (1, 2, 3, 4, 5)):
            for settings in ({}, SAMPLED):
                prompts = [prompt(length, length) for length in lengths]
                given = {"max_new_tokens": [20, 5, 9, 4, 11][: len(lengths)], "eos_token_id": (), **routed, **settings}
                same(one.generate(prompts, **given), plain.generate(prompts, **given))
    # A capture for each size and kind, the first time only: 1, 3 padded to 4, and 5, the most there are.
    assert len(graphs.captured) == len(set(graphs.captured)) == 6
    assert {rows for rows, _, _ in graphs.captured} == {1, 4, 5}


def test_an_end_token_is_seen_a_step_late_and_nothing_after_it_counts():
    model = adapted("llama", routing="layer")
    one, plain = engines(model)
    prompts, lengths = [prompt(20), prompt(40)], {"max_new_tokens": [30, 20]}
    for settings in ({}, {**SAMPLED, "min_new_tokens": 0}):  # with which the text up to the end is that of no end
        free = plain.generate(prompts, eos_token_id=(), **lengths, **settings)[0].ids
        end = next(token for token in free[3:] if token not in free[:3])
        given = {**lengths, "eos_token_id": end, "logprobs": 2, "return_routing": True, **settings}
        got, wanted = (each.generate(prompts, **given) for each in (one, plain))
        same(got, wanted)
        for mine, theirs in zip(got, wanted, strict=True):
            assert [each.logprob for each in mine.logprobs] == pytest.approx([each.logprob for each in theirs.logprobs])
        assert got[0].finish_reason == "stop"


def test_a_full_row_stays_within_the_cache_while_the_host_is_behind():
    model = bare("llama")
    one, _ = engines(model)
    prompts = [prompt(58), prompt(5, 1)]
    got = one.generate(prompts, max_new_tokens=[6, 40])
    assert [each.ids for each in got] == [generated(model, prompts[0], 6), generated(model, prompts[1], 40)]
    assert one._runner.positions.max() < one._runner.length


def test_weights_that_moved_are_captured_anew():
    model = adapted("llama", dtype=torch.bfloat16)
    one, plain = engines(model)
    graphs = one._runner._graphs
    given = {"max_new_tokens": 8, "eos_token_id": ()}
    same(one.generate([prompt(9)], **given), plain.generate([prompt(9)], **given))
    next(iter(model.banks.values())).b.data.mul_(-1)  # in place: cast anew, nothing moves
    same(one.generate([prompt(9)], **given), plain.generate([prompt(9)], **given))
    assert len(graphs.captured) == 1
    head = model.get_base_model().lm_head
    head.weight.data = head.weight.data.flip(0).clone()
    same(one.generate([prompt(9)], **given), plain.generate([prompt(9)], **given))
    assert len(graphs.captured) == 2
    with model.disable_adapter():
        same(one.generate([prompt(9)], **given), plain.generate([prompt(9)], **given))
    assert len(graphs.captured) == 3


def test_a_closed_stream_with_a_step_under_way_leaves_the_engine_usable():
    model = adapted("llama", routing="layer")
    one, plain = engines(model)
    pieces = one._run(one._read([prompt(20)], {"max_new_tokens": 30}, (), ()), one._record(None, False))
    for _ in range(4):
        next(pieces)
    assert len(one._runner._graphs.replayed) == 4  # one more than tokens read after the first
    pieces.close()
    given = {"max_new_tokens": 12, "eos_token_id": ()}
    same(one.generate([prompt(9)], **given), plain.generate([prompt(9)], **given))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on a CPU in the interpreter only; see test_engine_kernels"
)
def test_routing_of_captured_steps_on_kernels():
    pytest.importorskip("triton")
    model = adapted("llama", routing="layer")
    one, _ = engines(model, kernels=True, max_batch=2)
    for got in one.generate([prompt(9), prompt(5)], max_new_tokens=4, eos_token_id=(), return_routing=True):
        wanted = model.route(torch.tensor([got.prompt_ids + got.ids[:-1]]))
        assert torch.equal(got.routing.experts, wanted.experts[0])


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on a CPU in the interpreter only; see test_engine_kernels"
)
def test_switched_weights_in_captured_steps():
    pytest.importorskip("triton")
    model = adapted("llama", routing="layer")
    ids = prompt(9)
    wanted = generated(model, ids, 4)
    model.execution = "switch"
    one, _ = engines(model, kernels=True, max_batch=1)
    for _ in range(2):
        assert one.generate([ids], max_new_tokens=4, eos_token_id=())[0].ids == wanted
    assert one._runner._graphs.captured == [(1, True, True)]
