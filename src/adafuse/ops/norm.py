"""norm: what lies between the linears of a block but attention: residual sums with their RMSNorm, and SwiGLU. A launch each.

One program takes a whole token: it holds the row in registers, so that the sum is read once. Everything is rounded where the
HuggingFace modules round it, and computed in fp32 between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, launch_options, next_power_of_2, wait_for_inputs

MAX_HIDDEN = 32768  # a row that a program holds
BLOCK_F = 1024


# --- references --------------------------------------------------------------------------------------------------------


def norm_ref(x, weight, eps):
    """weight * x / sqrt(mean(x^2) + eps), in the dtype of x."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def swiglu_ref(gate_up, biases=(None, None)):
    """`swiglu` in plain PyTorch, in the dtype of gate_up."""
    gate, up = (part if b is None else part + b for part, b in zip(gate_up.chunk(2, -1), biases, strict=True))
    return torch.nn.functional.silu(gate) * up


# --- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _normed(x, weight, eps, H: tl.constexpr, dtype: tl.constexpr):
    """x [BLOCK_H] fp32, 0 past H -> weight * x / rms(x), rounded before the weight as HuggingFace does."""
    unit = (x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)).to(dtype).to(tl.float32)
    return (unit * weight.to(tl.float32)).to(dtype)


@triton.jit
def _add_norm_kernel(
    y,
    bias,
    residual,
    weight,
    out,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: a token."""
    token = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(weight + h, mask=inside, other=0.0)  # ahead of the wait: nothing writes it
    if BIAS:
        b = tl.load(bias + h, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    dtype: tl.constexpr = residual.dtype.element_ty
    added = tl.load(y + token * H + h, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(residual + token * H + h, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        added = (added + b).to(dtype).to(tl.float32)
    total = (before + added).to(dtype)
    tl.store(residual + token * H + h, total, mask=inside)
    tl.store(out + token * H + h, _normed(total.to(tl.float32), w, eps, H, dtype), mask=inside)


@triton.jit
def _embed_norm_kernel(
    tokens,
    embeddings,
    residual,
    weight,
    out,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program: a token. Launched without PDL: the step before it has ended, whoever ran it."""
    token = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    row = tl.load(tokens + token)
    x = tl.load(embeddings + row * H + h, mask=inside, other=0.0)
    w = tl.load(weight + h, mask=inside, other=0.0)
    tl.store(residual + token * H + h, x, mask=inside)
    tl.store(out + token * H + h, _normed(x.to(tl.float32), w, eps, H, x.dtype), mask=inside)


@triton.jit
def _swiglu_kernel(
    gate_up,
    gate_bias,
    up_bias,
    out,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: BLOCK_F features of a token. Grid (blocks of F, T)."""
    token = tl.program_id(1).to(tl.int64)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < F
    wait_for_inputs(PDL)
    dtype: tl.constexpr = out.dtype.element_ty
    gate = tl.load(gate_up + token * (2 * F) + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * (2 * F) + F + f, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        gate = (gate + tl.load(gate_bias + f, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        up = (up + tl.load(up_bias + f, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out + token * F + f, (silu * up).to(dtype), mask=inside)


# --- launchers -----------------------------------------------------------------------------------------------------------


def add_norm(y, residual, weight, out, *, eps, bias=None, pdl=False):
    """residual += y + bias, then out = weight * residual / sqrt(mean(residual^2) + eps). One launch.

    y, residual and out [T, H], contiguous; weight and bias [H]; all of one dtype. The mean is fp32. No host sync, no allocation: safe
    inside a CUDA graph. ValueError for other shapes, dtypes, devices.
    """
    _check_rows(residual, {"y": y, "out": out}, {"weight": weight, "bias": bias})
    tokens, hidden = residual.shape
    with torch.cuda.device_of(residual):
        _add_norm_kernel[(tokens,)](
            y,
            bias,
            residual,
            weight,
            out,
            eps,
            H=hidden,
            BLOCK_H=next_power_of_2(hidden),
            BIAS=bias is not None,
            num_warps=_warps(hidden),
            **launch_options(pdl),
        )
    return out


def embed_norm(tokens, embeddings, residual, weight, out, *, eps):
    """residual = embeddings[tokens], then out = weight * residual / sqrt(mean(residual^2) + eps). One launch, which begins a step.

    tokens [T] int64, in range; embeddings [V, H]; residual and out [T, H]; weight [H]; contiguous, of one dtype. Begins when all before it
    has ended. No host sync, no allocation: safe inside a CUDA graph. ValueError for other shapes, dtypes, devices.
    """
    _check_rows(residual, {"out": out}, {"weight": weight})
    count, hidden = residual.shape
    if tokens.shape != (count,) or tokens.dtype != torch.int64 or tokens.device != residual.device:
        raise ValueError(
            f"tokens must be int64 [{count}] on {residual.device}, got {tokens.dtype} {list(tokens.shape)} on {tokens.device}"
        )
    if embeddings.dim() != 2 or embeddings.shape[1] != hidden or not embeddings.is_contiguous():
        raise ValueError(f"embeddings must be contiguous [V, {hidden}], got {list(embeddings.shape)}")
    if embeddings.dtype != residual.dtype or embeddings.device != residual.device:
        raise ValueError(
            f"embeddings is {embeddings.dtype} on {embeddings.device}, residual {residual.dtype} on {residual.device}"
        )
    with torch.cuda.device_of(residual):
        _embed_norm_kernel[(count,)](
            tokens,
            embeddings,
            residual,
            weight,
            out,
            eps,
            H=hidden,
            BLOCK_H=next_power_of_2(hidden),
            num_warps=_warps(hidden),
        )
    return out


def swiglu(gate_up, out, *, gate_bias=None, up_bias=None, pdl=False):
    """out[t, f] = silu(gate_up[t, f] + gate_bias[f]) * (gate_up[t, F + f] + up_bias[f]). One launch.

    gate_up [T, 2 F], out [T, F], biases [F] (both or none): contiguous, of one dtype. No host sync, no allocation: safe inside a CUDA
    graph. ValueError for other shapes, dtypes, devices.
    """
    _check_rows(out, {}, {"gate_bias": gate_bias, "up_bias": up_bias})
    tokens, features = out.shape
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("gate and up have a bias both, or none")
    if gate_up.shape != (tokens, 2 * features) or gate_up.dtype != out.dtype or not gate_up.is_contiguous():
        raise ValueError(
            f"gate_up must be contiguous {out.dtype} [{tokens}, {2 * features}], got {gate_up.dtype} {list(gate_up.shape)}"
        )
    with torch.cuda.device_of(out):
        _swiglu_kernel[(cdiv(features, BLOCK_F), tokens)](
            gate_up,
            gate_bias,
            up_bias,
            out,
            F=features,
            BLOCK_F=BLOCK_F,
            BIAS=gate_bias is not None,
            num_warps=4,
            **launch_options(pdl),
        )
    return out


def _warps(hidden):
    """16 numbers a thread, as long as there are threads."""
    return max(1, min(16, next_power_of_2(hidden) // 512))


def _check_rows(like, rows, vectors):
    refuse_gradients(like, *rows.values(), *(v for v in vectors.values() if v is not None))
    if like.dim() != 2 or not like.is_contiguous():
        raise ValueError(f"rows must be contiguous [T, features], got {list(like.shape)} with strides {like.stride()}")
    shapes = {name: (each, tuple(like.shape)) for name, each in rows.items()}
    shapes |= {name: (each, (like.shape[1],)) for name, each in vectors.items() if each is not None}
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(
                f"{name} must be {like.dtype} {list(shape)} on {like.device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if like.shape[1] > MAX_HIDDEN and "weight" in vectors:
        raise ValueError(f"a norm over {like.shape[1]} features; up to {MAX_HIDDEN} fit into a program")
