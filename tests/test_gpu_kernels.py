"""What only a GPU can show of the kernels: early launches that wait, graphs without host sync, compute-sanitizer's verdict."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from gpus import early_launch, no_host_sync
from test_decode_op import a_case, empty, nan, relative_error

pytest.importorskip("triton")

import triton
import triton.language as tl

from adafuse.engine.graph import captured
from adafuse.ops.batch import add_delta_tiles_ref, expand_tiles, shrink_tiles
from adafuse.ops.beside import expand, shrink
from adafuse.ops.crowd import crowd, crowd_ref, cut_for
from adafuse.ops.decode import decode, decode_ref
from adafuse.ops.layout import lay_out
from adafuse.ops.ranks import copies_of_h
from adafuse.ops.route import route, route_ref

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LATE = 3_000_000  # nanoseconds, in which the host can queue several launches
SIZE = (1, 4096, (2048, 512), 8, 16, 2, 0)


@triton.jit
def _clock():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _late_copy_kernel(source, target, count, nanoseconds, BLOCK: tl.constexpr):
    """Lets its dependents start at once, and writes much later."""
    tl.extra.cuda.gdc_launch_dependents()
    start = _clock()
    while _clock() - start < nanoseconds:
        pass
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < count), mask=i < count)


@triton.jit
def _copy_kernel(source, target, count, BLOCK: tl.constexpr, WAIT: tl.constexpr):
    if WAIT:
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < count), mask=i < count)


def write_late(target, source):
    count = source.numel()
    _late_copy_kernel[(triton.cdiv(count, 1024),)](source, target, count, LATE, BLOCK=1024)


def double(*groups):
    return [[m.double() for m in group] for group in groups]


@early_launch
@pytest.mark.parametrize("wait", [True, False])
def test_the_delay_catches_a_kernel_that_does_not_wait(wait):
    """Without this the tests below could not fail."""
    source, late, seen = torch.randn(1024, device="cuda"), nan(1024), nan(1024)
    _copy_kernel[(1,)](late, seen, 1024, BLOCK=1024, WAIT=wait, launch_pdl=True)  # compiled ahead
    write_late(seen.clone(), source)
    torch.cuda.synchronize()
    write_late(late, source)
    _copy_kernel[(1,)](late, seen, 1024, BLOCK=1024, WAIT=wait, launch_pdl=True)
    torch.cuda.synchronize()
    assert torch.equal(seen, source) == wait


# In each test below, memory that kernels hand on to one another holds NaN, or what another input left, before the late run.


@early_launch
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("times", range(3))
def test_decode_waits_for_its_input_and_passes_the_wait_on(tokens, adapted, times):
    """A late x; a first decode that reads it, and a second that reads the first one's output and the late x's neighbour."""
    x, weights, banks_a, banks_b, chosen = a_case(tokens, *SIZE[1:], torch.bfloat16)
    back = [torch.randn(4096, 2560, device="cuda").bfloat16() / 50]

    def run(x, late=None):
        first, second = nan(tokens, 2560, dtype=x.dtype), nan(tokens, 4096, dtype=x.dtype)
        mixture = {}
        if adapted:
            h = empty(copies_of_h(chosen.active), tokens, 2, chosen.active)
            mixture = {"banks_a": banks_a, "banks_b": banks_b, "chosen": chosen, "h": h}
        torch.cuda.synchronize()
        if late is not None:
            write_late(late, x)
        decode(x if late is None else late, weights, first, **mixture, pdl=True)
        decode(first, back, second, pdl=True)
        torch.cuda.synchronize()
        return first, second

    write_late(nan(*x.shape, dtype=x.dtype), x)
    run(torch.randn_like(x))  # compiled ahead
    first, second = run(x, late=nan(*x.shape, dtype=x.dtype))
    base, *banks = double(weights, banks_a, banks_b)
    exact = decode_ref(x.double(), base, *banks, chosen) if adapted else decode_ref(x.double(), base)
    assert relative_error(first, exact.cpu()) < 1e-2
    assert relative_error(second, decode_ref(first.double(), [back[0].double()]).cpu()) < 1e-2


@early_launch
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("times", range(4))
def test_decode_after_the_plan_waits_for_it(tokens, times):
    """Experts and weights come late; neither this kernel nor the one behind it may use the ones before."""
    x, weights, banks_a, banks_b, chosen = a_case(tokens, *SIZE[1:], torch.bfloat16)
    late = chosen._replace(
        experts=torch.zeros_like(chosen.experts), weights=torch.full_like(chosen.weights, float("nan"))
    )
    outs = [nan(tokens, 2560, dtype=x.dtype) for _ in range(2)]
    banks = {"banks_a": banks_a, "banks_b": banks_b, "pdl": True}
    hs = [empty(copies_of_h(chosen.active), tokens, 2, chosen.active) for _ in range(2)]
    for after_plan in (True, False):  # compiled ahead
        h = empty(copies_of_h(chosen.active), tokens, 2, chosen.active)
        decode(x, weights, outs[0].clone(), **banks, chosen=chosen, h=h, after_plan=after_plan)
    for given in (chosen.experts, chosen.weights):
        write_late(given.clone(), given)
    torch.cuda.synchronize()
    parts = [(late.experts, chosen.experts), (late.weights, chosen.weights)]
    for target, source in parts if times % 2 else parts[::-1]:  # the last one is the kernel just ahead
        write_late(target, source)
    for n, out in enumerate(outs):
        decode(x, weights, out, **banks, chosen=late, h=hs[n], after_plan=n == 0)
    torch.cuda.synchronize()
    exact = decode_ref(x.double(), *double(weights, banks_a, banks_b), chosen).cpu()
    for out in outs:
        assert relative_error(out, exact) < 1e-2


@early_launch
@pytest.mark.parametrize("times", range(3))
def test_shrink_and_expand_wait(times):
    """A late x before shrink, then expand of the h that the late shrink wrote."""
    x, _, banks_a, banks_b, chosen = a_case(3, *SIZE[1:], torch.bfloat16)
    h, outs = empty(3, 2, chosen.active), [torch.zeros(3, width, device="cuda").bfloat16() for width in SIZE[2]]

    def run(x):
        shrink(x, banks_a, chosen, h, pdl=True)
        for m, (b, out) in enumerate(zip(banks_b, outs, strict=True)):
            expand(h[:, m], b, chosen, out, pdl=True)

    late = nan(*x.shape, dtype=x.dtype)
    write_late(late.clone(), x)
    run(torch.randn_like(x))  # compiled ahead
    h.fill_(-1)  # the bits of NaN
    for out in outs:
        out.zero_()
    torch.cuda.synchronize()
    write_late(late, x)
    run(late)
    torch.cuda.synchronize()
    nothing = [torch.zeros(width, x.shape[1], device="cuda", dtype=torch.float64) for width in SIZE[2]]
    exact = decode_ref(x.double(), nothing, *double(banks_a, banks_b), chosen).cpu()
    assert relative_error(torch.cat(outs, dim=-1), exact) < 1e-2


@early_launch
@pytest.mark.parametrize(
    "size", [(1, 11008, (4096,), 8, 64, 2, 0), (1, 4096, (2048,), 8, 32, 2, 0)], ids=["J 128", "J 64"]
)
def test_no_program_takes_a_rank_for_there_that_is_not(size):
    """Some warps hold copies of what others wait for. A thousand launches behind a late input, each looked at."""
    x, weights, banks_a, banks_b, chosen = a_case(*size, torch.bfloat16)
    out, late = nan(1, sum(size[2]), dtype=x.dtype), nan(*x.shape, dtype=x.dtype)
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        h = empty(copies_of_h(chosen.active), 1, 1, chosen.active)
        late.fill_(float("nan"))
        _late_copy_kernel[(triton.cdiv(x.numel(), 1024),)](x, late, x.numel(), 5_000, BLOCK=1024)
        decode(late, weights, out, banks_a=banks_a, banks_b=banks_b, chosen=chosen, h=h, pdl=True)
        bad += out.isnan().sum()
    assert bad.item() == 0


@early_launch
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("times", range(3))
def test_batch_waits_for_its_input(splits, times):
    """A late x before shrink, then expand of the h that the late shrink wrote: with splits, its sum did.

    The sums of the splits lie where the run before, of another x, has left its own.
    """
    tokens, features, width, experts, r = 200, 4096, 1024, 8, 16
    x, other = (torch.randn(tokens, features, device="cuda").bfloat16() for _ in range(2))
    late = nan(*x.shape, dtype=x.dtype)
    a = torch.randn(experts * r, features, device="cuda").bfloat16() / 64
    b = torch.randn(experts * r, width, device="cuda").bfloat16()
    chosen = torch.rand(tokens, experts, device="cuda").argsort(-1)[:, :2].int()
    tiles = lay_out(chosen, torch.rand(tokens, 2, device="cuda"), num_experts=experts, r=r)
    wanted = torch.zeros(tokens, width, device="cuda").bfloat16()
    add_delta_tiles_ref([wanted], x, [a], [b], tiles)

    def run(source):
        h, out = nan(*tiles.h_shape(1), dtype=x.dtype), torch.zeros_like(wanted)
        torch.cuda.synchronize()
        write_late(late, source)
        shrink_tiles(late, [a], tiles, h, pdl=True, splits=splits)
        expand_tiles(h, [b], tiles, [out], pdl=True)
        torch.cuda.synchronize()
        return out

    run(other)  # compiled ahead
    late.fill_(float("nan"))
    assert relative_error(run(x), wanted.double().cpu()) < 1e-2


@early_launch
@pytest.mark.parametrize("tokens", [32, 100])
@pytest.mark.parametrize("times", range(3))
def test_crowd_waits_for_its_input_and_the_plan(times, tokens):
    features, widths, experts, r = 4096, (1024, 512), 8, 16
    x = torch.randn(tokens, features, device="cuda").bfloat16()
    weights = [torch.randn(o, features, device="cuda").bfloat16() / 64 for o in widths]
    banks_a = [torch.randn(experts * r, features, device="cuda").bfloat16() / 64 for _ in widths]
    banks_b = [torch.randn(experts * r, o, device="cuda").bfloat16() for o in widths]
    gates, cut = torch.rand(tokens, experts + 1, device="cuda"), cut_for(tokens, features, widths, experts * r)
    late_x, late_gates = nan(*x.shape, dtype=x.dtype), nan(*gates.shape)

    def run(x, gates, out):
        scratch = {
            "h": nan(*cut.h_shape(tokens, 2, experts * r), dtype=x.dtype),
            "partial": nan(*cut.partial_shape),
            "flags": torch.zeros(cut.num_flags(tokens, 2, experts * r), dtype=torch.int32, device="cuda"),
        }
        late = [(late_x, given), (late_gates, given_gates)]
        for target, source in late if times % 2 else late[::-1]:  # the last one is the kernel just ahead
            write_late(target, source)
        banks = {"banks_a": banks_a, "banks_b": banks_b, "gates": gates, "r": r}
        return crowd(x, weights, out, **banks, **scratch, cut=cut, pdl=True)

    given, given_gates = x, gates
    run(x, gates, nan(tokens, sum(widths), dtype=x.dtype))  # compiled ahead
    late_x.fill_(float("nan"))
    late_gates.fill_(float("nan"))
    torch.cuda.synchronize()
    out = run(late_x, late_gates, nan(tokens, sum(widths), dtype=x.dtype))
    exact = crowd_ref(x.double(), *double(weights, banks_a, banks_b), gates.double(), r)
    assert relative_error(out, exact.cpu()) < 1e-2


@early_launch
@pytest.mark.parametrize("hidden", [0, 64])
@pytest.mark.parametrize("times", range(3))
def test_route_waits_for_its_input(hidden, times):
    """A late h0; through the router's hidden layer, logits and choice."""
    h0, late = torch.randn(2, 512, device="cuda"), nan(2, 512)
    inner = torch.randn(hidden, 512, device="cuda") / 8 if hidden else None
    router = torch.randn(16, hidden or 512, device="cuda") / 8
    experts, gates = torch.zeros(2, 2, 2, dtype=torch.int32, device="cuda"), nan(2, 2, 9)
    weights, logits, hidden_out = nan(2, 2, 2), nan(2, 16), nan(2, hidden)
    options = {"num_experts": 8, "scale": 1.0, "logits": logits, "gates": gates, "pdl": True}
    options |= {"hidden": inner, "hidden_out": hidden_out} if hidden else {}
    write_late(late.clone(), h0)
    route(torch.randn_like(h0), router, experts, weights, **options)  # compiled ahead
    experts.zero_()
    for buffer in (weights, logits, hidden_out, gates):
        buffer.fill_(float("nan"))
    torch.cuda.synchronize()
    write_late(late, h0)
    route(late, router, experts, weights, **options)
    torch.cuda.synchronize()
    exact = {"num_experts": 8, "top_k": 2, "scale": 1.0, "hidden": inner.double() if hidden else None}
    wanted = route_ref(h0.double(), router.double(), **exact)
    assert experts.long().equal(wanted[0])
    torch.testing.assert_close(weights.double(), wanted[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gates.gather(-1, experts.long()), weights)


@early_launch
def test_decode_runs_in_a_graph_without_host_sync():
    x, weights, banks_a, banks_b, chosen = a_case(*SIZE, torch.bfloat16)
    out, h = nan(1, 2560, dtype=x.dtype), empty(copies_of_h(chosen.active), 1, 2, chosen.active)

    def step():
        h.fill_(-1)
        decode(x, weights, out, banks_a=banks_a, banks_b=banks_b, chosen=chosen, h=h, pdl=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with no_host_sync(), captured(graph):
        step()
    exact_banks = double(weights, banks_a, banks_b)
    for _ in range(20):
        x.normal_()
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(out, decode_ref(x.double(), *exact_banks, chosen).cpu()) < 1e-2


def compute_sanitizer():
    """Its path: on PATH, or with the CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(toolkit / "bin"))


@pytest.mark.parametrize("watched", ["sanitized.py", "sanitized_engine.py"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, watched):
    program = compute_sanitizer()
    if program is None:
        missing = "compute-sanitizer is not installed (it comes with the CUDA toolkit), so no kernel was watched"
        warnings.warn(missing, stacklevel=1)  # a skipped test alone is easily overlooked
        pytest.skip(missing)
    script = Path(__file__).with_name(watched)
    # cuDNN's attention, which a prompt takes, is not ours: racecheck, which does not follow its barriers, reports it.
    command = [program, "--tool", tool, "--kernel-name-exclude", "kernel_substring=cudnn", "--error-exitcode", "9"]
    found = subprocess.run([*command, sys.executable, str(script)], capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
