"""attention: rotary positions, the KV cache, and attention over it. Plain PyTorch, static shapes, no wait for the device."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

CHANGING = frozenset(
    {"dynamic", "longrope"}
)  # rotary embeddings whose frequencies depend on the length of the longest sequence


def rotary_table(rotary, length: int, dtype: torch.dtype) -> torch.Tensor:
    """cos and sin [2, length, head_dim] of every position, from a HuggingFace rotary module's frequencies and scaling.

    Frequencies that change with the length of a sequence are taken as they are for short ones.
    """
    frequencies = (rotary.original_inv_freq if rotary.rope_type in CHANGING else rotary.inv_freq).float()
    positions = torch.arange(length, device=frequencies.device, dtype=torch.float32)
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    return (torch.stack([angles.cos(), angles.sin()]) * rotary.attention_scaling).to(dtype)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x cos + (-x_2, x_1) sin, x_1 and x_2 the halves of a head. x [B, S, heads, head_dim], table [2, B, S, head_dim]."""
    cos, sin = table[:, :, :, None]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def store(cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
    """Write k and v [B, S, kv_heads, head_dim] into a block's cache [2, B, kv_heads, length, head_dim] at positions [B, S], in place."""
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    for part, values in zip(cache, (k, v), strict=True):
        part.transpose(1, 2).index_put_((rows, positions), values.to(part.dtype))


def attend(q, cache, positions, *, scaling: float, window: int | None) -> torch.Tensor:
    """softmax(scaling q K^T) V over the keys at most as far as a token's own position, the last `window` of them (None: all).

    q [B, S, heads, head_dim]; cache [2, B, kv_heads, length, head_dim], whose last position may lie beyond all tokens;
    positions [B, S] -> [B, S, heads, head_dim]. Head h reads kv head h // (heads / kv_heads).
    """
    keys = torch.arange(cache.shape[-2], device=positions.device)
    own = positions[:, None, :, None]
    seen = keys <= own
    if window is not None:
        seen &= keys > own - window
    k, v = cache
    q = q.transpose(1, 2).to(k.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=True).transpose(1, 2)
