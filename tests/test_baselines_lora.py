"""Static LoRA is PEFT's own, on the same linears, at the active or the total rank; and what every method costs."""

import peft
import pytest
import torch
from baseline_methods import ALL, METHODS, inputs
from families import BLOCKS, HIDDEN, INTERMEDIATE, NAMES, family
from reference import relative_error
from tiny_text import collate, rows
from trainers import QUIET
from transformers import Trainer, TrainingArguments

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.baselines import account, lora_config, static_lora

CONFIG = AdaFuseConfig(r=3, num_experts=5, top_k=2, lora_alpha=4.5)
LINEARS = family("llama").linears
WIDTH = BLOCKS * sum(o + i for o, i in LINEARS.values())  # I + O over all linears


@pytest.mark.parametrize(("rank", "r"), [("active", 2 * 3), ("total", 5 * 3)])
@pytest.mark.parametrize("name", NAMES)
def test_it_adapts_the_linears_that_adafuse_adapts(name, rank, r):
    model = static_lora(family(name).build(), CONFIG, rank)
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert list(layers) == list(AdaFuseModel(family(name).build(), CONFIG).banks)
    for layer in layers.values():
        assert layer.r["default"] == r
        assert layer.scaling["default"] == CONFIG.scale
        assert layer.lora_A["default"].weight.dtype == torch.float32
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]


def test_shared_ranks_count_and_targets_and_dropout_are_those_of_the_config():
    config = AdaFuseConfig(r=4, num_experts=6, top_k=3, shared_rank=2, lora_dropout=0.1, target_modules=["q_proj"])
    base = family("llama").build()
    assert [lora_config(base, config, rank).r for rank in ("active", "total")] == [14, 26]
    made = lora_config(base, config)
    assert (made.lora_alpha, made.lora_dropout) == (28.0, 0.1)
    assert set(made.target_modules) == {f"model.layers.{b}.self_attn.q_proj" for b in range(BLOCKS)}
    with pytest.raises(ValueError, match="rank='all' is unknown; allowed: 'active', 'total'"):
        lora_config(base, config, "all")


def test_the_equation_and_a_fresh_adapter():
    model = static_lora(family("llama").build(), CONFIG)
    base, given = family("llama").build(), inputs()
    with torch.no_grad():
        assert torch.equal(model(**given).logits, base(**given).logits)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
                path, _, which = name.removeprefix("base_model.model.").partition(".lora_")
                if which.startswith("B"):
                    a = model.get_parameter(name.replace("lora_B", "lora_A"))
                    base.get_submodule(path).weight += 4.5 / 3 * parameter @ a
        assert relative_error(model(**given).logits, base(**given).logits) < 1e-5


def test_it_trains_and_loads_as_peft_does(tmp_path):
    model = static_lora(family("llama").build(), CONFIG, "total")
    arguments = TrainingArguments(str(tmp_path), max_steps=20, learning_rate=1e-2, save_steps=20, **QUIET)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows(16))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    again = peft.PeftModel.from_pretrained(family("llama").build(), tmp_path / "checkpoint-20")
    with torch.no_grad():
        assert torch.equal(again(**inputs()).logits, model.eval()(**inputs()).logits)


def test_an_adapted_base_is_refused():
    with pytest.raises(ValueError, match="already adapted"):
        static_lora(static_lora(family("llama").build(), CONFIG), CONFIG)


# --- account -------------------------------------------------------------------------------------------------------------

E, K, R, FFN = 5, 2, 3, BLOCKS * 3 * (HIDDEN + INTERMEDIATE)
MOLA = [sum((o + i) * R for o, i in LINEARS.values()), sum(i for _, i in LINEARS.values())]
INPUTS = BLOCKS * MOLA[1]
# adapter parameters, of these the routers', parameters of a token's experts, width of the adapted linears
WANTED = {
    "layerwise": (E * R * WIDTH + E * INPUTS, E * INPUTS, K * R * WIDTH, WIDTH),
    "mola": ((2 + 5) * sum(MOLA), (2 + 5) * MOLA[1], K * R * WIDTH, WIDTH),
    "moral": (
        E * R * FFN + E * BLOCKS * (2 * HIDDEN + INTERMEDIATE),
        E * BLOCKS * (2 * HIDDEN + INTERMEDIATE),
        K * R * FFN,
        FFN,
    ),
    "pesc": (
        R * WIDTH + BLOCKS * E * (6 * 2 * HIDDEN + HIDDEN),
        BLOCKS * E * HIDDEN,
        R * WIDTH + BLOCKS * K * 6 * 2 * HIDDEN,
        WIDTH,
    ),
    "mixlora": (
        E * R * FFN + R * (WIDTH - FFN) + BLOCKS * E * HIDDEN,
        BLOCKS * E * HIDDEN,
        K * R * FFN + R * (WIDTH - FFN),
        WIDTH,
    ),
    "random": (E * R * WIDTH, 0, K * R * WIDTH, WIDTH),
}


@pytest.mark.parametrize("method", ALL)
def test_accounts_equal_their_formulas(method):
    parameters, routers, active, width = WANTED[method]
    model, tensors = ALL[method].attach(family("llama").build(torch.bfloat16))
    assert sum(tensor.numel() for tensor in tensors.values()) == parameters
    found = account(model)
    assert (found.trainable, found.adapter) == (parameters, parameters)
    assert found.active_rank == pytest.approx(active / width)
    assert found.bytes_per_token == 2 * active + 4 * routers
    assert account(model, itemsize=4).bytes_per_token == 4 * active + 4 * routers
    model.set_trainable("none")
    assert (account(model).trainable, account(model).adapter) == (0, parameters)
    assert f"{parameters:,} adapter parameters" in str(found)


def test_accounts_of_adafuse_and_of_static_lora():
    config = AdaFuseConfig(r=R, num_experts=E, top_k=K, shared_rank=2, routing="layer")
    found = account(AdaFuseModel(family("llama").build(), config))
    routers = BLOCKS * E * HIDDEN
    assert found.trainable == (E * R + 2) * WIDTH + routers
    assert found.active_rank == K * R + 2
    assert found.bytes_per_token == 4 * (K * R + 2) * WIDTH + 4 * routers
    for rank, r in (("active", K * R + 2), ("total", E * R + 2)):
        static = account(static_lora(family("llama").build(), config, rank))
        assert (static.trainable, static.adapter, static.active_rank) == (r * WIDTH, r * WIDTH, r)
        assert static.bytes_per_token == 4 * r * WIDTH


def test_equal_ranks_mean_equal_accounts():
    """What the rows of a table are compared at: as many active ranks, or as many parameters but for the routers."""
    layerwise = account(METHODS["layerwise"].attach()[0])
    adafuse = account(AdaFuseModel(family("llama").build(), CONFIG))
    active, total = (account(static_lora(family("llama").build(), CONFIG, rank)) for rank in ("active", "total"))
    assert layerwise.active_rank == adafuse.active_rank == active.active_rank
    assert layerwise.trainable - E * INPUTS == adafuse.trainable - E * HIDDEN == total.trainable


def test_a_model_without_adapters_has_no_account():
    model = static_lora(family("llama").build(), CONFIG).unload()
    model.get_base_model = lambda: model
    with pytest.raises(ValueError, match="neither an adapted model of adafuse nor a PEFT LoRA"):
        account(model)
