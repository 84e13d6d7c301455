"""The loop: the plain Trainer on an adapted model against the per-token loop; precision, checkpoints, balance."""

import pytest
import torch
from families import BLOCKS, family, fill
from reference import language_model_loss, leaves, relative_error
from reference import run as reference_run
from safetensors import safe_open
from snapshots import differences
from tiny_text import collate, rows, tokenizer
from trainers import adapted, assert_close, assert_same_bits, quiet, train
from transformers import DataCollatorWithFlattening

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.checkpoint import WEIGHTS_FILE
from adafuse.loop import TrainSettings, balance_of, balance_warnings
from adafuse.loop import train as train_with_progress

TOLERANCE = 2e-4  # fp32 against fp64, through a backward pass of two blocks


def copies(model):
    return {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}


# --- gradients against the per-token loop ------------------------------------------------------------------------------


def reference_gradients(model, micro_batches):
    """d/d(adapter) of  sum_i n_i / N * (mean language-model loss of micro-batch i + coefficient * its balance loss).

    n_i: label tokens of micro-batch i that are predicted (not the first of a row), N: their sum.
    """
    config, tensors = model.adafuse_config, leaves(model.adapter_tensors())
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches]
    for batch, count in zip(micro_batches, counts, strict=True):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = reference_run(family("llama").build(), "model.layers", config, tensors, **inputs)
        loss = language_model_loss(found.logits, batch["labels"]) + config.aux_loss_coef * found.aux_loss()
        (loss * count / sum(counts)).backward()
    return {name: tensor.grad for name, tensor in tensors.items()}


class InOrder(torch.utils.data.Dataset):
    """Rows and, for the Trainer's shuffling sampler, a length; `__getitem__` ignores the shuffle: micro-batches are known."""

    def __init__(self, rows):
        self.rows, self.taken = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, _):
        self.taken += 1
        return self.rows[(self.taken - 1) % len(self.rows)]


@pytest.mark.parametrize("coefficient", [0.0, 3.0])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_has_the_gradients_of_the_per_token_loop(accumulation, coefficient, tmp_path):
    """With 4 micro-batches, the balance gradient is their mean weighted by label tokens, not their sum."""
    examples = rows(8)
    size = 8 // accumulation
    micro_batches = [collate(examples[i : i + size]) for i in range(0, 8, size)]
    counts = {int((batch["labels"] != -100).sum()) for batch in micro_batches}
    assert accumulation == 1 or len(counts) > 1, "equal micro-batches would not tell weighted from plain means"
    model = adapted(aux_loss_coef=coefficient, shared_rank=2)
    wanted = reference_gradients(model, micro_batches)
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trained = train(model, InOrder(examples), tmp_path, collate=collate, **options)
    assert_close(trained.gradients[0], wanted, TOLERANCE)


def test_accumulation_of_1_and_of_4_have_equal_language_model_gradients(tmp_path):
    found = []
    for accumulation in (1, 4):
        model = adapted(aux_loss_coef=0.0, routing="layer", router_hidden=8)
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        found += train(model, InOrder(rows(8)), tmp_path, collate=collate, **options).gradients
    assert_close(found[1], found[0], tolerance=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_padding_reaches_neither_loss_nor_router(left, tmp_path):
    examples, found = rows(4), []
    for extra in (0, 9):
        model = adapted(aux_loss_coef=3.0, routing="layer")
        padded = lambda batch, extra=extra: collate(batch, extra=extra, left=left)  # noqa: E731
        trained = train(model, InOrder(examples), tmp_path, collate=padded, per_device_train_batch_size=4)
        found.append((trained.gradients[0], trained.state.log_history[0]["loss"]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert_close(found[1][0], found[0][0], tolerance=1e-5)


def test_packed_rows_train_as_padded_ones(tmp_path):
    """All examples in one row, positions starting anew at each, no attention mask: same gradients, balance loss too."""
    examples, found = rows(4), []
    for collator in (collate, DataCollatorWithFlattening()):
        model = adapted(aux_loss_coef=3.0, routing="layer")
        trained = train(model, InOrder(examples), tmp_path, collate=collator, per_device_train_batch_size=4)
        found += trained.gradients
    packed = DataCollatorWithFlattening()(examples)
    assert packed["input_ids"].shape[0] == 1
    assert (packed["position_ids"] == 0).sum() == 4
    assert_close(found[1], found[0], tolerance=1e-4)


# --- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 8])
def test_under_bf16_autocast_the_router_is_fp32(hidden, tmp_path):
    model = adapted(routing="layer", router_hidden=hidden, aux_loss_coef=1.0)
    seen, dtypes = [], set()
    router, linear = model.router, model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    state = {name: parameter.detach().clone() for name, parameter in router.named_parameters()}
    router.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), out.probabilities.detach())))
    linear.register_forward_hook(lambda _, args, out: dtypes.add(out.dtype))
    trained = train(model, rows(4), tmp_path, collate=collate, per_device_train_batch_size=4, bf16=True)
    assert dtypes == {torch.bfloat16}, "autocast is off: a weak test"
    h0, probabilities = seen[0]
    x = h0.double() / torch.sqrt(h0.double().square().mean(-1, keepdim=True) + 1e-6)
    if hidden:
        inner = x @ state["hidden.weight"].double().T
        x = inner * torch.sigmoid(inner)
    logits = (x @ state["weight"].double().T).unflatten(-1, (BLOCKS, 4))
    assert probabilities.dtype == torch.float32
    assert relative_error(probabilities, logits.softmax(-1)) < 1e-6  # bf16 would give some 1e-3
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {g.dtype for g in trained.gradients[0].values()} == {torch.float32}


def test_bf16_autocast_has_gradients_near_those_of_fp32(tmp_path):
    found = []
    for bf16 in (False, True):
        model = adapted(aux_loss_coef=1.0, top_k=4)  # all experts: rounding cannot change the choice
        found += train(
            model, InOrder(rows(8)), tmp_path, collate=collate, per_device_train_batch_size=8, bf16=bf16
        ).gradients
    for name, wanted in found[0].items():
        difference = (found[1][name] - wanted).norm() / wanted.norm()
        assert 0 < difference < 0.2, (name, difference)


def test_a_bf16_base_trains_an_fp32_adapter(tmp_path):
    model = adapted(dtype=torch.bfloat16)
    before = copies(model)
    trained = train(model, rows(4), tmp_path, collate=collate, per_device_train_batch_size=4)
    assert {g.dtype for g in trained.gradients[0].values()} == {torch.float32}
    after = model.adapter_tensors()
    assert all(after[name].dtype == torch.float32 and not torch.equal(after[name], before[name]) for name in before)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_hold_the_adapter_only(tmp_path):
    model = adapted(routing="layer", router_hidden=8, shared_rank=2)
    train(model, rows(8), tmp_path, collate=collate, max_steps=2, save_strategy="steps", save_steps=2)
    folder = tmp_path / "checkpoint-2"
    assert {path.name for path in folder.glob("*.safetensors")} == {WEIGHTS_FILE}
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in shapes}
    assert shapes == family("llama").tensors(model.adafuse_config)
    assert_same_bits(tensors, model.adapter_tensors())
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    moments = sum(value["exp_avg"].numel() for value in state["state"].values())
    assert moments == sum(tensor.numel() for tensor in tensors.values())
    again = AdaFuseModel.from_pretrained(family("llama").build(), folder)
    assert_same_bits(again.adapter_tensors(), model.adapter_tensors())


VARIANTS = {
    "plain": ({}, {}),
    "all options": (
        {"routing": "layer", "router_hidden": 8, "shared_rank": 2, "lora_dropout": 0.3, "top_k": 1},
        {"gradient_accumulation_steps": 2, "bf16": True, "gradient_checkpointing": True},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(variant, tmp_path):
    config, options = VARIANTS[variant]
    options = {"collate": collate, "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3, **options}
    options["save_strategy"] = "steps"
    whole = adapted(**config)
    train(whole, rows(20), tmp_path, **options)
    resumed = adapted(**config)
    fill(resumed, seed=9)  # the checkpoint must overwrite this
    torch.manual_seed(123)
    trained = train(resumed, rows(20), tmp_path, resume=tmp_path / "checkpoint-3", **options)
    assert len(trained.gradients) == 3
    assert_same_bits(resumed.adapter_tensors(), whole.adapter_tensors())


@pytest.mark.parametrize("only", ["router", "experts"])
def test_only_one_part_trains(only, tmp_path):
    model = adapted(aux_loss_coef=0.0)
    before = copies(model)
    base = {n: p.detach().clone() for n, p in model.get_base_model().named_parameters() if ".bank." not in n}
    train_with_progress(
        model, tokenizer(), rows(8), settings=TrainSettings(steps=2, batch_size=2, only=only), console=quiet()
    )
    changed = {name for name, tensor in model.adapter_tensors().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("router.") == (only == "router")}
    assert all(torch.equal(p, base[n]) for n, p in model.get_base_model().named_parameters() if ".bank." not in n)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_with_progress(adapted(), tokenizer(), rows(4), settings=TrainSettings(steps=1), console=quiet())
    assert list(tmp_path.iterdir()) == []
    for settings, resume in ((TrainSettings(save_every=1), False), (TrainSettings(), True)):
        with pytest.raises(ValueError, match="need a folder"):
            train_with_progress(adapted(), tokenizer(), rows(4), settings=settings, resume=resume, console=quiet())


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", -1), ("batch_size", 0), ("accumulation", 0), ("epochs", 0.0), ("learning_rate", 0.0),
     ("learning_rate", float("nan")), ("only", "none"), ("eval_fraction", 1.0), ("save_every", -1), ("max_length", 1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TrainSettings(**{name: value})


# --- balance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["model", "layer"])
def test_the_balance_counts_each_token_of_each_row(routing):
    model, examples = adapted(routing=routing).train(), rows(6)
    balance = balance_of(model, examples)
    decisions = BLOCKS if routing == "layer" else 1
    counts = torch.zeros(decisions, 4, dtype=torch.float64)
    for row in examples:
        for token in model.route(torch.tensor([row["input_ids"]])).experts[0]:
            for decision, chosen in enumerate(token.tolist()):
                for expert in chosen:
                    counts[decision, expert] += 1
    torch.testing.assert_close(balance["load"], counts / counts.sum(-1, keepdim=True))
    assert balance["tokens"] == sum(len(row["input_ids"]) for row in examples)
    assert model.training
    assert balance_warnings(balance) == []


def test_collapsed_experts_are_warned_of():
    model = adapted(top_k=1)
    tensors = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    # Opposite logits for experts 0 and 1, zero for 2 and 3: one of the first two always wins.
    row = tensors["router.weight"][0].clone()
    tensors["router.weight"] = torch.stack([row, -row, 0 * row, 0 * row])
    model.load_adapter_tensors(tensors)
    warned = balance_warnings(balance_of(model, rows(9)))
    assert len(warned) == 1
    assert "2 of 4 experts have collapsed" in warned[0]
    assert "(expert 2, expert 3)" in warned[0]


def test_data_parallel_is_refused():
    """nn.DataParallel, which a Trainer that sees several GPUs in one process uses, copies blocks but not what they share."""
    with pytest.raises(ValueError, match="torchrun"):
        adapted()._replicate_for_data_parallel()


def test_training_leaves_the_base_untouched(tmp_path):
    base = family("llama").build()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = AdaFuseModel(base, AdaFuseConfig(r=2, num_experts=4))
    train(model, rows(4), tmp_path, collate=collate, max_steps=2)
    assert differences(before, model.detach().state_dict()) == []
