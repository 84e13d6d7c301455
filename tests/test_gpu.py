"""What only a GPU can show: the router under TF32, no host synchronisation, CUDA graphs, bf16 against float64."""

import copy

import pytest
import torch
from gpus import no_host_sync
from transformers import LlamaConfig, LlamaForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.engine.graph import captured
from adafuse.router import Router

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def legacy_switch():
    torch.backends.cuda.matmul.allow_tf32 = True


def new_switch():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def precision_switch():
    torch.set_float32_matmul_precision("high")


@pytest.fixture
def tf32_off_afterwards():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def model_on(device, dtype, **config):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, vocab_size=500)
    )
    model = AdaFuseModel(base, AdaFuseConfig(r=8, num_experts=8, **config))
    for bank in model.banks.values():
        torch.nn.init.normal_(bank.b, std=0.05)
    return model.to(device, dtype).eval()


@pytest.mark.usefixtures("tf32_off_afterwards")
@pytest.mark.parametrize("switch", [legacy_switch, new_switch, precision_switch])
@pytest.mark.parametrize("hidden", [0, 64])
def test_router_is_fp32_under_tf32_forward_and_backward(switch, hidden):
    switch()
    setting = torch.backends.cuda.matmul.fp32_precision
    torch.manual_seed(0)
    router = Router(4096, 64, 2, router_hidden=hidden, device="cuda")
    h0 = torch.randn(2, 300, 4096, device="cuda")
    probability = router(h0).probabilities
    probability.square().sum().backward()
    exact = copy.deepcopy(router).double()

    def forward64(h):
        x = h.double()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if hidden:
            x = torch.nn.functional.silu(x @ exact.hidden.weight.T)
        return (x @ exact.weight.T).softmax(-1)[:, :, None]

    exact.zero_grad()
    expected = forward64(h0)
    expected.square().sum().backward()
    assert (probability - expected).norm() / expected.norm() < 2e-6  # TF32 would give about 1e-4
    for mine, theirs in zip(router.parameters(), exact.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() / theirs.grad.norm() < 1e-5
    assert torch.backends.cuda.matmul.fp32_precision == setting
    x = torch.randn(512, 4096, device="cuda")  # the switch still holds for everybody else
    assert (x @ x.T - (x.double() @ x.double().T)).abs().max() > 1e-3


@pytest.mark.parametrize("routing", ["model", "layer"])
def test_forward_does_not_wait_for_the_device(routing):
    model = model_on("cuda", torch.bfloat16, routing=routing, shared_rank=4)
    ids = torch.randint(0, 500, (2, 16), device="cuda")
    # A ready 4-D mask: transformers waits for the device to find out whether a 2-D one, or none, means packed sequences.
    causal = torch.full((16, 16), float("-inf")).triu(1).to("cuda", torch.bfloat16).expand(2, 1, 16, 16)
    given = {"input_ids": ids, "attention_mask": causal, "position_ids": torch.arange(16, device="cuda")[None]}
    with torch.no_grad():
        model(**given, use_cache=False)
        with no_host_sync():
            model(**given, use_cache=False)


def test_forward_in_a_cuda_graph_equals_eager():
    model = model_on("cuda", torch.float32, routing="layer")
    ids = torch.randint(0, 500, (1, 16), device="cuda")
    fresh = torch.randint(0, 500, (1, 16), device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            logits = model(input_ids=ids, use_cache=False).logits
        ids.copy_(fresh)
        graph.replay()
        torch.testing.assert_close(logits, model(input_ids=fresh, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_delta_agrees_with_float64(dtype, bound):
    """The error of the adapters' own part: adapted minus bare, for one linear, relative RMS."""
    from adafuse.ops.delta import add_delta

    torch.manual_seed(0)
    x, a, b = torch.randn(63, 1000), torch.randn(48, 1000) / 1000**0.5, torch.randn(48, 777)
    mask = torch.rand(63, 48) * (torch.rand(63, 48) < 0.3)
    y = torch.full((63, 777), 0.0)
    got = add_delta(*(t.to("cuda", dtype) for t in (y, x, a, b)), rank_mask=mask.to("cuda"))
    rounded = [t.to(dtype).double() for t in (x, a, b)]
    expected = (rounded[0] @ rounded[1].T * mask.double()) @ rounded[2]
    assert (got.cpu().double() - expected).norm() / expected.norm() < bound


def test_generate_on_gpu_equals_cpu():
    model = model_on("cpu", torch.float32, routing="layer")
    ids = torch.randint(0, 500, (2, 8))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    options["attention_mask"] = options["attention_mask"].cuda()
    assert torch.equal(model.cuda().generate(ids.cuda(), **options).cpu(), expected)
