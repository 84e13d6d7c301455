"""The example of docs/serving.md runs, with a tiny model in place of the one it names."""

import re
from pathlib import Path

import engines
import tiny

ROOT = Path(__file__).parents[2]


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny.save_base("llama", tmp_path / "base")
    tiny.save_adapter(base, tmp_path / "adapter")
    text = (ROOT / "docs" / "serving.md").read_text().replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(base))
    text = text.replace("max_model_len=2048", "max_model_len=256, dtype='float32', enforce_eager=True")
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/serving.md", "exec"), namespace)
    adapted, bare = namespace["outputs"]
    assert adapted.prompt_token_ids == bare.prompt_token_ids
    for output, adapter in ((adapted, tmp_path / "adapter"), (bare, None)):
        ids = list(output.outputs[0].token_ids)
        assert tiny.judge(tiny.reference(base, adapter), output.prompt_token_ids, ids)[0] == ids
    namespace["llm"].llm_engine.engine_core.shutdown()
    assert engines.REQUESTS in text
