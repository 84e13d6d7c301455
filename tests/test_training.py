"""What `adafuse train` does: files in, an adapter out, nothing half written; and the examples of docs/training.md."""

import dataclasses
import json
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from tiny_text import save_base, sums, tokenizer, write_jsonl
from trainers import assert_close, assert_same_bits, quiet
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from adafuse import AdaFuseConfig, AdaFuseModel, loop
from adafuse.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from adafuse.cli import app
from adafuse.data import read_examples
from adafuse.training import TrainSettings, run_training

CONFIG = AdaFuseConfig(r=2, num_experts=4, top_k=2)
SETTINGS = TrainSettings(steps=4, batch_size=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "data.jsonl", sums(40))


def command(base, data, out, *, config=CONFIG, settings=SETTINGS, **options):
    """(result, what was printed) of `run_training`."""
    console = quiet()
    result = run_training(base, data, out, config=config, settings=settings, console=console, device="cpu", **options)
    return result, console.file.getvalue()


def saved(folder):
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def files(folder):
    """Path -> content of every file below a folder; empty if it does not exist."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_trains_saves_and_reports(base, data, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=40, eval_every=20, eval_fraction=0.25)
    result, printed = command(base, data, tmp_path / "out", settings=settings)
    assert set(files(tmp_path / "out")) == {CONFIG_FILE, WEIGHTS_FILE}
    assert "30 examples, 10 held out" in printed
    assert "step 20: eval loss" in printed
    assert f"40 steps: mean training loss {result.train_loss:.4f}, eval loss {result.eval_loss:.4f}" in printed
    assert result.eval_loss < result.train_loss < 5.5  # log(257) = 5.5 is what the untrained model has
    assert "load of the experts: 0:" in printed
    model = AdaFuseModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert_same_bits(model.adapter_tensors(), saved(tmp_path / "out"))
    ids = torch.tensor([tokenizer()("3+4=").input_ids])
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_the_eval_loss_is_the_mean_over_answer_tokens(base, data, tmp_path):
    evaluated = sums(5, seed=3)
    options = {"eval_file": write_jsonl(tmp_path / "eval.jsonl", evaluated), "settings": TrainSettings(steps=2)}
    result, _ = command(base, data, tmp_path / "out", **options)
    model = AdaFuseModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    total, count = 0.0, 0
    for item in evaluated:
        prompt, answer = (tokenizer()(item[key]).input_ids for key in ("prompt", "answer"))
        answer = [*answer, tokenizer().eos_token_id]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        for place, token in enumerate(answer, start=len(prompt)):
            total, count = total - log_p[place - 1, token].item(), count + 1
    assert result.eval_loss == pytest.approx(total / count, rel=1e-4)


def test_accumulation_of_the_command_equals_a_larger_batch(base, data, tmp_path):
    for name, accumulation in (("one", 1), ("four", 4)):
        settings = dataclasses.replace(
            SETTINGS, steps=2, batch_size=8 // accumulation, accumulation=accumulation, learning_rate=1e-3
        )
        command(base, data, tmp_path / name, config=dataclasses.replace(CONFIG, aux_loss_coef=0.0), settings=settings)
    one, four = saved(tmp_path / "one"), saved(tmp_path / "four")
    assert_close({n: t for n, t in four.items() if "_b" in n}, {n: t for n, t in one.items() if "_b" in n}, 1e-2)


@contextmanager
def stopped_after(step, monkeypatch):
    """Runs inside end as by Ctrl-C at the end of a step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._ShowProgress, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_an_interrupted_command_resumes_to_the_same_adapter(base, data, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, steps=6, save_every=2, accumulation=2)
    config = dataclasses.replace(CONFIG, lora_dropout=0.2)
    whole, _ = command(base, data, tmp_path / "whole", config=config, settings=settings)
    out = tmp_path / "out"
    with stopped_after(5, monkeypatch):
        command(base, data, out, config=config, settings=settings)
    assert {path.name for path in out.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    (out / "checkpoint-6").mkdir()  # a save that was stopped before its end
    (out / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": ')
    with pytest.raises(ValueError, match="--resume to go on with it, or --overwrite"):
        command(base, data, out, config=config, settings=settings)
    result, printed = command(base, data, out, config=config, settings=settings, resume=True)
    assert_same_bits(saved(out), saved(tmp_path / "whole"))
    assert (result.steps, result.eval_loss) == (6, whole.eval_loss)
    assert "6 steps" in printed
    again, printed = command(base, data, out, config=config, settings=settings, resume=True)
    assert again.train_loss is None
    assert "nothing left to train" in printed
    assert_same_bits(saved(out), saved(tmp_path / "whole"))


def test_the_training_loss_after_a_resume_is_the_mean_of_its_own_steps(base, data, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, steps=20, save_every=10)
    with stopped_after(12, monkeypatch):
        command(base, data, tmp_path / "out", settings=settings)
    result, _ = command(base, data, tmp_path / "out", settings=settings, resume=True)
    state = json.loads((tmp_path / "out" / "checkpoint-20" / "trainer_state.json").read_text())
    logged = [entry["loss"] for entry in state["log_history"] if "loss" in entry and entry["step"] > 10]
    assert len(logged) == 10
    assert result.train_loss == pytest.approx(sum(logged) / 10, rel=1e-3)


def test_an_adapter_is_not_overwritten_unasked(base, data, tmp_path):
    out = tmp_path / "out"
    command(base, data, out, settings=dataclasses.replace(SETTINGS, save_every=2))
    before = files(out)
    with pytest.raises(ValueError, match="already holds an adapter; pass --overwrite"):
        command(base, data, out)
    assert files(out) == before
    command(base, data, out, settings=dataclasses.replace(SETTINGS, steps=1), overwrite=True)
    assert set(files(out)) == {CONFIG_FILE, WEIGHTS_FILE}, "checkpoints of the old run would be resumed from"
    assert loop.newest_checkpoint(out) is None


def test_resume_needs_a_checkpoint_with_the_same_settings(base, data, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        command(base, data, tmp_path / "out", resume=True)
    command(base, data, tmp_path / "out", settings=dataclasses.replace(SETTINGS, save_every=2))
    with pytest.raises(ValueError, match=r"other settings.*r=2"):
        command(base, data, tmp_path / "out", config=dataclasses.replace(CONFIG, r=3), resume=True)


def test_a_further_run_goes_on_from_an_adapter(base, data, tmp_path):
    command(base, data, tmp_path / "first")
    settings = dataclasses.replace(SETTINGS, steps=2, only="router", learning_rate=1e-3)
    command(base, data, tmp_path / "second", config=None, settings=settings, adapter=tmp_path / "first")
    first, second = saved(tmp_path / "first"), saved(tmp_path / "second")
    assert [name for name in first if not torch.equal(first[name], second[name])] == ["router.weight"]


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory):
    """Two PEFT LoRA folders for the base, of ranks 2 and 3, filled with numbers."""
    folders = []
    for index, r in enumerate((2, 3)):
        lora = peft.LoraConfig(r=r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
        folders.append(tmp_path_factory.mktemp(f"lora{index}"))
        model.save_pretrained(folders[-1])
    return folders


@pytest.mark.parametrize("only", ["router", "all"])
def test_peft_loras_become_the_experts(only, base, data, loras, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=2, only=only)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the padded ranks
        _, printed = command(base, data, tmp_path / "out", config={"top_k": 1}, settings=settings, experts=loras)
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert (config["num_experts"], config["r"], config["top_k"]) == (2, 3, 1)
    first = saved(tmp_path / "out")["model.layers.0.self_attn.q_proj.experts_a"][1]
    with safe_open(loras[1] / "adapter_model.safetensors", framework="pt") as file:
        lora = file.get_tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    assert torch.equal(first, lora) == (only == "router"), printed


def test_settings_that_loras_bring_with_them_are_refused(base, data, loras, tmp_path):
    with pytest.raises(
        ValueError, match="num_experts, r cannot be set for imported experts: they come from the LoRA files"
    ):
        command(base, data, tmp_path / "out", config={"r": 4, "num_experts": 2}, experts=loras)
    with pytest.raises(ValueError, match="either adapter or experts"):
        command(base, data, tmp_path / "out", config={}, experts=loras, adapter=loras[0])
    assert not (tmp_path / "out").exists()


BAD_DATA = {
    "empty": ("", "is empty"),
    "blank lines": ("\n \n", "is empty"),
    "broken JSON": ('{"prompt": "a", "answer": "b"}\n{"prompt": \n', "line 2: broken JSON"),
    "empty answer": ('{"prompt": "a", "answer": " "}\n', "line 1: the answer is empty"),
    "all too long": (json.dumps({"prompt": "a" * 100, "answer": "b"}) + "\n", "1 of 1 examples are longer than 64"),
    "no template": ('{"messages": [{"role": "assistant", "content": "b"}]}\n', "no chat template"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_writes_nothing(case, base, tmp_path):
    text, message = BAD_DATA[case]
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        command(base, tmp_path / "bad.jsonl", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_data_keeps_what_was_to_be_overwritten(base, data, tmp_path):
    command(base, data, tmp_path / "out", settings=dataclasses.replace(SETTINGS, save_every=2))
    before = files(tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1"):
        command(base, tmp_path / "bad.jsonl", tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before


def test_examples_too_long_are_counted_and_reported(base, tmp_path):
    records = [*sums(10), {"prompt": "x" * 70, "answer": "y"}]
    _, printed = command(base, write_jsonl(tmp_path / "d.jsonl", records), tmp_path / "out")
    assert "1 of 11 examples are longer than 64 tokens and were left out (lines 11)" in printed
    settings = dataclasses.replace(SETTINGS, max_length=65)
    with pytest.raises(ValueError, match="max_length=65 is more than the 64 positions"):
        command(base, tmp_path / "d.jsonl", tmp_path / "other", settings=settings)


def test_nothing_to_evaluate_on_is_said(base, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", sums(4))
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        command(base, data, tmp_path / "out", settings=dataclasses.replace(SETTINGS, eval_every=2))
    result, printed = command(base, data, tmp_path / "out")
    assert result.eval_loss is None
    assert "no eval data" in printed


def test_the_command_line_trains(base, data, loras, tmp_path):
    arguments = ["train", "--base", str(base), "--data", str(data), "--device", "cpu", "--steps", "1"]
    run = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "a"), "--r", "2", "--target", "q_proj"])
    assert run.exit_code == 0, run.output
    assert json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["target_modules"] == ["q_proj"]
    experts = [word for folder in loras for word in ("--experts", str(folder))]
    run = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "b"), "--only", "router", *experts])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "c"), "--r", "2", *experts])
    assert isinstance(run.exception, ValueError)
    assert "come from the LoRA files" in str(run.exception)


# --- docs/training.md --------------------------------------------------------------------------------------------------

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GUIDE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.fixture
def desk(base, loras, tmp_path, monkeypatch):
    """A folder in which what the guide names is there: the base (a tiny one), the data, the LoRAs."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", sums(40))
    for name, folder in (("lora-a", loras[0]), ("lora-b", loras[1])):
        (tmp_path / name).symlink_to(folder)
    return tmp_path


def test_the_examples_of_the_guide_run(base, desk):
    """In order, in one namespace, as a reader would type them in."""
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    namespace = {}
    for number, block in enumerate(blocks("python"), start=1):
        # TRL's default is bf16 on a GPU; without one it wants to be told.
        code = block.replace(HUB_NAME, str(base)).replace('SFTConfig("run-sft",', 'SFTConfig("run-sft", use_cpu=True,')
        exec(compile(code, f"docs/training.md, block {number}", "exec"), namespace)
    for folder in ("adapter", "adapter-sft", "run/checkpoint-2", "run-sft/checkpoint-4"):
        assert (desk / folder / WEIGHTS_FILE).is_file()
    assert_same_bits(namespace["again"].adapter_tensors(), saved(desk / "adapter"))


def test_the_commands_of_the_guide_run(base, desk):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("adafuse ")]
    assert len(commands) == 2
    for line in commands:
        arguments = [word.replace(HUB_NAME, str(base)) for word in line.split()[1:]]
        result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--steps", "2"])
        assert result.exit_code == 0, (line, result.output, result.exception)


def test_the_data_of_the_guide_is_read(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(blocks("json")))
    assert [bool(example.messages) for example in read_examples(tmp_path / "d.jsonl")] == [False, True]
