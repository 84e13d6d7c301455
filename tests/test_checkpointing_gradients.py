"""Gradient checkpointing: a recompute in the backward pass uses the routing, and the adapter state, of its own forward."""

import warnings

import pytest
import torch
from families import NAMES, batch, family, fill
from reference import relative_error

from adafuse import AdaFuseConfig, AdaFuseModel


def attached(name="llama", checkpointing=True, **changes) -> AdaFuseModel:
    """An adapted tiny model in training mode, with random adapter tensors."""
    settings = {"r": 2, "num_experts": 4, "top_k": 2, "routing": "layer", "aux_loss_coef": 0.5, **changes}
    model = AdaFuseModel(family(name).build(), AdaFuseConfig(**settings))
    fill(model)
    if checkpointing:
        enable(model)
    return model.train()


def enable(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames the method
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)


def one(seed: int) -> dict[str, torch.Tensor]:
    """A batch of its own length for each seed, so that a routing of another forward does not even fit."""
    ids = batch(rows=2, length=5 + seed, seed=seed)
    return {"input_ids": ids, "labels": ids}


def same_size(seed: int) -> dict[str, torch.Tensor]:
    """Batches of one size, so that a routing of another forward would fit, and be wrong in silence."""
    ids = batch(rows=2, length=7, seed=seed)
    return {"input_ids": ids, "labels": ids}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: gradient.clone() for name, gradient in model.adapter_tensors(grad=True).items()}


def assert_equal(got, wanted, tolerance=1e-5):
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


def runs_of_a_linear(model, name):
    """A list that grows by one at each run of the second block's first linear, recomputes included."""
    fam, calls = family(name), []
    path = next(each for each in fam.paths() if each.startswith(f"{fam.blocks}.1."))
    model.get_base_model().get_submodule(path).register_forward_hook(lambda *_: calls.append(path))
    return calls


@pytest.mark.parametrize("routing", ["model", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_without_checkpointing(name, routing):
    checked, plain = attached(name, routing=routing), attached(name, False, routing=routing)
    calls = runs_of_a_linear(checked, name)
    for model in (checked, plain):
        model(**one(3)).loss.backward()
    assert len(calls) == 2, f"{len(calls)} runs of a linear: checkpointing was not active"
    assert_equal(gradients(checked), gradients(plain))


@pytest.mark.parametrize("inputs", [one, same_size])
@pytest.mark.parametrize("routing", ["model", "layer"])
def test_two_forwards_before_one_backward(routing, inputs):
    checked, plain = attached(routing=routing, top_k=1), attached(checkpointing=False, routing=routing, top_k=1)
    for model in (checked, plain):
        (model(**inputs(3)).loss + 2 * model(**inputs(4)).loss).backward()
    apart = attached(checkpointing=False, routing=routing, top_k=1)
    apart(**inputs(3)).loss.backward()
    (2 * apart(**inputs(4)).loss).backward()
    assert_equal(gradients(checked), gradients(plain))
    assert_equal(gradients(checked), gradients(apart))


def test_two_forwards_with_the_backwards_in_either_order():
    wanted = attached(checkpointing=False)
    for seed in (3, 4):
        wanted(**same_size(seed)).loss.backward()
    for order in ((0, 1), (1, 0)):
        model = attached()
        losses = [model(**same_size(seed)).loss for seed in (3, 4)]
        for index in order:
            losses[index].backward()
        assert_equal(gradients(model), gradients(wanted))


def test_a_forward_without_the_adapter_in_between():
    """DPO's order: policy forward, reference forward with the adapter off, then the backward."""
    checked, plain = attached(), attached(checkpointing=False)
    for model in (checked, plain):
        policy = model(**same_size(3)).loss
        with model.disable_adapter():
            reference = model(**same_size(4)).loss
        (policy * reference.detach() + policy).backward()
    assert_equal(gradients(checked), gradients(plain))


def test_a_backward_inside_disable_adapter_recomputes_with_the_adapter():
    checked, plain = attached(), attached(checkpointing=False)
    for model in (checked, plain):
        loss = model(**same_size(3)).loss
        with model.disable_adapter():
            loss.backward()
    assert_equal(gradients(checked), gradients(plain))


def test_a_backward_of_the_backbone_recomputes_without_the_adapter():
    """Gradients of the embeddings, through a forward with the adapter off and, in the same backward, one with it on."""
    found = []
    for model in (attached(), attached(checkpointing=False)):
        embeds = model.get_input_embeddings()(batch()).detach()
        off, on = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
        with model.disable_adapter():
            bare = model(inputs_embeds=off, labels=batch()).loss
        (bare + model(inputs_embeds=on, labels=batch()).loss).backward()
        found.append({**gradients(model), "off": off.grad, "on": on.grad})
    assert_equal(*found)
    assert relative_error(found[0]["on"], found[0]["off"]) > 0.1, "the adapter does next to nothing: a weak test"


def test_a_route_call_between_forward_and_backward_changes_nothing():
    checked, plain = attached(), attached(checkpointing=False)
    for model in (checked, plain):
        loss = model(**same_size(3)).loss
        model.route(same_size(4)["input_ids"])
        loss.backward()
    assert_equal(gradients(checked), gradients(plain))


def test_a_failed_forward_between_forward_and_backward_changes_nothing():
    checked, plain = attached(), attached(checkpointing=False)
    for model in (checked, plain):
        loss = model(**same_size(3)).loss
        last = model.get_base_model().get_submodule("model.layers.1.mlp.down_proj")
        handle = last.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**same_size(4))
        handle.remove()
        loss.backward()
    assert_equal(gradients(checked), gradients(plain))


def _fail(*_):
    raise RuntimeError("on purpose")


def test_dropout_is_drawn_again_in_the_recompute():
    checked, plain = attached(lora_dropout=0.3), attached(checkpointing=False, lora_dropout=0.3)
    for model in (checked, plain):
        torch.manual_seed(11)
        model(**one(3)).loss.backward()
    assert_equal(gradients(checked), gradients(plain))


def test_under_autocast():
    checked, plain = attached(), attached(checkpointing=False)
    for model in (checked, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**one(3)).loss
        loss.backward()
    assert_equal(gradients(checked), gradients(plain), tolerance=1e-3)


def test_enabled_on_the_base_before_attaching():
    base = family("llama").build()
    enable(base)
    model = AdaFuseModel(base, AdaFuseConfig(r=2, num_experts=4, routing="layer", aux_loss_coef=0.5))
    fill(model)
    plain = attached(checkpointing=False)
    for each in (model.train(), plain):
        each(**one(3)).loss.backward()
    assert_equal(gradients(model), gradients(plain))


def test_disabled_again():
    model, plain = attached(), attached(checkpointing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_disable()
    calls = runs_of_a_linear(model, "llama")
    for each in (model, plain):
        each(**one(3)).loss.backward()
    assert len(calls) == 1
    assert_equal(gradients(model), gradients(plain), tolerance=0.0)


def _enable_reentrant_then_attach_and_train(base):
    enable(base, use_reentrant=True)
    AdaFuseModel(base, AdaFuseConfig(r=2, num_experts=4)).train()(**one(3))


def _attach_then_enable_reentrant_and_train(base):
    model = AdaFuseModel(base, AdaFuseConfig(r=2, num_experts=4)).train()
    enable(model, use_reentrant=True)
    model(**one(3))


@pytest.mark.parametrize("order", [_enable_reentrant_then_attach_and_train, _attach_then_enable_reentrant_and_train])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_reentrant_checkpointing_is_refused(order, name):
    """At the latest by the first forward in training: before any gradient could be wrong."""
    with pytest.raises(ValueError, match="reentrant"):
        order(family(name).build())
