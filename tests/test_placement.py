"""Models that do not sit still: dispatched over devices by Accelerate, copied, run by several threads, patched by others."""

import copy
import threading

import pytest
import torch
from accelerate import dispatch_model
from transformers import LlamaConfig, LlamaForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel

CONFIG = AdaFuseConfig(r=4, num_experts=4, routing="layer", shared_rank=2)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=101,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def with_experts(base):
    torch.manual_seed(1)
    model = AdaFuseModel(base, CONFIG)
    torch.manual_seed(2)
    model.load_adapter_tensors({name: torch.randn_like(t) * 0.1 for name, t in sorted(model.adapter_tensors().items())})
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(3))


def test_base_dispatched_by_accelerate_before_attaching(tmp_path, ids):
    expected = with_experts(llama())(ids).logits
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    base = dispatch_model(llama(), device_map=places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    bare = base(ids).logits
    model = with_experts(base)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert torch.equal(model.detach()(ids).logits, bare)


def test_a_copy_is_independent(ids):
    model = with_experts(llama())
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, expected)
    twin.load_adapter_tensors({name: torch.zeros_like(t) for name, t in twin.adapter_tensors().items()})
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(twin(ids).logits, llama()(ids).logits)


def test_threads_do_not_mix_their_routings():
    model = with_experts(llama())
    inputs = [torch.randint(0, 101, (1, 5 + i), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with torch.no_grad():
        expected = [model(x).logits for x in inputs]
    wrong = []

    def run(i):
        with torch.no_grad():
            for _ in range(30):
                if not torch.allclose(model(inputs[i]).logits, expected[i], atol=1e-6):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_block_whose_forward_was_replaced_is_refused():
    base = llama()
    base.model.layers[1].forward = base.model.layers[1].forward
    with pytest.raises(ValueError, match="forward of a LlamaDecoderLayer was replaced"):
        AdaFuseModel(base, CONFIG)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_an_exception_in_a_forward_leaves_the_model_usable(ids):
    model = with_experts(llama())
    expected = model(ids).logits
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 1000))
    handle = model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    handle.remove()
    assert torch.equal(model(ids).logits, expected)


def test_torch_compile_gives_the_same_logits(ids):
    model = with_experts(llama())
    expected = model(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_forward_within_a_forward_keeps_both_routings(ids):
    model = with_experts(llama())
    expected, inner, running = model(ids).logits, [], []

    def hook(*_):
        if not running:
            running.append(True)
            inner.append(model(ids.flip(1)).logits)

    handle = model.get_base_model().model.layers[0].register_forward_hook(hook)
    assert torch.equal(model(ids).logits, expected)
    handle.remove()
    assert torch.equal(inner[0], model(ids.flip(1)).logits)


def test_weights_written_past_autograd_are_used_after_a_change_of_mode(ids):
    """As averages of weights are swapped in for an evaluation: p.data.copy_ leaves no trace that a cache could see."""
    model = with_experts(llama().bfloat16())
    with torch.no_grad():
        before = model(ids).logits
        for bank in model.banks.values():
            bank.b.data.zero_()
        model.eval()
        assert torch.equal(model(ids).logits, llama().bfloat16()(ids).logits)
        assert not torch.equal(before, model(ids).logits)


def test_router_trains_after_a_forward_in_inference_mode(ids):
    model = with_experts(llama().bfloat16())
    model.set_trainable("router")
    with torch.inference_mode():
        model(ids)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.router.weight.grad.any()
    with torch.inference_mode(), pytest.raises(ValueError, match="attach it outside"):
        AdaFuseModel(llama(), CONFIG)


def test_the_config_follows_resized_embeddings():
    model = with_experts(llama())
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == model.get_base_model().config.vocab_size == 120
