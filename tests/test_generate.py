"""Generation: every way of decoding gives what the full forward gives."""

import pytest
import torch
from families import BLOCKS, NAMES, VOCAB, batch, family, fill
from reference import relative_error, run
from transformers import DynamicCache, StaticCache

from adafuse import AdaFuseConfig, AdaFuseModel

ROUTINGS = ("model", "layer")
NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def attached(name="llama", routing="layer", **changes) -> AdaFuseModel:
    """An adapted tiny model in evaluation mode, with random adapter tensors."""
    settings = {"r": 2, "num_experts": 4, "top_k": 2, "shared_rank": 2, "routing": routing, **changes}
    model = AdaFuseModel(family(name).build(), AdaFuseConfig(**settings))
    fill(model)
    return model.eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 6, 4 and 2 tokens, padded on the left: ids and attention mask."""
    ids = batch(rows=3, length=6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, :4] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_equals_the_full_forward(name, routing):
    model, ids = attached(name, routing), batch(rows=2, length=9)
    with torch.no_grad():
        full = model(input_ids=ids).logits
        cache, parts = DynamicCache(config=model.get_base_model().config), []
        for part in ids.split([3, 1, 1, 1, 1, 1, 1], dim=1):
            parts.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    assert relative_error(torch.cat(parts, dim=1), full) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_the_loop(name):
    """The next token each time, from the whole sequence so far, by the reference."""
    model, fam = attached(name), family(name)
    got = model.generate(batch(rows=2, length=4), max_new_tokens=4, do_sample=False)
    ids = batch(rows=2, length=4)
    with torch.no_grad():
        for _ in range(4):
            logits = run(fam.build(), fam.blocks, model.adafuse_config, model.adapter_tensors(), input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert got.tolist() == ids.tolist()
    assert got.tolist() != fam.build().generate(ids[:, :4], max_new_tokens=4, do_sample=False).tolist()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_equals_single_prompts(name, routing):
    model = attached(name, routing)
    ids, mask = prompts()
    together = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row, real, new in zip(ids, mask.bool(), together, strict=True):
        alone = model.generate(row[real].unsqueeze(0), attention_mask=torch.ones(1, int(real.sum())), **GREEDY)
        assert alone[0, real.sum() :].tolist() == new.tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2"])
def test_beams_with_a_cache_equal_beams_without(name):
    """Beams are reordered at each step: a routing kept from the step before would follow the wrong beam."""
    model = attached(name)
    ids, mask = prompts()
    beams = {"max_new_tokens": NEW, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **beams)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **beams)
    assert cached.shape == (12, ids.shape[1] + NEW)
    assert cached.tolist() == plain.tolist()
    assert len({tuple(row) for row in cached.tolist()}) == 12, "beams are not distinct: a weak test"


def test_beams_are_as_likely_as_they_say():
    model, ids = attached(), batch(rows=1, length=5)
    settings = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    said = model.generate(ids, **settings, do_sample=False, return_dict_in_generate=True, output_scores=True)
    with torch.no_grad():
        logprobs = model(input_ids=said.sequences).logits.double().log_softmax(-1)
    scores = [
        sum(logprobs[beam, position - 1, row[position]] for position in range(5, 5 + NEW)).item()
        for beam, row in enumerate(said.sequences)
    ]
    assert said.sequences_scores.tolist() == pytest.approx(scores, rel=1e-4)
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-neox"])
def test_a_static_cache_gives_the_same_tokens(name):
    model = attached(name)
    ids, mask = prompts()
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    got = model.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY)
    assert got.tolist() == wanted.tolist()


def test_a_static_cache_by_hand_equals_the_full_forward():
    model, ids = attached(), batch(rows=2, length=6)
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=16)
    with torch.no_grad():
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([3, 1, 1, 1], dim=1)]
        full = model(input_ids=ids).logits
    assert relative_error(torch.cat(parts, dim=1), full) < 1e-5


def test_sampling_is_reproducible_from_a_seed():
    model, ids = attached(), batch(rows=2, length=4)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(model.generate(ids, max_new_tokens=NEW, do_sample=True, top_k=0).tolist())
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("name", ["llama", "gemma3-multimodal", "gpt2"])
def test_generating_without_the_adapter_is_the_base(name):
    model, base = attached(name), family(name).build()
    ids, mask = prompts()
    with model.disable_adapter():
        got = model.generate(ids, attention_mask=mask, **GREEDY)
    assert got.tolist() == base.generate(ids, attention_mask=mask, **GREEDY).tolist()
    assert got.tolist() != model.generate(ids, attention_mask=mask, **GREEDY).tolist()


def test_a_fresh_adapter_generates_what_the_base_does():
    ids, mask = prompts()
    model = AdaFuseModel(family("llama").build(), AdaFuseConfig(r=2, num_experts=4))
    wanted = family("llama").build().generate(ids, attention_mask=mask, **GREEDY)
    assert model.generate(ids, attention_mask=mask, **GREEDY).tolist() == wanted.tolist()


def test_generating_with_keyword_inputs_and_from_embeddings():
    model, ids = attached(), batch(rows=2, length=4)
    wanted = model.generate(ids, **GREEDY)
    assert model.generate(input_ids=ids, **GREEDY).tolist() == wanted.tolist()
    embeds = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, **GREEDY).tolist() == wanted[:, 4:].tolist()


def test_an_adapted_model_can_assist_another():
    """Assisted decoding runs two adapted models in turn: neither may see the other's routing, and the output is exact."""
    model, assistant = attached(), attached(num_experts=3, top_k=1, routing="model")
    ids = batch(rows=1, length=5)
    got = model.generate(ids, assistant_model=assistant.get_base_model(), **GREEDY)
    assert got.tolist() == model.generate(ids, **GREEDY).tolist()


def test_aux_loss_with_a_cache_is_that_of_the_new_tokens():
    """The mask covers the cached tokens too; only its last columns belong to the tokens of this call."""
    model = attached(num_experts=5)
    ids, mask = prompts()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
        rest = {"input_ids": ids[:, 3:], "attention_mask": mask, "past_key_values": cache}
        got = model(**rest, output_router_logits=True).aux_loss
        routing = model.route(ids, attention_mask=mask)
        alone = {"input_ids": ids[:, 3:], "attention_mask": mask[:, 3:]}
        wanted = model(**alone, output_router_logits=True).aux_loss
    assert routing.experts.shape == (3, 6, BLOCKS, 2)
    assert relative_error(got, wanted) < 1e-6


def test_generating_in_training_mode_has_no_loss_and_leaves_the_mode():
    model = attached().train()
    tokens = model.generate(batch(rows=1, length=4), **GREEDY)
    assert model.training
    assert tokens.max() < VOCAB
