"""TRL's trainers, unmodified, on an adapted model: SFTTrainer against the per-token loop, DPOTrainer, GRPOTrainer."""

import copy
import itertools

import pytest
import torch
from families import fill
from reference import language_model_loss, leaves
from reference import run as reference_run
from tiny_text import save_base, sums, tokenizer
from trainers import QUIET, assert_close, assert_same_bits, run
from transformers import AutoModelForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

COEFFICIENT = 0.5
TRL_ADDS_THE_BALANCE_LOSS = hasattr(trl.trainer.utils, "add_fused_lm_head")  # else it takes the model's `.loss`
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), chat=True)


def adapted(folder, filled=True, **changes):
    settings = {"r": 2, "num_experts": 4, "top_k": 2, "aux_loss_coef": COEFFICIENT, **changes}
    model = AdaFuseModel(AutoModelForCausalLM.from_pretrained(folder), AdaFuseConfig(**settings))
    if filled:
        fill(model)
    return model


def sft(model, tmp_path, records=None, **changes):
    records = records or [{"prompt": each["prompt"], "completion": each["answer"]} for each in sums(16)]
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    arguments |= {"learning_rate": 1e-2, "bf16": False, **QUIET, **changes}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **arguments),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer(chat=True),
    )


def inputs_seen(model):
    """The keyword arguments of each forward in training, as they come."""
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append({k: v.clone() for k, v in kwargs.items() if torch.is_tensor(v)}),
        with_kwargs=True,
    )
    return seen


def reference_gradients(folder, config, tensors, micro_batches):
    """d/d(adapter) of  sum over label tokens of -log p / their number + coefficient * mean of the balance losses."""
    tensors = leaves(tensors)
    base = AutoModelForCausalLM.from_pretrained(folder)
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches]
    for batch, count in zip(micro_batches, counts, strict=True):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = reference_run(base, "model.layers", config, tensors, **inputs)
        share = count / sum(counts)
        weight = 1 / len(micro_batches) if TRL_ADDS_THE_BALANCE_LOSS else share
        loss = language_model_loss(found.logits, batch["labels"]) * share
        (loss + config.aux_loss_coef * weight * found.aux_loss()).backward()
    return {name: tensor.grad for name, tensor in tensors.items()}


def unpacked(batch):
    """One row with positions that start anew -> a padded batch of the rows in it."""
    starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    rows = [{name: batch[name][0, a:b] for name in ("input_ids", "labels")} for a, b in itertools.pairwise(starts)]
    pad = torch.nn.utils.rnn.pad_sequence
    labels = [row["labels"].clone() for row in rows]
    for each in labels:
        each[0] = -100  # never predicted: nothing of its own stands before it
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
    }


@pytest.mark.parametrize("coefficient", [COEFFICIENT, 0.0])
def test_sft_steps_with_the_gradients_of_the_per_token_loop(coefficient, folder, tmp_path):
    """The balance loss reaches TRL; it takes the plain mean over the micro-batches, or in older releases ours, weighted by label tokens."""
    model = adapted(folder, aux_loss_coef=coefficient)
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    trainer = sft(model, tmp_path, gradient_accumulation_steps=2)
    seen = inputs_seen(model)
    run(trainer)
    assert not TRL_ADDS_THE_BALANCE_LOSS or trainer.aux_loss_enabled == bool(coefficient)
    assert [len(batch["input_ids"]) for batch in seen] == [2, 2]
    assert_close(trainer.gradients[0], reference_gradients(folder, model.adafuse_config, before, seen), TOLERANCE)
    assert not getattr(model.get_base_model().config, "output_router_logits", False), "the base's config was written to"


@pytest.mark.parametrize("how", [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}])
def test_packed_sft_trains_as_the_examples_apart(how, folder, tmp_path):
    model = adapted(folder)
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    trainer = sft(model, tmp_path, **{"per_device_train_batch_size": 1 if "packing" in how else 4, **how})
    seen = inputs_seen(model)
    run(trainer)
    apart = [unpacked(batch) for batch in seen]
    assert "attention_mask" not in seen[0]
    assert seen[0]["input_ids"].shape[0] == 1
    assert apart[0]["input_ids"].shape[0] > 2
    assert_close(trainer.gradients[0], reference_gradients(folder, model.adafuse_config, before, apart), TOLERANCE)


def test_sft_on_chats_with_loss_on_the_answers(folder, tmp_path):
    turns = [
        [{"role": "user", "content": each["prompt"]}, {"role": "assistant", "content": each["answer"]}]
        for each in sums(8)
    ]
    model = adapted(folder)
    trainer = sft(model, tmp_path, [{"messages": each} for each in turns], assistant_only_loss=True)
    seen = inputs_seen(model)
    run(trainer)
    for ids, labels in zip(seen[0]["input_ids"], seen[0]["labels"], strict=True):
        answer = tokenizer().decode(ids[labels != -100], skip_special_tokens=True)
        assert answer.isdigit(), answer


def test_sft_checkpoints_hold_the_adapter_and_resume_bit_for_bit(folder, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    options["gradient_checkpointing"] = True
    whole = adapted(folder, lora_dropout=0.2)
    run(sft(whole, tmp_path, **options))
    checkpoint = tmp_path / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors"}
    adapter = sum(tensor.numel() for tensor in whole.adapter_tensors().values()) * 4
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) < 1.5 * adapter
    resumed = adapted(folder, filled=False, lora_dropout=0.2)
    run(sft(resumed, tmp_path, **options), resume=checkpoint)
    assert_same_bits(resumed.adapter_tensors(), whole.adapter_tensors())


PREFERENCES = [{"prompt": e["prompt"], "chosen": e["answer"], "rejected": "no"} for e in sums(8)]


def dpo(model, tmp_path, **changes):
    arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": False, "bf16": False}
    arguments |= {"save_strategy": "no", "learning_rate": 1e-2, "precompute_ref_log_probs": True, **QUIET}
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(tmp_path), **arguments),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tokenizer(),
        **changes,
    )


@torch.no_grad()
def log_probabilities(model, prompt, answer):
    """log p(answer and end | prompt), summed, by one forward without padding."""
    words = tokenizer()
    prompt, answer = words(prompt).input_ids, [*words(answer).input_ids, words.eos_token_id]
    log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(log_p[place - 1, token].item() for place, token in enumerate(answer, start=len(prompt)))


def assert_reference_is(model, trainer):
    for row, item in zip(trainer.train_dataset, PREFERENCES, strict=True):
        for which in ("chosen", "rejected"):
            wanted = log_probabilities(model, item["prompt"], item[which])
            assert row[f"ref_{which}_logps"] == pytest.approx(wanted, rel=1e-4)


def test_dpo_takes_its_reference_from_the_disabled_adapter(folder, tmp_path, monkeypatch):
    """The reference pass of DPO and GRPO for an adapter: the policy itself within `disable_adapter()`."""
    monkeypatch.setattr(AdaFuseModel, "add_adapter", lambda self, name, config: None)  # TRL wants a copy: not here
    model, base = adapted(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert log_probabilities(model.eval(), "1+1=", "2") != pytest.approx(log_probabilities(base, "1+1=", "2"), rel=1e-2)
    trainer = dpo(model, tmp_path)
    run(trainer)
    assert trainer.ref_model is None
    assert_reference_is(base, trainer)
    assert len(trainer.gradients) == 2
    assert all(gradient.norm() > 0 for gradient in trainer.gradients[0].values())


def test_dpo_on_a_model_alone(folder, tmp_path):
    """TRL's reference is the policy as it was at the start: for a fresh adapter the base, for a trained one a copy."""
    for filled in (False, True):
        model = adapted(folder, filled=filled)
        start = copy.deepcopy(model).eval()
        trainer = dpo(model, tmp_path)
        run(trainer)
        assert_reference_is(start, trainer)


def test_dpo_turns_dropout_off(folder, tmp_path):
    """DPOConfig(disable_dropout=True), the default: policy and reference are compared without noise."""
    model = adapted(folder, lora_dropout=0.5)
    dpo(model, tmp_path, ref_model=AutoModelForCausalLM.from_pretrained(folder))
    model.train()
    first, second = (model(input_ids=torch.tensor([[5, 6, 7]])).logits for _ in range(2))
    assert torch.equal(first, second)


def test_dpo_with_a_reference_model(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = adapted(folder)
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    trainer = dpo(model, tmp_path, ref_model=base)
    run(trainer)
    assert_reference_is(AutoModelForCausalLM.from_pretrained(folder), trainer)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.adapter_tensors().items())


@pytest.mark.parametrize("beta", [0.0, 0.1])  # above 0 TRL compares with a frozen copy
def test_grpo_trains_on_rewards_of_its_own_samples(folder, tmp_path, beta):
    model = adapted(folder)
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(each))) for each in completions],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4, bf16=False,
            max_completion_length=6, beta=beta, gradient_checkpointing=False, save_strategy="no", learning_rate=1e-2, **QUIET,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": each["prompt"]} for each in sums(4)]),
        processing_class=tokenizer(),
    )  # fmt: skip
    run(trainer)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.adapter_tensors().items())
