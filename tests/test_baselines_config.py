"""The baselines' settings: the published defaults, the parts of the blocks, JSON, refusals."""

import json
import subprocess
import sys

import pytest
from families import family

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.baselines import LayerwiseConfig, LayerwiseModel, MixLoraConfig, PescConfig, RandomConfig

CONFIGS = [
    LayerwiseConfig(),
    LayerwiseConfig.mola(),
    LayerwiseConfig.moral(r=4),
    LayerwiseConfig(target_modules=["q_proj"], lora_alpha=3),
    PescConfig(),
    MixLoraConfig(lora_alpha=None),
    RandomConfig(seed=4, routing="layer"),
]


def test_the_published_settings():
    mola = LayerwiseConfig.mola()
    assert (mola.r, mola.lora_alpha, mola.lora_dropout, mola.top_k, mola.aux_loss_coef) == (8, 16, 0.05, 2, 0.0)
    assert (mola.num_experts, mola.target_modules) == ((2, 4, 6, 8), "all-linear")
    moral = LayerwiseConfig.moral()
    assert (moral.num_experts, moral.top_k) == (8, 2)
    assert set(moral.target_modules) == {"gate_proj", "up_proj", "down_proj"}
    pesc = PescConfig()
    assert (pesc.num_experts, pesc.top_k, pesc.bottleneck, pesc.adapter_scale, pesc.adapter_dropout) == (
        8,
        2,
        64,
        1,
        0.1,
    )
    assert (pesc.lora_r, pesc.lora_alpha, pesc.lora_scale) == (64, 16, 0.25)
    mixlora = MixLoraConfig()
    assert (mixlora.num_experts, mixlora.top_k, mixlora.r, mixlora.lora_alpha, mixlora.aux_loss_coef) == (
        8,
        2,
        16,
        32,
        0.01,
    )
    ours, random = AdaFuseConfig(), RandomConfig()
    assert {**ours.to_dict(), "aux_loss_coef": 0.0, "seed": 0} == random.to_dict()


@pytest.mark.parametrize(
    ("blocks", "counts", "wanted"),
    [
        (32, (2, 4, 6, 8), [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8),
        (30, (2, 4, 6, 8), [2] * 8 + [4] * 7 + [6] * 8 + [8] * 7),
        (4, (5, 5, 5, 5), [5] * 4),
        (3, (2, 7), [2, 2, 7]),
        (3, 6, [6] * 3),
    ],
)
def test_experts_by_part_of_the_blocks(blocks, counts, wanted):
    config = LayerwiseConfig(num_experts=counts)
    assert [config.experts_of(block, blocks) for block in range(blocks)] == wanted


def test_a_model_of_four_blocks_has_the_quarters_of_mola():
    base = family("llama").build()
    settings = {**base.config.to_dict(), "num_hidden_layers": 4}
    model = LayerwiseModel(type(base)(type(base.config)(**settings)), LayerwiseConfig.mola(r=2))
    for block, experts in enumerate((2, 4, 6, 8)):
        mine = [bank for path, bank in model.banks.items() if path.startswith(f"model.layers.{block}.")]
        assert [bank.num_experts for bank in mine] == [experts] * 7


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_json_round_trip(config):
    settings = json.loads(config.to_json())
    assert None not in settings.values()
    assert type(config).from_dict(settings) == config
    with pytest.raises(ValueError, match="unknown adapter setting"):
        type(config).from_dict({**settings, "more": 1})
    with pytest.raises(ValueError, match="top_k are missing"):
        type(config).from_dict({name: value for name, value in settings.items() if name != "top_k"})


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (LayerwiseConfig, {"r": 0}, "r=0 is too small"),
        (LayerwiseConfig, {"num_experts": (2, 0)}, "num_experts=0 is too small"),
        (LayerwiseConfig, {"num_experts": ()}, r"num_experts=\(\) is neither a whole number nor a list"),
        (LayerwiseConfig, {"num_experts": 2.5}, r"num_experts=2\.5 is neither"),
        (LayerwiseConfig, {"num_experts": (2, 4.0)}, r"num_experts=4\.0 is not a whole number"),
        (LayerwiseConfig, {"num_experts": True}, "num_experts=True is not a whole number"),
        (LayerwiseConfig, {"num_experts": (1, 8)}, "top_k=2 is more than num_experts=1"),
        (LayerwiseConfig, {"lora_dropout": 1.0}, "lora_dropout=1.0 is not a probability below 1"),
        (LayerwiseConfig, {"target_modules": "q_proj"}, r"did you mean \['q_proj'\]"),
        (LayerwiseConfig, {"aux_loss_coef": -1}, "aux_loss_coef=-1.0 is negative"),
        (PescConfig, {"bottleneck": 0}, "bottleneck=0 is too small"),
        (PescConfig, {"lora_r": 0}, "lora_r=0 is too small"),
        (PescConfig, {"top_k": 9}, "top_k=9 is more than num_experts=8"),
        (PescConfig, {"adapter_scale": "1"}, "adapter_scale='1' is not a number"),
        (PescConfig, {"lora_alpha": None}, "lora_alpha=None is not a number"),
        (PescConfig, {"adapter_dropout": 2}, "adapter_dropout=2.0 is not a probability"),
        (MixLoraConfig, {"num_experts": 0}, "num_experts=0 is too small"),
        (MixLoraConfig, {"lora_alpha": float("inf")}, "lora_alpha=inf is not a finite number"),
        (RandomConfig, {"routing": "token"}, "routing='token' is unknown"),
    ],
)
def test_settings_out_of_range_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_the_names_load_on_first_use():
    code = "import adafuse.baselines as b, sys; assert 'torch' not in sys.modules; b.LayerwiseConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    import adafuse.baselines

    assert all(getattr(adafuse.baselines, name) is not None for name in adafuse.baselines.__all__)
    assert callable(adafuse.baselines.account)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = adafuse.baselines.Nothing


def test_the_default_config_is_used():
    assert LayerwiseModel(family("llama").build()).adafuse_config == LayerwiseConfig()
    assert AdaFuseModel(family("llama").build()).adafuse_config == AdaFuseConfig()
