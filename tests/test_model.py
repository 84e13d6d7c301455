"""AdaFuseModel: targets, refusals, loss, padding, dropout, config."""

import copy
import warnings

import pytest
import torch
from families import BLOCKS, HIDDEN, VOCAB, batch, family, fill
from reference import language_model_loss, relative_error, run
from snapshots import differences, snapshot
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.router import balance_loss

COEF = 0.25


def config(**changes) -> AdaFuseConfig:
    return AdaFuseConfig(**{"r": 2, "num_experts": 4, "top_k": 2, "aux_loss_coef": COEF, **changes})


def attached(name="llama", **changes) -> AdaFuseModel:
    """An adapted tiny model in evaluation mode, with random adapter tensors."""
    model = AdaFuseModel(family(name).build(), config(**changes))
    fill(model)
    return model.eval()


def loop(model, name="llama", **inputs):
    fam = family(name)
    return run(fam.build(), fam.blocks, model.adafuse_config, model.adapter_tensors(), **inputs)


def padded(side: str, padding_id: int) -> dict[str, torch.Tensor]:
    """Row 0 has 7 tokens, row 1 has 4 and three positions of padding, which hold `padding_id`."""
    ids = batch()
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, padding_id), "attention_mask": mask}


def tiny_llama_config():
    return family("llama").build().config


# Targets


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["q_proj", "down_proj"], ["0.self_attn.q_proj", "0.mlp.down_proj", "1.self_attn.q_proj", "1.mlp.down_proj"]),
        (["1.self_attn.q_proj", "mlp.up_proj"], ["0.mlp.up_proj", "1.self_attn.q_proj", "1.mlp.up_proj"]),
        (["model.layers.0.mlp.gate_proj"], ["0.mlp.gate_proj"]),
    ],
)
def test_targets_are_name_suffixes(targets, wanted):
    model = attached(target_modules=targets, routing="layer")
    assert list(model.banks) == [f"model.layers.{name}" for name in wanted]
    with torch.no_grad():
        got = model(input_ids=batch())
    assert relative_error(got.logits, loop(model, input_ids=batch()).logits) < 1e-5


@pytest.mark.parametrize(
    "targets",
    [["nothing_proj"], ["proj"], ["q_proj", "nothing_proj"], ["self_attn"], ["input_layernorm"], ["embed_tokens"]],
    ids=str,
)
def test_a_target_that_matches_no_linear_is_refused_by_name(targets):
    base = family("llama").build()
    before = snapshot(base)
    with pytest.raises(ValueError, match=targets[-1]):
        AdaFuseModel(base, config(target_modules=targets))
    assert differences(before, snapshot(base)) == []


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]], ids=str)
def test_the_head_is_refused(targets):
    base = family("llama").build()
    before = snapshot(base)
    with pytest.raises(ValueError, match="head"):
        AdaFuseModel(base, config(target_modules=targets))
    assert differences(before, snapshot(base)) == []


def test_a_linear_outside_the_blocks_is_refused():
    base = family("opt-projected").build()
    before = snapshot(base)
    with pytest.raises(ValueError, match="project_in"):
        AdaFuseModel(base, config(target_modules=["project_in"]))
    assert differences(before, snapshot(base)) == []


# Bases


def _not_causal_lms():
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = LlamaConfig(vocab_size=VOCAB, **llama)
    bert = BertConfig(vocab_size=VOCAB, **llama)
    t5 = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return {
        "no head": lambda: LlamaModel(small),
        "masked": lambda: BertForMaskedLM(bert),
        "classifier": lambda: LlamaForSequenceClassification(small),
        "encoder-decoder": lambda: T5ForConditionalGeneration(t5),
    }


@pytest.mark.parametrize("kind", list(_not_causal_lms()))
def test_a_base_that_is_no_causal_lm_is_refused(kind):
    base = _not_causal_lms()[kind]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=type(base).__name__):
        AdaFuseModel(base, config())
    assert differences(before, snapshot(base)) == []


def test_a_base_that_is_no_huggingface_model_is_refused():
    with pytest.raises(ValueError, match="Linear"):
        AdaFuseModel(torch.nn.Linear(4, 4), config())


def test_attaching_twice_is_refused_and_leaves_the_first():
    base = family("llama").build()
    model = AdaFuseModel(base, config())
    fill(model)
    before, logits = snapshot(base), model.eval()(input_ids=batch()).logits
    for again in (base, model):
        with pytest.raises(ValueError, match=r"already|twice|detach"):
            AdaFuseModel(again, config(r=3))
    assert differences(before, snapshot(base)) == []
    assert torch.equal(model(input_ids=batch()).logits, logits)


def test_attach_after_detach():
    base = family("llama").build()
    first = AdaFuseModel(base, config())
    fill(first)
    wanted = first.eval()(input_ids=batch()).logits
    first.detach()
    second = AdaFuseModel(base, config())
    fill(second)
    assert torch.equal(second.eval()(input_ids=batch()).logits, wanted)


def test_attaching_keeps_the_mode_of_every_module():
    """A base in training with a part in evaluation mode (a frozen tower, dropout switched off) stays so."""
    base = family("gemma3-multimodal").build().train()
    base.model.vision_tower.eval()
    before = {path: module.training for path, module in base.named_modules()}
    AdaFuseModel(base, config()).detach()
    changed = {path for path, module in base.named_modules() if module.training != before[path]}
    assert changed == set()


def test_experts_of_a_moe_backbone_are_left_alone_and_attach_says_so(caplog):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    moe = {"num_key_value_heads": 2, "num_local_experts": 4}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, **sizes, **moe)).eval()
    wanted = base(input_ids=batch()).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AdaFuseModel(base, config())
    said = [str(each.message) for each in caught] + [record.getMessage() for record in caplog.records]
    assert any("experts" in line and "not adapted" in line for line in said), f"attach said only: {said}"
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert list(model.banks) == [f"model.layers.{b}.self_attn.{name}" for b in range(BLOCKS) for name in attention]
    assert torch.equal(model(input_ids=batch()).logits, wanted)


def test_adapter_tensors_are_loaded_strictly():
    model = attached()
    good = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    name = "model.layers.0.self_attn.q_proj.experts_a"
    bad = {
        "missing": {key: value for key, value in good.items() if key != name},
        "extra": {**good, "model.layers.9.self_attn.q_proj.experts_a": good[name]},
        "shape": {**good, name: good[name][:, :1]},
    }
    for kind, tensors in bad.items():
        zeroed = {key: torch.zeros_like(value) for key, value in tensors.items()}
        with pytest.raises(ValueError, match=r"model\.layers\.(0|9)\.self_attn\.q_proj\.experts_a"):
            model.load_adapter_tensors(zeroed)
        after = model.adapter_tensors()
        assert all(torch.equal(after[key], good[key]) for key in good), f"{kind}: a refused load wrote something"


# Initialisation


def test_a_is_kaiming_uniform_and_b_is_zero():
    """As PEFT: Kaiming uniform with a = sqrt(5) is uniform within +- 1 / sqrt(fan in)."""
    tensors = AdaFuseModel(family("llama").build(), config(r=8, shared_rank=8, num_experts=8)).adapter_tensors()
    for name, tensor in tensors.items():
        if name.endswith(("_b",)):
            assert not tensor.any(), name
        elif name.endswith("_a"):
            bound = tensor.shape[-1] ** -0.5
            assert tensor.abs().max() <= bound, name
            assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), name
    experts = tensors["model.layers.0.self_attn.q_proj.experts_a"]
    assert len({tuple(expert.flatten().tolist()) for expert in experts}) == 8, "experts start equal"


def test_alpha_is_twice_the_rank_unless_given():
    for changes, scale, shared in [({}, 2.0, 2.0), ({"lora_alpha": 3.0, "shared_alpha": 1.0}, 1.5, 0.5)]:
        chosen = config(shared_rank=2, **changes)
        assert (chosen.scale, chosen.shared_scale) == (scale, shared)


# Config


def test_model_config_is_a_copy_that_shows_the_balance_loss():
    base = family("llama").build()
    before = base.config.to_dict()
    own = base.config
    model = AdaFuseModel(base, config())
    assert model.config is not own
    assert model.config.router_aux_loss_coef == COEF
    assert hasattr(model.config, "output_router_logits")
    assert base.config is own
    assert base.config.to_dict() == before
    assert not hasattr(own, "router_aux_loss_coef")
    assert model.config.model_type == "llama"
    assert model.get_base_model() is base


# Loss


@pytest.mark.parametrize("routing", ["model", "layer"])
def test_loss_has_the_balance_loss_in_training_only(routing):
    model = attached(routing=routing)
    given = {"input_ids": batch(), "labels": batch()}
    with torch.no_grad():
        wanted = loop(model, **given)
        language = language_model_loss(wanted.logits, given["labels"])
        evaluated, trained = model(**given), model.train()(**given)
    assert relative_error(evaluated.loss, language) < 1e-5
    assert relative_error(trained.loss, language + COEF * wanted.aux_loss()) < 1e-5
    assert torch.equal(evaluated.logits, trained.logits)


@pytest.mark.parametrize("training", [False, True])
def test_output_router_logits_gives_the_unweighted_aux_loss_and_leaves_the_loss_alone(training):
    model = attached().train(training)
    given = {"input_ids": batch(), "labels": batch()}
    output = model(**given, output_router_logits=True)
    with torch.no_grad():
        wanted = loop(model, **given)
    assert relative_error(output.loss, language_model_loss(wanted.logits, given["labels"])) < 1e-5
    assert relative_error(output.aux_loss, wanted.aux_loss()) < 1e-5


def test_a_trainer_that_takes_the_loss_as_it_is_gets_the_balance_loss_in_it():
    """TRL before 1.15 asks for `.aux_loss` only to log it."""
    model = attached().train()
    ids = batch()
    given = {
        "input_ids": ids,
        "labels": ids,
        "num_items_in_batch": 4 * ids[:, 1:].numel(),
        "output_router_logits": True,
    }
    with torch.no_grad():
        wanted = loop(model, input_ids=ids)
        model.config.router_aux_loss_coef = 0.7
        output = model(**given)
    expected = (language_model_loss(wanted.logits, ids) + 0.7 * wanted.aux_loss()) / 4
    assert relative_error(output.loss, expected) < 1e-5
    assert relative_error(output.aux_loss, wanted.aux_loss()) < 1e-5


def test_aux_loss_sends_its_gradient_to_the_router_only():
    model = attached(router_hidden=8).train()
    model(input_ids=batch(), output_router_logits=True).aux_loss.backward()
    moved = {name for name, gradient in model.adapter_tensors(grad=True).items() if gradient.any()}
    assert moved == {"router.weight", "router.hidden.weight"}


@pytest.mark.parametrize("training", [False, True])
def test_no_labels_no_loss(training):
    assert attached().train(training)(input_ids=batch()).loss is None


def test_loss_in_a_tuple_is_the_same():
    model = attached().train()
    given = {"input_ids": batch(), "labels": batch()}
    assert torch.equal(model(**given, return_dict=False)[0], model(**given).loss)


def test_positional_input_ids():
    model = attached()
    assert torch.equal(model(batch()).logits, model(input_ids=batch()).logits)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_num_items_in_batch_weights_both_losses(name, as_tensor):
    """This micro-batch has 12 - 3 = 9 labels that a position predicts, of 36 in the batch: a quarter of both losses."""
    model = attached(name).train()
    labels = batch()
    labels[0, 1:4] = -100
    items = torch.tensor(36) if as_tensor else 36
    with torch.no_grad():
        output = model(input_ids=batch(), labels=labels, num_items_in_batch=items)
        wanted = loop(model, name, input_ids=batch())
    mean = language_model_loss(wanted.logits, labels) + COEF * wanted.aux_loss()
    assert relative_error(output.loss, mean * 9 / 36) < 1e-5


def test_micro_batches_add_up_to_the_batch():
    """Two micro-batches of different length: gradients add up to LM loss per token, and aux weighted by label tokens."""
    model = attached().train()
    rows = [batch(rows=1, length=5, seed=3), batch(rows=1, length=9, seed=4)]
    counts = [4, 8]
    for ids in rows:
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(sum(counts))).loss.backward()
    got = {name: gradient.clone() for name, gradient in model.adapter_tensors(grad=True).items()}
    model.zero_grad()
    for ids, count in zip(rows, counts, strict=True):
        (model(input_ids=ids, labels=ids).loss * count / sum(counts)).backward()
    wanted = model.adapter_tensors(grad=True)
    assert {name for name in wanted if relative_error(got[name], wanted[name]) > 1e-4} == set()


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2"])
def test_what_stands_in_the_padding_changes_nothing(name, side):
    model = attached(name, routing="layer")
    real = padded(side, 0)["attention_mask"].bool()
    one, other = (model(**padded(side, each), output_router_logits=True) for each in (0, 55))
    assert torch.equal(one.aux_loss, other.aux_loss)
    torch.testing.assert_close(one.logits[real], other.logits[real], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi", "gpt-neox"])
def test_right_padding_changes_nothing_for_the_real_tokens(name):
    model = attached(name)
    given = padded("right", 0)
    together = model(**given).logits[1, :4]
    alone = model(input_ids=given["input_ids"][1:, :4]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_4d_mask_works_but_does_not_tell_the_balance_loss_what_is_padding():
    model = attached()
    causal = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 7, 7)
    got = model(input_ids=batch(), attention_mask=causal).logits
    torch.testing.assert_close(got, model(input_ids=batch()).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="padding"):
        model(input_ids=batch(), attention_mask=causal, output_router_logits=True)


# Other ways in


def test_inputs_embeds_are_routed_like_the_tokens():
    model = attached()
    embeds = model.get_input_embeddings()(batch())
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=batch()).logits)


def test_packed_sequences_equal_single_ones():
    """Two sequences in one row, told apart by their position ids, as HuggingFace's packing collator does.

    Without a cache, as in training: with one, transformers does not look for the seams.
    """
    model = attached()
    first, second = batch(rows=1, length=4, seed=5), batch(rows=1, length=6, seed=6)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(4), torch.arange(6)]).unsqueeze(0)
    got = model(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
    wanted = torch.cat([model(input_ids=ids).logits[0] for ids in (first, second)])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_two_models_of_one_process_do_not_meet():
    one, other = attached(), attached("llama", num_experts=3, top_k=1, routing="layer")
    wanted = one(input_ids=batch()).logits, other(input_ids=batch()).logits
    assert torch.equal(one(input_ids=batch()).logits, wanted[0])
    assert torch.equal(other(input_ids=batch()).logits, wanted[1])
    with one.disable_adapter():
        assert torch.equal(other(input_ids=batch()).logits, wanted[1])


def test_a_deep_copy_is_independent():
    model = attached()
    twin = copy.deepcopy(model)
    wanted = model(input_ids=batch()).logits
    assert torch.equal(twin(input_ids=batch()).logits, wanted)
    fill(twin, seed=9)
    assert torch.equal(model(input_ids=batch()).logits, wanted)
    assert relative_error(twin(input_ids=batch()).logits, loop(twin, input_ids=batch()).logits) < 1e-5


# Dropout


def test_dropout_acts_in_training_only_and_on_the_adapters_only():
    model, sure = attached(lora_dropout=0.4, shared_rank=2), attached(shared_rank=2)
    assert torch.equal(model(input_ids=batch()).logits, sure(input_ids=batch()).logits)
    model.train()
    torch.manual_seed(5)
    first = model(input_ids=batch()).logits
    assert not torch.equal(model(input_ids=batch()).logits, first)
    torch.manual_seed(5)
    assert torch.equal(model(input_ids=batch()).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=batch()).logits, family("llama").build()(input_ids=batch()).logits)


def test_dropout_zeroes_and_rescales_the_adapters_input():
    """One linear, everything else off: the mean over many draws is the output without dropout."""
    model = attached(lora_dropout=0.25, target_modules=["1.mlp.down_proj"], shared_rank=2)
    with torch.no_grad():
        exact = model(input_ids=batch()).logits
        bare = family("llama").build()(input_ids=batch()).logits
        model.train()
        # The final norm bends the mean a little: compare against the size of the adapter's effect.
        mean = torch.stack([model(input_ids=batch()).logits for _ in range(200)]).mean(0)
    assert (mean - exact).norm() < 0.2 * (exact - bare).norm()


# disable_adapter


def test_disable_adapter_ends_with_an_error_too_and_nests():
    model = attached()
    wanted = model(input_ids=batch()).logits
    bare = family("llama").build()(input_ids=batch()).logits
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(model(input_ids=batch()).logits, wanted)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(model(input_ids=batch()).logits, bare)
        assert torch.equal(model(input_ids=batch()).logits, bare)
    assert torch.equal(model(input_ids=batch()).logits, wanted)


def test_disable_adapter_has_no_balance_loss():
    model = attached().train()
    given = {"input_ids": batch(), "labels": batch()}
    with model.disable_adapter():
        assert torch.equal(model(**given).loss, family("llama").build()(**given).loss)


def test_training_without_labels_says_that_nothing_balances():
    model = attached().train()
    with pytest.warns(UserWarning, match="no labels, so the balance loss is not part"):
        model(input_ids=batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=batch(), labels=batch())
        model(input_ids=batch(), output_router_logits=True)
        model.eval()(input_ids=batch())


def test_a_mask_of_document_numbers_counts_each_token_once():
    model = attached()
    mask = torch.tensor([[0, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 2, 2, 0]])
    routing = model.route(batch())
    assert torch.equal(balance_loss(routing, mask), balance_loss(routing, mask.clamp(max=1)))
