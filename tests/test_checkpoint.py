"""Adapter folders: round trips, the names and shapes in the files, refusal of everything that is wrong with them."""

import json
import pickle

import pytest
import torch
from families import BLOCKS, HIDDEN, batch, family, fill
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from snapshots import differences, snapshot
from transformers import LlamaConfig, LlamaForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel, checkpoint
from adafuse.checkpoint import CONFIG_FILE, WEIGHTS_FILE

CONFIGS = {
    "default": {},
    "layer": {"routing": "layer", "top_k": 1},
    "shared": {"shared_rank": 2, "shared_alpha": 3},
    "hidden": {"router_hidden": 8},
    "targets": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "all": {
        "routing": "layer",
        "shared_rank": 1,
        "router_hidden": 6,
        "target_modules": ["v_proj"],
        "lora_dropout": 0.1,
    },
}


def config_of(name: str) -> AdaFuseConfig:
    return AdaFuseConfig(**{"r": 3, "num_experts": 5, **CONFIGS[name]})


def adapted(config=None, base=None, seed=1) -> AdaFuseModel:
    model = AdaFuseModel(base if base is not None else family("llama").build(), config or config_of("default"))
    fill(model, seed)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    """A sound adapter of the tiny Llama."""
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def logits(model):
    return model(input_ids=batch()).logits


def refused(folder, match, base=None):
    """Loading `folder` raises one ValueError that matches, on one line of sense, and leaves the base as it was."""
    base = base if base is not None else family("llama").build()
    before, wanted = snapshot(base), logits(base)
    with pytest.raises(ValueError, match=match) as caught:
        AdaFuseModel.from_pretrained(base, folder)
    assert differences(before, snapshot(base)) == []
    assert torch.equal(logits(base), wanted)
    return str(caught.value)


def read(path):
    """The tensors of a file, copied: the file may then be written over."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def edit_weights(folder, change, metadata=True):
    """Rewrite the weights: `change` gets the dict of tensors. metadata False: without the header's copy of the config."""
    path = folder / WEIGHTS_FILE
    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
    tensors = read(path)
    change(tensors)
    save_file(tensors, path, metadata=kept if metadata else {"format": "pt"})


def edit_config(folder, **changes):
    """Change settings both in the JSON and in the header, as another version of the library would have written them."""
    description = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(description))
    tensors = read(folder / WEIGHTS_FILE)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", "adapter_config": json.dumps(description)})


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-multimodal"])
@pytest.mark.parametrize("options", ["default", "layer", "shared", "hidden"])
def test_a_reloaded_adapter_gives_the_same_logits(tmp_path, name, options):
    model = adapted(config_of(options), family(name).build())
    model.save_pretrained(tmp_path)
    again = AdaFuseModel.from_pretrained(family(name).build(), tmp_path)
    assert again.adafuse_config == model.adafuse_config
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", ["targets", "all"])
def test_lists_of_targets_come_back(tmp_path, options):
    model = adapted(config_of(options))
    model.save_pretrained(tmp_path)
    again = AdaFuseModel.from_pretrained(family("llama").build(), tmp_path, is_trainable=True)
    assert sorted(again.banks) == sorted(model.banks)
    assert all(parameter.requires_grad for bank in again.banks.values() for parameter in bank.parameters())
    assert torch.equal(logits(again), logits(model))


def test_a_bf16_base_keeps_fp32_adapters(tmp_path):
    model = adapted(base=family("llama").build(torch.bfloat16))
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float32}
    again = AdaFuseModel.from_pretrained(family("llama").build(torch.bfloat16), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_saving_in_bf16_halves_the_file_and_loads_as_fp32(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "fp32")
    model.save_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16" / WEIGHTS_FILE).values()} == {torch.bfloat16}
    again = AdaFuseModel.from_pretrained(family("llama").build(), tmp_path / "bf16")
    for name, tensor in again.adapter_tensors().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.adapter_tensors()[name].bfloat16().float())


SIZES = st.integers(1, 5)


@st.composite
def adapters(draw):
    """A config, a base of some linears, and finite tensors of the shapes these prescribe, with the corners of fp32."""
    config = AdaFuseConfig(
        r=draw(SIZES),
        num_experts=(experts := draw(SIZES)),
        top_k=draw(st.integers(1, experts)),
        shared_rank=draw(st.integers(0, 2)),
        router_hidden=draw(st.integers(0, 3)),
        routing=draw(st.sampled_from(["model", "layer"])),
        lora_alpha=draw(st.floats(0.1, 100)),
        target_modules=draw(st.lists(st.text("abc_.é", min_size=1, max_size=5), min_size=1, max_size=3)),
    )
    shapes = {"router.weight": (2 * experts if config.routing == "layer" else experts, config.router_hidden or 4)}
    if config.router_hidden:
        shapes["router.hidden.weight"] = (config.router_hidden, 4)
    for path in draw(st.lists(st.text("abcdef.é", min_size=1, max_size=8), min_size=1, max_size=3, unique=True)):
        shapes[f"{path}.experts_a"] = (experts, config.r, draw(SIZES))
        shapes[f"{path}.experts_b"] = (experts, draw(SIZES), config.r)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["router.weight"].view(-1)[0] = draw(st.floats(width=32, allow_nan=False, allow_infinity=False))
    return config, shapes, tensors


@given(adapters(), st.text("ab/-é", max_size=8))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_is_what_is_read(tmp_path, adapter, base_name):
    """In one folder, so that each example replaces the one before."""
    config, shapes, tensors = adapter
    fingerprint = {"model_type": "x", "linears": {name: list(shape) for name, shape in shapes.items()}}
    description = checkpoint.describe(config, base_name, fingerprint)
    checkpoint.write(tmp_path, description, tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert checkpoint.read_description(tmp_path) == json.loads((tmp_path / CONFIG_FILE).read_text()) == description
    assert checkpoint.config_of(description) == config
    got = checkpoint.read_tensors(tmp_path, shapes)
    assert list(got) == list(shapes)
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-multimodal"])
@pytest.mark.parametrize("options", ["default", "layer", "shared", "hidden"])
def test_tensors_have_the_names_and_shapes_of_the_format(tmp_path, name, options):
    config = config_of(options)
    adapted(config, family(name).build()).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    saved = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / WEIGHTS_FILE).items()}
    assert saved == family(name).tensors(config)


def test_experts_are_saved_in_order(tmp_path):
    """What the file says about expert e is what a token that chose e gets: checked against the parameters by hand."""
    model = adapted(config_of("shared"))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    path, bank = next(iter(model.banks.items()))
    for e in range(5):
        assert torch.equal(saved[f"{path}.experts_a"][e], bank.a[3 * e : 3 * e + 3])
        assert torch.equal(saved[f"{path}.experts_b"][e], bank.b[3 * e : 3 * e + 3].T)
    assert torch.equal(saved[f"{path}.shared_a"], bank.a[15:])
    assert torch.equal(saved[f"{path}.shared_b"], bank.b[15:].T)


def test_the_json_is_resolved_and_repeated_in_the_header(folder):
    text = (folder / CONFIG_FILE).read_text()
    assert "null" not in text
    description = json.loads(text, parse_constant=pytest.fail)
    assert {key: description[key] for key in ("format_version", "r", "num_experts", "top_k", "lora_alpha")} == {
        "format_version": 1,
        "r": 3,
        "num_experts": 5,
        "top_k": 2,
        "lora_alpha": 6.0,
    }
    assert "base_model_name_or_path" in description
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["adapter_config"]) == description


def test_the_fingerprint_says_what_the_base_must_be(folder):
    llama = family("llama")
    assert json.loads((folder / CONFIG_FILE).read_text())["fingerprint"] == {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "linears": {path: list(llama.shape(path)) for path in llama.paths()},
    }


def test_conv1d_linears_are_fingerprinted_as_out_and_in(tmp_path):
    adapted(base=family("gpt2").build()).save_pretrained(tmp_path)
    linears = json.loads((tmp_path / CONFIG_FILE).read_text())["fingerprint"]["linears"]
    assert linears == {path: list(family("gpt2").shape(path)) for path in family("gpt2").paths()}


def test_the_name_of_the_base_is_kept(tmp_path):
    base = family("llama").build()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base=LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    description = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert description["base_model_name_or_path"] == str(tmp_path / "base")


# --- saving -----------------------------------------------------------------------------------------------------------


def test_pickle_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        adapted().save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert not (tmp_path / "adapter").exists()


def test_only_the_main_process_writes(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "adapter").write_text("precious")
    with pytest.raises(ValueError, match="is a file"):
        adapted().save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "precious"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_diverged_adapter_is_not_saved(tmp_path, bad):
    model = adapted()
    with torch.no_grad():
        model.router.weight[0, 0] = bad
    with pytest.raises(ValueError, match=r"router\.weight"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_value_too_large_for_the_asked_dtype_is_not_saved(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.router.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"router\.weight"):
        model.save_pretrained(tmp_path / "adapter", dtype=torch.float16)
    assert not (tmp_path / "adapter").exists()


def test_a_state_dict_is_saved_instead_of_the_parameters(tmp_path):
    """As a sharded trainer gives it: names of the parameters, tensors gathered elsewhere."""
    model, other = adapted(seed=1), adapted(seed=2)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    again = AdaFuseModel.from_pretrained(family("llama").build(), tmp_path)
    assert torch.equal(logits(again), logits(other))


# --- loading what is wrong --------------------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    assert "nowhere" in refused(tmp_path / "nowhere", "neither a folder")


def test_a_file_instead_of_a_folder(folder):
    refused(folder / WEIGHTS_FILE, "not a folder")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "missing")


def test_weights_missing(folder):
    (folder / WEIGHTS_FILE).unlink()
    refused(folder, f"{WEIGHTS_FILE} is missing")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_truncated_weights(folder, keep):
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(folder, "not a readable safetensors file")


def test_weights_with_something_behind_them(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    refused(folder, "not a readable safetensors file")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


def test_a_pickle_is_never_read(folder):
    weights = pickle.dumps(Bomb())
    (folder / "adapter_model.bin").write_bytes(weights)
    (folder / WEIGHTS_FILE).unlink()
    refused(folder, "pickle")
    (folder / WEIGHTS_FILE).write_bytes(weights)
    refused(folder, "not a readable safetensors file")


def test_a_torch_file_with_the_right_name(folder):
    torch.save(read(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    refused(folder, "not a readable safetensors file")


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("name", ["router.weight", "model.layers.1.mlp.up_proj.experts_b"])
def test_wrong_tensors(folder, name, header):
    def reshape(tensors):
        tensors[name] = tensors[name].transpose(0, 1).contiguous()

    path = folder / WEIGHTS_FILE
    sound = path.read_bytes()
    cases = {
        f"missing.*{name}": lambda tensors: tensors.pop(name),
        r"cannot have.*extra\.weight": lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}),
        r"cannot have.*shared_a": lambda tensors: tensors.update(
            {"model.layers.0.mlp.up_proj.shared_a": torch.zeros(2, HIDDEN)}
        ),
        f"{name} has shape.*expected": reshape,
        f"{name} holds NaN": lambda tensors: tensors[name].view(-1)[3:4].fill_(torch.nan),
        f"{name} holds.*Inf": lambda tensors: tensors[name].view(-1)[-1:].fill_(-torch.inf),
        f"{name} has dtype": lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}),
    }
    for match, change in cases.items():
        edit_weights(folder, change, metadata=header)
        refused(folder, match)
        path.write_bytes(sound)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"intermediate_size": 64}, "gate_proj"),
        ({"num_key_value_heads": 4}, "k_proj"),
    ],
    ids=str,
)
def test_a_base_of_another_shape(folder, change, match):
    llama = family("llama").build()
    other = LlamaForCausalLM(LlamaConfig(**{**llama.config.to_dict(), **change}))
    assert "another base" in refused(folder, match, other)


def test_a_base_of_another_family(folder):
    """Mistral has the same paths and shapes as Llama: the fingerprint tells them apart all the same."""
    assert "another base" in refused(folder, "model_type is llama there and mistral", family("mistral").build())
    assert "another base" in refused(folder, "model_type", family("gpt2").build())


def test_a_base_in_bf16_or_under_another_name_is_the_same_base(folder):
    base = family("llama").build(torch.bfloat16)
    base.config._name_or_path = base.name_or_path = "elsewhere"
    AdaFuseModel.from_pretrained(base, folder)


def test_the_base_is_adapted_already(folder):
    base = family("llama").build()
    AdaFuseModel(base, config_of("default"))
    with pytest.raises(ValueError, match="already"):
        AdaFuseModel.from_pretrained(base, folder)


def test_a_newer_format(folder):
    edit_config(folder, format_version=2)
    assert "upgrade" in refused(folder, "format_version 2")


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.5, True, []])
def test_a_format_version_that_is_none(folder, version):
    edit_config(folder, format_version=version)
    refused(folder, "format_version")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r": 0}, "r=0"),
        ({"top_k": 9}, "top_k"),
        ({"routing": "token"}, "routing"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"target_modules": ["nothing_like_it"]}, "nothing_like_it"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"r": 4}, "has shape"),
        ({"router_hidden": 4}, "missing"),
        ({"shared_rank": 4, "shared_alpha": 4}, "missing"),
        ({"target_modules": ["q_proj"]}, "another base"),
        ({"fingerprint": None}, "fingerprint"),
        ({"fingerprint": []}, "fingerprint"),
        ({"fingerprint": {}}, "no fingerprint"),
        ({"fingerprint": {"model_type": "llama", "linears": 3}}, "no fingerprint"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(folder, change, match):
    edit_config(folder, **change)
    refused(folder, match)


@pytest.mark.parametrize("text", ["", "{", '{"r": 3,}', "[]", "null", "3", b"\xff\xfe{}"], ids=repr)
def test_broken_json(folder, text):
    """With and without the header's copy."""
    content = text if isinstance(text, bytes) else text.encode()
    (folder / CONFIG_FILE).write_bytes(content)
    refused(folder, CONFIG_FILE)
    edit_weights(folder, lambda tensors: None, metadata=False)
    refused(folder, CONFIG_FILE)


def test_a_broken_header(folder):
    tensors = read(folder / WEIGHTS_FILE)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", "adapter_config": "{"})
    refused(folder, "header")


def test_no_json(folder):
    """The header has it all: a first save interrupted between the two files. Without a header there is nothing to go by."""
    (folder / CONFIG_FILE).unlink()
    with pytest.warns(UserWarning, match=WEIGHTS_FILE):
        model = AdaFuseModel.from_pretrained(family("llama").build(), folder)
    assert torch.equal(logits(model), logits(adapted()))
    edit_weights(folder, lambda tensors: None, metadata=False)
    refused(folder, f"no {CONFIG_FILE}")


def test_without_a_header_the_json_rules(folder):
    edit_weights(folder, lambda tensors: None, metadata=False)
    model = AdaFuseModel.from_pretrained(family("llama").build(), folder)
    assert torch.equal(logits(model), logits(adapted()))


def test_the_header_wins_over_another_json(folder):
    description = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**description, "r": 99, "lora_alpha": 1.0}))
    with pytest.warns(UserWarning, match="interrupted save"):
        model = AdaFuseModel.from_pretrained(family("llama").build(), folder)
    assert torch.equal(logits(model), logits(adapted()))


def test_a_peft_lora_folder_is_sent_to_the_import(tmp_path):
    lora = get_peft_model(family("llama").build(), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    assert "import_loras" in refused(tmp_path, "PEFT LORA")


# --- load_adapter -----------------------------------------------------------------------------------------------------


def test_load_adapter_replaces_the_weights(folder):
    model = adapted(seed=2).train()
    model.load_adapter(folder, "default", is_trainable=True)
    assert model.training
    assert torch.equal(logits(model.eval()), logits(adapted()))


@pytest.mark.parametrize("options", ["layer", "shared", "hidden", "targets"])
def test_load_adapter_refuses_other_settings(folder, options):
    model = adapted(config_of(options), seed=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"other settings|another base"):
        model.load_adapter(folder, "default")
    assert differences(before, snapshot(model)) == []


def test_load_adapter_refuses_bad_weights_and_other_names(folder):
    model = adapted(seed=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'second'"):
        model.load_adapter(folder, "second")
    edit_weights(folder, lambda tensors: tensors["router.weight"].view(-1)[:1].fill_(torch.nan))
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(folder, "default")
    assert differences(before, snapshot(model)) == []


def test_options_that_mean_nothing_are_refused_not_swallowed(folder, tmp_path):
    base = family("llama").build()
    with pytest.raises(ValueError, match=r"unknown option.s. is_trainble"):
        AdaFuseModel.from_pretrained(base, folder, is_trainble=True)
    with pytest.raises(ValueError, match="adapter 'other'"):
        AdaFuseModel.from_pretrained(base, folder, adapter_name="other")
    with pytest.raises(ValueError, match="dtpye"):
        adapted().save_pretrained(tmp_path / "new", dtpye=torch.bfloat16)
    with pytest.raises(ValueError, match=r"call model.push_to_hub"):
        adapted().save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_a_subfolder_is_read(folder):
    model = AdaFuseModel.from_pretrained(family("llama").build(), folder.parent, subfolder=folder.name)
    assert torch.equal(logits(model), logits(adapted()))


def test_the_reference_copy_is_never_saved_in_place_of_the_adapter(folder, tmp_path):
    model = adapted()
    model.add_adapter("ref")
    model.set_adapter("ref")
    for act in (
        lambda: model.save_pretrained(tmp_path / "new"),
        lambda: model.load_adapter(folder, "default"),
        lambda: model.add_adapter("ref"),
    ):
        with pytest.raises(ValueError, match=r"set_adapter\('default'\) first"):
            act()
    model.set_adapter(["default"])
    model.save_pretrained(tmp_path / "new")


def test_an_adapter_loaded_to_train_trains(folder):
    model = AdaFuseModel.from_pretrained(family("llama").build(), folder)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.load_adapter(folder, "default", is_trainable=True)
    assert model.get_nb_trainable_parameters()[0] > 0


def test_saving_what_is_not_there(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="the state_dict lacks 29 parameter"):
        model.save_pretrained(tmp_path / "new", state_dict={"something": torch.ones(1)})
    model.detach()
    with pytest.raises(RuntimeError, match="detached"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
