"""4-bit and 8-bit bases on the CPU: train, save, reload; the adapter and the router stay in fp32."""

import pytest
import torch
from families import fill
from reference import relative_error
from safetensors import safe_open
from tiny_text import collate, save_base, sums, tokenizer, write_jsonl
from trainers import QUIET, quiet, run, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.base import load_adapted, load_base
from adafuse.checkpoint import WEIGHTS_FILE
from adafuse.data import Example, encode
from adafuse.training import TrainSettings, run_training

CONFIG = AdaFuseConfig(r=2, num_experts=4, routing="layer", aux_loss_coef=0.5)


def _nf4():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def _int8():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def _torchao_int4():
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))


KINDS = {
    "bitsandbytes 4 bit": _nf4,
    "bitsandbytes 8 bit": _int8,
    "torchao 8 bit": _torchao_int8,
    "torchao 4 bit": _torchao_int4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sizes that bitsandbytes' 4-bit kernel for CPUs takes: the outputs of each linear a multiple of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
    return save_base(tmp_path_factory.mktemp("base"), **sizes)


def quantized(folder, kind):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind](), dtype=torch.float32)


def examples(count=16):
    items = [Example(i, each["prompt"], each["answer"]) for i, each in enumerate(sums(count))]
    return encode(items, tokenizer(), None).rows


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torchao 4 bit"])  # Trainer refuses that one itself
def test_it_trains_saves_and_reloads(kind, folder, tmp_path):
    model = AdaFuseModel(quantized(folder, kind), CONFIG)
    fill(model)
    linear = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj.base_layer")
    full = AutoModelForCausalLM.from_pretrained(folder).get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, 64)
    assert 1e-4 < relative_error(linear(x).detach(), full(x)) < 0.3, "the base is not quantised, or is broken"
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    trained = train(model, examples(), tmp_path, collate=collate, max_steps=2, per_device_train_batch_size=4,
                    save_strategy="steps", save_steps=2)  # fmt: skip
    assert {gradient.dtype for gradient in trained.gradients[0].values()} == {torch.float32}
    after = model.adapter_tensors()
    assert all(after[name].dtype == torch.float32 and not torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path / "adapter")
    for saved in (tmp_path / "adapter", tmp_path / "checkpoint-2"):
        again = AdaFuseModel.from_pretrained(quantized(folder, kind), saved)
        batch = collate(examples(4))
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    with safe_open(tmp_path / "checkpoint-2" / WEIGHTS_FILE, framework="pt") as file:
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == dict.fromkeys(before, "F32")  # noqa: SIM118
    onto_full = AdaFuseModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert all(torch.equal(tensor, after[name]) for name, tensor in onto_full.adapter_tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_on_the_dequantised_base(kind, folder):
    model = AdaFuseModel(quantized(folder, kind), CONFIG).train()
    tensors = fill(model)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for path in model.banks:
            linear = model.get_base_model().get_submodule(path).base_layer
            identity = torch.eye(linear.in_features)
            plain.get_submodule(path).weight.copy_(linear(identity).T)
    wanted = AdaFuseModel(plain, CONFIG).train()
    wanted.load_adapter_tensors(tensors)
    with torch.no_grad():  # what an evaluation between two steps does must not change the next gradient
        model.eval()(**collate(examples(2)))
    for each in (model.train(), wanted):
        each(**collate(examples(4))).loss.backward()
    got, wanted = model.adapter_tensors(grad=True), wanted.adapter_tensors(grad=True)
    # bitsandbytes' 8-bit kernel rounds the activations too, so its linears are not quite linear.
    tolerance = 0.2 if kind == "bitsandbytes 8 bit" else 1e-3
    errors = {name: ((got[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_add_the_experts_beside_a_quantised_base(kind, folder, few_programs):
    """A prompt, and one token; on a CPU in Triton's interpreter. 8-bit bitsandbytes rounds by what is in the batch, so both see one."""
    pytest.importorskip("triton")
    model = AdaFuseModel(quantized(folder, kind), AdaFuseConfig(r=2, num_experts=4, routing="layer")).eval()
    fill(model)
    ids = collate(examples(1))["input_ids"]
    for tokens in (ids, ids[:, :1]):
        found = {}
        for model.execution in ("reference", "fused"):
            with torch.no_grad():
                found[model.execution] = model(input_ids=tokens).logits
        with torch.no_grad(), model.disable_adapter():
            bare = model(input_ids=tokens).logits
        assert relative_error(bare, found["reference"]) > 1e-2, "the experts add nothing"
        assert relative_error(found["fused"], found["reference"]) < (2e-2 if kind == "bitsandbytes 8 bit" else 1e-4)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_command_trains_on_a_quantised_base(bits, folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    data = write_jsonl(tmp_path / "data.jsonl", sums(40))
    settings = TrainSettings(steps=4, batch_size=4, learning_rate=1e-2, save_every=2, gradient_checkpointing=True)
    load = {"device": "cpu", "quantize": bits}
    run_training(folder, data, tmp_path / "out", config=CONFIG, settings=settings, console=quiet(), **load)
    model, _ = load_adapted(tmp_path / "out", folder, **load)
    assert getattr(model.get_base_model(), f"is_loaded_in_{bits}")
    assert torch.isfinite(model(**collate(examples(2))).logits).all()


def test_loading_refuses_what_it_does_not_know(folder):
    with pytest.raises(ValueError, match="quantize='2bit' is unknown; allowed: 4bit, 8bit"):
        load_base(folder, quantize="2bit", device="cpu")
    with pytest.raises(ValueError, match="dtype='int8' is unknown; allowed"):
        load_base(folder, dtype="int8", device="cpu")
    with pytest.raises(ValueError, match="cannot be loaded as a HuggingFace causal LM"):
        load_base(folder / "nothing", device="cpu")


def test_sft_trainer_on_a_4bit_base(folder, tmp_path):
    """TRL casts what trains on a quantised base to bf16: the arithmetic of the router stays fp32, the files too."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = AdaFuseModel(quantized(folder, "bitsandbytes 4 bit"), CONFIG)
    records = [{"prompt": each["prompt"], "completion": each["answer"]} for each in sums(16)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, save_steps=2, learning_rate=1e-2, bf16=False, **QUIET
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer(),
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    probabilities = set()
    model.router.register_forward_hook(lambda _, __, routing: probabilities.add(routing.probabilities.dtype))
    run(trainer)
    assert probabilities == {torch.float32}
    again = AdaFuseModel.from_pretrained(quantized(folder, "bitsandbytes 4 bit"), tmp_path / "checkpoint-2")
    for name, tensor in again.adapter_tensors().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.adapter_tensors()[name].float())


def test_sft_trainer_on_a_4bit_base_in_fp32(folder, tmp_path):
    """Cast back before training, the adapter trains in fp32 there as everywhere."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = AdaFuseModel(quantized(folder, "bitsandbytes 4 bit"), CONFIG)
    records = [{"prompt": each["prompt"], "completion": each["answer"]} for each in sums(16)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, save_steps=2, learning_rate=1e-2, bf16=False, **QUIET
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer(),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    run(trainer)
    assert {gradient.dtype for gradient in trainer.gradients[0].values()} == {torch.float32}
    moments = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert {state["exp_avg"].dtype for state in moments.values()} == {torch.float32}


def test_a_base_repacked_for_inference_is_not_trained(folder):
    """bitsandbytes does it on CPUs that have a kernel for it, in eval mode; gradients would be wrong in silence."""
    base = quantized(folder, "bitsandbytes 4 bit")
    with torch.no_grad():
        base.eval()(**collate(examples(2)))
    model = AdaFuseModel(base, CONFIG)
    with torch.no_grad():
        assert torch.isfinite(model(**collate(examples(2))).logits).all()
    linear = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj.base_layer")
    if not getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no such kernel")
    with pytest.raises(ValueError, match="load the base again"):
        model.train()
