"""Each baseline against the loop over tokens and experts: logits, loss, gradients, in both executions and on several families."""

import copy

import pytest
import torch
from baseline_methods import COEF, GATED, METHODS, inputs
from families import NAMES, family
from reference import language_model_loss, leaves, relative_error, relative_rms

LAYERWISE = [(name, "llama") for name in ("mola", "moral")] + [("layerwise", name) for name in NAMES]
CASES = LAYERWISE + [(method, name) for method in ("pesc", "mixlora") for name in GATED]
ACTIVATIONS = {"gemma3": lambda z: torch.nn.functional.gelu(z, approximate="tanh")}
ACTIVATIONS["gemma3-multimodal"] = ACTIVATIONS["gemma3"]


def loop(method, name, config, tensors, training=False, **given):
    extra = {"act": ACTIVATIONS.get(name)} if method == "mixlora" else {}
    base = family(name).build().train(training)
    return METHODS[method].reference(base, config, tensors, **extra, **given)


def executions(method):
    return METHODS[method].model.executions


@pytest.mark.parametrize(("method", "name"), CASES)
def test_logits_and_loss_equal_the_loop(method, name):
    model, tensors = METHODS[method].attach(family(name).build())
    given = inputs()
    with torch.no_grad():
        wanted = loop(method, name, model.adafuse_config, tensors, **given)
        bare = family(name).build()(**given)
    real = given["attention_mask"].bool()
    assert relative_error(bare.logits[real], wanted.logits[real]) > 0.1, "the adapter does next to nothing: a weak test"
    for execution in executions(method):
        model.execution = execution
        with torch.no_grad():
            got = model(**given)
        assert relative_error(got.logits[real], wanted.logits[real]) < 1e-5, execution
        assert relative_error(got.loss, language_model_loss(wanted.logits, given["labels"])) < 1e-5, execution


@pytest.mark.parametrize("execution", ["graph", "published"])
@pytest.mark.parametrize(("method", "name"), CASES)
def test_gradients_equal_the_loop(method, name, execution):
    if execution not in executions(method):
        pytest.skip(f"{method} has no execution {execution!r}")
    model, tensors = METHODS[method].attach(family(name).build())
    tensors = leaves(tensors)
    model.train()
    model.execution = execution
    given = inputs("right")
    loss = model(**given).loss
    loss.backward()

    wanted = loop(method, name, model.adafuse_config, tensors, training=True, **given)
    wanted_loss = language_model_loss(wanted.logits, given["labels"]) + COEF * wanted.aux_loss()
    wanted_loss.backward()

    assert relative_error(loss, wanted_loss) < 1e-5
    gradients = model.adapter_tensors(grad=True)
    assert sorted(gradients) == sorted(tensors)
    errors = {name: relative_error(gradients[name], tensors[name].grad) for name in tensors}
    assert {name: error for name, error in errors.items() if error > 1e-4} == {}


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("method", ["layerwise", "pesc", "mixlora"])
def test_other_numbers_of_chosen_experts(method, top_k):
    model, tensors = METHODS[method].attach(top_k=top_k)
    tensors = leaves(tensors)
    given = inputs("right")
    model.train()(**given).loss.backward()
    wanted = loop(method, "llama", model.adafuse_config, tensors, training=True, **given)
    (language_model_loss(wanted.logits, given["labels"]) + COEF * wanted.aux_loss()).backward()
    gradients = model.adapter_tensors(grad=True)
    errors = {name: relative_error(gradients[name], tensors[name].grad) for name in tensors}
    assert {name: error for name, error in errors.items() if error > 1e-4} == {}
    routers = [name for name in gradients if name.endswith("router.weight")]
    assert all(gradients[name].any() for name in routers), "a router without a gradient"


@pytest.mark.parametrize("method", METHODS)
def test_routings_are_those_of_the_loop(method):
    model, tensors = METHODS[method].attach()
    given = {name: value for name, value in inputs().items() if name != "labels"}
    with torch.no_grad():
        wanted = loop(method, "llama", model.adafuse_config, tensors, **given)
    found = model.routings(**given)
    assert set(found) == set(wanted.routed)
    for path, routing in found.items():
        chosen, weights, probabilities = zip(*wanted.routed[path], strict=True)
        assert routing.experts.dtype == torch.int64
        assert routing.experts.flatten(0, 2).tolist() == list(map(list, chosen))
        assert relative_error(routing.weights.flatten(0, 2), torch.stack([torch.stack(w) for w in weights])) < 1e-5
        assert relative_error(routing.probabilities.flatten(0, 2), torch.stack(probabilities)) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_right_to_rounding(method, dtype, bound):
    """Each routed linear or FFN against itself in double, on the inputs it really had: nothing is amplified on the way."""
    model, _ = METHODS[method].attach(family("llama").build(dtype))
    errors = {}
    for name, module in list(model.named_modules()):
        if hasattr(module, "router"):
            twin = copy.deepcopy(module).double()

            def compare(_, args, output, name=name, twin=twin):
                assert output.dtype == dtype
                errors[name, model.execution] = relative_rms(output, twin(args[0].double()))

            module.register_forward_hook(compare)
    with torch.no_grad():
        differentiable = [each for each in executions(method) if each != "fused"]  # whose kernels know no double
        for execution in differentiable:
            model.execution = execution
            model(input_ids=inputs()["input_ids"])
    routers = sum(name.endswith("router.weight") for name in model.adapter_tensors())
    assert len(errors) == routers * len(differentiable)
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("execution", ["graph", "published"])
@pytest.mark.parametrize("method", METHODS)
def test_training_under_autocast(method, execution):
    if execution not in executions(method):
        pytest.skip(f"{method} has no execution {execution!r}")
    plain, _ = METHODS[method].attach()
    mixed, _ = METHODS[method].attach()
    mixed.execution = execution
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixed.train()(**inputs()).loss
    loss.backward()
    assert relative_error(loss, plain.train()(**inputs()).loss) < 0.03
    gradients = mixed.adapter_tensors(grad=True)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


@torch.no_grad()
@pytest.mark.parametrize("execution", ["graph", "published"])
@pytest.mark.parametrize("method", METHODS)
def test_dropout_touches_the_experts_and_not_the_router(method, execution):
    if execution not in executions(method):
        pytest.skip(f"{method} has no execution {execution!r}")
    dropouts = {name: 0.5 for name in ("lora_dropout", "adapter_dropout") if hasattr(METHODS[method].config, name)}
    model, _ = METHODS[method].attach(**dropouts)
    model.execution = execution
    given = {"input_ids": inputs()["input_ids"]}
    first = METHODS[method].attach()[0].routings(**given)
    evaluated = model(**given).logits
    assert torch.equal(model(**given).logits, evaluated)
    model.train()
    assert not torch.allclose(model(**given).logits, evaluated)
    # The first router of all sees what no dropout has touched yet.
    path = next(iter(first))
    dropped = model.routings(**given)
    if method in ("layerwise", "mola"):
        assert torch.equal(dropped[path].experts, first[path].experts)
    torch.manual_seed(3)
    one = model(**given).logits
    torch.manual_seed(3)
    assert torch.equal(model(**given).logits, one)
