"""What the documents say: code blocks run, links lead somewhere, tables are those of the committed results."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from tiny_text import save_base, sums, write_jsonl
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return save_base(tmp_path / "base")


def run_blocks(path, base):
    namespace = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), start=1):
        exec(compile(block.replace(HUB_NAME, str(base)), f"{path.name}, block {number}", "exec"), namespace)
    return namespace


def test_ratios_of_decode_are_of_the_rows_that_they_name():
    """Of the same case in the same file, unless a row says that it comes from another run."""
    rows = json.loads((ROOT / "benchmarks/results/h100/decode.json").read_text())["rows"]

    def place(row, name):
        return name, *(row["case"][key] for key in ("model", "context", "batch"))

    medians = {place(row, row["name"]): row["median"] for row in rows}
    compared = [row for row in rows if row["vs"] is not None]
    assert len(compared) > 500
    for row in compared:
        of_file = row["median"] / medians[place(row, row["vs"])]
        assert "run" in row["case"] or row["ratio"] == pytest.approx(of_file), row["name"]
    assert sum("run" in row["case"] for row in rows) == 5  # PESC of one case, docs/latency.md


def test_the_examples_of_the_readme_run(base, capsys):
    model = run_blocks(ROOT / "README.md", base)["model"]
    assert all(bank.b.grad.any() for bank in model.banks.values())
    assert Path("untrained", "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out


def test_the_examples_on_peft_run(base):
    for seed, name in enumerate(("lora-a", "lora-b")):
        config = peft.LoraConfig(r=2 + seed, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(name)
    with pytest.warns(UserWarning, match="rank 2 padded with zeros to 3"):
        run_blocks(ROOT / "docs" / "peft.md", base)
    assert sorted(path.name for path in Path("loras").iterdir()) == ["expert-0", "expert-1"]


def test_the_example_on_baselines_runs(base, capsys):
    base = save_base(base.parent / "four-blocks", num_hidden_layers=4)  # a block for each part that MoLA has
    model = run_blocks(ROOT / "docs" / "baselines.md", base)["model"]
    assert model.execution == "published"
    assert "bytes read per token" in capsys.readouterr().out


def test_the_examples_on_the_engine_run(base, capsys):
    namespace = run_blocks(ROOT / "docs" / "engine.md", base)
    assert len(namespace["results"]) == 2
    assert capsys.readouterr().out


def test_the_finetuning_example_runs(base, monkeypatch, capsys):
    data = write_jsonl(Path("train.jsonl"), sums(16))
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(base), str(data), "out"])
    runpy.run_path(str(ROOT / "examples" / "finetune.py"), run_name="__main__")
    assert "load of the experts:" in capsys.readouterr().out
    assert Path("out", "adapter_model.safetensors").is_file()


def test_tables_are_those_of_the_results():
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, f"{found.stdout}{found.stderr}: run python benchmarks/tables.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
