"""What every baseline shares with AdaFuseModel: attach and detach, loss, padding, generate, executions, refusals."""

import copy
import threading

import peft
import pytest
import torch
from accelerate import dispatch_model
from baseline_methods import ALL, COEF, METHODS, inputs
from families import BLOCKS, batch, family
from reference import language_model_loss, relative_error
from snapshots import differences, snapshot
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.baselines import (
    LayerwiseConfig,
    LayerwiseModel,
    MixLoraConfig,
    MixLoraModel,
    PescConfig,
    PescModel,
    RandomConfig,
)
from adafuse.baselines.gate import Ledger

# Where "nothing" means up to rounding: MixLoRA's weights, which sum to 1 so, multiply the FFN's own output; a fused kernel
# computes the base's product itself.
ROUNDED = {"mixlora", "fused"}


# Attach and detach


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALL)
def test_a_fresh_adapter_changes_nothing(method, dtype):
    given = inputs()
    with torch.no_grad():
        wanted = family("llama").build(dtype)(**given).logits
        for execution in ALL[method].attach()[0].executions if method in METHODS else ("reference",):
            model, tensors = ALL[method].attach(family("llama").build(dtype), filled=False)
            model.execution = execution
            got = model(**given).logits
            error = relative_error(got, wanted)
            bound = (
                0.0 if ROUNDED.isdisjoint((method, execution)) else {torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
            )
            assert error <= bound, execution
    assert all(not tensor.any() for name, tensor in tensors.items() if name.endswith("_b"))
    assert all(tensor.any() for name, tensor in tensors.items() if not name.endswith("_b"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ALL)
def test_detaching_gives_the_base_back(method, training):
    base = family("llama").build().train(training)
    base.model.embed_tokens.requires_grad_(False)
    before = snapshot(base)
    model, _ = ALL[method].attach(base)
    assert all(module.training == training for module in model.modules())
    model(**inputs())
    assert model.detach() is base
    assert differences(before, snapshot(base)) == []
    again, _ = ALL[method].attach(base)
    assert again(**inputs()).logits.isfinite().all()


@pytest.mark.parametrize("method", ALL)
def test_only_the_adapter_trains(method):
    model, tensors = ALL[method].attach()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == sum(t.numel() for t in tensors.values())
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    model.set_trainable("experts")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".router." in name)
    assert all(bank.a.requires_grad and bank.b.requires_grad for bank in model.banks.values())
    model.set_trainable("none")
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_routers_alone_can_train(method):
    model, _ = METHODS[method].attach()
    model.set_trainable("router")
    model.train()(**inputs()).loss.backward()
    moved = {name for name, gradient in model.adapter_tensors(grad=True).items() if gradient.any()}
    assert moved == {name for name in model.adapter_tensors() if name.endswith(".router.weight")}


@pytest.mark.parametrize("method", ALL)
def test_it_is_a_peft_model_that_cannot_merge(method):
    model, _ = ALL[method].attach()
    assert isinstance(model, peft.PeftModel)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.merge_and_unload()


@pytest.mark.parametrize("method", ALL)
def test_disable_adapter_is_the_backbone(method):
    model, _ = ALL[method].attach()
    given = inputs()
    with torch.no_grad():
        adapted, wanted = model(**given).logits, family("llama").build()(**given).logits
        with model.disable_adapter():
            output = model.train()(**given, output_router_logits=True)
        assert torch.equal(output.logits, wanted)
        assert output.aux_loss == 0
        assert torch.equal(model.eval()(**given).logits, adapted)


@pytest.mark.parametrize("method", ALL)
def test_a_copy_is_independent(method):
    model, _ = ALL[method].attach()
    twin = copy.deepcopy(model)
    given = inputs()
    with torch.no_grad():
        wanted = model(**given).logits
        for bank in twin.banks.values():
            bank.b.zero_()
        assert torch.equal(model(**given).logits, wanted)
        assert relative_error(twin(**given).logits, family("llama").build()(**given).logits) < 1e-6


@pytest.mark.parametrize("method", ALL)
def test_an_adapted_base_is_refused(method):
    model, _ = ALL[method].attach()
    with pytest.raises(ValueError, match="already carries a dynamic adapter"):
        AdaFuseModel(model.get_base_model())
    other = AdaFuseModel(family("llama").build(), AdaFuseConfig(r=2))
    with pytest.raises(ValueError, match="already carries a dynamic adapter"):
        ALL[method].attach(other.get_base_model())


@pytest.mark.parametrize("method", ALL)
def test_a_config_of_another_method_is_refused(method):
    wrong = PescConfig() if method != "pesc" else LayerwiseConfig()
    with pytest.raises(ValueError, match=f"config must be a {type(ALL[method].config).__name__}"):
        ALL[method].model(family("llama").build(), wrong)
    with pytest.raises(ValueError, match="config must be an AdaFuseConfig, got RandomConfig"):
        AdaFuseModel(family("llama").build(), RandomConfig())


@pytest.mark.parametrize("method", ALL)
def test_a_base_dispatched_by_accelerate(method, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    base = dispatch_model(
        family("llama").build(), device_map=places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    with torch.no_grad():
        wanted, bare = ALL[method].attach()[0](batch()).logits, base(batch()).logits
        model, _ = ALL[method].attach(base)
        assert torch.equal(model(batch()).logits, wanted)
        assert torch.equal(model.detach()(batch()).logits, bare)


@torch.no_grad()
@pytest.mark.parametrize("method", ALL)
def test_torch_compile_gives_the_same_logits(method):
    model, _ = ALL[method].attach()
    wanted = model(input_ids=batch(), use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        assert relative_error(compiled(input_ids=batch(), use_cache=False).logits, wanted) < 1e-5
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_failed_forward_leaves_the_model_usable(method):
    model, _ = METHODS[method].attach()
    wanted = model(batch()).logits
    handle = model.get_base_model().model.layers[1].self_attn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch())
    handle.remove()
    assert torch.equal(model(batch()).logits, wanted)


# Structure


@pytest.mark.parametrize(("model", "config"), [(PescModel, PescConfig(lora_r=2)), (MixLoraModel, MixLoraConfig(r=2))])
@pytest.mark.parametrize(
    ("name", "found"),
    [("gpt2", r"mlp \(c_fc, c_proj"), ("opt", "fc1; fc2"), ("phi", r"mlp \(activation_fn, fc1, fc2")],
)
def test_a_base_without_a_gated_ffn_is_refused(model, config, name, found):
    base = family(name).build()
    before = snapshot(base)
    message = rf"\({name}\) has no FFN .* gate_proj, up_proj, down_proj .*block 0 has .*{found}"
    with pytest.raises(ValueError, match=message):
        model(base, config)
    assert differences(before, snapshot(base)) == []


@pytest.mark.parametrize(("model", "config"), [(PescModel, PescConfig(lora_r=2)), (MixLoraModel, MixLoraConfig(r=2))])
def test_a_mixture_backbone_is_refused(model, config):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    with pytest.raises(ValueError, match="MixtralForCausalLM"):
        model(base, config)


def test_moral_names_the_linears_it_misses():
    with pytest.raises(ValueError, match=r"'down_proj' matches no linear of the blocks .*c_fc"):
        LayerwiseModel(family("gpt2").build(), LayerwiseConfig.moral())


def test_more_parts_than_blocks_are_refused():
    base = family("llama").build()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"names 4 parts of the blocks, and the model has 2 block"):
        LayerwiseModel(base, LayerwiseConfig.mola())
    assert differences(before, snapshot(base)) == []


def test_where_each_method_sits():
    linears = family("llama").linears
    ffn = [name for name in linears if name.startswith("mlp.")]
    expected = {
        "layerwise": (list(linears), list(linears)),
        "moral": (ffn, ffn),
        "pesc": (["mlp"], [*linears, "mlp"]),
        "mixlora": (["mlp"], list(linears)),
    }
    for method, (routers, banks) in expected.items():
        model, tensors = METHODS[method].attach()
        prefix = "model.layers.1."
        assert {n for n in tensors if n.startswith(prefix) and "router" in n} == {
            f"{prefix}{name}.router.weight" for name in routers
        }
        assert {path for path in model.banks if path.startswith(prefix)} == {f"{prefix}{name}" for name in banks}


# Loss and padding


@pytest.mark.parametrize("method", METHODS)
def test_loss_has_the_balance_loss_in_training_only(method):
    model, tensors = METHODS[method].attach()
    given = inputs()
    with torch.no_grad():
        wanted = METHODS[method].reference(family("llama").build(), model.adafuse_config, tensors, **given)
        language = language_model_loss(wanted.logits, given["labels"])
        evaluated, trained = model(**given), model.train()(**given)
        apart = model(**given, output_router_logits=True)
    assert relative_error(evaluated.loss, language) < 1e-5
    assert relative_error(trained.loss, language + COEF * wanted.aux_loss()) < 1e-5
    assert relative_error(apart.loss, language) < 1e-5
    assert relative_error(apart.aux_loss, wanted.aux_loss()) < 1e-5
    assert model.config.router_aux_loss_coef == COEF


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_padding_is_left_out_of_the_balance_loss(method, side):
    model, _ = METHODS[method].attach()
    alone = inputs(side)
    ids, mask = alone["input_ids"], alone["attention_mask"]
    extra = torch.full((2, 4), 7)
    parts = [extra, ids] if side == "left" else [ids, extra]
    masks = [torch.zeros_like(extra), mask] if side == "left" else [mask, torch.zeros_like(extra)]
    longer = {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks, 1)}
    other = {"input_ids": ids.masked_fill(mask == 0, 11), "attention_mask": mask}
    with torch.no_grad():
        losses = [
            model(**given, output_router_logits=True).aux_loss
            for given in ({"input_ids": ids, "attention_mask": mask}, longer, other)
        ]
        counted = model(input_ids=ids, output_router_logits=True).aux_loss
    assert relative_error(losses[1], losses[0]) < 1e-5
    assert relative_error(losses[2], losses[0]) < 1e-6
    assert relative_error(counted, losses[0]) > 1e-4, "the padding weighs nothing: a weak test"


# Generation


@pytest.mark.parametrize("method", ALL)
def test_token_by_token_equals_the_full_forward(method):
    model, _ = ALL[method].attach()
    ids = batch(rows=2, length=7)
    with torch.no_grad():
        full = model(input_ids=ids).logits
        cache = DynamicCache(config=model.get_base_model().config)
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split([3, 1, 1, 2], 1)
        ]
    assert relative_error(torch.cat(parts, 1), full) < 1e-5


@pytest.mark.parametrize("method", ALL)
def test_every_execution_generates_the_same_tokens(method):
    model, _ = ALL[method].attach()
    executions = model.executions if method in METHODS else ("reference", "fused")
    found = []
    for execution in executions:
        model.execution = execution
        found.append(model.generate(batch(rows=2, length=4), max_new_tokens=5, do_sample=False).tolist())
    assert found == [found[0]] * len(found)
    assert found[0] != family("llama").build().generate(batch(2, 4), max_new_tokens=5, do_sample=False).tolist()


# Executions


@pytest.mark.parametrize("method", METHODS)
def test_graph_has_no_shape_that_depends_on_data_and_published_has(method):
    """Fake tensors have shapes and no data: what asks for a value, or for as many rows as a value says, fails on them."""
    model, _ = METHODS[method].attach()
    for training in (False, True):
        for execution in [each for each in model.executions if each != "fused"]:
            model.train(training)
            model.execution = execution
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
                # A ready mask, in which transformers looks for nothing.
                given = {"input_ids": torch.zeros(2, 7, dtype=torch.long), "attention_mask": torch.zeros(2, 1, 7, 7)}
                given |= {"position_ids": torch.arange(7)[None], "use_cache": False}
                if execution == "published":
                    with pytest.raises(DynamicOutputShapeException):
                        model(**given)
                else:
                    model(**given)


@pytest.mark.parametrize("method", METHODS)
def test_unknown_executions_are_refused(method):
    model, _ = METHODS[method].attach()
    for value in ("switch", "auto", *{"graph", "published", "fused"}.difference(model.executions)):
        with pytest.raises(ValueError, match=r"is none that \w+Model has; allowed: 'graph'"):
            model.execution = value
    assert model.execution == "graph"


def test_fused_refuses_gradients_and_machines_without_a_gpu(monkeypatch):
    model, _ = METHODS["layerwise"].attach()
    model.execution = "fused"
    with pytest.raises(ValueError, match=r'set model\.execution = "graph" to train'):
        model(**inputs())
    monkeypatch.delenv("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="runs GPU kernels"):
            model.execution = "fused"


@torch.no_grad()
def test_two_threads_have_forwards_of_their_own():
    model, _ = METHODS["mixlora"].attach()
    batches = [batch(rows=1 + i, length=4 + i, seed=i) for i in range(4)]
    wanted = [model(input_ids=ids).logits for ids in batches]
    found = {}

    def forward(i):
        with torch.no_grad():
            found[i] = [model(input_ids=batches[i]).logits for _ in range(5)]

    threads = [threading.Thread(target=forward, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(logits, wanted[i]) for i in found for logits in found[i])


def test_routings_cover_every_router_and_need_an_enabled_adapter():
    model, _ = METHODS["mola"].attach()
    found = model.routings(batch(rows=3, length=5))
    assert isinstance(found, Ledger)
    assert len(found) == BLOCKS * len(family("llama").linears)
    routing = found["model.layers.1.mlp.up_proj"]
    assert routing.experts.shape == (3, 5, 1, 2)
    assert routing.probabilities.shape == (3, 5, 1, 5)
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        model.routings(batch())
