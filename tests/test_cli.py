"""The command line as a user meets it: exit codes, one line for an error, help that teaches, every command on real files."""

import json
import subprocess
import sys

import pytest
from tiny_text import save_base, sums, write_jsonl

from adafuse import cli


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), chat=True)


@pytest.fixture
def adafuse(monkeypatch, capfd):
    """Runs a command line in this process -> (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["adafuse", *map(str, words)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def trained(adafuse, base, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", sums(40))
    words = ["train", "--base", base, "--data", data, "--out", tmp_path / "adapter", "--steps", 2, "--batch-size", 4]
    code, out, err = adafuse(*words, "--r", 2, "--num-experts", 4, "--target", "q_proj", "--target", "up_proj")
    assert code == 0, err
    assert "38 examples, 2 held out" in out
    assert "eval loss" in out
    assert "load of the experts: 0:" in out
    return tmp_path / "adapter"


def test_train_generate_eval_inspect(adafuse, trained, tmp_path):
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["r"], config["num_experts"], config["target_modules"]) == (2, 4, ["q_proj", "up_proj"])

    code, out, err = adafuse("generate", "--adapter", trained, "--prompt", "1+1=", "--max-new-tokens", 5, "--chat")
    assert (code, bool(out.strip())) == (0, True), err
    code, shown, _ = adafuse(
        "generate", "--adapter", trained, "--prompt", "1+1=", "--max-new-tokens", 5, "--show-experts"
    )
    assert code == 0
    assert "first expert of a token: 0 1 2 3" in shown

    items = [{"prompt": "1+1=", "choices": ["2", "3"], "answer": 0, "domain": "sums"}] * 3
    data = write_jsonl(tmp_path / "choices.jsonl", items)
    code, out, err = adafuse("eval", "--adapter", trained, "--data", data, "--out", tmp_path / "result.json")
    assert code == 0, err
    assert "accuracy" in out
    assert json.loads((tmp_path / "result.json").read_text())["overall"]["items"] == 3
    code, out, err = adafuse("eval", "--base", config["base_model_name_or_path"], "--data", data)
    assert code == 0, err

    (tmp_path / "text.txt").write_text("a short text")
    page = tmp_path / "page.html"
    code, out, err = adafuse("inspect", "--adapter", trained, "--text", tmp_path / "text.txt", "--out", page)
    assert code == 0, err
    assert page.read_text().startswith("<!doctype html>")


def test_going_on_from_an_adapter(adafuse, base, trained, tmp_path):
    data = write_jsonl(tmp_path / "more.jsonl", sums(10, seed=1))
    words = ["train", "--base", base, "--data", data, "--adapter", trained, "--out", tmp_path / "second", "--steps", 1]
    assert adafuse(*words, "--only", "router")[0] == 0
    code, _, err = adafuse(*words, "--r", 4)
    assert code == 2
    assert "--adapter brings its own settings" in " ".join(err.replace("│", " ").split())


def one_line(err):
    """The error line of a failed command; nothing of Python's may surround it."""
    lines = [line for line in err.splitlines() if line.strip() and "Loading weights" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    return lines[0]


def test_a_failure_is_one_line_and_exit_code_1(adafuse, base, trained, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", sums(10))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    mute = write_jsonl(tmp_path / "mute.jsonl", [{"prompt": "a", "answer": " "}])
    train = ["train", "--base", base, "--out", tmp_path / "new", "--steps", 1]
    cases = {
        "line 2: broken JSON": [*train, "--data", tmp_path / "broken.jsonl"],
        "is empty": [*train, "--data", tmp_path / "empty.jsonl"],
        "the answer is empty": [*train, "--data", mute],
        "is not a file": [*train, "--data", tmp_path / "absent.jsonl"],
        "top_k=9 is more than num_experts=8": [*train, "--data", good, "--top-k", 9],
        "matches no linear of the blocks": [*train, "--data", good, "--target", "nothing"],
        "is the language-model head": [*train, "--data", good, "--target", "lm_head"],
        "only='both' is unknown": [*train, "--data", good, "--only", "both"],
        "already holds an adapter": ["train", "--base", base, "--data", good, "--out", trained],
        "not a file": ["inspect", "--adapter", trained, "--text", tmp_path / "no.txt", "--out", tmp_path / "new.html"],
        "dtype='int3' is unknown": ["generate", "--adapter", trained, "--prompt", "a", "--dtype", "int3"],
        "device='tpu9' cannot be used here": ["generate", "--adapter", trained, "--prompt", "a", "--device", "tpu9"],
        "out of memory": [*train, "--data", good, "--r", 10**9],
        "epochs=inf is not a finite number": [*train, "--data", good, "--epochs", "inf"],
        "missing choices": ["eval", "--adapter", trained, "--data", good],
        "is not here": ["bench", "nothing"],
    }
    for message, words in cases.items():
        code, out, err = adafuse(*words)
        assert code == 1, (message, out, err)
        assert message in one_line(err)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.html").exists()


def test_logits_that_are_no_numbers_are_one_line(adafuse, trained, monkeypatch):
    def no_numbers(*_, **__):
        raise FloatingPointError("the logits of prompt 0 after 0 new tokens are NaN or infinite")

    monkeypatch.setattr("adafuse.generation.run_generation", no_numbers)
    code, _, err = adafuse("generate", "--adapter", trained, "--prompt", "a")
    assert (code, one_line(err)) == (1, "error: the logits of prompt 0 after 0 new tokens are NaN or infinite")


@pytest.mark.parametrize(
    "words",
    [["train"], ["eval", "--data", "x.jsonl"], ["generate", "--nonsense"], ["nothing"], ["train", "--r", "two"]],
)
def test_wrong_usage_is_exit_code_2(adafuse, words):
    code, _, err = adafuse(*words)
    assert code == 2
    assert "Usage" in err
    assert "Traceback" not in err


def test_help_names_every_command_and_shows_an_example_of_each(adafuse):
    code, out, _ = adafuse("--help")
    commands = ("demo", "train", "eval", "generate", "inspect", "bench")
    assert code == 0
    assert all(command in out for command in commands)
    for command in ("train", "eval", "generate", "inspect"):
        code, out, _ = adafuse(command, "--help")
        assert (code, "Example: adafuse " + command in out) == (0, True)


def test_version(adafuse):
    import adafuse as package

    assert adafuse("--version")[:2] == (0, f"adafuse {package.__version__}\n")


@pytest.mark.parametrize("module", ["adafuse", "adafuse.cli", "adafuse.config"])
def test_importing_is_light(module):
    """No torch, no transformers: `adafuse --help` answers at once."""
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft', 'triton'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_an_error_at_the_shell_is_one_line(base, tmp_path):
    """The same through a real process: no warnings of libraries around it."""
    words = [sys.executable, "-m", "adafuse.cli", "train", "--base", str(base), "--data", "absent", "--out", "new"]
    found = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert one_line(found.stderr) == "error: absent is not a file"
