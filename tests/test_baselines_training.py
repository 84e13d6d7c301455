"""Training the baselines: the HuggingFace Trainer unmodified, gradient checkpointing, accumulation, quantised bases."""

import gc
import warnings

import pytest
import torch
from baseline_methods import ALL, METHODS
from families import batch, family
from reference import relative_error
from safetensors import safe_open
from tiny_text import collate, rows, save_base
from trainers import assert_close, assert_same_bits, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adafuse.baselines.gate import Ledger
from adafuse.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from adafuse.packing import forbid_packing

STEPS = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}


def files(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("method", ALL)
def test_a_short_run_lowers_the_loss_and_saves_the_adapter_alone(method, tmp_path):
    model, _ = ALL[method].attach(filled=False)
    trained = train(model, rows(16), tmp_path, collate=collate, **{**STEPS, "max_steps": 30, "save_steps": 30})
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
    checkpoint = tmp_path / "checkpoint-30"
    assert {CONFIG_FILE, WEIGHTS_FILE} <= files(checkpoint)
    assert not {name for name in files(checkpoint) if name.startswith(("model", "pytorch_model"))}
    with safe_open(checkpoint / WEIGHTS_FILE, framework="pt") as file:
        assert set(file.keys()) == set(model.adapter_tensors())
    again = ALL[method].model.from_pretrained(family("llama").build(), checkpoint)
    assert_same_bits(again.adapter_tensors(), model.adapter_tensors())


@pytest.mark.parametrize("method", ALL)
def test_a_resumed_run_ends_with_the_same_bits(method, tmp_path):
    dropouts = {name: 0.2 for name in ("lora_dropout", "adapter_dropout") if hasattr(ALL[method].config, name)}
    whole, _ = ALL[method].attach(**dropouts)
    train(whole, rows(16), tmp_path / "run", collate=collate, **STEPS)
    resumed, _ = ALL[method].attach(**dropouts)
    train(resumed, rows(16), tmp_path / "run", collate=collate, resume=tmp_path / "run" / "checkpoint-3", **STEPS)
    assert_same_bits(resumed.adapter_tensors(), whole.adapter_tensors())


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_weights_the_balance_loss_by_label_tokens(method, tmp_path):
    examples = rows(8)
    model, _ = METHODS[method].attach()
    micro_batches = [collate(examples[i : i + 2]) for i in range(0, 8, 2)]
    counts = [int((each["labels"][:, 1:] != -100).sum()) for each in micro_batches]
    assert len(set(counts)) > 1, "equal micro-batches would not tell weighted from plain means"
    for each, count in zip(micro_batches, counts, strict=True):
        (model.train()(**each).loss * count / sum(counts)).backward()
    wanted = {name: gradient.clone() for name, gradient in model.adapter_tensors(grad=True).items()}
    again, _ = METHODS[method].attach()
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "train_sampling_strategy": "sequential",
    }
    trained = train(again, examples, tmp_path, collate=collate, **options)
    assert_close(trained.gradients[0], wanted, 1e-4)


# --- gradient checkpointing ----------------------------------------------------------------------------------------------


def checkpointed(method, execution="graph", **changes):
    model, _ = METHODS[method].attach(**changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames the method
        model.gradient_checkpointing_enable()
    model.execution = execution
    return model.train()


def plain(method, execution="graph", **changes):
    model, _ = METHODS[method].attach(**changes)
    model.execution = execution
    return model.train()


def given(seed, length=7):
    ids = batch(rows=2, length=length, seed=seed)
    return {"input_ids": ids, "labels": ids}


def gradients(model):
    return {name: gradient.clone() for name, gradient in model.adapter_tensors(grad=True).items()}


@pytest.mark.parametrize("execution", ["graph", "published"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_gradients(method, execution):
    if execution not in METHODS[method].model.executions:
        pytest.skip(f"{method} has no execution {execution!r}")
    checked, wanted = checkpointed(method, execution), plain(method, execution)
    calls = []
    last = next(iter(reversed(checked.banks)))
    module = next(each for each in checked.modules() if getattr(each, "bank", None) is checked.banks[last])
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (checked, wanted):
        model(**given(3)).loss.backward()
    assert len(calls) == 2, f"{len(calls)} runs of a module: checkpointing was not active"
    assert_close(gradients(checked), gradients(wanted), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_two_forwards_before_one_backward_and_one_without_the_adapter_between(method):
    checked, wanted = checkpointed(method), plain(method)
    for model in (checked, wanted):
        first = model(**given(3)).loss
        with model.disable_adapter():
            reference = model(**given(4)).loss.detach()
            (first * reference).backward()  # recomputed while the adapter is off
        second, third = model(**given(5)).loss, model(**given(6)).loss
        (second + 2 * third).backward()
    assert_close(gradients(checked), gradients(wanted), 1e-5)


def test_a_recompute_runs_in_the_execution_of_its_forward():
    checked, wanted = checkpointed("layerwise"), plain("layerwise")
    loss = checked(**given(3)).loss
    checked.execution = "published"
    loss.backward()
    wanted(**given(3)).loss.backward()
    assert_close(gradients(checked), gradients(wanted), 1e-5)


def test_dropout_is_drawn_again_in_the_recompute():
    for method in ("layerwise", "mixlora"):
        checked, wanted = checkpointed(method, lora_dropout=0.3), plain(method, lora_dropout=0.3)
        for model in (checked, wanted):
            torch.manual_seed(11)
            model(**given(3)).loss.backward()
        assert_close(gradients(checked), gradients(wanted), 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_no_routing_outlives_its_forward(method, checkpointing):
    """The graph of a forward must not hold its routings, which hold the graph."""
    model = (checkpointed if checkpointing else plain)(method)
    outputs = [model(**given(3)) for _ in range(2)]
    assert not [each for each in gc.get_objects() if type(each) is Ledger]
    outputs[0].loss.backward()
    assert not [each for each in gc.get_objects() if type(each) is Ledger]


# --- quantised bases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, {"load_in_8bit": True}]
)
@pytest.mark.parametrize("method", ["layerwise", "pesc", "mixlora"])
def test_a_quantised_base_trains(method, settings, tmp_path):
    """Sizes that bitsandbytes' 4-bit kernel for CPUs takes. The adapter does to it what it does to a base of the weights it has."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
    folder = save_base(tmp_path / "base", **sizes)

    def base():
        quantization = BitsAndBytesConfig(**settings)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)

    model, tensors = METHODS[method].attach(base())
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    examples = rows(8)
    # Not mixlora, whose loop multiplies with the weights themselves; not 8 bit, which rounds activations, so that small errors jump.
    if method != "mixlora" and "load_in_4bit" in settings:
        batch = {name: value for name, value in collate(examples).items() if name != "labels"}
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            unpacked = base()
            forbid_packing(unpacked)  # as the adapted one is: else another kernel, with other rounding, computes it
            wanted = METHODS[method].reference(unpacked, model.adafuse_config, tensors, **batch)
            assert relative_error(model.eval()(**batch).logits[real], wanted.logits[real]) < 1e-4
    train(model, examples, tmp_path / "run", collate=collate, max_steps=2, per_device_train_batch_size=4)
    after = model.adapter_tensors()
    assert all(after[name].isfinite().all() and not torch.equal(after[name], before[name]) for name in before)
