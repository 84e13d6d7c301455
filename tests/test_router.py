"""The router: initialisation, arithmetic in fp32, choice and weights, the balance loss, the vocabulary table."""

import pytest
import torch
from families import BLOCKS, HIDDEN, POSITIONAL, TOKEN_ONLY, VOCAB, batch, family, fill
from reference import relative_error, run

from adafuse import AdaFuseConfig, AdaFuseModel, Routing
from adafuse.router import table

BF16 = torch.bfloat16


def attached(name="llama", dtype=torch.float32, fill_it=True, **changes):
    """An adapted tiny model in evaluation mode, with random adapter tensors."""
    config = AdaFuseConfig(**{"r": 2, "num_experts": 5, "top_k": 2, "target_modules": "all-linear", **changes})
    model = AdaFuseModel(family(name).build(dtype), config)
    if fill_it:
        fill(model)
    return model.eval()


def set_router(model, weight):
    """Write the rows of the router's last layer, leaving everything else."""
    model.load_adapter_tensors({**model.adapter_tensors(), "router.weight": weight})


def loop(model, name="llama", dtype=torch.float32, **inputs):
    """The reference's run over the same adapter tensors."""
    fam = family(name)
    return run(fam.build(dtype), fam.blocks, model.adafuse_config, model.adapter_tensors(), **inputs)


# Initialisation


@pytest.mark.parametrize("routing", ["model", "layer"])
def test_router_starts_with_half_over_root_fan_in(routing):
    tensors = attached(fill_it=False, routing=routing, num_experts=128, router_hidden=0).adapter_tensors()
    weight = tensors["router.weight"]
    # 4096 numbers or more: their standard deviation is within 4 % of the true one with near certainty.
    assert weight.std().item() == pytest.approx(0.5 / HIDDEN**0.5, rel=0.05)
    assert abs(weight.mean().item()) < 0.05 * weight.std().item()
    assert weight.abs().max() > 3 * weight.std(), "not normal: a uniform distribution ends at 1.7 standard deviations"


def test_hidden_router_starts_with_half_over_root_fan_in_in_both_layers():
    tensors = attached(fill_it=False, num_experts=128, router_hidden=128).adapter_tensors()
    assert tensors["router.hidden.weight"].std().item() == pytest.approx(0.5 / HIDDEN**0.5, rel=0.05)
    assert tensors["router.weight"].std().item() == pytest.approx(0.5 / 128**0.5, rel=0.05)


def test_router_attributes_are_the_exchange_tensors():
    model = attached(router_hidden=8)
    tensors = model.adapter_tensors()
    assert torch.equal(model.router.weight, tensors["router.weight"])
    assert torch.equal(model.router.hidden.weight, tensors["router.hidden.weight"])
    assert model.router.hidden.bias is None
    assert attached(router_hidden=0).router.hidden is None


# Choice and weights


@pytest.mark.parametrize("router_hidden", [0, 8])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_weights_are_positive_sorted_and_sum_to_one(top_k, router_hidden):
    routing = attached(top_k=top_k, router_hidden=router_hidden, routing="layer").route(batch())
    assert isinstance(routing, Routing)
    assert routing.weights.shape == (2, 7, BLOCKS, top_k)
    assert (routing.weights > 0).all()
    assert (routing.weights.diff(dim=-1) <= 0).all(), "not best first"
    assert (routing.experts.sort(dim=-1).values.diff(dim=-1) > 0).all(), "an expert was chosen twice"
    assert (routing.experts >= 0).all()
    assert (routing.experts < 5).all()
    if top_k > 1:
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(2, 7, BLOCKS), rtol=1e-6, atol=1e-6)


def test_top_1_weight_is_the_probability():
    model = attached(top_k=1)
    weights = model.route(batch()).weights
    wanted = loop(model, input_ids=batch())
    best = torch.tensor([[token[0].max() for token in row] for row in wanted.probabilities])
    assert relative_error(weights[..., 0, 0], best) < 1e-5
    assert (weights < 0.99).all(), "the weight is 1: the probability was divided by itself"


@pytest.mark.parametrize("top_k", [1, 2])
def test_router_learns_from_the_language_model_loss(top_k):
    model = attached(top_k=top_k, aux_loss_coef=0.0).train()
    model(input_ids=batch(), labels=batch()).loss.backward()
    gradient = model.adapter_tensors(grad=True)["router.weight"]
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("routing", ["model", "layer"])
def test_ties_go_to_the_lower_index(routing, top_k):
    model = attached(routing=routing, top_k=top_k)
    decisions = BLOCKS if routing == "layer" else 1
    set_router(model, torch.zeros(decisions * 5, HIDDEN))
    routing = model.route(batch())
    assert (routing.experts == torch.arange(top_k)).all()
    assert (
        relative_error(routing.weights, torch.full((2, 7, decisions, top_k), 0.2 if top_k == 1 else 1 / top_k)) < 1e-6
    )


def test_ties_among_some_experts_go_to_the_lower_index():
    """Experts 1, 3 and 4 have the same row: where they are best, 1 and 3 are chosen; where they are worst, 0 and 2."""
    model = attached(num_experts=5, top_k=2)
    rows = torch.zeros(5, HIDDEN)
    rows[[1, 3, 4], 1:] = torch.randn(HIDDEN - 1).sign() / 4  # an odd number of them: no sum is 0
    set_router(model, rows)
    # The router makes these 1 and -1, whose products and sums are exact: a BLAS may add the fifth row's in another order than those of the
    # first four.
    embeddings = model.get_base_model().get_input_embeddings().weight.data
    embeddings.copy_(1024 * embeddings.sign())
    experts = model.route(torch.arange(VOCAB).view(1, -1)).experts[0, :, 0].tolist()
    assert {tuple(chosen) for chosen in experts} == {(1, 3), (0, 2)}


def test_one_expert_always_weighs_one():
    model = attached(num_experts=1, top_k=1)
    routing = model.route(batch())
    assert torch.equal(routing.experts, torch.zeros(2, 7, 1, 1, dtype=torch.int64))
    assert torch.equal(routing.weights, torch.ones(2, 7, 1, 1))
    with torch.no_grad():
        got, wanted = model(input_ids=batch()), loop(model, input_ids=batch())
    assert relative_error(got.logits, wanted.logits) < 1e-5


@pytest.mark.parametrize("name", TOKEN_ONLY)
@pytest.mark.parametrize("routing", ["model", "layer"])
def test_a_token_is_routed_alone_as_in_a_batch(name, routing):
    model = attached(name, routing=routing)
    ids = batch(rows=3, length=5)
    together = model.route(ids)
    for row in range(3):
        for position in range(5):
            alone = model.route(ids[row : row + 1, position : position + 1])
            assert torch.equal(alone.experts[0, 0], together.experts[row, position])
            torch.testing.assert_close(alone.weights[0, 0], together.weights[row, position], rtol=1e-5, atol=1e-6)


def test_route_works_under_gradients_off_and_leaves_the_mode_alone():
    model = attached().train()
    routing = model.route(batch())
    assert model.training
    assert not routing.weights.requires_grad


# Always in fp32


@pytest.mark.parametrize("router_hidden", [0, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_autocast_does_not_reach_the_router(name, router_hidden):
    model = attached(name, router_hidden=router_hidden, routing="layer").train()
    given = {"input_ids": batch(), "labels": batch(), "output_router_logits": True}
    plain, plain_aux = model.route(batch()), model(**given).aux_loss
    with torch.autocast("cpu", dtype=BF16):
        cast, output = model.route(batch()), model(**given)
    assert output.logits.dtype == BF16, "autocast was not active: a weak test"
    assert torch.equal(cast.experts, plain.experts)
    assert torch.equal(cast.weights, plain.weights)
    assert cast.weights.dtype == torch.float32
    assert output.aux_loss.dtype == torch.float32
    assert torch.equal(output.aux_loss, plain_aux)


@pytest.mark.parametrize("router_hidden", [0, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_router_of_a_bf16_model_computes_in_fp32(name, router_hidden):
    model = attached(name, BF16, router_hidden=router_hidden)
    routing = model.route(batch())
    wanted = loop(model, name, BF16, input_ids=batch())
    assert {tensor.dtype for tensor in model.adapter_tensors().values()} == {torch.float32}
    assert torch.equal(routing.experts, wanted.experts_tensor())
    assert relative_error(routing.weights, wanted.weights_tensor()) < 1e-5, "bf16 would err by more than 1e-3"


def test_casting_the_whole_model_keeps_the_router_in_fp32():
    """`model.to(bfloat16)` and `model.half()` are how users save memory; the router's arithmetic stays fp32."""
    routing = attached().to(BF16).route(batch())
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(2, 7, 1), rtol=1e-6, atol=1e-6)


# The balance loss


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("routing", ["model", "layer"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_aux_loss_equals_the_loop(routing, top_k, padding):
    model = attached(routing=routing, top_k=top_k)
    ids = batch()
    mask = torch.ones_like(ids)
    mask[1, {"none": slice(0, 0), "left": slice(0, 3), "right": slice(-3, None)}[padding]] = 0
    given = {"input_ids": ids} if padding == "none" else {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        got = model(**given, output_router_logits=True).aux_loss
        wanted = loop(model, **given).aux_loss()
    assert got.shape == ()
    assert relative_error(got, wanted) < 1e-5


def test_aux_loss_of_a_uniform_router_is_one():
    """f: the first K experts have share 1; P = 1/E for all; so E * K * 1/E / K = 1."""
    for top_k in (1, 2, 5):
        model = attached(top_k=top_k)
        set_router(model, torch.zeros(5, HIDDEN))
        aux = model(input_ids=batch(), output_router_logits=True).aux_loss
        assert aux.item() == pytest.approx(1.0, rel=1e-6)


def test_aux_loss_of_a_collapsed_router_is_num_experts():
    model = attached(top_k=1)
    ids = torch.full((1, 4), 7)  # One token only, and a router far in its favour: f = P = 1 for one expert of five.
    set_router(model, 100 * model.adapter_tensors()["router.weight"])
    assert model(input_ids=ids, output_router_logits=True).aux_loss.item() == pytest.approx(5.0, rel=1e-3)


# The vocabulary table


@pytest.mark.parametrize("name", TOKEN_ONLY)
@pytest.mark.parametrize("options", [("model", 0, 2), ("layer", 8, 1)], ids=str)
def test_table_is_what_route_says(name, options):
    routing, router_hidden, top_k = options
    model = attached(name, routing=routing, router_hidden=router_hidden, top_k=top_k)
    known = table(model)
    ids = batch(rows=4, length=9)
    routed = model.route(ids)
    assert isinstance(known, Routing)
    assert known.experts.shape == known.weights.shape == (VOCAB, BLOCKS if routing == "layer" else 1, top_k)
    assert (known.experts.dtype, known.weights.dtype) == (torch.int64, torch.float32)
    assert torch.equal(known.experts[ids], routed.experts)
    torch.testing.assert_close(known.weights[ids], routed.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POSITIONAL)
def test_table_is_refused_where_position_matters(name):
    with pytest.raises(ValueError, match="position"):
        table(attached(name))


def test_table_leaves_the_model_as_it_was():
    model = attached().train()
    ids = batch()
    before = model(input_ids=ids).logits
    table(model)
    assert model.training
    assert torch.equal(model(input_ids=ids).logits, before)
