"""Every form of "fused", and "switch", over sizes and kinds of routing, in memory poisoned with NaN, against float64."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_batch_op import DEVICE, LIMITS, ROUTINGS, route
from test_switch_op import a_routing, a_segment, delta, shared_delta
from test_switch_op import check as check_weights

from adafuse import AdaFuseConfig
from adafuse.fused import FORMS
from adafuse.ops.beside import expand, shrink
from adafuse.ops.switch import SwitchTable, switch
from adafuse.plan import Plan
from adafuse.router import Routing

ON_GPU = DEVICE == "cuda"
# num_experts, top_k
EXPERTS = [(1, 1), (6, 1), (6, 2), (8, 1), (8, 2), (64, 1), (64, 2), (64, 16), (256, 16)]
TOKENS = {
    1: ("decode", "beside"),
    2: ("decode", "beside", "crowd"),
    7: ("decode", "beside", "crowd", "tiles"),
    63: ("crowd", "tiles", "gated"),
    1000: ("tiles", "gated", "matmul"),
}
IN_INTERPRETER = [
    (1, "decode"),
    (1, "beside"),
    (7, "decode"),
    (7, "crowd"),
    (63, "crowd"),
    (63, "tiles"),
    (63, "gated"),
    (63, "matmul"),
]
FEATURES, OUTPUTS = (256, 200) if ON_GPU else (40, 24)


def beside(x, w, a, b, plan):
    """The experts of a few tokens beside the base's own matmul."""
    y, chosen = torch.nn.functional.linear(x, w), plan.chosen
    h = torch.empty(len(x), 1, chosen.active, dtype=torch.int32, device=DEVICE)
    return expand(shrink(x, (a,), chosen, h)[:, 0], b, chosen, y)


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
    got = (beside if form == "beside" else FORMS[form])(x, w, a, b, plan)
    mask = torch.zeros(tokens, config.num_experts, dtype=torch.float64, device=DEVICE)
    for slot in range(config.top_k):
        mask[torch.arange(tokens, device=DEVICE), experts[:, slot].long()] += weights[:, slot].double() * config.scale
    mask = mask.repeat_interleave(config.r, dim=1)
    mask = torch.cat([mask, torch.full_like(mask[:, :1], config.shared_scale).expand(-1, config.shared_rank)], dim=1)
    exact = x.double() @ w.double().T + ((x.double() @ a.double().T) * mask) @ b.double()
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error < LIMITS[dtype], f"{form}, {kind}, {tokens} tokens: {error:.1e}"


def check_switch(dtype, config, shape):
    """From a copy, and in place from one routing to another."""
    for pristine in (True, False):
        sizes = {name: getattr(config, name) for name in ("num_experts", "top_k", "r", "shared_rank")}
        s = a_segment(*shape, **sizes, pristine=pristine, dtype=dtype)
        old, new = a_routing([s], config.top_k, 1), a_routing([s], config.top_k, 1)
        exact = s.reads.double() + delta(s, *new) + (shared_delta(s, 0.7) if pristine else -delta(s, *old))
        with torch.no_grad():
            switch(SwitchTable([s], top_k=config.top_k), *new, old=old, shared_scale=0.7)
        check_weights([s], [exact])


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


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("r", [1, 4, 16, 64])
@pytest.mark.parametrize("experts", EXPERTS, ids=str)
def test_switch_on_the_gpu(experts, r, dtype):
    torch.manual_seed(0)
    for shared_rank, shape in ((0, (256, 200)), (3, (129, 67))):
        config = AdaFuseConfig(num_experts=experts[0], top_k=experts[1], r=r, shared_rank=shared_rank)
        check_switch(dtype, config, shape)


SMALL = ((6, 2, 4), (8, 1, 16), (16, 8, 1))  # num_experts, top_k, r


@pytest.mark.skipif(ON_GPU, reason="the same at full size runs on the GPU")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("tokens", "form"), IN_INTERPRETER)
def test_all_forms_in_the_interpreter(tokens, form, dtype):
    """Each form sees all kinds of routing, some in each dtype."""
    torch.manual_seed(0)
    for n, (num_experts, top_k, r) in enumerate(SMALL):
        config = AdaFuseConfig(num_experts=num_experts, top_k=top_k, r=r, shared_rank=3)
        kind = ROUTINGS[(list(LIMITS).index(dtype) + 2 * n) % len(ROUTINGS)]
        check(form, dtype, kind, tokens, config)


@pytest.mark.skipif(ON_GPU, reason="the same at full size runs on the GPU")
@pytest.mark.parametrize(
    ("form", "tokens"), [("decode", 2), ("beside", 2), ("crowd", 20), ("tiles", 20), ("gated", 20), ("matmul", 20)]
)
def test_hundreds_of_experts_in_the_interpreter(form, tokens):
    torch.manual_seed(0)
    check(form, torch.float32, "uniform", tokens, AdaFuseConfig(num_experts=256, top_k=16, r=1, shared_rank=3))


@pytest.mark.skipif(ON_GPU, reason="the same at full size runs on the GPU")
@pytest.mark.parametrize(("num_experts", "top_k", "r"), [(8, 1, 4), (64, 2, 4), (256, 16, 1)])
def test_switch_in_the_interpreter(num_experts, top_k, r):
    torch.manual_seed(0)
    config = AdaFuseConfig(num_experts=num_experts, top_k=top_k, r=r, shared_rank=3)
    check_switch(torch.float32, config, (40, 24))


@pytest.mark.skipif(ON_GPU, reason="the kernels that it needs are compiled by the tests that run them")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_a_gpu(capability, tmp_path):
    """The interpreter takes what the compiler refuses."""
    script = Path(__file__).with_name("compiled.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    found = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert "kernels compiled" in found.stdout


@pytest.mark.skipif(ON_GPU, reason="compute-sanitizer runs it on the GPU")
def test_what_compute_sanitizer_watches_runs():
    runpy.run_path(str(Path(__file__).with_name("sanitized.py")), run_name="__main__")
