"""What the benchmark of servers tells vLLM, vLLM understands."""

import sys
from pathlib import Path

import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from adafuse import cli
from adafuse import serve as serve_module

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:  # in vLLM 0.24
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import serve_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    serve_models.make_models("tiny", [8], folder, True, "cpu")
    return folder


@pytest.mark.parametrize("label", serve_models.SERVERS)
def test_vllm_understands_how_it_is_started(label, folder, monkeypatch):
    asked = [
        "--model",
        "tiny",
        "--in-flight",
        "1",
        "8",
        "--servers",
        label,
        "--out",
        "x",
        "--",
        "--stream-interval",
        "2",
    ]
    options = serve_models.parse(asked)
    server = serve_models.servers(options, folder, 8)[label]
    arguments = server.arguments[2:]
    if label.startswith("ours"):
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", server.environment.get("VLLM_USE_V2_MODEL_RUNNER", "0"))
        started = []
        monkeypatch.setattr(serve_module, "_start", started.extend)
        cli.app(arguments, standalone_mode=False)
        arguments = started
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(parsed)
    assert (parsed.model, parsed.max_num_seqs, parsed.stream_interval) == (str(folder / "base"), 8, 2)
    assert parsed.kv_cache_memory_bytes == serve_models.kv_bytes(options)
    assert [lora.name for lora in parsed.lora_modules or []] == (server.names if label == "multilora" else [])
    assert label == "multilora" or parsed.served_model_name[0] in server.names
