"""What only a GPU can show of the engine: graphs that replay what runs eagerly, no host sync, early launches that wait, flat memory.

That its tokens are those of HuggingFace is shown by test_engine_kernels.py, which takes graphs where there is a GPU.
"""

import copy
import gc

import pytest
import torch
from engine_models import NAMES, adapted, generated, logits_of, prompt
from engine_uses import KINDS, whatever_a_user_does
from families import family, fill
from gpus import early_launch, no_host_sync

pytest.importorskip("triton")

from test_attend_op import a_case as attention_case
from test_decode_op import nan, relative_error
from test_gpu_kernels import write_late
from tiny_text import tokenizer

from adafuse import AdaFuseConfig, AdaFuseModel, Engine
from adafuse.engine.graph import WARMUP, Graphs
from adafuse.engine.sampling import Sampler, Sampling
from adafuse.ops.attend import Room, attend, attend_ref
from adafuse.ops.decode import decode
from adafuse.ops.norm import add_norm, norm_ref, swiglu, swiglu_ref
from adafuse.ops.pick import pick, room

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

VOCAB = 5000


def a_model(name="llama"):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "vocab_size": VOCAB,
        "head_dim": 64,
    }
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    kind = type(family(name).make())
    base = kind(kind.config_class(**shape, eos_token_id=None, bos_token_id=None, pad_token_id=None))
    found = AdaFuseModel(base, AdaFuseConfig(r=16, num_experts=8, routing="layer", shared_rank=4))
    for bank in found.banks.values():
        torch.nn.init.normal_(bank.b, std=0.05)
    return found.to("cuda", torch.bfloat16).eval()


@pytest.fixture(scope="module")
def model():
    return a_model()


def engine(model, **options):
    return Engine(model, **{"max_seq_len": 1024, "prefill_chunk": 256, "kernels": True, "graphs": True, **options})


def test_kernels_and_graphs_are_the_default(model):
    got = Engine(model, max_seq_len=256)
    assert got._kernels
    assert got._runner.captures
    wanted = engine(model).generate(prompts(7), max_new_tokens=20, eos_token_id=())
    assert got.generate(prompts(7), max_new_tokens=20, eos_token_id=()) == wanted


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5, "min_new_tokens": 4}


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lengths", [(300,), (300, 5, 77), (9, 300, 40, 1, 2)], ids=["1", "3", "5"])
def test_a_replayed_graph_is_the_eager_step(model, lengths, settings):
    """To the bit: the same kernels on the same numbers, with the batch padded."""
    options = {"max_new_tokens": [60, 5, 40, 30, 6][: len(lengths)], "eos_token_id": (), "logprobs": 3, **settings}
    captured = engine(model).generate(prompts(*lengths), **options)
    assert captured == engine(model, graphs=False).generate(prompts(*lengths), **options)
    assert len({token for each in captured for token in each.ids}) > 10


@pytest.mark.parametrize("way", ["adapted", "bare", "several at once"])
@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_texts_part_only_where_the_top_two_are_within_rounding(name, way):
    """Within rounding: in fp32 no further apart than two logits come by as much error each as HuggingFace's bf16 has. No token of the
    engine's may be further below the best."""
    model = a_model(name)
    if way == "bare":
        model = model.detach()
    exact = copy.deepcopy(model).float()
    one, asked, options = engine(model), prompts(100, 30, 7), {"max_new_tokens": 200, "eos_token_id": ()}
    batches = [asked] if way == "several at once" else [[ids] for ids in asked]
    found = [each for batch in batches for each in one.generate(batch, **options)]
    for ids, mine in zip(asked, (each.ids for each in found), strict=True):
        theirs = generated(model, ids, 200)
        rounded, logits = (logits_of(each, ids + mine[:-1])[len(ids) - 1 :] for each in (model, exact))
        rounding = 2 * (rounded - logits).abs().max()
        chosen = logits.gather(1, torch.tensor(mine, device="cuda")[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < rounding
        place = next((n for n, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), None)
        if place is not None:
            top = logits[place].topk(2)
            assert {mine[place], theirs[place]} == set(top.indices.tolist())
            assert top.values[0] - top.values[1] < rounding


def test_ctrl_c_in_a_capture_leaves_the_engine_usable(model, monkeypatch):
    options = {"max_new_tokens": 20, "eos_token_id": ()}
    wanted = engine(model).generate(prompts(40), **options)
    one = engine(model)
    step = one._runner._step

    def interrupted(*args):
        step(*args)
        if torch.cuda.is_current_stream_capturing():
            raise KeyboardInterrupt

    monkeypatch.setattr(one._runner, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.generate(prompts(40), **options)
    monkeypatch.undo()
    assert one.generate(prompts(40), **options) == wanted


def test_plain_pytorch_in_a_graph_is_the_eager_step(model):
    options = {"max_new_tokens": 30, "eos_token_id": ()}
    captured = engine(model, kernels=False).generate(prompts(40, 7), **options)
    eager = engine(model, kernels=False, graphs=False).generate(prompts(40, 7), **options)
    assert [each.ids for each in captured] == [each.ids for each in eager]


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "opt-projected"])
@pytest.mark.parametrize("execution", ["reference", "fused"])
def test_another_family_in_a_graph_is_the_eager_step(name, execution):
    other = AdaFuseModel(family(name).build(), AdaFuseConfig(r=2, num_experts=4, routing="layer"))
    fill(other)
    other.cuda().eval().execution = execution
    ids, options = (
        [prompt(20), prompt(5, 1), prompt(33, 2)],
        {"max_new_tokens": 30, "eos_token_id": (), "return_routing": True},
    )
    captured = Engine(other, max_seq_len=64, max_batch=4, graphs=True).generate(ids, **options)
    eager = Engine(other, max_seq_len=64, max_batch=4, graphs=False).generate(ids, **options)
    for mine, theirs in zip(captured, eager, strict=True):
        assert mine.ids == theirs.ids == generated(other, mine.prompt_ids, 30)
        assert torch.equal(mine.routing.experts, theirs.routing.experts)
        assert torch.equal(
            mine.routing.experts, other.route(torch.tensor([mine.prompt_ids + mine.ids[:-1]]).cuda()).experts[0]
        )


def test_one_engine_serves_batches_settings_and_weights_in_turn(model):
    one, options = engine(model), {"max_new_tokens": 20, "eos_token_id": ()}

    def fresh(ids, **more):
        return engine(model, graphs=False).generate(ids, **options, **more)

    for lengths in ((30,), (30, 5), (70,)):
        for settings in ({}, SAMPLED):
            assert one.generate(prompts(*lengths), **options, **settings) == fresh(prompts(*lengths), **settings)
    bank = next(iter(model.banks.values()))
    bank.b.data.mul_(-1)
    assert one.generate(prompts(30), **options) == fresh(prompts(30))
    model.eval()  # drops the casts that the graphs read
    ballast = [torch.full((1 << n,), torch.nan, device="cuda") for n in range(10, 24)]  # takes the memory they had
    assert one.generate(prompts(30), **options) == fresh(prompts(30))
    del ballast
    with model.disable_adapter():
        assert one.generate(prompts(30), **options) == fresh(prompts(30))
    bank.b.data.mul_(-1)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_step_does_not_wait_for_the_device(model, graphs, settings):
    one = engine(model, graphs=graphs)
    sampling = {"max_new_tokens": 9, "eos_token_id": (), **settings}
    one.generate(prompts(20), **sampling)
    runner = one._runner
    sampling.pop("eos_token_id")
    sampler = Sampler([Sampling(**sampling)], prompts(20), ends=(), vocab_size=VOCAB, device="cuda")
    with torch.no_grad():
        sampler = runner.begin(1, sampler, adapted=True, addresses=one._addresses())
        with no_host_sync():
            for _ in range(3):
                runner.step(1, adapted=True, sampler=sampler)


# --- kernels that start early --------------------------------------------------------------------------------------------


def late(source):
    """A tensor that a kernel writes much later, while it lets the one behind it start."""
    target = nan(*source.shape, dtype=source.dtype)
    write_late(target.clone(), source)  # compiled ahead
    torch.cuda.synchronize()
    write_late(target, source)
    return target


@early_launch
@pytest.mark.parametrize("times", range(3))
def test_norm_waits_and_passes_the_wait_on(times):
    """A late y, its norm, and a linear that reads the norm."""
    y, residual, weight = (torch.randn(2, 4096, device="cuda").bfloat16() for _ in range(3))
    weight, matrix = weight[0].contiguous(), torch.randn(512, 4096, device="cuda").bfloat16() / 64
    exact = norm_ref(y.double() + residual.double(), weight.double(), 1e-5)
    for warm in (True, False):
        rest, out, last = residual.clone(), nan(2, 4096, dtype=y.dtype), nan(2, 512, dtype=y.dtype)
        given = y if warm else late(y)
        add_norm(given, rest, weight, out, eps=1e-5, pdl=True)
        decode(out, (matrix,), last, pdl=True)
        torch.cuda.synchronize()
    assert relative_error(out, exact.cpu()) < 1e-2
    assert relative_error(last, (exact @ matrix.double().T).cpu()) < 1e-2


@early_launch
@pytest.mark.parametrize("times", range(3))
def test_attention_waits_for_its_queries(times):
    qkv, cache, at, rotary, _ = attention_case(8, 2, 128, 600, (599, 0, 300), torch.bfloat16)
    room_for = Room.make(cache, 8)
    exact = attend_ref(qkv.double(), cache.double(), at, rotary.double(), scaling=0.3)
    for warm in (True, False):
        out = nan(3, 8 * 128, dtype=qkv.dtype)
        given = qkv if warm else late(qkv)
        attend(given, cache, at, rotary, out, room_for, scaling=0.3, pdl=True)
        torch.cuda.synchronize()
    assert relative_error(out, exact.cpu()) < 1e-2


@early_launch
@pytest.mark.parametrize("times", range(3))
def test_activation_and_pick_wait(times):
    gate_up, logits = torch.randn(2, 5000, device="cuda").bfloat16(), torch.randn(2, 32000, device="cuda").bfloat16()
    place = room(2, 32000, "cuda")
    for warm in (True, False):
        out, tokens = nan(2, 2500, dtype=gate_up.dtype), torch.zeros(2, 2, dtype=torch.int64, device="cuda")
        swiglu(gate_up if warm else late(gate_up), out, pdl=True)
        pick(logits if warm else late(logits), *tokens, place, pdl=True)
        torch.cuda.synchronize()
    assert relative_error(out, swiglu_ref(gate_up.double()).cpu()) < 1e-2
    assert tokens.tolist() == [logits.float().argmax(-1).tolist()] * 2


# --- memory --------------------------------------------------------------------------------------------------------------


def test_a_thousand_generations_leave_memory_flat():
    one = Engine(
        adapted(routing="layer").to("cuda", torch.bfloat16),
        max_seq_len=64,
        max_batch=2,
        tokenizer=tokenizer(),
        prefill_chunk=16,
        kernels=True,
        graphs=True,
    )

    def generations(count):
        for n in range(count):
            whatever_a_user_does(one, n)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = generations(3 * KINDS)
    assert generations(1000) == before


def test_an_older_graph_is_not_freed_while_another_is_captured():
    """Held by a cycle, it is garbage from the last call of `run` on, which is the captured one."""
    x, old = torch.zeros(4, device="cuda"), [Graphs(torch.device("cuda"))]
    old[0].capture("old", lambda: x.add_(1))
    calls = []

    def run():
        calls.append(len(calls))
        if len(calls) == WARMUP + 1:
            cycle = [old.pop()]
            cycle.append(cycle)
            del cycle
        assert len([[] for _ in range(100_000)]) == 100_000  # enough new objects for the collector to start
        x.add_(1)

    new = Graphs(torch.device("cuda"))
    new.capture("new", run)
    x.zero_()
    new.replay("new")
    assert x.tolist() == [1.0] * 4
    assert gc.isenabled()


def test_an_interrupt_leaves_the_engine_usable(model):
    one = engine(model)
    wanted = one.generate(prompts(30), max_new_tokens=30, eos_token_id=())
    pieces = one._run(one._read(prompts(30), {"max_new_tokens": 30}, (), ()), one._record(None, False))
    for _ in range(5):
        next(pieces)
    pieces.close()  # with a step under way
    assert one.generate(prompts(30), max_new_tokens=30, eos_token_id=()) == wanted
