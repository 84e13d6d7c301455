"""AdaFuseConfig: round trips of every valid setting, and one clear error for each invalid value."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adafuse import AdaFuseConfig
from adafuse.config import ALL_LINEAR

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
ALPHAS = st.none() | st.floats(1e-3, 1e3) | st.integers(1, 512)


@st.composite
def settings(draw):
    experts = draw(st.integers(1, 64))
    return {
        "r": draw(st.integers(1, 256)),
        "num_experts": experts,
        "top_k": draw(st.integers(1, experts)),
        "lora_alpha": draw(ALPHAS),
        "lora_dropout": draw(st.floats(0, 1, exclude_max=True) | st.just(0)),
        "shared_rank": draw(st.integers(0, 64)),
        "shared_alpha": draw(ALPHAS),
        "target_modules": draw(st.just(ALL_LINEAR) | st.lists(NAMES, min_size=1, max_size=4)),
        "routing": draw(st.sampled_from(["model", "layer"])),
        "router_hidden": draw(st.integers(0, 512)),
        "aux_loss_coef": draw(st.floats(0, 10) | st.integers(0, 3)),
    }


def nulls(value):
    """Whether a JSON value has a null anywhere."""
    if isinstance(value, dict):
        return any(map(nulls, value.values()))
    if isinstance(value, list):
        return any(map(nulls, value))
    return value is None


@given(settings())
def test_round_trips(given_settings):
    config = AdaFuseConfig(**given_settings)
    assert AdaFuseConfig.from_dict(config.to_dict()) == config
    assert AdaFuseConfig.from_dict(json.loads(config.to_json())) == config
    assert AdaFuseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(settings())
def test_json_is_resolved(given_settings):
    """No null and no NaN: strict JSON, and what was given is what is stored."""
    stored = json.loads(AdaFuseConfig(**given_settings).to_json(), parse_constant=pytest.fail)
    assert not nulls(stored)
    assert sorted(stored) == sorted(given_settings)
    for name in (
        "r",
        "num_experts",
        "top_k",
        "shared_rank",
        "router_hidden",
        "routing",
        "lora_dropout",
        "aux_loss_coef",
    ):
        assert stored[name] == given_settings[name]
    if isinstance(given_settings["target_modules"], list):
        assert set(stored["target_modules"]) == set(given_settings["target_modules"])


@given(settings())
def test_alpha_left_out_is_twice_its_rank(given_settings):
    config = AdaFuseConfig(**{**given_settings, "lora_alpha": None, "shared_alpha": None})
    assert config.lora_alpha == 2 * config.r
    assert config.scale == 2
    assert config.shared_alpha == 2 * config.shared_rank
    assert config.shared_scale == (2 if config.shared_rank else 0)


def test_defaults_are_those_of_the_design():
    assert AdaFuseConfig().to_dict() == {
        "r": 16,
        "num_experts": 8,
        "top_k": 2,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "shared_rank": 0,
        "shared_alpha": 0.0,
        "target_modules": "all-linear",
        "routing": "model",
        "router_hidden": 0,
        "aux_loss_coef": 0.01,
    }


def test_targets_in_another_order_or_doubled_are_the_same_config():
    one, other = (AdaFuseConfig(target_modules=names) for names in (["b", "a"], ("a", "b", "a")))
    assert one == other
    assert hash(one) == hash(other)


NOT_WHOLE = [None, 1.0, "4", True, [], math.nan]
NOT_NUMBERS = [
    "1",
    True,
    [],
    math.nan,
    math.inf,
    -math.inf,
    10**400,
]  # the last is a whole number in JSON, too large for a float
INVALID = [
    *(("r", value) for value in (0, -1, *NOT_WHOLE)),
    *(("num_experts", value) for value in (0, -8, *NOT_WHOLE)),
    *(("top_k", value) for value in (0, 9, -1, *NOT_WHOLE)),
    *(("shared_rank", value) for value in (-1, *NOT_WHOLE)),
    *(("router_hidden", value) for value in (-1, *NOT_WHOLE)),
    *(("lora_alpha", value) for value in NOT_NUMBERS),
    *(("shared_alpha", value) for value in NOT_NUMBERS),
    *(("lora_dropout", value) for value in (1, 1.5, -0.1, *NOT_NUMBERS)),
    *(("aux_loss_coef", value) for value in (-1e-9, -1, *NOT_NUMBERS)),
    *(("routing", value) for value in ("", "token", "Model", None, 3, True, [])),
    *(
        ("target_modules", value)
        for value in ("", "q_proj", "all", [], (), {}, None, 3, True, [""], [3], [None], ["q", 1])
    ),
]


@pytest.mark.parametrize(("field", "value"), INVALID, ids=lambda value: str(value)[:12])
def test_an_invalid_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        AdaFuseConfig(**{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("experts", [1, 3, 7])
def test_top_k_above_the_number_of_experts(experts):
    with pytest.raises(ValueError, match=f"top_k={experts + 1} .*num_experts={experts}"):
        AdaFuseConfig(num_experts=experts, top_k=experts + 1)


@pytest.mark.parametrize("field", sorted(AdaFuseConfig().to_dict()))
def test_from_dict_refuses_a_null_and_a_missing_setting(field):
    settings = AdaFuseConfig().to_dict()
    with pytest.raises(ValueError, match=field):
        AdaFuseConfig.from_dict({**settings, field: None})
    del settings[field]
    with pytest.raises(ValueError, match=field):
        AdaFuseConfig.from_dict(settings)


def test_from_dict_refuses_a_setting_it_does_not_know():
    with pytest.raises(ValueError, match="use_dora"):
        AdaFuseConfig.from_dict({**AdaFuseConfig().to_dict(), "use_dora": False})
