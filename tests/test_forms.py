"""Every form of "fused" over sizes and kinds of routing, from one plan, in memory poisoned with NaN, against float64."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_batch_op import DEVICE, LIMITS, ROUTINGS, route

from adafuse import AdaFuseConfig
from adafuse.fused import FORMS
from adafuse.plan import Plan
from adafuse.router import Routing

ON_GPU = DEVICE == "cuda"
# num_experts, top_k
EXPERTS = [(1, 1), (6, 1), (6, 2), (8, 2), (64, 1), (64, 2), (64, 16)]
TOKENS = {1: ("decode",), 2: ("decode",), 7: ("decode", "tiles"), 63: ("crowd", "tiles"), 1000: ("tiles", "matmul")}
FEATURES, OUTPUTS = (256, 200) if ON_GPU else (40, 24)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its like are filled with NaN, and the largest int."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check(form, dtype, kind, tokens, config):
    ranks = config.num_experts * config.r + config.shared_rank
    x = torch.randn(tokens, FEATURES, device=DEVICE).to(dtype)
    w, a = ((torch.randn(n, FEATURES, device=DEVICE) * FEATURES**-0.5).to(dtype) for n in (OUTPUTS, ranks))
    b = torch.randn(ranks, OUTPUTS, device=DEVICE).to(dtype)
    experts, weights = route(kind, tokens, config.num_experts, config.top_k)
    plan = Plan.of(Routing(experts.long()[None, :, None], weights[None, :, None]), config).of_block(0)
    got = FORMS[form](x, w, a, b, plan)
    mask = torch.zeros(tokens, config.num_experts, dtype=torch.float64, device=DEVICE)
    for slot in range(config.top_k):
        mask[torch.arange(tokens), experts[:, slot].long()] += weights[:, slot].double() * config.scale
    mask = mask.repeat_interleave(config.r, dim=1)
    mask = torch.cat([mask, torch.full_like(mask[:, :1], config.shared_scale).expand(-1, config.shared_rank)], dim=1)
    exact = x.double() @ w.double().T + ((x.double() @ a.double().T) * mask) @ b.double()
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error < LIMITS[dtype], f"{form}, {kind}, {tokens} tokens: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("r", [1, 4, 16, 64])
@pytest.mark.parametrize("experts", EXPERTS, ids=str)
def test_all_forms_on_the_gpu(experts, r, dtype):
    torch.manual_seed(0)
    for tokens, forms in TOKENS.items():
        for form in forms:
            for n, kind in enumerate(ROUTINGS):
                config = AdaFuseConfig(num_experts=experts[0], top_k=experts[1], r=r, shared_rank=3 * (n % 2))
                check(form, dtype, kind, tokens, config)


@pytest.mark.skipif(ON_GPU, reason="the same at full size runs on the GPU")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("tokens", "form"), [(n, form) for n in (1, 7, 63) for form in TOKENS[n]] + [(63, "matmul")])
def test_all_forms_in_the_interpreter(tokens, form, dtype):
    torch.manual_seed(0)
    kind = ROUTINGS[(tokens + len(form)) % len(ROUTINGS)]
    for num_experts, top_k, r in ((6, 2, 4), (8, 1, 16), (16, 8, 1)):
        config = AdaFuseConfig(num_experts=num_experts, top_k=top_k, r=r, shared_rank=3)
        check(form, dtype, kind, tokens, config)


@pytest.mark.skipif(ON_GPU, reason="compute-sanitizer runs it on the GPU")
def test_what_compute_sanitizer_watches_runs():
    runpy.run_path(str(Path(__file__).with_name("sanitized.py")), run_name="__main__")
