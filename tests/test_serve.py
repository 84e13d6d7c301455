"""What is checked before vLLM starts, the arguments it is started with, and the requests that name the bare base.
None of this needs vLLM.
"""

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from families import family, fill
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from adafuse import AdaFuseConfig, AdaFuseModel, checkpoint
from adafuse import serve as serve_module
from adafuse.integrations.vllm.middleware import ModelNames, rewrite
from adafuse.integrations.vllm.start import Served, check_fallback, digest, llm_options
from adafuse.serve import server_arguments

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def save(tmp_path, name, **settings):
    """Folders of a tiny base of a family and of an adapter on it."""
    base, adapter = tmp_path / name, tmp_path / f"{name}-adapter"
    model = family(name).build()
    model.save_pretrained(base)
    adapted = AdaFuseModel(model, AdaFuseConfig(r=2, num_experts=4, **settings))
    fill(adapted)
    adapted.save_pretrained(adapter)
    return base, adapter


# --- what can be served
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "AdaFuseLlamaForCausalLM"),
        ("mistral", "AdaFuseMistralForCausalLM"),
        ("qwen2", "AdaFuseQwen2ForCausalLM"),
        ("qwen3", "AdaFuseQwen3ForCausalLM"),
        ("gemma3", "AdaFuseGemma3ForCausalLM"),
        ("phi", "AdaFuseTransformersForCausalLM"),
        ("gpt-neox", "AdaFuseTransformersForCausalLM"),
    ],
)
def test_options_for_a_base_that_can_be_served(name, architecture, tmp_path):
    base, adapter = save(tmp_path, name)
    options = llm_options(base, adapter)
    overrides = {"architectures": [architecture], "adafuse_adapter": str(adapter), "adafuse_digest": digest(adapter)}
    assert options == {"model": str(base), "hf_overrides": overrides}


@pytest.mark.parametrize("name", ["gpt2", "opt", "opt-projected"])
def test_a_base_whose_tokens_cannot_be_routed_before_it_runs_is_refused(name, tmp_path):
    base, adapter = save(tmp_path, name)
    with pytest.raises(ValueError, match="changes its embeddings before block 0"):
        llm_options(base, adapter)


def test_a_base_that_vllm_does_not_run_is_refused(tmp_path):
    from transformers import FalconConfig, Lfm2Config

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    for config, why in (
        (FalconConfig(**sizes), "computes attention in a way of its own"),
        (
            Lfm2Config(**sizes, num_key_value_heads=2, intermediate_size=48, layer_types=["conv", "full_attention"]),
            "has layers of conv",
        ),
    ):
        with pytest.raises(
            ValueError, match=f"{config.model_type}.* {why}, which vLLM's Transformers backend does not run"
        ):
            check_fallback("Some", config)


def test_a_multimodal_base_is_refused(tmp_path):
    base, adapter = save(tmp_path, "gemma3-multimodal")
    with pytest.raises(ValueError, match="not a decoder of text alone"):
        llm_options(base, adapter)


def test_a_mixture_backbone_is_refused(tmp_path):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
    }
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3))
    model.save_pretrained(tmp_path / "base")
    _, adapter = save(tmp_path, "llama")
    with pytest.raises(ValueError, match="mixture backbone of 3 experts"):
        llm_options(tmp_path / "base", adapter)


def test_an_encoder_decoder_is_refused(tmp_path):
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "base")
    _, adapter = save(tmp_path, "llama")
    with pytest.raises(ValueError, match="not a decoder of text alone"):
        llm_options(tmp_path / "base", adapter)


def test_another_base_is_refused(tmp_path):
    base, _ = save(tmp_path, "llama")
    _, other = save(tmp_path, "qwen2")
    with pytest.raises(ValueError, match="made on another base: model_type is qwen2 there and llama"):
        llm_options(base, other)
    narrow = family("llama").build().config
    narrow.intermediate_size = 40
    narrow.save_pretrained(tmp_path / "narrow")
    _, adapter = save(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"made on another base: model\.layers\.0\.mlp\.gate_proj"):
        llm_options(tmp_path / "narrow", adapter)


def test_what_is_no_base_or_no_adapter_is_refused(tmp_path):
    base, adapter = save(tmp_path, "llama")
    with pytest.raises(ValueError, match="cannot be loaded as a HuggingFace causal LM"):
        llm_options(tmp_path / "nowhere", adapter)
    with pytest.raises(ValueError, match="neither a folder here nor an adapter"):
        llm_options(base, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is missing"):
        llm_options(base, base)


def test_weights_that_change_while_a_server_starts_are_refused(tmp_path):
    base, adapter = save(tmp_path, "llama")
    served = Served.of(SimpleNamespace(**llm_options(base, adapter)["hf_overrides"]))
    served.check_unchanged()
    model = AdaFuseModel.from_pretrained(family("llama").build(), adapter)
    fill(model, seed=5)
    model.save_pretrained(adapter)
    with pytest.raises(ValueError, match="changed while the server was starting"):
        served.check_unchanged()


def test_a_config_without_adapter_is_refused():
    with pytest.raises(ValueError, match="its config names none"):
        Served.of(SimpleNamespace(architectures=["AdaFuseLlamaForCausalLM"]))


# --- the command
# --------------------------------------------------------------------------------------------------------


def after(arguments, option):
    return arguments[arguments.index(option) + 1]


def test_the_server_listens_on_this_machine_only_and_offers_both_models(tmp_path):
    base, adapter = save(tmp_path, "llama")
    arguments = server_arguments(adapter, base, options=["--port", "9", "--max-model-len=64"])
    assert after(arguments, "--host") == "127.0.0.1"
    assert arguments[-3:] == ["--served-model-name", "llama-adapter", str(base)]
    assert json.loads(after(arguments, "--hf-overrides"))["architectures"] == ["AdaFuseLlamaForCausalLM"]
    assert after(arguments, "--port") == "9"
    assert "--max-model-len=64" in arguments
    assert "--middleware" in arguments


def test_names_and_host_can_be_chosen(tmp_path):
    base, adapter = save(tmp_path, "llama")
    arguments = server_arguments(adapter, base, name="tuned", base_name="plain", options=["--host=::1"])
    assert arguments[-2:] == ["tuned", "plain"]
    assert "--host" not in arguments
    arguments = server_arguments(adapter, base, name="tuned", adapted_only=True)
    assert arguments[-2:] == ["--served-model-name", "tuned"]
    assert "--middleware" not in arguments
    assert "--logits-processors" in arguments  # the load is reported
    options = {"adapted_only": True, "load_interval": 0}
    assert "--logits-processors" not in server_arguments(
        adapter, base, **options, options=["--speculative-config", "{}"]
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--pipeline-parallel-size=2", "use --tensor-parallel-size"),
        ("-pp", "use --tensor-parallel-size"),
        ("--pipeline_parallel_size", "use --tensor-parallel-size"),
        ("--served-model-name", "use --name"),
        ("--model", "use --base"),
        ("--enable-lora", "cannot be given"),
        ("--logits-processors", "cannot be given"),
        ("--speculative-config", "leave it out"),
        ("--spec-method=ngram", "leave it out"),
        ("-sc", "leave it out"),
        ("--pipeline-parallel", "use --tensor-parallel-size"),
        ("--enable_lor", "cannot be given"),
        ("--hf-overrides.rope_theta", "cannot be given"),
        ("--hf_overrides.architectures=[]", "cannot be given"),
        ("--prefill-context-parallel-size", "use --tensor-parallel-size"),
        ("--enable-dbo", "cannot be given"),
        ("--attention-backend=FLASHINFER", "choose FLASH_ATTN"),
    ],
)
def test_options_that_would_undo_it_are_refused(option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        server_arguments(tmp_path, tmp_path, options=[option, "1"])


def test_a_backend_that_does_not_say_whose_tokens_are(tmp_path):
    base, adapter = save(tmp_path, "llama")
    silent = ["--max-num-seqs", "8", "--attention_backend", "flashinfer"]
    with pytest.raises(ValueError, match="flashinfer does not say where a request's tokens begin"):
        server_arguments(adapter, base, options=silent)
    assert silent[-1] in server_arguments(adapter, base, options=silent, adapted_only=True, load_interval=0)
    assert "FLASH_ATTN" in server_arguments(adapter, base, options=["--attention-backend", "FLASH_ATTN"])


@pytest.mark.parametrize("runner", ["1", "0", None])
@pytest.mark.parametrize("alone", [False, True])
def test_the_batch_is_followed_as_the_runner_lets_it(runner, alone, tmp_path, monkeypatch):
    base, adapter = save(tmp_path, "llama")
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: name)  # as if vLLM were there
    started = []
    monkeypatch.setattr(serve_module, "_start", lambda arguments: started.extend([*arguments, os.environ.get(RUNNER)]))
    monkeypatch.setenv(RUNNER, runner) if runner else monkeypatch.delenv(RUNNER, raising=False)
    serve_module.run_server(adapter, base, adapted_only=alone, load_interval=0)
    by_logits = runner != "1" and not alone
    assert ("--logits-processors" in started) == by_logits
    assert started[-1] == ("0" if by_logits else runner)


def test_it_cleans_up_when_told_to_stop(tmp_path, monkeypatch):
    base, adapter = save(tmp_path, "llama")
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(serve_module.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(serve_module, "_start", lambda _: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        serve_module.run_server(adapter, base)
    assert not list((tmp_path / "temporary").iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_copy_that_vllm_would_not_find_is_refused(tmp_path, monkeypatch):
    base, adapter = save(tmp_path, "llama")
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(serve_module, "_start", lambda arguments: pytest.fail("it was started"))
    monkeypatch.setattr(serve_module, "entry_points", lambda group: [SimpleNamespace(name="another")])
    with pytest.raises(ImportError, match="vLLM would not find adafuse"):
        serve_module.run_server(adapter, base)


def test_two_models_of_one_name_are_refused(tmp_path):
    base, adapter = save(tmp_path, "llama")
    with pytest.raises(ValueError, match="both models would be called 'x'"):
        server_arguments(adapter, base, name="x", base_name="x")


def test_a_wrong_base_is_one_line_and_exit_code_1(tmp_path):
    base, _ = save(tmp_path, "llama")
    _, other = save(tmp_path, "qwen2")
    done = serve("--adapter", other, "--base", base)
    assert done.returncode == 1
    expected = "made on another base" if importlib.util.find_spec("vllm") else "adafuse serve needs vLLM"
    assert expected in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert "Traceback" not in done.stderr


def serve(*arguments):
    command = [sys.executable, "-m", "adafuse.cli", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_importing_the_package_does_not_import_vllm():
    code = (
        "import sys, adafuse, adafuse.integrations.vllm, adafuse.integrations.vllm.plugin; print('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


# --- requests
# -----------------------------------------------------------------------------------------------------------

COMPLETIONS = "/v1/completions"


def rewritten(path=COMPLETIONS, **request):
    refusal, body = rewrite(path, json.dumps(request).encode(), "plain")
    assert refusal is None
    return json.loads(body)


def test_a_request_for_the_base_is_marked_and_salted():
    asked = {"model": "plain", "prompt": "a"}
    assert rewritten(**asked) == {**asked, "vllm_xargs": {"adafuse_bare": 1}, "cache_salt": "bare:"}
    found = rewritten(**asked, vllm_xargs={"k": 2}, cache_salt="s")
    assert found == {**asked, "vllm_xargs": {"k": 2, "adafuse_bare": 1}, "cache_salt": "bare:s"}


def test_no_client_marks_a_request_itself_or_reaches_into_the_others_cache():
    asked = {"model": "tuned", "prompt": "a"}
    assert rewritten(**asked) == asked
    found = rewritten(**asked, vllm_xargs={"adafuse_bare": 1, "k": 2}, cache_salt="bare:")
    assert found == {**asked, "vllm_xargs": {"k": 2}, "cache_salt": "adapted:bare:"}
    for path in ("/inference/v1/generate", "/v1/responses"):
        refusal, _ = rewrite(path, b'{"sampling_params": {"extra_args": {"adafuse_b\\u0061re": 1}}}', "plain")
        assert "answers at /v1/completions" in refusal


def test_salts_are_kept_apart_wherever_they_are_sent():
    asked = {"model": "tuned", "messages": [{"cache_salt": "bare:", "n": 1}], "cache_salt": 5}
    found = rewritten("/invocations", **asked)
    assert found == {**asked, "messages": [{"cache_salt": "adapted:bare:", "n": 1}]}
    assert rewritten("/v1/responses", model="tuned", cache_salt="s")["cache_salt"] == "adapted:s"
    body = b'{"model":  "tuned"}'
    assert rewrite("/v1/responses", body, "plain") == (None, body)


def test_the_base_answers_no_beam_searches():
    asked = {"prompt": "a", "use_beam_search": True, "n": 2}
    assert "no beam searches" in rewrite(COMPLETIONS, json.dumps({**asked, "model": "plain"}).encode(), "plain")[0]
    assert rewritten(**asked, model="tuned") == {**asked, "model": "tuned"}


def test_the_base_is_refused_where_requests_cannot_be_marked():
    refusal, _ = rewrite("/v1/responses", b'{"model": "plain", "input": "a"}', "plain")
    assert "answers at /v1/completions" in refusal
    assert rewritten("/tokenize", model="plain", prompt="a") == {"model": "plain", "prompt": "a"}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"plain"', b"\xff", b"[" * 100000, b'{"model": ["plain"]}'])
def test_what_is_no_request_passes_as_it_came(body):
    refusal, found = rewrite(COMPLETIONS, body, "plain")
    assert refusal is None
    assert found == body or json.loads(found) == json.loads(body)


@pytest.mark.parametrize("field", [{"vllm_xargs": "x"}, {"vllm_xargs": [1]}, {"cache_salt": 5}])
def test_malformed_fields_are_left_for_vllm_to_refuse(field):
    found = rewritten(model="plain", prompt="a", **field)
    assert {key: found[key] for key in field} == field


def test_the_middleware_hands_on_the_new_length_and_the_hang_up():
    messages = [
        {"type": "http.request", "body": b'{"model": "pl', "more_body": True},
        {"type": "http.request", "body": b'ain", "prompt": "a"}'},
        {"type": "http.disconnect"},
    ]
    seen = {}

    async def app(scope, receive, send):
        body = await receive()
        seen.update(headers=dict(scope["headers"]), body=body["body"], then=await receive())

    async def receive():
        return messages.pop(0)

    state = SimpleNamespace(args=SimpleNamespace(served_model_name=["tuned", "plain"]))
    headers = [(b"content-length", b"33"), (b"x-a", b"b")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": COMPLETIONS,
        "headers": headers,
        "app": SimpleNamespace(state=state),
    }
    asyncio.run(ModelNames(app)(scope, receive, None))
    assert json.loads(seen["body"])["vllm_xargs"] == {"adafuse_bare": 1}
    assert seen["headers"] == {b"x-a": b"b", b"content-length": str(len(seen["body"])).encode()}
    assert seen["then"] == {"type": "http.disconnect"}


def test_digest_is_of_the_weights_file(tmp_path):
    checkpoint.write(tmp_path, checkpoint.describe(AdaFuseConfig(), "", {}), {"x": torch.zeros(2)})
    first = digest(tmp_path)
    checkpoint.write(tmp_path, checkpoint.describe(AdaFuseConfig(), "", {}), {"x": torch.ones(2)})
    assert digest(tmp_path) != first
