"""LoRA folders that PEFT itself made: as experts, out again, and refused. PEFT's own model and delta weights are the reference."""

import json
import shutil
import warnings

import peft
import pytest
import torch
from families import BLOCKS, HIDDEN, batch, family, fill
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from snapshots import differences, snapshot

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.integrations import lora_folder
from adafuse.integrations.peft import export_loras, import_loras

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GATED = ["q_proj", "v_proj", "down_proj"]
TARGETS = {"llama": GATED, "gemma3": GATED, "gemma3-multimodal": r".*language_model\.layers.*\.(q_proj|down_proj)"}
TARGETS |= {"gpt2": ["c_attn", "mlp.c_proj"], "gpt-neox": ["query_key_value", "dense"]}
# On "model.layers.1.self_attn.q_proj": rank 5 and alpha 9 by suffix; 2 by a regular expression elsewhere.
PATTERNS = {
    "rank_pattern": {"q_proj": 5, r".*\.1\.mlp\.down_proj": 2},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "v_proj": 1.5},
}


def make_lora(folder, fam, seed=1, **settings):
    """A LoRA folder made by PEFT on `fam`, B random; returns PEFT's model, in evaluation mode."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[fam.name], **settings}
    if fam.name == "gpt2":
        settings["fan_in_fan_out"] = True
    model = get_peft_model(fam.build(), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return model.eval()


def make_loras(tmp_path, fam, *settings):
    folders = [tmp_path / f"lora-{i}" for i in range(len(settings))]
    return folders, [make_lora(f, fam, seed=i + 1, **s) for i, (f, s) in enumerate(zip(folders, settings, strict=True))]


def silent(function, *args, **kwargs):
    """The call, with any warning to the user an error (what libraries deprecate among themselves is not one)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return function(*args, **kwargs)


@torch.no_grad()
def logits(model):
    return model(input_ids=batch()).logits


def error(got, wanted):
    return (got - wanted).abs().max().item()


def deltas(peft_model):
    """Module path -> PEFT's delta [out, in], scale included."""
    modules = peft_model.base_model.model.named_modules()
    found = {path: m.get_delta_weight("default").detach() for path, m in modules if hasattr(m, "get_delta_weight")}
    conv1d = {path for path in found if peft_model.base_model.model.get_submodule(path).fan_in_fan_out}
    return {path: delta.T if path in conv1d else delta for path, delta in found.items()}


@torch.no_grad()
def mixture(fam, peft_models, routing):
    """Logits of a plain base to which, token by token, PEFT's deltas are added with the weights of `routing`."""
    base, found = fam.build(), [deltas(model) for model in peft_models]
    experts, weights = routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)

    def hook(path, decision):
        def add(_linear, args, output):
            out = output.reshape(-1, output.shape[-1]).clone()
            for t, x in enumerate(args[0].reshape(-1, args[0].shape[-1])):
                for e, w in zip(experts[t, decision].tolist(), weights[t, decision].tolist(), strict=True):
                    if path in found[e]:
                        out[t] += w * (found[e][path] @ x)
            return out.view(output.shape)

        return add

    for path in sorted({path for each in found for path in each}):
        block = int(path.removeprefix(f"{fam.blocks}.").split(".")[0])
        base.get_submodule(path).register_forward_hook(hook(path, block if experts.shape[1] > 1 else 0))
    return logits(base)


# --- one LoRA is PEFT's model -------------------------------------------------------------------------------------


SINGLE = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora-patterns": {"use_rslora": True, **PATTERNS},
    "one-block": {"layers_to_transform": [1]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
CASES = [("llama", kind) for kind in SINGLE] + [("gemma3", kind) for kind in SINGLE]
CASES += [
    ("gpt2", "plain"),
    ("gpt2", "rslora"),
    ("gpt2", "one-block"),
    ("gpt-neox", "plain"),
    ("gemma3-multimodal", "plain"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_lora_gives_the_outputs_of_peft(tmp_path, name, kind):
    fam = family(name)
    wanted = logits(make_lora(tmp_path / "lora", fam, **SINGLE[kind]))
    model = import_loras(fam.build(), [tmp_path / "lora"])
    assert (model.adafuse_config.num_experts, model.adafuse_config.top_k, model.adafuse_config.scale) == (1, 1, 1.0)
    assert error(logits(model), wanted) < 1e-5
    assert error(logits(fam.build()), wanted) > 0.1, "the LoRA does next to nothing: a weak test"


def test_a_lora_saved_in_bf16_is_read_exactly(tmp_path):
    fam, folder = family("llama"), tmp_path / "lora"
    reference = make_lora(folder, fam)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    reference.load_adapter(folder, "bf16")
    reference.set_adapter("bf16")
    assert error(logits(silent(import_loras, fam.build(), [folder])), logits(reference)) < 1e-5


def test_a_pissa_lora_converted_by_peft_is_a_plain_lora(tmp_path):
    """PiSSA subtracts from the base; PEFT's conversion at saving makes a LoRA for the original base of twice the rank."""
    fam = family("llama")
    config = LoraConfig(r=4, target_modules=GATED, init_lora_weights="pissa", task_type="CAUSAL_LM")
    trained = get_peft_model(fam.build(), config)
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(tmp_path / "init")
    trained.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wanted = logits(trained.eval())
    trained.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match=r"raw.*init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"):
        import_loras(fam.build(), [tmp_path / "raw"])
    trained.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    assert error(logits(import_loras(fam.build(), [tmp_path / "plain"])), wanted) < 1e-4


# --- several LoRAs ------------------------------------------------------------------------------------------------


VARIED = (
    {},
    {"r": 2, "lora_alpha": 5, "target_modules": None, "use_rslora": True},
    {"r": 6, "layers_to_transform": [1]},
)
OTHER_TARGETS = {"llama": ["gate_proj", "q_proj"], "gemma3": ["o_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("routing", ["model", "layer"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_several_loras_give_the_routed_sum_of_peft_deltas(tmp_path, name, routing, top_k):
    fam = family(name)
    settings = [dict(VARIED[0]), {**VARIED[1], "target_modules": OTHER_TARGETS[name]}, dict(VARIED[2])]
    folders, references = make_loras(tmp_path, fam, *settings)
    with pytest.warns(UserWarning, match="note:"):
        model = import_loras(fam.build(), folders, top_k=top_k, routing=routing)
    chosen = model.route(batch())
    assert chosen.experts.unique().numel() == 3, "an expert is never chosen: a weak test"
    assert error(logits(model), mixture(fam, references, chosen)) < 1e-5


def test_an_expert_with_all_the_weight_is_its_lora(tmp_path):
    fam = family("llama")
    folders, references = make_loras(tmp_path, fam, {}, {"lora_alpha": 3})
    model = silent(import_loras, fam.build(), folders, top_k=2, router_hidden=4)
    tensors = model.adapter_tensors()
    # silu(100 x) + silu(-100 x) = 100 |x|: a positive logit whatever the token.
    row = 100 * torch.randn(1, HIDDEN)
    tensors["router.hidden.weight"].copy_(torch.cat([row, -row, 0 * row, 0 * row]))
    for expert in (0, 1):
        tensors["router.weight"].zero_()[expert, :2] = 10
        assert model.route(batch()).weights[..., 0].min() > 1 - 1e-6
        assert error(logits(model), logits(references[expert])) < 1e-5


def test_the_padding_is_said_with_its_numbers(tmp_path):
    fam = family("llama")
    settings = (
        {},
        {"r": 2},
        {"r": 4, "target_modules": ["q_proj"]},
        {"r": 3, "rank_pattern": {"q_proj": 1, "v_proj": 4}},
    )
    folders, _ = make_loras(tmp_path, fam, *settings)
    with pytest.warns(UserWarning, match="note:") as said:
        model = import_loras(fam.build(), folders)
    assert len(said) == 1
    lines = str(said[0].message).splitlines()
    assert lines[0] == "imported 4 LoRA(s) as experts; note:"
    assert lines[1:] == [
        f"- {folders[1]}: rank 2 padded with zeros to 4",
        f"- {folders[2]}: absent from 4 of 6 linears, zero there",
        f"- {folders[3]}: rank 1-4 padded with zeros to 4",
    ]
    assert said[0].filename == __file__
    tensors = model.adapter_tensors()
    assert not tensors["model.layers.0.self_attn.q_proj.experts_b"][1, :, 2:].any()
    assert not tensors["model.layers.0.mlp.down_proj.experts_b"][2].any()


def test_padded_ranks_can_still_learn(tmp_path):
    """Were A zero too, neither A nor B would ever get a gradient there."""
    fam = family("llama")
    folders, _ = make_loras(tmp_path, fam, {}, {"r": 2})
    with pytest.warns(UserWarning, match="rank 2 padded"):
        model = import_loras(fam.build(), folders)
    model.set_trainable("all")
    model(input_ids=batch(), labels=batch()).loss.backward()
    gradient = model.adapter_tensors(grad=True)["model.layers.0.self_attn.q_proj.experts_b"]
    assert gradient[1, :, 2:].abs().min() > 0


def test_different_bases_are_said(tmp_path):
    fam = family("llama")
    folders, _ = make_loras(tmp_path, fam, {}, {})
    for folder, name in zip(folders, ("org/base", "org/base-chat"), strict=True):
        edit(folder, base_model_name_or_path=name)
    with pytest.warns(UserWarning, match=r"different bases.*org/base \(.*lora-0\), org/base-chat \(.*lora-1\)"):
        import_loras(fam.build(), folders)


@pytest.mark.parametrize(
    ("name", "chosen", "names"),
    [
        ("llama", ["q_proj", "down_proj"], ("down_proj", "q_proj")),
        ("gpt2", ["mlp.c_proj"], ("mlp.c_proj",)),
        ("gpt2", ["c_proj"], ("c_proj",)),
        ("llama", ["layers.1.mlp.up_proj"], ("model.layers.1.mlp.up_proj",)),
        ("gemma3-multimodal", r".*language_model.*q_proj", ("q_proj",)),
    ],
)
def test_targets_are_the_shortest_names_that_fit(tmp_path, name, chosen, names):
    make_lora(tmp_path / "lora", family(name), target_modules=chosen)
    model = silent(import_loras, family(name).build(), [tmp_path / "lora"])
    assert model.adafuse_config.target_modules == names


@pytest.mark.parametrize(
    ("made_on", "used_on", "prefix"),
    [
        ("gemma3", "gemma3", "language_model.model.layers"),
        ("gemma3", "gemma3-multimodal", "model.layers"),
        ("gemma3-multimodal", "gemma3", "model.language_model.layers"),
        ("gemma3-multimodal", "gemma3-multimodal", "language_model.model.layers"),
    ],
)
def test_the_same_blocks_under_another_wrapper_are_found(tmp_path, made_on, used_on, prefix):
    folder = tmp_path / "lora"
    reference = make_lora(folder, family(made_on))
    blocks = family(made_on).blocks
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {name.replace(f".{blocks}.", f".{prefix}."): tensor for name, tensor in tensors.items()}, folder / WEIGHTS
    )
    with pytest.warns(
        UserWarning, match=rf"module\(s\) have another prefix here, {prefix}\.0\..* is {family(used_on).blocks}\.0"
    ):
        model = import_loras(family(used_on).build(), [folder])
    assert set(model.banks) == {path.replace(blocks, family(used_on).blocks) for path in deltas(reference)}
    if made_on == used_on:
        assert error(logits(model), logits(reference)) < 1e-5


def test_a_vision_tower_is_not_taken_for_the_language_model(tmp_path):
    folder, fam = tmp_path / "lora", family("gemma3-multimodal")
    make_lora(folder, fam, target_modules=r".*vision_tower.*\.q_proj")
    refused(fam, [folder], "vision_tower.* is a Linear outside the blocks")


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_import_export_import_is_the_same(tmp_path, name):
    fam = family(name)
    folders, _ = make_loras(tmp_path, fam, {"use_rslora": True}, {"r": 2, "target_modules": OTHER_TARGETS[name]})
    with pytest.warns(UserWarning, match="note:"):
        first = import_loras(fam.build(), folders)
    again = silent(import_loras, fam.build(), export_loras(first, tmp_path / "out"))
    assert again.adafuse_config == first.adafuse_config
    ours, theirs = first.adapter_tensors(), again.adapter_tensors()
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if n != "router.weight" and not torch.equal(ours[n], theirs[n])] == []


def test_an_imported_adapter_saves_and_loads(tmp_path):
    fam = family("gpt2")
    folders, _ = make_loras(tmp_path, fam, {}, {})
    model = import_loras(fam.build(), folders, routing="layer", router_hidden=3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AdaFuseModel.from_pretrained(fam.build(), tmp_path / "adapter")
    assert loaded.adafuse_config == model.adafuse_config
    assert torch.equal(logits(loaded), logits(model))


def test_detach_after_import_gives_the_base_back(tmp_path):
    base = family("llama").build()
    before = snapshot(base)
    make_lora(tmp_path / "lora", family("llama"))
    import_loras(base, [tmp_path / "lora"]).detach()
    assert differences(before, snapshot(base)) == []


def test_training_the_router_moves_the_router_only(tmp_path):
    """Labels are what the first LoRA's model would say: the router learns to choose it.

    All three experts run, so that a token that does not choose the first one at the start still learns of it.
    """
    fam = family("llama")
    folders, references = make_loras(tmp_path, fam, {}, {}, {})
    model = silent(import_loras, fam.build(), folders, top_k=3, aux_loss_coef=0.0)
    ids = batch(4, 6)  # fewer tokens than the router has inputs: it can tell all of them apart
    with torch.no_grad():
        wanted = references[0](input_ids=ids).logits.softmax(-1)
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    base = {name: p.clone() for name, p in model.get_base_model().named_parameters() if "bank" not in name}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in trained] == [id(model.router.weight)]
    optimiser, losses = torch.optim.AdamW(trained, lr=0.05), []
    shares = [(model.route(ids).experts[..., 0] == 0).float().mean()]
    model.train()
    for _ in range(30):
        loss = -(wanted * model(input_ids=ids).logits.log_softmax(-1)).sum(-1).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    shares.append((model.route(ids).experts[..., 0] == 0).float().mean())
    after = model.adapter_tensors()
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["router.weight"]
    assert all(torch.equal(p, base[n]) for n, p in model.get_base_model().named_parameters() if n in base)
    floor = -(wanted * wanted.log()).sum(-1).mean()
    assert losses[-1] - floor < 0.25 * (losses[0] - floor)
    assert shares[1] > 0.9 > shares[0]


# --- export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gemma3-multimodal", "gpt-neox", "phi"])
def test_peft_loads_every_exported_expert(tmp_path, name):
    fam = family(name)
    config = AdaFuseConfig(r=3, num_experts=3, lora_alpha=4.5, shared_rank=2, shared_alpha=5)
    model = AdaFuseModel(fam.build(), config)
    tensors = fill(model)
    folders = export_loras(model, tmp_path / "new" / "out")
    assert [folder.name for folder in folders] == ["expert-0", "expert-1", "expert-2", "shared"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]
    for e, folder in enumerate(folders):
        a, b, scale = ("experts_a", "experts_b", 1.5) if e < 3 else ("shared_a", "shared_b", 2.5)
        loaded = silent(PeftModel.from_pretrained, fam.build(), folder)
        found = deltas(loaded)
        assert sorted(found) == sorted(fam.paths())
        for path, delta in found.items():
            wanted_a, wanted_b = tensors[f"{path}.{a}"], tensors[f"{path}.{b}"]
            wanted = scale * (wanted_b @ wanted_a if e == 3 else wanted_b[e] @ wanted_a[e])
            assert error(delta, wanted) < 1e-6, path
        assert error(logits(loaded), logits(fam.build())) > 0.1


def test_an_exported_expert_is_the_model_with_that_expert_alone(tmp_path):
    fam = family("llama")
    model = AdaFuseModel(fam.build(), AdaFuseConfig(r=3, num_experts=1, top_k=1, target_modules=["up_proj", "o_proj"]))
    fill(model)
    (folder,) = export_loras(model.eval(), tmp_path / "out")
    settings = json.loads((folder / CONFIG).read_text())
    assert sorted(settings["target_modules"]) == ["o_proj", "up_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["fan_in_fan_out"]) == (3, 6, False)
    assert error(logits(PeftModel.from_pretrained(fam.build(), folder)), logits(model)) < 1e-5


def test_exporting_into_an_empty_folder_or_nothing_else(tmp_path):
    model = AdaFuseModel(family("llama").build(), AdaFuseConfig(num_experts=2))
    (tmp_path / "empty").mkdir()
    export_loras(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="a folder with files in it; name a folder that does not exist yet"):
        export_loras(model, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="it is a file"):
        export_loras(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    model = AdaFuseModel(family("llama").build(), AdaFuseConfig(num_experts=2))
    calls = []

    def full_disk(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(lora_folder, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        export_loras(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        model.adapter_tensors()["model.layers.0.mlp.up_proj.experts_b"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"refusing to export: model\.layers\.0\.mlp\.up_proj\.experts_b"):
        export_loras(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- refused ------------------------------------------------------------------------------------------------------


def edit(folder, **changes):
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**settings, **changes}))


def refused(fam, folders, match, **settings):
    """import_loras raises ValueError with `match`, and the base is what it was."""
    base = fam.build()
    before = snapshot(base)
    with pytest.raises(ValueError, match=match):
        import_loras(base, folders, **settings)
    assert differences(before, snapshot(base)) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "use_dora is set.*DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias is set.*with a bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set.*beside the LoRA"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set.*embeddings"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "embed_tokens.*(is a LoRA on an embedding|saved beside the LoRA)",
        ),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "lm_head.*saved beside the LoRA|lm_head is the language-model head",
        ),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights='pissa_niter_2'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_more_than_a_plain_lora_is_refused(tmp_path, settings, match):
    make_lora(tmp_path / "good", family("llama"))
    make_lora(tmp_path / "bad", family("llama"), **settings)
    refused(family("llama"), [tmp_path / "good", tmp_path / "bad"], f"{tmp_path / 'bad'}: .*({match})")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is set"),
        ({"megatron_config": {"tp": 2}}, "megatron_config is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"something_new": {"deep": 1}}, "something_new is set.*does not know"),
        ({"r": 8}, r"A \[4, \d+\].*gives rank 8"),
        ({"r": None}, "r of model.layers.0.* is None"),
        ({"r": 0}, "the rank of .* is 0"),
        ({"lora_alpha": "high"}, "lora_alpha of .* is 'high'"),
        ({"lora_alpha": float("nan")}, "lora_alpha of .* is nan"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern is not a dict of name patterns"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is not a dict of name patterns"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, match):
    make_lora(tmp_path / "lora", family("llama"))
    edit(tmp_path / "lora", **changes)
    refused(family("llama"), [tmp_path / "lora"], f"{tmp_path / 'lora'}: .*{match}")


def _without(*names):
    return lambda tensors: {k: t for k, t in tensors.items() if not k.endswith(names)}


def _renaming(old, new):
    return lambda tensors: {k.replace(old, new): t for k, t in tensors.items()}


def _replacing(tensor, which="layers.0.self_attn.q_proj.lora_A.weight"):
    return lambda tensors: {k: tensor if k.endswith(which) else t for k, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_without("layers.0.self_attn.q_proj.lora_B.weight"), "lora_B of model.layers.0.self_attn.q_proj is missing"),
        (_without("weight"), "holds no tensor"),
        (
            _renaming("layers.1", "layers.7"),
            r"model.layers.7.mlp.down_proj is no module of this base.*\(model.layers\)",
        ),
        (_renaming("q_proj", "q_norm"), "q_norm is no module of this base"),
        (_renaming("mlp.down_proj", "mlp"), "model.layers.0.mlp is a LlamaMLP;"),
        (_renaming("base_model.model.", ""), "is not named as PEFT names"),
        (_renaming(".weight", ".default.weight"), "is not named as PEFT names"),
        (_renaming("lora_A.weight", "lora_magnitude_vector"), "lora_magnitude_vector belongs to DoRA"),
        (
            _replacing(torch.randn(4, 16)),
            "from 16 to 32 features, the base's linear from 32 to 32; it was trained on another",
        ),
        (_replacing(torch.randn(3, 32)), r"A \[3, 32\] and B \[32, 4\].*rank 4"),
        (_replacing(torch.randn(4, 32, 1)), r"shape \[4, 32, 1\].*convolutions"),
        (_replacing(torch.randn(0)), r"shape \[0\]"),
        (_replacing(torch.ones(4, 32, dtype=torch.int8)), "torch.int8"),
        (_replacing(torch.full((4, 32), float("nan"))), "q_proj.lora_A.weight holds NaN or Inf"),
        (_replacing(torch.full((4, 32), float("inf"))), "q_proj.lora_A.weight holds NaN or Inf"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, match):
    folder = tmp_path / "lora"
    make_lora(folder, family("llama"))
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    refused(family("llama"), [folder], f"{folder}: .*{match}")


def test_the_same_module_under_two_names_is_refused(tmp_path):
    folder = tmp_path / "lora"
    make_lora(folder, family("llama"), target_modules=["q_proj"])
    tensors = load_file(folder / WEIGHTS)
    twice = _renaming("model.layers", "language_model.model.layers")({k: t.clone() for k, t in tensors.items()})
    save_file({**tensors, **twice}, folder / WEIGHTS)
    refused(family("llama"), [folder], "two LoRAs in the file are for model.layers.0.self_attn.q_proj")


def test_a_lora_of_a_convolution_is_refused(tmp_path):
    fam, folder = family("gemma3-multimodal"), tmp_path / "lora"
    make_lora(folder, fam, target_modules=["patch_embedding"])
    refused(fam, [folder], "patch_embedding.*convolutions")


def test_files_that_are_missing_broken_or_pickled_are_refused(tmp_path):
    fam, good = family("llama"), tmp_path / "good"
    make_lora(good, fam)

    def broken(name, change):
        shutil.copytree(good, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def pickled(folder):
        torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()

    def truncated(folder):
        (folder / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:-100])

    cases = {
        "absent": (None, "is not a folder"),
        "no-config": (lambda folder: (folder / CONFIG).unlink(), f"it has no {CONFIG}$"),
        "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), "is missing"),
        "bad-json": (lambda folder: (folder / CONFIG).write_text('{"r": '), "not valid JSON"),
        "pickled": (pickled, "adapter_model.bin, a pickle file"),
        "truncated": (truncated, "not a readable safetensors file"),
    }
    for name, (change, match) in cases.items():
        folder = broken(name, change) if change else tmp_path / name
        refused(fam, [good, folder], f"{folder}.*{match}")


def test_folders_that_are_something_else_are_refused(tmp_path):
    fam = family("llama")
    model = AdaFuseModel(fam.build(), AdaFuseConfig(num_experts=2))
    model.save_pretrained(tmp_path / "ours")
    export_loras(model, tmp_path / "exported")
    refused(fam, [tmp_path / "ours"], "is a dynamic adapter.*AdaFuseModel.from_pretrained")
    refused(fam, [tmp_path / "exported"], r"contains folders that have one \(expert-0, expert-1\): name those")


def test_lists_that_make_no_sense_are_refused(tmp_path):
    fam = family("llama")
    make_lora(tmp_path / "lora", fam)
    refused(fam, [], "no LoRA folder was given")
    refused(fam, str(tmp_path / "lora"), "is one path; pass a list")
    refused(fam, [tmp_path / "lora"], r"top_k=2 is more than the 1 LoRA folder", top_k=2)
    refused(fam, [tmp_path / "lora"], "top_k=0 is too small", top_k=0)
    refused(fam, [tmp_path / "lora"], "routing='token' is unknown", routing="token")


def test_a_base_that_is_adapted_or_no_causal_lm_is_refused(tmp_path):
    fam = family("llama")
    adapted = make_lora(tmp_path / "lora", fam)
    with pytest.raises(ValueError, match="already adapted"):
        import_loras(adapted, [tmp_path / "lora"])
    model = import_loras(fam.build(), [tmp_path / "lora"])
    with pytest.raises(ValueError, match="already carries a dynamic adapter"):
        import_loras(model.get_base_model(), [tmp_path / "lora"])
    with pytest.raises(ValueError, match="not a causal LM"):
        import_loras(fam.build().model, [tmp_path / "lora"])


def test_every_setting_of_the_installed_peft_is_known():
    """One that is neither read, harmless nor refused with a reason: look at what it changes and add it to its list."""
    known = lora_folder._READ | lora_folder._HARMLESS | set(lora_folder._REFUSED)
    assert set(peft.LoraConfig().to_dict()) <= known


def test_the_paths_of_both_blocks_are_used(tmp_path):
    make_lora(tmp_path / "lora", family("llama"))
    assert len(silent(import_loras, family("llama").build(), [tmp_path / "lora"]).banks) == BLOCKS * len(GATED)
