"""forward: tokens at given positions through the blocks, against the KV cache. The same for a step and for a chunk of a prompt."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from adafuse.engine.attention import attend, rotate, store
from adafuse.engine.backbone import Backbone, Block
from adafuse.engine.linears import Gate, Share, linears


def rms_norm(x: torch.Tensor, norm) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis; the mean and the division in fp32. norm: the HuggingFace module."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * wide.to(x.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate_up [T, 2 F], gate first -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def forward(backbone: Backbone, gate: Gate | None, tokens, positions, cache, rotary) -> torch.Tensor:
    """Hidden states [B * S, H] behind the last norm, of tokens [B, S] int64 at positions [B, S] int64.

    cache [L, 2, B, kv_heads, length, head_dim]: what lies in front of the tokens is read, their own keys and values are written.
    rotary: cos and sin [2, length, head_dim]. gate: routes the tokens before block 0; None: the backbone alone.
    Writes into given buffers only and never waits for the device: safe inside a CUDA graph.
    """
    x = backbone.embeddings(tokens).flatten(0, 1)
    shares = [None] * len(backbone.blocks) if gate is None else gate.route(x)
    table = rotary[:, positions]
    for block, share, block_cache in zip(backbone.blocks, shares, cache, strict=True):
        x = x + _attention(backbone, block, share, rms_norm(x, block.attention_norm), positions, block_cache, table)
        x = x + _mlp(block, share, rms_norm(x, block.mlp_norm))
    return rms_norm(x, backbone.norm)


def _attention(backbone, block: Block, share: Share | None, x, positions, cache, table):
    heads, kv_heads = backbone.num_heads, backbone.num_kv_heads
    qkv = linears(x, block.qkv, share).view(*positions.shape, heads + 2 * kv_heads, backbone.head_dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    if block.q_norm is not None:
        q, k = rms_norm(q, block.q_norm), rms_norm(k, block.k_norm)
    store(cache, rotate(k, table), v, positions)
    y = attend(rotate(q, table), cache, positions, scaling=block.scaling, window=block.window)
    return linears(y.reshape(len(x), -1), block.o, share)


def _mlp(block: Block, share: Share | None, x):
    return linears(swiglu(linears(x, block.gate_up, share)), block.down, share)
