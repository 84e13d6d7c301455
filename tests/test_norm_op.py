"""Norms with residual sums and SwiGLU against plain arithmetic in float64. On a CPU they run under Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from adafuse.ops.norm import MAX_HIDDEN, add_norm, embed_norm, norm_ref, swiglu, swiglu_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}  # relative RMS; the interpreter cuts bits off
DTYPES = list(LIMITS)
SIZES = [(1, 64), (3, 63), (8, 1000), (2, 4096)]
EPS = 1e-3  # large, so that leaving it out shows


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def nan(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def rms_norm(x, weight):
    """A token at a time, in float64."""
    rows = [weight.double() * row / ((row @ row) / len(row) + EPS).sqrt() for row in x.double()]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_add_norm(size, dtype, biased):
    y, residual, weight = normal(*size, dtype=dtype), 0.1 * normal(*size, dtype=dtype), normal(size[1], dtype=dtype)
    bias = normal(size[1], dtype=dtype) if biased else None
    total = residual.double() + y.double() + (bias.double() if biased else 0)
    out = nan(*size, dtype=dtype)
    assert add_norm(y, residual, weight, out, eps=EPS, bias=bias) is out
    assert relative_error(residual, total) < LIMITS[dtype]
    assert relative_error(out, rms_norm(residual, weight)) < LIMITS[dtype]
    assert relative_error(norm_ref(residual.double(), weight.double(), EPS), rms_norm(residual, weight)) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_embed_norm(size, dtype):
    embeddings, weight = normal(11, size[1], dtype=dtype), normal(size[1], dtype=dtype)
    tokens = torch.randint(0, 11, size[:1], device=DEVICE)
    residual, out = nan(*size, dtype=dtype), nan(*size, dtype=dtype)
    embed_norm(tokens, embeddings, residual, weight, out, eps=EPS)
    assert torch.equal(residual, embeddings[tokens])
    assert relative_error(out, rms_norm(residual, weight)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 48), (3, 999), (2, 1024), (8, 2500)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_swiglu(size, dtype, biased):
    tokens, features = size
    gate_up, out = normal(tokens, 2 * features, dtype=dtype), nan(*size, dtype=dtype)
    biases = [normal(features, dtype=dtype) if biased else None for _ in range(2)]
    swiglu(gate_up, out, gate_bias=biases[0], up_bias=biases[1])
    gate, up = (
        part.double() + (0 if b is None else b.double()) for part, b in zip(gate_up.chunk(2, 1), biases, strict=True)
    )
    exact = gate / (1 + (-gate).exp()) * up
    assert relative_error(out, exact) < LIMITS[dtype]
    plain = swiglu_ref(gate_up.double(), [None if b is None else b.double() for b in biases])
    assert relative_error(plain, exact) < 1e-12


def test_what_the_kernels_cannot_take_is_refused():
    y, weight = normal(2, 64), normal(64)
    with pytest.raises(ValueError, match=r"y must be torch.float32 \[2, 64\] on .*, got torch.float16 \[2, 64\]"):
        add_norm(y.half(), y, weight, y.clone(), eps=EPS)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 \[64\] on .*, got torch.float32 \[63\]"):
        add_norm(y, y.clone(), weight[1:], y.clone(), eps=EPS)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        add_norm(y, normal(64, 2).T, weight, y.clone(), eps=EPS)
    with pytest.raises(ValueError, match=r"tokens must be int64 \[2\]"):
        embed_norm(torch.zeros(3, dtype=torch.int64, device=DEVICE), normal(5, 64), y, weight, y.clone(), eps=EPS)
    with pytest.raises(ValueError, match=r"gate_up must be contiguous torch.float32 \[2, 128\]"):
        swiglu(normal(2, 127), y)
    with pytest.raises(ValueError, match="have a bias both, or none"):
        swiglu(normal(2, 128), y, gate_bias=weight)
    wide = normal(1, MAX_HIDDEN + 1)
    with pytest.raises(ValueError, match=f"a norm over {MAX_HIDDEN + 1} features"):
        add_norm(wide, wide.clone(), wide[0], wide.clone(), eps=EPS)
    with pytest.raises(ValueError, match="no backward pass"):
        add_norm(y.requires_grad_(), y.detach().clone(), weight, y.detach().clone(), eps=EPS)
