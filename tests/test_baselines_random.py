"""Random routing: the hash written out in plain integers, and the experts' sum by the reference of AdaFuse's form."""

import pytest
import torch
from baseline_methods import ALL, inputs
from families import BLOCKS, NAMES, VOCAB, batch, family, fill
from reference import leaves, relative_error, token_delta

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.baselines import RandomConfig, RandomModel
from adafuse.baselines.random_routing import HashRouter

pytestmark = pytest.mark.usefixtures("few_programs")


def mix(x):
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def chosen(token, decision, config):
    """The K experts with the largest scores."""

    def score(expert):
        key = mix(mix(config.seed) + decision * config.num_experts + expert)
        return mix(token * 0x9E3779B9 ^ key)

    return sorted(range(config.num_experts), key=lambda expert: (-score(expert), expert))[: config.top_k]


def attached(name="llama", **changes):
    config = RandomConfig(**{"r": 3, "num_experts": 5, "top_k": 2, "shared_rank": 2, "lora_alpha": 4.5, **changes})
    model = RandomModel(family(name).build(), config)
    return model, fill(model)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("routing", ["model", "layer"])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_hash_chooses_and_all_weights_are_equal(routing, seed, top_k):
    model, _ = attached(routing=routing, seed=seed, top_k=top_k)
    ids = torch.arange(VOCAB)[None]
    found = model.route(ids)
    decisions = BLOCKS if routing == "layer" else 1
    wanted = [[chosen(token, d, model.adafuse_config) for d in range(decisions)] for token in range(VOCAB)]
    assert found.experts.dtype == torch.int64
    assert found.experts[0].tolist() == wanted
    assert torch.equal(found.weights, torch.full((1, VOCAB, decisions, top_k), 1 / top_k))


def test_large_ids_and_seeds_hash_as_plain_integers_do():
    config = RandomConfig(num_experts=8, seed=2**31 + 5)
    ids = [0, 1, 151_935, 262_143, 2**31 - 1]
    found = HashRouter(config, 1).of(torch.tensor([ids]))
    assert found.experts[0, :, 0].tolist() == [chosen(token, 0, config) for token in ids]


def test_experts_share_the_vocabulary_evenly_and_blocks_choose_independently():
    config = RandomConfig(num_experts=8, top_k=2)
    experts = HashRouter(config, 2).of(torch.arange(50_000)[None]).experts[0]
    load = torch.nn.functional.one_hot(experts, 8).double().mean((0, 2))
    assert (load - 1 / 8).abs().max() < 0.005
    same = (experts[:, 0].sort(-1).values == experts[:, 1].sort(-1).values).all(-1).double().mean()
    assert abs(same - 1 / 28) < 0.005, "of 28 pairs, two blocks would pick the same one in 28 cases by chance"


@pytest.mark.parametrize("routing", ["model", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_equal_the_loop(name, routing):
    model, tensors = attached(name, routing=routing)
    tensors, config, fam = leaves(tensors), model.adafuse_config, family(name)
    given = inputs("right")
    loss = model.train()(**given).loss
    loss.backward()

    loop = fam.build().train().requires_grad_(False)
    for path in fam.paths():
        block = int(path.removeprefix(f"{fam.blocks}.").split(".")[0])

        def hook(_, args, output, path=path, decision=block if routing == "layer" else 0):
            deltas = [
                token_delta(
                    x, chosen(token, decision, config), [1 / config.top_k] * config.top_k, path, config, tensors
                )
                for x, token in zip(
                    args[0].reshape(-1, args[0].shape[-1]), given["input_ids"].flatten().tolist(), strict=True
                )
            ]
            return (output.double() + torch.stack(deltas).view(output.shape)).to(output.dtype)

        loop.get_submodule(path).register_forward_hook(hook)
    wanted = loop(**given)
    wanted.loss.backward()
    real = given["attention_mask"].bool()
    assert relative_error(model(**given).logits[real], wanted.logits[real]) < 1e-5
    assert relative_error(loss, wanted.loss) < 1e-5, "there is no balance loss to add"
    gradients = model.adapter_tensors(grad=True)
    errors = {key: relative_error(gradients[key], tensors[key].grad) for key in tensors}
    assert {key: error for key, error in errors.items() if error > 1e-4} == {}


@torch.no_grad()
def test_embeddings_have_no_ids_to_hash_and_no_stale_ids_are_used():
    model, _ = attached()
    embeddings = model.get_input_embeddings()
    model(input_ids=batch())
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
        model(inputs_embeds=embeddings(batch()))
    with model.disable_adapter():
        model(inputs_embeds=embeddings(batch()))
    assert torch.equal(model(batch()).logits, model(input_ids=batch()).logits)


def test_a_detached_base_keeps_no_hook():
    model, _ = attached()
    base = model.detach()
    assert not base._forward_pre_hooks
    other, _ = ALL["random"].attach(base)
    assert len(other.get_base_model()._forward_pre_hooks) == 1


def test_there_is_no_router_to_train():
    model, tensors = attached()
    assert not any("router" in name for name in tensors)
    assert not list(model.router.parameters())
    with pytest.raises(ValueError, match=r"aux_loss_coef=0\.1: random routing has no router"):
        RandomConfig(aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="router_hidden=4: random routing has no router"):
        RandomConfig(router_hidden=4)
    with pytest.raises(ValueError, match=r'set_trainable\("router"\): random routing has no router'):
        model.set_trainable("router")
    with pytest.raises(ValueError, match="seed=4294967296 is too large; allowed: 0 to 4294967295"):
        RandomConfig(seed=2**32)
    with pytest.raises(ValueError, match="seed=-1 is too small"):
        RandomConfig(seed=-1)


@torch.no_grad()
def test_it_runs_in_every_execution_of_adafuse():
    model, _ = attached(routing="layer")
    ids = batch(rows=1, length=5)
    wanted = model(input_ids=ids).logits
    for execution in ("fused", "switch"):
        model.execution = execution
        assert relative_error(model(input_ids=ids).logits, wanted) < 1e-5
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 8)


def test_the_same_experts_as_adafuse_would_have():
    """Given the same choice, the two models are one function: the control differs in the routing alone."""
    random, tensors = attached(routing="model", top_k=5, shared_rank=0)
    config = AdaFuseConfig(r=3, num_experts=5, top_k=5, lora_alpha=4.5)
    learned = AdaFuseModel(family("llama").build(), config)
    router = torch.zeros(5, 32)  # equal logits: all five experts, each with the weight 1 / 5
    learned.load_adapter_tensors({**tensors, "router.weight": router})
    with torch.no_grad():
        assert relative_error(random(batch()).logits, learned.eval()(batch()).logits) < 1e-5
