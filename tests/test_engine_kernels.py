"""The engine's steps on kernels against HuggingFace. On a CPU the kernels run in Triton's interpreter, so texts are short here."""

from types import SimpleNamespace

import pytest
import torch
from engine_models import adapted, bare, generated, prompt
from reference import relative_error

pytest.importorskip("triton")

from adafuse import Engine, switching
from adafuse.costs import fused_form
from adafuse.engine.runner import Runner
from adafuse.ops.switch import switch

pytestmark = pytest.mark.usefixtures("few_programs")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = 200 if torch.cuda.is_available() else 6
ADAPTERS = {
    None: None,
    "model": {"routing": "model"},
    "layer": {"routing": "layer"},
    "shared": {"routing": "layer", "shared_rank": 3, "router_hidden": 6, "num_experts": 5, "r": 3, "top_k": 1},
    "partial": {"target_modules": ["q_proj", "o_proj", "up_proj"], "top_k": 4},
}


def a_model(name="llama", adapter=None, dtype=torch.float32, base=None, **settings):
    chosen = ADAPTERS[adapter] or settings
    model = adapted(name, dtype, base=base, **chosen) if chosen else bare(name, dtype, **(base or {}))
    return model.to(DEVICE)


def engine(model, **options) -> Engine:
    return Engine(model, **{"max_seq_len": 256, "max_batch": 4, "prefill_chunk": 32, "kernels": True, **options})


def without_kernels(model) -> Engine:
    return engine(model, kernels=False, graphs=False)


@pytest.mark.parametrize(
    ("name", "adapter", "base"),
    [
        ("llama", None, {}),
        ("llama", "model", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", "partial", {"num_key_value_heads": 1, "head_dim": 16}),
        ("mistral", "layer", {"sliding_window": 70}),
        ("qwen2", "shared", {}),
        ("qwen3", "model", {}),
    ],
)
def test_the_tokens_are_those_of_huggingface(name, adapter, base):
    model, ids = a_model(name, adapter, base=base), prompt(41 if COUNT == 200 else 130)
    wanted = generated(model, ids, COUNT)
    assert engine(model).generate([ids], max_new_tokens=len(wanted))[0].ids == wanted


def test_a_batch_of_different_lengths_is_padded_and_each_is_alone():
    model = a_model("mistral", "layer")
    prompts, lengths = [prompt(length, seed) for seed, length in enumerate((1, 70, 33))], [COUNT, 2, 4]
    one = engine(model)
    got = one.generate(prompts, max_new_tokens=lengths, return_routing=True, logprobs=2)
    for ids, length, each in zip(prompts, lengths, got, strict=True):
        assert each.ids == generated(model, ids, length)
        wanted = model.route(torch.tensor([ids + each.ids[:-1]], device=DEVICE))
        assert torch.equal(each.routing.experts, wanted.experts[0])
        torch.testing.assert_close(each.routing.weights, wanted.weights[0])
    exact = without_kernels(model).generate(prompts, max_new_tokens=lengths, logprobs=2)
    for mine, theirs in zip(got, exact, strict=True):
        assert [[i for i, _ in each.top] for each in mine.logprobs] == [[i for i, _ in e.top] for e in theirs.logprobs]
        for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert abs(a.logprob - b.logprob) < 1e-4


def test_sampling_draws_the_same():
    model, prompts = a_model("llama", "model"), [prompt(20), prompt(9, 1)]
    settings = {
        "max_new_tokens": min(COUNT, 20),
        "temperature": [0.8, 0.0],
        "top_k": [20, 0],
        "repetition_penalty": 1.3,
    }
    settings |= {"seed": [3, 4], "min_new_tokens": 3, "eos_token_id": list(range(40))}
    got = engine(model).generate(prompts, **settings)
    assert [each.ids for each in got] == [each.ids for each in without_kernels(model).generate(prompts, **settings)]


@pytest.mark.parametrize(("rows", "form"), [(1, "decode"), (4, "decode"), (4, "crowd")])
@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [("layer", torch.bfloat16), ("model", torch.float16), ("shared", torch.bfloat16), ("partial", torch.bfloat16)],
)
def test_half_precision_is_as_exact_as_plain_pytorch(monkeypatch, adapter, dtype, rows, form):
    """The logits of one step, against the same weights in fp32; the interpreter cuts bits off where a GPU rounds."""
    monkeypatch.setattr("adafuse.engine.runs.common_form", lambda *_: form)
    model, ids = a_model("qwen3", adapter, dtype), [prompt(40 - row, row) for row in range(rows)]
    exact = a_model("qwen3", adapter)
    exact.get_base_model().load_state_dict(model.get_base_model().state_dict())
    engines = [engine(model), without_kernels(model), without_kernels(exact)]
    logits = []
    for each in engines:
        each.generate(ids, max_new_tokens=1)
        each._runner.tokens[:rows] = torch.arange(7, 7 + rows)
        each._runner.step(rows, adapted=True)
        logits.append(each._runner.logits[:rows].float())
    mine, theirs = (relative_error(each, logits[2]) for each in logits[:2])
    assert mine < 3 * theirs
    assert kinds_of_runs(engines[0], rows) == {"DecodeRun" if form == "decode" else "CrowdRun"}


def kinds_of_runs(engine, rows):
    return {type(run).__name__ for group in engine._runner._kernel_step(rows, True).runs.of_groups for run in group}


def test_a_step_takes_one_form_where_its_groups_would_take_several():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    model = a_model(
        "llama", dtype=torch.bfloat16, base={**sizes, "num_key_value_heads": 4}, num_experts=8, r=4, top_k=2
    )
    groups = {"qkv": (64, 192, 3), "o": (64, 64, 1), "gate_up": (64, 256, 2), "down": (128, 64, 1)}
    apart = {fused_form(group, model.adafuse_config, 4, 2, among=("decode", "crowd")) for group in groups.values()}
    assert apart == {"decode", "crowd"}
    one = engine(model)
    one.generate([prompt(9 - row, row) for row in range(4)], max_new_tokens=1)
    assert len(kinds_of_runs(one, 4)) == 1


def test_weights_that_change_later_count():
    model, ids = a_model("llama", "model", torch.bfloat16), prompt(20)
    one = engine(model)
    before = one.generate([ids], max_new_tokens=5)[0].ids
    packed = one._addresses()
    for bank in model.banks.values():
        bank.b.data.mul_(-3)
    after = one.generate([ids], max_new_tokens=5)[0].ids
    assert one._addresses() == packed  # a captured step reads the new casts where the old ones were
    assert after == engine(model).generate([ids], max_new_tokens=5)[0].ids != before
    model.eval()  # which drops the casts
    assert one.generate([ids], max_new_tokens=5)[0].ids == after


def test_a_disabled_adapter_is_the_backbone():
    model, ids = a_model("llama", "model"), prompt(20)
    one = engine(model)
    with_adapter = one.generate([ids], max_new_tokens=4)[0].ids
    with model.disable_adapter():
        assert one.generate([ids], max_new_tokens=4)[0].ids == generated(a_model(), ids, 4) != with_adapter
    assert one.generate([ids], max_new_tokens=4)[0].ids == with_adapter


def test_logits_that_are_no_numbers_are_reported_and_do_not_stay():
    model, ids = a_model(), prompt(20)
    one = engine(model)
    wanted = one.generate([ids], max_new_tokens=3)
    weight = model.model.layers[0].self_attn.v_proj.weight
    kept = weight.data.clone()
    pieces = one._run(one._read([ids], {"max_new_tokens": 9}, (), ()), one._record(None, False))
    next(pieces)
    weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"logits of prompt 0 after [12] new tokens are NaN or infinite"):
        for _ in pieces:
            pass
    weight.data.copy_(kept)
    assert one.generate([ids], max_new_tokens=3) == wanted


# --- switching -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*in_place")
@pytest.mark.parametrize("source", ["pristine", "in_place"])
@pytest.mark.parametrize("adapter", ["layer", "shared"])
def test_switched_weights_give_the_same_tokens(source, adapter):
    model, ids = a_model("llama", adapter), prompt(20)
    wanted = generated(model, ids, COUNT if source == "pristine" else min(COUNT, 20))  # in place weights drift
    before = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    model.switch_source = source
    model.execution = "switch"
    one = engine(model)
    for _ in range(2):
        got = one.generate([ids], max_new_tokens=len(wanted), return_routing=True)[0]
        assert got.ids == wanted
        assert torch.equal(
            got.routing.experts, model.route(torch.tensor([ids + wanted[:-1]], device=DEVICE)).experts[0]
        )
    with model.disable_adapter():
        assert one.generate([ids], max_new_tokens=3)[0].ids == generated(a_model(), ids, 3)
    model.execution = "auto"
    for name, tensor in model.get_base_model().state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0 if source == "pristine" else 1e-4)
    assert one.generate([ids], max_new_tokens=len(wanted))[0].ids == wanted


@pytest.mark.filterwarnings("ignore:.*in_place")
@pytest.mark.parametrize("moment", ["before", "behind"])
@pytest.mark.parametrize("launch", [1, 2])
@pytest.mark.parametrize("source", ["pristine", "in_place"])
def test_an_interrupt_within_a_switch_leaves_no_wrong_weights(monkeypatch, source, launch, moment):
    """The first launch of a generation begins the merging, the second is a step's."""
    model, ids, calls = a_model("llama", "shared"), prompt(9), []
    before = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    model.switch_source = source
    model.execution = "switch"
    one = engine(model, max_batch=1, graphs=False)
    wanted = one.generate([ids], max_new_tokens=3)[0].ids

    def interrupted(*given, **options):
        calls.append(1)
        if len(calls) != launch or moment == "behind":
            switch(*given, **options)
        if len(calls) == launch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(switching, "switch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.generate([ids], max_new_tokens=3)
    if source == "in_place":
        for use in (lambda: one.generate([ids], max_new_tokens=3), model.get_base_model().state_dict):
            with pytest.raises(ValueError, match="was interrupted, so the base's weights are unknown"):
                use()
        return
    assert one.generate([ids], max_new_tokens=3)[0].ids == wanted
    model.execution = "auto"
    for name, tensor in model.get_base_model().state_dict().items():
        assert torch.equal(tensor, before[name])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*in_place")
@pytest.mark.parametrize("source", ["pristine", "in_place"])
def test_an_interrupt_within_a_switch_of_huggingfaces_forward(monkeypatch, source):
    """Behind the launch, so that the weights hold what `old` does not say, and the next token has the experts that it says."""
    model, tokens = a_model("llama", "layer"), torch.tensor([[[3]], [[5]]], device=DEVICE)
    assert not torch.equal(*(model.route(each).experts for each in tokens))
    model.switch_source = source
    model.execution = "switch"
    wanted = model(input_ids=tokens[0]).logits

    def interrupted(*given, **options):
        switch(*given, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(switching, "switch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=tokens[1])
    if source == "in_place":
        with pytest.raises(ValueError, match="was interrupted, so the base's weights are unknown"):
            model(input_ids=tokens[0])
    else:
        assert torch.equal(model(input_ids=tokens[0]).logits, wanted)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*in_place")
@pytest.mark.parametrize("where", ["engine", "huggingface"])
def test_a_switch_that_is_refused_leaves_the_weights_known(monkeypatch, where):
    """Before the first launch nothing is written: a GPU without room for the kernel must not cost the model."""
    model, ids = a_model("llama", "shared"), prompt(9)
    before = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    model.switch_source = "in_place"
    model.execution = "switch"
    one = engine(model, max_batch=1, graphs=False)

    def refused(*_, **__):
        raise RuntimeError("out of resources")

    with monkeypatch.context() as patch:
        patch.setattr(switching, "switch", refused)
        with pytest.raises(RuntimeError, match="out of resources"):
            one.generate([ids], 3) if where == "engine" else model(input_ids=torch.tensor([[3]], device=DEVICE))
    model.execution = "auto"
    for name, tensor in model.get_base_model().state_dict().items():
        assert torch.equal(tensor, before[name])


def test_several_prompts_cannot_be_switched():
    model = a_model("llama", "model")
    model.execution = "switch"
    with pytest.raises(ValueError, match="one prompt at a time; got 2"):
        engine(model).generate([[1], [2]])


# --- what is refused -------------------------------------------------------------------------------------------------


def hooked():
    model = a_model()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


def quantised():
    model = a_model()
    other = type("Linear4bit", (torch.nn.Linear,), {})(32, 16, bias=False, device=DEVICE)
    model.model.layers[0].self_attn.k_proj = other
    return model


def half_biased():
    model = a_model()
    model.model.layers[0].self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(16, device=DEVICE))
    return model


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (a_model, {"max_batch": 9}, "max_batch=9: the kernels take up to 8 sequences; lower it, or pass .*kernels=False"),
        (hooked, {}, "block 1, gate_up: the linear has hooks"),
        (quantised, {}, "block 0, qkv: a Linear4bit is no plain nn.Linear"),
        (half_biased, {}, "block 0, qkv: some of the linears have a bias and some have none"),
        (lambda: a_model(lora_alpha=0.0), {}, "lora_alpha=0 switches the experts off"),
        (lambda: a_model(base={"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 32}), {}, "32 heads a key"),
        (a_model, {"kernels": "yes"}, "kernels='yes': allowed are True, False and None"),
        (a_model, {"graphs": 1}, "graphs=1: allowed are True, False and None"),
    ],
)  # fmt: skip
def test_what_the_kernels_do_not_take_is_refused(make, options, says):
    with pytest.raises(ValueError, match=says):
        engine(make(), **options)


def test_what_only_a_gpu_has_is_refused_elsewhere(monkeypatch):
    model = bare()
    with pytest.raises(ValueError, match="graphs=True captures CUDA graphs, and the model is on cpu; move it to a GPU"):
        Engine(model, graphs=True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError,
        match="kernels=True runs GPU kernels, and the model is on cpu; move it to a GPU, or leave kernels out",
    ):
        Engine(model, kernels=True)


def test_a_linear_that_gets_a_hook_later_is_refused():
    model = a_model()
    one = engine(model)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks, which the kernels would not run"):
        one.generate([[1]])


@pytest.mark.parametrize(
    ("capability", "early"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 1), True)]
)
def test_kernels_start_early_only_where_the_gpu_has_it(monkeypatch, capability, early):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    asked = []
    step = SimpleNamespace(
        run=lambda *_, pdl: asked.append(("run", pdl)), pick=lambda *_, pdl, **__: asked.append(("pick", pdl))
    )
    runner = SimpleNamespace(_kernel_step=lambda *_: step, picked=[0], advance=[1], _last=7)
    tokens = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    Runner._step_on_kernels(runner, 1, True, SimpleNamespace(plain=True), tokens, tokens)
    assert asked == [("run", early), ("pick", early)]
