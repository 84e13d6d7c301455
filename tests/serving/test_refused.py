"""What an engine refuses with an adapter, with vLLM's own settings objects; and overrides written by hand, as documented."""

import pytest
import tiny
from engines import REQUESTS, compare, engine, texts
from transformers import MixtralConfig, MixtralForCausalLM
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.registry import ModelRegistry

from adafuse.integrations.vllm.names import ARCHITECTURES
from adafuse.integrations.vllm.plugin import register
from adafuse.integrations.vllm.start import check_engine, llm_options


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    base = tiny.save_base("llama", folder / "base")
    return base, tiny.save_adapter(base, folder / "adapter")


def test_registering_twice_is_registering_once():
    before = set(ModelRegistry.get_supported_archs())
    register()
    register()
    after = set(ModelRegistry.get_supported_archs())
    assert after - before <= {f"AdaFuse{name}" for name in ARCHITECTURES}
    assert {f"AdaFuse{name}" for name in ARCHITECTURES} <= after


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pipeline_parallel_size": 2}, "use tensor parallelism"),
        ({"enable_lora": True}, "start without it"),
    ],
)
def test_settings_that_do_not_work_with_an_adapter(setting, message, folders):
    arguments = {**llm_options(*folders), "dtype": "float32", "max_model_len": 256}
    check_engine(EngineArgs(**arguments).create_engine_config())
    with pytest.raises(ValueError, match=message):
        check_engine(EngineArgs(**arguments, **setting).create_engine_config())


def test_graphs_that_would_hold_the_routing(folders, monkeypatch):
    config = EngineArgs(**llm_options(*folders), dtype="float32", max_model_len=256).create_engine_config()
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="set it to 0"):
        check_engine(config)


def start(base, **overrides):
    """An engine by overrides alone, without the checks of `llm_options`."""
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
    overrides = {"architectures": ["AdaFuseLlamaForCausalLM"], **overrides}
    return LLM(model=str(base), hf_overrides=overrides, **options)


def test_an_engine_without_adapter_is_refused(folders):
    with pytest.raises(ValueError, match="its config names none"):
        start(folders[0])


def test_an_engine_with_an_adapter_of_another_base_is_refused(folders, tmp_path):
    base, _ = folders
    other = tiny.save_base("qwen2", tmp_path / "base")
    adapter = tiny.save_adapter(other, tmp_path / "adapter")
    with pytest.raises(ValueError, match="made on another base"):
        start(base, adafuse_adapter=str(adapter))


def test_an_engine_whose_adapter_has_changed_is_refused(folders):
    base, adapter = folders
    with pytest.raises(ValueError, match="changed while the server was starting"):
        start(base, adafuse_adapter=str(adapter), adafuse_digest="0" * 64)


def test_an_adapter_of_another_architecture_is_refused(folders, tmp_path):
    """As many blocks and features, but other linears."""
    base, _ = folders
    grouped = tiny.save_base("llama-grouped", tmp_path / "base")
    adapter = tiny.save_adapter(grouped, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"qkv_proj holds a linear of \[out, in\] \[64, 64\]"):
        start(base, adafuse_adapter=str(adapter))


def test_a_bad_mark_is_refused_before_it_reaches_the_engine(folders):
    base, adapter = folders
    with engine(base, adapter, logits_processors=[REQUESTS]) as llm:
        params = SamplingParams(max_tokens=1, extra_args={"adafuse_bare": 2})
        with pytest.raises(Exception, match="neither 0"):  # of a class that changes with vLLM's version
            llm.generate({"prompt_token_ids": [1]}, params, use_tqdm=False)
        found = texts(llm, [[1, 2]], tokens=4)
    compare(found, [tiny.judge(tiny.reference(base, adapter), [1, 2], found[0][0])])


def test_a_mixture_backbone_is_refused_by_the_engine_too(folders, tmp_path):
    _, adapter = folders
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=tiny.VOCAB)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    overrides = {"architectures": ["AdaFuseTransformersForCausalLM"], "adafuse_adapter": str(adapter)}
    with pytest.raises(ValueError, match="mixture backbone of 2 experts"):
        start(tmp_path, **overrides)
