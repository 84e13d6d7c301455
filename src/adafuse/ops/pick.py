"""pick: the likeliest token of each row of logits, and the row's move to its next position. One launch, which ends a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import cdiv, launch_options, next_power_of_2, wait_for_inputs

BLOCK_V = 2048
BROKEN = tl.constexpr(2147483647)  # an index that no token has: of logits that are no numbers


def pick_ref(logits):
    """`pick` in plain PyTorch: tokens [T] int64."""
    finite = logits.amax(-1).isfinite()
    best = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    return best.where(finite, -1)


@triton.jit
def _pick_kernel(
    logits,
    picked,
    tokens,
    positions,
    advance,
    values,
    indices,
    arrived,
    V,
    last,
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MOVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: BLOCK_V logits of a row; the row's last to finish takes the best of all. Grid (BLOCKS, T)."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    broken = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)
    x = tl.where(x == x, x, float("-inf"))
    best = tl.max(x, 0)
    index = tl.min(tl.where((x == best) & (v < V), v, BROKEN), 0)
    tl.store(values + row * BLOCKS + block, best)
    tl.store(indices + row * BLOCKS + block, tl.where(broken != 0, BROKEN, index))
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == BLOCKS - 1:
        b = tl.arange(0, BLOCK_B)
        bests = tl.load(values + row * BLOCKS + b, mask=b < BLOCKS, other=float("-inf"), cache_modifier=".cg")
        found = tl.load(indices + row * BLOCKS + b, mask=b < BLOCKS, other=0, cache_modifier=".cg")
        top = tl.max(bests, 0)
        token = tl.min(tl.where((bests == top) & (b < BLOCKS), found, BROKEN), 0)
        bad = (tl.max(found, 0) == BROKEN) | (top == float("-inf"))
        tl.store(picked + row, tl.where(bad, -1, token).to(tl.int64))
        tl.store(tokens + row, tl.where(bad, 0, token).to(tl.int64))
        if MOVE:
            moved = tl.load(positions + row) + tl.load(advance + row)
            tl.store(positions + row, tl.minimum(moved, last))
        tl.store(arrived + row, 0)


def room(tokens: int, vocab_size: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `pick` works in: values and indices [T, blocks of V], arrived [T] int32, 0 between calls."""
    blocks = cdiv(vocab_size, BLOCK_V)
    values = torch.zeros(tokens, blocks, device=device)
    indices = torch.zeros(tokens, blocks, dtype=torch.int32, device=device)
    return values, indices, torch.zeros(tokens, dtype=torch.int32, device=device)


def pick(logits, picked, tokens, room, *, positions=None, advance=None, last=0, pdl=False):
    """picked[t] = the lowest index of the largest of logits[t], -1 if one is NaN or +inf or all are -inf; tokens[t] = max(picked[t], 0).

    positions given: positions[t] = min(positions[t] + advance[t], last). logits [T, V], contiguous; the others [T] int64; room: of
    `room`. No host sync, no allocation: safe inside a CUDA graph. ValueError for other shapes, dtypes.
    """
    refuse_gradients(logits)
    count, vocab = logits.shape
    if not logits.is_contiguous() or not logits.is_floating_point():
        raise ValueError(f"logits must be contiguous floats [T, V], got {logits.dtype} with strides {logits.stride()}")
    given = {"picked": picked, "tokens": tokens} | (
        {} if positions is None else {"positions": positions, "advance": advance}
    )
    for name, tensor in given.items():
        if tensor.shape != (count,) or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64 [{count}], got {tensor.dtype} {list(tensor.shape)}")
    values, indices, arrived = room
    blocks = cdiv(vocab, BLOCK_V)
    if values.shape != (count, blocks) or indices.shape != (count, blocks) or arrived.shape != (count,):
        raise ValueError(f"room is for {list(values.shape)} blocks, the logits have [{count}, {blocks}]")
    with torch.cuda.device_of(logits):
        _pick_kernel[(blocks, count)](
            logits,
            picked,
            tokens,
            positions,
            advance,
            values,
            indices,
            arrived,
            vocab,
            last,
            BLOCKS=blocks,
            BLOCK_B=next_power_of_2(blocks),
            BLOCK_V=BLOCK_V,
            MOVE=positions is not None,
            num_warps=4,
            **launch_options(pdl),
        )
    return picked
