"""switch: write the chosen experts into the weights of a whole model, in one kernel launch.

The plain reference is `switch_ref`. What is to be written is data: a `SwitchTable`, built once from a list of segments (one
adapted weight each), whose buffers stay where they are, so that a CUDA graph can hold the launch. Shapes, ranks and numbers of
experts may differ between the segments of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl

from adafuse.ops.gradients import refuse_gradients
from adafuse.ops.launch import INTERPRETED, cdiv, next_power_of_2

_FIELDS = tl.constexpr(10)  # int64 numbers of a segment in the table, in the order in which the kernel reads them
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Segment:
    """One adapted weight W [M, N] and the bank of its experts: row i of the bank adds left[i, :]^T right[i, :].

    left [R, M] and right [R, N], with R = num_experts * r + shared_rank: the rows of expert e are e*r .. e*r + r - 1, the shared
    expert's come last. For a linear that stores [out, in], left is the bank's B and right its A; swapped for one that stores
    [in, out]. source [M, N] is the untouched copy to merge from, None to add to the weight in place. decision is the row of the
    routing that this weight follows. All tensors have one dtype (bf16, fp16 or fp32) and are contiguous.
    """

    weight: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    r: int
    num_experts: int
    source: torch.Tensor | None = None
    shared_rank: int = 0
    decision: int = 0

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"weight": self.weight, "source": self.source, "left": self.left, "right": self.right}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def reads(self) -> torch.Tensor:
        """What the sum is added to."""
        return self.weight if self.source is None else self.source


@dataclass(frozen=True)
class Tile:
    """How the kernel cuts the work. A program owns block_m rows of a weight and walks `strip` tiles of block_n columns.

    It keeps the scaled left ranks of its rows if there are at most max_ranks of them, so that a tile costs its own bytes and
    those of the right ranks. With more, it fetches both sides again for every tile, max_ranks at a time. registers: the next tile of
    the weight waits in registers instead of shared memory, which then has room for larger tiles of many ranks.
    """

    block_m: int = 128
    block_n: int = 128
    strip: int = 32
    max_ranks: int = 256
    num_warps: int = 8
    num_stages: int = 3
    registers: bool = False
    stagger: int = 0

    @classmethod
    def default(cls, ranks: int, dtype: torch.dtype, aligned: bool) -> Tile:
        """For weights of which at most `ranks` ranks are active, on an H100. No choice here spills registers."""
        if dtype == torch.float32:  # IEEE products run outside the tensor cores and unroll over the ranks
            return cls(block_m=64, block_n=32, max_ranks=128 if aligned else 64, num_stages=2)
        if not aligned:  # an address for every element
            return cls(block_m=64, block_n=64, max_ranks=128 if ranks <= 128 else 64)
        if ranks > 256:  # a matmul more than a copy
            return cls(strip=8, max_ranks=64)
        # All linears of Llama-2-7B, H100. 128 ranks: 9.31 ms, staggered 9.60, with tiles of 128 x 64 11.0. 256 ranks: 11.64 ms, not
        # staggered 11.92, with tiles of 128 x 64 and the weights in shared memory 12.4.
        return cls() if ranks <= 128 else cls(num_stages=2, registers=True, stagger=1)


class SwitchTable:
    """The segments of one launch, checked once and laid out on the device. Knows its bytes and FLOPs; not the routing.

    top_k: experts per decision. tile: None for the default. Either every segment has a source (then `in_place` is False) or none.
    The table holds addresses: a weight that is moved or replaced afterwards needs a new table.
    """

    def __init__(self, segments, *, top_k: int, tile: Tile | None = None):
        self.segments, self.top_k = tuple(segments), top_k
        _check_table(self.segments, top_k)
        first = self.segments[0]
        self.dtype, self.device, self.in_place = first.weight.dtype, first.weight.device, first.source is None
        self.num_decisions = 1 + max(s.decision for s in self.segments)
        # The first launch of a table in place has no old routing to subtract, but the shared experts to add.
        ranks = max(max(self.ranks(s), top_k * s.r + s.shared_rank) for s in self.segments)
        self.aligned = all(_is_aligned(s) for s in self.segments)
        self.tile = tile or Tile.default(ranks, self.dtype, self.aligned)
        self.block_r = min(self.tile.max_ranks, max(16, next_power_of_2(ranks)))
        self.resident = ranks <= self.block_r
        self.table = torch.tensor([_row(s) for s in self.segments], dtype=torch.int64).to(self.device)
        self.programs = torch.cat([_programs(i, s, self.tile) for i, s in enumerate(self.segments)]).to(self.device)

    def ranks(self, segment: Segment) -> int:
        """Active ranks of a segment in a switch from one routing to the next."""
        routed = self.top_k * segment.r
        return 2 * routed if self.in_place else routed + segment.shared_rank

    def bytes_moved(self) -> int:
        """Bytes that a switch of all segments must read and write: the weights twice, the active ranks once."""
        sizes = ((*s.weight.shape, self.ranks(s)) for s in self.segments)
        return self.dtype.itemsize * sum(2 * m * n + ranks * (m + n) for m, n, ranks in sizes)

    def flops(self) -> int:
        """FLOPs of a switch of all segments, without the padding of ranks to blocks."""
        return sum(2 * s.weight.numel() * self.ranks(s) for s in self.segments)


def switch(table: SwitchTable, experts, weights, *, old=None, shared_scale: float = 1.0) -> None:
    """W = source + sum_j w[j] * left[row(j), :]^T right[row(j), :] for every segment, in one launch.

    j runs over the ranks of the segment's chosen experts, with the expert's weight, then over its shared expert's, with
    shared_scale. In place, W itself is the source, and with `old` the sum is that of the new routing minus that of the old one;
    the shared experts then cancel, so that only a launch without `old` adds them. (Negative weights and scale take them out.)

    experts int32 and weights fp32 [D, top_k] on the table's device, the experts of a decision distinct, in range and not
    checked; scales (alpha / r) are part of the weights. old = (experts, weights) of the routing that the weights hold now:
    segments whose decision is the same to the bit are left alone. Without it every segment is written. Products take operands
    in the table's dtype (IEEE for fp32), sums are fp32, rounded once.
    No host sync, no allocation: safe inside a CUDA graph. Nothing is recorded for a backward pass.
    """
    old_experts, old_weights = (experts, weights) if old is None else old
    _check_routing(table, experts, weights)
    _check_routing(table, old_experts, old_weights)
    refuse_gradients(weights, *(t for s in table.segments for t in s.tensors.values()))
    tile, dtype = table.tile, _DTYPES[table.dtype]
    with torch.cuda.device_of(experts):
        _switch_kernel[(len(table.programs),)](
            table.table,
            table.programs,
            experts,
            weights,
            old_experts,
            old_weights,
            shared_scale,
            DTYPE=dtype,
            # Triton's interpreter multiplies the bit patterns of bf16.
            OPERAND=tl.float32 if INTERPRETED.value else dtype,
            TOP_K=table.top_k,
            SKIP=old is not None,
            SUBTRACT=old is not None and table.in_place,
            ALIGNED=table.aligned,
            RESIDENT=table.resident,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_R=table.block_r,
            STRIP=tile.strip,
            STAGES=tile.num_stages,
            REGISTERS=tile.registers,
            STAGGER=tile.stagger,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


@torch.no_grad()
def switch_ref(table: SwitchTable, experts, weights, *, old=None, shared_scale: float = 1.0) -> None:
    """What `switch` does, segment by segment in plain PyTorch, in fp32."""
    for s in table.segments:
        new = experts[s.decision], weights[s.decision]
        before = None if old is None else (old[0][s.decision], old[1][s.decision])
        if before is not None and torch.equal(new[0], before[0]) and torch.equal(new[1], before[1]):
            continue
        scale = _rank_scales(s, *new)
        if before is not None and table.in_place:
            scale -= _rank_scales(s, *before)
        else:
            scale[s.num_experts * s.r :] = shared_scale
        s.weight.copy_(s.reads.float() + (s.left.float() * scale[:, None]).T @ s.right.float())


def _rank_scales(s: Segment, experts, weights):
    """fp32 [R]: the weight of the expert that each row of the bank belongs to, 0 where it was not chosen."""
    scale = weights.new_zeros(len(s.left))
    scale[: s.num_experts * s.r].view(s.num_experts, s.r)[experts.long()] = weights[:, None]
    return scale


# --- what a table is made of --------------------------------------------------------------------------------------------


def _row(s: Segment) -> list[int]:
    addresses = [t.data_ptr() for t in (s.weight, s.reads, s.left, s.right)]
    return [*addresses, *s.weight.shape, s.r, s.shared_rank, s.num_experts, s.decision]


def _programs(index: int, s: Segment, tile: Tile):
    """int32 [P, 3]: segment, block of rows, strip of columns; blocks of rows run fastest, so that neighbours share right ranks."""
    m, n = s.weight.shape
    strips, blocks = cdiv(n, tile.block_n * tile.strip), cdiv(m, tile.block_m)
    strip, block = torch.meshgrid(torch.arange(strips), torch.arange(blocks), indexing="ij")
    return torch.stack([torch.full_like(strip, index), block, strip], -1).flatten(0, 1).int()


def _is_aligned(s: Segment) -> bool:
    """Whether every row of every tensor starts on 16 bytes and ends on a multiple of 8 elements."""
    return all(size % 8 == 0 for size in s.weight.shape) and all(t.data_ptr() % 16 == 0 for t in s.tensors.values())


# --- errors -------------------------------------------------------------------------------------------------------------


def _check_table(segments, top_k):
    if not segments:
        raise ValueError("a SwitchTable needs at least one segment, got none")
    for i, s in enumerate(segments):
        _check_segment(f"segment {i}", s, top_k)
    for what, of in {
        "dtype": lambda s: s.weight.dtype,
        "device": lambda s: s.weight.device,
        "choice between a source and in place": lambda s: "in place" if s.source is None else "source",
    }.items():
        found = {str(of(s)) for s in segments}
        if len(found) > 1:
            raise ValueError(
                f"the segments of a table need one {what}, got {', '.join(sorted(found))}: build a table for each"
            )
    _check_overlap(segments)


def _check_segment(name, s, top_k):
    if s.weight.dtype not in _DTYPES:
        raise ValueError(f"{name}: the weight is {s.weight.dtype}, allowed are bf16, fp16 and fp32")
    if s.weight.dim() != 2 or 0 in s.weight.shape:
        raise ValueError(f"{name}: the weight has shape {list(s.weight.shape)}, it must be a matrix that is not empty")
    if not 1 <= top_k <= s.num_experts or s.r < 1 or s.shared_rank < 0 or s.decision < 0:
        raise ValueError(
            f"{name}: got top_k={top_k}, num_experts={s.num_experts}, r={s.r}, shared_rank={s.shared_rank}, decision={s.decision}; "
            "1 <= top_k <= num_experts, r >= 1, shared_rank >= 0 and decision >= 0 are needed"
        )
    (m, n), ranks = s.weight.shape, s.num_experts * s.r + s.shared_rank
    shapes = {"weight": (m, n), "source": (m, n), "left": (ranks, m), "right": (ranks, n)}
    for what, tensor in s.tensors.items():
        if tuple(tensor.shape) != shapes[what]:
            raise ValueError(f"{name}: {what} has shape {list(tensor.shape)}, {list(shapes[what])} is needed")
        if (tensor.dtype, tensor.device) != (s.weight.dtype, s.weight.device):
            raise ValueError(
                f"{name}: {what} is {tensor.dtype} on {tensor.device}, the weight {s.weight.dtype} on {s.weight.device}; "
                "they must agree"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: {what} has strides {tensor.stride()}, it must be contiguous: call .contiguous() first"
            )
    if ranks * max(m, n) >= 2**31:
        raise ValueError(f"{name}: the bank has {ranks} x {max(m, n)} elements, more than 32 bits can count")


def _check_overlap(segments):
    """No two segments may write the same bytes, and none may overwrite its own source."""
    written = sorted((s.weight.data_ptr(), s.weight.nbytes, i) for i, s in enumerate(segments))
    for (start, size, i), (following, _, j) in pairwise(written):
        if start + size > following:
            raise ValueError(f"segments {i} and {j} write the same memory (tied weights?): adapt it in one segment")
    for i, s in enumerate(segments):
        if s.source is not None and abs(s.source.data_ptr() - s.weight.data_ptr()) < s.weight.nbytes:
            raise ValueError(
                f"segment {i}: the source shares memory with the weight; pass source=None to switch in place"
            )


def _check_routing(table, experts, weights):
    for what, tensor, dtype in (("experts", experts, torch.int32), ("weights", weights, torch.float32)):
        if tensor.dtype != dtype or tensor.device != table.device or not tensor.is_contiguous():
            raise ValueError(
                f"{what} must be contiguous {dtype} on {table.device}, got {tensor.dtype} on {tensor.device}"
            )
        if tensor.dim() != 2 or tensor.shape[0] < table.num_decisions or tensor.shape[1] != table.top_k:
            raise ValueError(
                f"{what} has shape {list(tensor.shape)}, the table needs [decisions >= {table.num_decisions}, {table.top_k}]"
            )


# --- kernel -------------------------------------------------------------------------------------------------------------


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _unchanged(routing, TOP_K: tl.constexpr):
    """Whether the new and the old routing of a decision are the same to the bit."""
    experts, weights, old_experts, old_weights = routing
    bits: tl.constexpr = tl.pointer_type(tl.int32)
    k = tl.arange(0, triton.next_power_of_2(TOP_K))
    chosen = k < TOP_K
    differ = tl.load(experts + k, mask=chosen, other=0) ^ tl.load(old_experts + k, mask=chosen, other=0)
    new = tl.load(weights.to(bits, bitcast=True) + k, mask=chosen, other=0)
    differ |= new ^ tl.load(old_weights.to(bits, bitcast=True) + k, mask=chosen, other=0)
    return tl.reduce(differ, 0, _either) == 0


@triton.jit
def _count(bank, TOP_K: tl.constexpr, SUBTRACT: tl.constexpr):
    """Number of active ranks: those of the new and the old experts, or those of the new ones and the shared one."""
    r, shared_rank, _, _ = bank
    return 2 * TOP_K * r if SUBTRACT else TOP_K * r + shared_rank


@triton.jit
def _active_ranks(j, routing, bank, TOP_K: tl.constexpr, SUBTRACT: tl.constexpr):
    """Of the active ranks j: the row of the bank, the weight, and whether there is such a rank."""
    experts, weights, old_experts, old_weights = routing
    r, _, num_experts, shared_scale = bank
    k = j // r
    if SUBTRACT:
        new, old = k < TOP_K, (k >= TOP_K) & (k < 2 * TOP_K)
        expert = tl.load(experts + k, mask=new, other=0) + tl.load(old_experts + k - TOP_K, mask=old, other=0)
        weight = tl.load(weights + k, mask=new, other=0.0) - tl.load(old_weights + k - TOP_K, mask=old, other=0.0)
    else:
        # The shared expert is stored like one more expert; all its ranks, more or fewer than r, count as choice number TOP_K.
        k = tl.minimum(k, TOP_K)
        expert = tl.load(experts + k, mask=k < TOP_K, other=num_experts)
        weight = tl.load(weights + k, mask=k < TOP_K, other=shared_scale)
    return (expert - k) * r + j, weight, j < _count(bank, TOP_K, SUBTRACT)


@triton.jit
def _left_ranks(j, left, M, in_m, routing, bank, TOP_K: tl.constexpr, SUBTRACT: tl.constexpr, BLOCK_M: tl.constexpr):
    """The active ranks j: rows of the bank and whether there are such, both [BLOCK_R, 1], and left times weight, [BLOCK_M, BLOCK_R].

    The product is rounded to the dtype of the bank, which the tensor cores take.
    """
    rank, weight, active = _active_ranks(j, routing, bank, TOP_K, SUBTRACT)
    m = tl.arange(0, BLOCK_M)
    tile = tl.load(left + (rank * M)[None, :] + m[:, None], mask=in_m & active[None, :], other=0.0)
    scaled = tile.to(tl.float32) * weight[None, :]
    return rank[:, None], active[:, None], scaled.to(left.dtype.element_ty)


@triton.jit
def _switch_kernel(
    table,
    programs,
    experts,
    weights,
    old_experts,
    old_weights,
    shared_scale,
    DTYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    TOP_K: tl.constexpr,
    SKIP: tl.constexpr,
    SUBTRACT: tl.constexpr,
    ALIGNED: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STRIP: tl.constexpr,
    STAGES: tl.constexpr,
    REGISTERS: tl.constexpr,
    STAGGER: tl.constexpr,
):
    program = programs + 3 * tl.program_id(0)
    segment = table + tl.load(program) * _FIELDS
    m0, n0 = tl.load(program + 1) * BLOCK_M, tl.load(program + 2) * (BLOCK_N * STRIP)
    weight = tl.load(segment).to(tl.pointer_type(DTYPE))
    source = tl.load(segment + 1).to(tl.pointer_type(DTYPE))
    left = tl.load(segment + 2).to(tl.pointer_type(DTYPE))
    right = tl.load(segment + 3).to(tl.pointer_type(DTYPE))
    M, N = tl.load(segment + 4).to(tl.int32), tl.load(segment + 5).to(tl.int32)
    r, shared_rank = tl.load(segment + 6).to(tl.int32), tl.load(segment + 7).to(tl.int32)
    bank = (r, shared_rank, tl.load(segment + 8).to(tl.int32), shared_scale)
    chosen = tl.load(segment + 9) * TOP_K
    routing = (experts + chosen, weights + chosen, old_experts + chosen, old_weights + chosen)

    if SKIP:  # noqa: SIM102 - nested, so that without an old routing the comparison is not even compiled
        if _unchanged(routing, TOP_K):
            return
    if ALIGNED:  # what the compiler cannot see in numbers that it reads, and needs for accesses of 16 bytes
        weight, source = tl.multiple_of(weight, 16), tl.multiple_of(source, 16)
        left, right = tl.multiple_of(left, 16), tl.multiple_of(right, 16)
        M, N = tl.multiple_of(M, 8), tl.multiple_of(N, 8)

    # 64 bits for the corner only: offsets from it fit in 32, which halves the registers that they take.
    corner = m0.to(tl.int64) * N + n0
    weight, source = weight + corner, source + corner
    left, right = left + m0, right + n0
    n = tl.arange(0, BLOCK_N)
    in_m = (tl.arange(0, BLOCK_M) < M - m0)[:, None]
    tile = (tl.arange(0, BLOCK_M) * N)[:, None] + n[None, :]
    j = tl.arange(0, BLOCK_R)
    if RESIDENT:
        rank, active, lhs = _left_ranks(j, left, M, in_m, routing, bank, TOP_K, SUBTRACT, BLOCK_M)

    # Programs of other rows read the same right ranks: each starts at another column, so that they do not queue for the same lines.
    end = tl.minimum(BLOCK_N * STRIP, N - n0)
    tiles = (end + BLOCK_N - 1) // BLOCK_N
    shift = tl.load(program + 1) * STAGGER
    if REGISTERS:
        start = shift % tiles * BLOCK_N
        following = tl.load(source + start + tile, mask=in_m & (n < end - start)[None, :], other=0.0)
    # Only with num_stages on the loop itself are the weights fetched ahead too, and not just the operands of the product.
    for step in tl.range(0, tiles, num_stages=None if REGISTERS else STAGES):
        start = (step + shift) % tiles * BLOCK_N
        in_n = (n < end - start)[None, :]
        if REGISTERS:
            acc = following.to(tl.float32)
            ahead = (step + 1 + shift) % tiles * BLOCK_N
            more = in_m & ((n < end - ahead) & (step + 1 < tiles))[None, :]
            following = tl.load(source + ahead + tile, mask=more, other=0.0)
        else:
            acc = tl.load(source + start + tile, mask=in_m & in_n, other=0.0).to(tl.float32)
        if RESIDENT:
            rhs = tl.load(right + start + rank * N + n[None, :], mask=active & in_n, other=0.0)
            acc = tl.dot(lhs.to(OPERAND), rhs.to(OPERAND), acc, input_precision="ieee")
        else:
            for j0 in range(0, _count(bank, TOP_K, SUBTRACT), BLOCK_R):
                rank, active, lhs = _left_ranks(j0 + j, left, M, in_m, routing, bank, TOP_K, SUBTRACT, BLOCK_M)
                rhs = tl.load(right + start + rank * N + n[None, :], mask=active & in_n, other=0.0)
                acc = tl.dot(lhs.to(OPERAND), rhs.to(OPERAND), acc, input_precision="ieee")
        tl.store(weight + start + tile, acc.to(DTYPE), mask=in_m & in_n)
