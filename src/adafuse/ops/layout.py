"""layout: a routing decision laid out for kernels that compute tiles of tokens and blocks of ranks.

Tokens are sorted so that those with the same experts are neighbours, then cut into tiles of `block_t` tokens; the ranks are cut into
blocks of `block_r`. Each tile lists the blocks that its tokens need. Done once per step, read by all layers (`batch`, `gated`, `matmul`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import can_launch, cdiv, next_power_of_2

KEY_BITS = 62  # of an int64, leaving the sign alone
ROUTING = ["order", "gates", "counts", "blocks"]  # may be views of one decision of several, at any address
MOST_SORTED = 16384  # tokens: each is compared with each


@dataclass(frozen=True)
class Tiles:
    """Routing decisions laid out for the kernels. Leading dimensions (a decision per block, say) are shared by all four tensors.

    order   [..., T] int32                      token at each sorted place
    gates   [..., T, E + 1] fp32                scaled weight of each expert by token (unsorted), 0 where not chosen; then the
                                                shared expert's scale
    counts  [..., num_tiles] int32              how many rank blocks a tile needs
    blocks  [..., num_tiles, num_blocks] int32  which: the first counts[tile] of its row, ascending
    """

    order: torch.Tensor
    gates: torch.Tensor
    counts: torch.Tensor
    blocks: torch.Tensor
    r: int
    shared_rank: int
    top_k: int
    block_t: int
    block_r: int

    def __getitem__(self, decision) -> Tiles:
        """One of several decisions, as views."""
        return replace(self, **{name: getattr(self, name)[decision] for name in ROUTING})

    def to(self, device) -> Tiles:
        return replace(self, **{name: getattr(self, name).to(device) for name in ROUTING})

    @property
    def tokens(self) -> int:
        return self.order.shape[-1]

    @property
    def num_experts(self) -> int:
        return self.gates.shape[-1] - 1

    @property
    def rank(self) -> int:
        return self.num_experts * self.r + self.shared_rank

    @property
    def num_tiles(self) -> int:
        return self.counts.shape[-1]

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[-1]

    def h_shape(self, modules: int) -> tuple[int, int, int]:
        """Shape of h for a group of `modules` linears: tokens in sorted order, both dimensions padded to whole tiles and blocks."""
        return modules, self.num_tiles * self.block_t, self.num_blocks * self.block_r

    def mask(self) -> torch.Tensor:
        """mask of one decision, its tokens sorted: fp32 [num_tiles * block_t, num_blocks * block_r], 0 in the padding."""
        _, rows, columns = self.h_shape(1)
        mask = self.gates.new_zeros(rows, columns)
        ranks = torch.arange(self.rank, device=mask.device)
        expert = (ranks // self.r).clamp(max=self.num_experts)
        mask[: self.tokens, : self.rank] = self.gates[self.order.long()][:, expert]
        return mask


def lay_out(experts, weights, *, num_experts, r, shared_rank=0, shared_scale=1.0, block_t=None, block_r=None) -> Tiles:
    """Sort the tokens of each decision by the rank blocks they need, and list those of each tile.

    experts [..., T, K] int32 or int64, distinct within a token; weights [..., T, K] with the experts' scale folded in.
    Leading dimensions: independent decisions for the same tokens. Shapes depend only on those of the arguments, and nothing
    waits for the device: safe inside a CUDA graph. Blocks default to `tile_shape`.
    """
    if experts.shape != weights.shape or experts.dim() < 2:
        raise ValueError(f"experts {list(experts.shape)} and weights {list(weights.shape)} must both be [..., T, K]")
    tokens, top_k = experts.shape[-2:]
    rank = num_experts * r + shared_rank
    default_t, default_r = tile_shape(tokens, r, rank)
    block_t, block_r = block_t or default_t, block_r or default_r
    if min(block_t, block_r) < 16 or block_t & (block_t - 1) or block_r & (block_r - 1):
        raise ValueError(f"block_t {block_t} and block_r {block_r} must be powers of two of at least 16")

    sizes = {"r": r, "shared_rank": shared_rank, "block_t": block_t, "block_r": block_r}
    on_kernels = can_launch(experts) and 0 < tokens <= MOST_SORTED and cdiv(rank, block_r) <= KEY_BITS
    if on_kernels:
        refuse_gradients(weights)
    laid_out = (_by_kernels if on_kernels else _by_torch)(experts, weights, num_experts, shared_scale, **sizes)
    return Tiles(*laid_out, **sizes, top_k=top_k)


# --- in PyTorch -----------------------------------------------------------------------------------------------------------


def _by_torch(experts, weights, num_experts, shared_scale, r, shared_rank, block_t, block_r):
    """order, gates, counts, blocks."""
    tokens = experts.shape[-2]
    needed = _needed_blocks(experts, num_experts, r, shared_rank, block_r)
    order = _gray_order(needed)
    by_tile = needed.gather(-2, order.unsqueeze(-1).expand_as(needed))
    by_tile = torch.nn.functional.pad(by_tile, (0, 0, 0, -tokens % block_t)).unflatten(-2, (-1, block_t)).any(-2)
    return (
        order.int(),
        dense_gates(experts, weights, num_experts, shared_scale),
        by_tile.sum(-1, dtype=torch.int32),
        by_tile.logical_not().byte().argsort(dim=-1, stable=True).int(),
    )


def dense_gates(experts, weights, num_experts, shared_scale=1.0):
    """fp32 [..., T, E + 1]: the weight of each expert by token, 0 where not chosen; then the shared expert's scale."""
    gates = weights.new_zeros(*weights.shape[:-1], num_experts + 1, dtype=torch.float32)
    gates.scatter_(-1, experts.long(), weights.float())[..., -1].fill_(shared_scale)
    return gates


def tile_shape(tokens, r, rank) -> tuple[int, int]:
    """Default (block_t, block_r): one block for all ranks where they are few.

    Many tokens: blocks that do not straddle experts where r allows, so that few are needed. Up to 512 tokens, for which `gated` is made,
    a tile of them needs nearly all small experts, and steps of 64 ranks take less time.
    """
    if tokens <= 512:
        return min(64, max(16, next_power_of_2(tokens))), max(16, min(64, next_power_of_2(rank)))
    return 128, max(16, next_power_of_2(rank) if rank <= 64 else min(64, r & -r))


def _needed_blocks(experts, num_experts, r, shared_rank, block_r):
    """bool [..., T, num_blocks]: whether a token needs any rank of a block."""
    span = torch.arange(cdiv(r - 1, block_r) + 1, device=experts.device)  # no expert touches more blocks
    first = experts.long().unsqueeze(-1) * r
    blocks = torch.minimum(first // block_r + span, (first + r - 1) // block_r).flatten(-2)
    num_blocks = cdiv(num_experts * r + shared_rank, block_r)
    needed = torch.zeros(*experts.shape[:-1], num_blocks, dtype=torch.bool, device=experts.device)
    needed.scatter_(-1, blocks, True)
    if shared_rank:
        needed[..., num_experts * r // block_r :] = True
    return needed


def _gray_order(needed):
    """int64 [..., T]: tokens sorted by the place of their set of blocks in the reflected Gray code.

    Equal sets become neighbours. Among sets of one size that code moves on by exchanging a single member, so a tile that spans
    several sets needs few blocks: 3.6 of 8 on average, unsorted 8, for 2048 tokens with 2 of 8 equally likely experts, tiles of
    128.
    """
    digits = needed.cumsum(-1) & 1  # the place in the code, in binary: prefix parities of the set's bits
    order = torch.arange(needed.shape[-2], device=needed.device).expand(needed.shape[:-1])
    for word in reversed(
        digits.split(KEY_BITS, -1)
    ):  # the least significant first: each sort keeps the order of those before
        shift = torch.arange(word.shape[-1] - 1, -1, -1, device=word.device)
        key = (word << shift).sum(-1)
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    return order


# --- by kernels -----------------------------------------------------------------------------------------------------------
# PyTorch takes some 35 launches for it, 0.13 to 0.15 ms on an H100: 2 % of a step of 256 tokens through Llama-2-7B.


@triton.jit
def _needed(experts, token, inside, K: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, NUM_BLOCKS: tl.constexpr,
            SHARED: tl.constexpr):  # fmt: skip
    """int64: the blocks that each token needs as bits, block 0's the highest of NUM_BLOCKS; the last SHARED are needed by all."""
    one = tl.full(token.shape, 1, tl.int64)
    bits = (one << SHARED) - 1
    for k in tl.static_range(K):
        rank = tl.load(experts + token * K + k, mask=inside, other=0).to(tl.int64) * RANK
        first, last = rank // BLOCK_R, (rank + RANK - 1) // BLOCK_R
        bits = bits | (((one << (last - first + 1)) - 1) << (NUM_BLOCKS - 1 - last))
    return tl.where(inside, bits, 0)


@triton.jit
def _place_in_gray_code(bits):
    """The place of a set in the reflected Gray code: prefix parities of its bits, from the highest on."""
    for n in tl.static_range(6):
        bits = bits ^ (bits >> (1 << n))
    return bits


@triton.jit(do_not_specialize=["T"])
def _sort_kernel(
    experts, weights, order, gates, T, shared_scale,
    K: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, NUM_BLOCKS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """order and gates of BLOCK tokens: a token's place is the number of those that come before it. Grid (blocks of tokens, decisions)."""
    decision = tl.program_id(1).to(tl.int64)
    experts, weights = experts + decision * T * K, weights + decision * T * K
    order, gates = order + decision * T, gates + decision * T * (E + 1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < T
    key = _place_in_gray_code(_needed(experts, token, inside, K, RANK, BLOCK_R, NUM_BLOCKS, SHARED))
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, T, BLOCK):
        other = start + tl.arange(0, BLOCK)
        keys = _place_in_gray_code(_needed(experts, other, other < T, K, RANK, BLOCK_R, NUM_BLOCKS, SHARED))
        earlier = (keys[None, :] == key[:, None]) & (other[None, :] < token[:, None])
        before = ((keys[None, :] < key[:, None]) | earlier) & (other < T)[None, :]
        place += tl.sum(before.to(tl.int32), axis=1)
    tl.store(order + place, token, mask=inside)

    e = tl.arange(0, BLOCK_E)
    gate = tl.where(e == E, shared_scale, 0.0)[None, :] + tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(experts + token * K + k, mask=inside, other=0)
        weight = tl.load(weights + token * K + k, mask=inside, other=0.0).to(tl.float32)
        gate = tl.where(e[None, :] == expert[:, None], weight[:, None], gate)
    tl.store(gates + token[:, None] * (E + 1) + e[None, :], gate, mask=inside[:, None] & (e <= E)[None, :])


@triton.jit(do_not_specialize=["T"])
def _list_kernel(
    experts, order, counts, blocks, T,
    K: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, NUM_BLOCKS: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """counts and blocks of a tile: the blocks that it needs, then the others, both ascending. Grid (tiles, decisions)."""
    tile, decision = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.load(order + decision * T + t, mask=t < T, other=0)
    bits = _needed(experts + decision * T * K, token, t < T, K, RANK, BLOCK_R, NUM_BLOCKS, SHARED)
    n = tl.arange(0, BLOCK_B)
    bit = (bits[:, None] >> (NUM_BLOCKS - 1 - tl.minimum(n, NUM_BLOCKS - 1)).to(tl.int64)[None, :]) & 1
    needed = tl.where(n < NUM_BLOCKS, tl.max(bit, axis=0).to(tl.int32), 0)
    count = tl.sum(needed, 0)
    place = tl.where(needed > 0, tl.cumsum(needed, 0) - 1, count + tl.cumsum(1 - needed, 0) - 1)
    row = decision * tl.num_programs(0) + tile
    tl.store(counts + row, count)
    tl.store(blocks + row * NUM_BLOCKS + place, n, mask=n < NUM_BLOCKS)


def _by_kernels(experts, weights, num_experts, shared_scale, r, shared_rank, block_t, block_r):
    """What `_by_torch` gives, in two launches."""
    experts, weights = experts.contiguous(), weights.contiguous()
    *leading, tokens, top_k = experts.shape
    decisions, num_tiles = experts.numel() // (tokens * top_k), cdiv(tokens, block_t)
    num_blocks = cdiv(num_experts * r + shared_rank, block_r)

    def new(*shape, dtype=torch.int32):
        return torch.empty(*leading, *shape, dtype=dtype, device=experts.device)

    order, gates = new(tokens), new(tokens, num_experts + 1, dtype=torch.float32)
    counts, blocks = new(num_tiles), new(num_tiles, num_blocks)
    shared = num_blocks - num_experts * r // block_r if shared_rank else 0
    sizes = {"K": top_k, "RANK": r, "BLOCK_R": block_r, "NUM_BLOCKS": num_blocks, "SHARED": shared}
    with torch.cuda.device_of(experts):
        _sort_kernel[(cdiv(tokens, 64), decisions)](
            experts, weights, order, gates, tokens, shared_scale,
            E=num_experts, BLOCK_E=next_power_of_2(num_experts + 1), BLOCK=64, **sizes,
        )  # fmt: skip
        _list_kernel[(num_tiles, decisions)](
            experts, order, counts, blocks, tokens, BLOCK_B=next_power_of_2(num_blocks), BLOCK_T=block_t, **sizes
        )
    return order, gates, counts, blocks
