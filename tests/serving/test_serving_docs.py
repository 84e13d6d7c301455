"""The example of docs/serving.md runs, as a file of its own, with a tiny model in place of the one it names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import engines
import tiny

ROOT = Path(__file__).parents[2]
SHOW = """
    import json
    print("IDS", json.dumps([[list(output.prompt_token_ids), list(output.outputs[0].token_ids)] for output in outputs]))
"""


def test_the_example_runs(tmp_path):
    base = tiny.save_base("llama", tmp_path / "base")
    tiny.save_adapter(base, tmp_path / "adapter")
    text = (ROOT / "docs" / "serving.md").read_text().replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(base))
    text = text.replace("max_model_len=2048", "max_model_len=256, dtype='float32', enforce_eager=True")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "example.py").write_text(block.rstrip() + SHOW)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    found = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert found.returncode == 0, found.stderr[-3000:]
    (shown,) = [line for line in found.stdout.splitlines() if line.startswith("IDS ")]
    (prompt, adapted), (same, bare) = json.loads(shown.removeprefix("IDS "))
    assert prompt == same
    for ids, adapter in ((adapted, tmp_path / "adapter"), (bare, None)):
        assert tiny.judge(tiny.reference(base, adapter), prompt, ids)[0] == ids
    assert engines.REQUESTS in text
