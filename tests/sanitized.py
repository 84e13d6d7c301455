"""Every kernel once, at small and odd sizes: what compute-sanitizer watches. Run by test_gpu_kernels.py."""

import torch

from adafuse.ops.attend import Heads, Room, attend
from adafuse.ops.batch import add_delta_tiles, expand_tiles, shrink_tiles
from adafuse.ops.beside import expand, shrink
from adafuse.ops.chosen import Chosen
from adafuse.ops.crowd import crowd, cut_for
from adafuse.ops.decode import Tile, decode
from adafuse.ops.gated import linear_gated
from adafuse.ops.launch import processors, since_hopper
from adafuse.ops.layout import lay_out
from adafuse.ops.matmul import matmul_tiles, readable
from adafuse.ops.norm import add_norm, embed_norm, swiglu
from adafuse.ops.pair import Tile as PairTile
from adafuse.ops.pair import h_shape, pair
from adafuse.ops.pick import pick, room
from adafuse.ops.ranks import EMPTY, copies_of_h
from adafuse.ops.route import Requests, route
from adafuse.ops.switch import Segment, SwitchTable, switch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU runs it in the interpreter, so that it does not rot
EARLY = {"pdl": since_hopper(torch.empty(0, device=DEVICE))}


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE).to(dtype)


def experts_of(tokens, num_experts, top_k):
    return torch.rand(tokens, num_experts, device=DEVICE).argsort(-1)[:, :top_k].int()


def a_decode(tokens, features, widths, num_experts, r, top_k, shared, dtype=torch.bfloat16, **options):
    ranks = num_experts * r + shared
    weights = torch.rand(tokens, top_k, device=DEVICE)
    chosen = Chosen(experts_of(tokens, num_experts, top_k), weights, num_experts, r, shared, 0.5)
    x, base = normal(tokens, features, dtype=dtype), [normal(o, features, dtype=dtype) for o in widths]
    banks_a = [normal(ranks, features, dtype=dtype) for _ in widths]
    banks_b = [normal(ranks, o, dtype=dtype) for o in widths]
    h = torch.full(
        (copies_of_h(chosen.active), tokens, len(widths), chosen.active), EMPTY.value, dtype=torch.int32, device=DEVICE
    )
    out, banks = normal(tokens, sum(widths), dtype=dtype), {"banks_a": banks_a, "banks_b": banks_b}
    decode(x, base, out, **banks, chosen=chosen, h=h, **options)
    decode(x, base, out, **options)
    shrink(x, banks_a, chosen, h[0], **EARLY)
    expand(h[0, :, 0], banks_b[0], chosen, normal(tokens, widths[0], dtype=dtype), **EARLY)


def a_second_tile():
    """More outputs than the device is taken to have places for programs: the first ones compute another tile."""
    outputs = processors(torch.empty(0, device=DEVICE)) + 8
    a_decode(1, 40, (outputs - 50, 50), 6, 2, 2, 1, tile=Tile(1, 4, resident=1))


def a_batch(tokens, features, widths, num_experts, r, top_k, shared, dtype=torch.bfloat16, splits=None):
    ranks = num_experts * r + shared
    routing = experts_of(tokens, num_experts, top_k), torch.rand(tokens, top_k, device=DEVICE)
    tiles = lay_out(*routing, num_experts=num_experts, r=r, shared_rank=shared)
    a = [normal(ranks, features, dtype=dtype) for _ in widths]
    b = [normal(ranks, o, dtype=dtype) for o in widths]
    x, weights = normal(tokens, features, dtype=dtype), [normal(o, features, dtype=dtype) for o in widths]
    outs, wide = [normal(tokens, o, dtype=dtype) for o in widths], normal(tokens, sum(widths), dtype=dtype)
    add_delta_tiles(outs, x, a, b, tiles)
    h = shrink_tiles(x, a, tiles, splits=splits, **EARLY)
    expand_tiles(h, b, tiles, outs, **EARLY)
    if all(map(readable, b)):
        for in_order in (False, True):
            linear_gated(x, torch.cat(weights), a, b, tiles, in_order=in_order)
    if all(readable(each) for each in (*weights, *b)):
        matmul_tiles(x, weights, h, b, tiles, wide)


def a_crowd(tokens, features, widths, num_experts, r, dtype=torch.bfloat16):
    ranks = num_experts * r
    cut = cut_for(tokens, features, widths, ranks, dtype)
    gates = torch.rand(tokens, num_experts + 1, device=DEVICE)
    h = torch.empty(cut.h_shape(tokens, len(widths), ranks), device=DEVICE, dtype=dtype)
    flags = torch.zeros(cut.num_flags(tokens, len(widths), ranks), device=DEVICE, dtype=torch.int32)
    scratch = {"h": h, "partial": torch.empty(cut.partial_shape, device=DEVICE), "flags": flags, "cut": cut}
    banks_a = [normal(ranks, features, dtype=dtype) for _ in widths]
    banks_b = [normal(ranks, o, dtype=dtype) for o in widths]
    x, base = normal(tokens, features, dtype=dtype), [normal(o, features, dtype=dtype) for o in widths]
    out = normal(tokens, sum(widths), dtype=dtype)
    crowd(x, base, out, banks_a=banks_a, banks_b=banks_b, gates=gates, r=r, **scratch, **EARLY)


def a_pair(tokens, features, widths, num_experts, r, top_k=0, **tile):
    """top_k: of one token, its own ranks."""
    ranks, experts = num_experts * r, experts_of(1, num_experts, top_k) if top_k else None
    gates = torch.rand(tokens, num_experts + 1, device=DEVICE)
    banks_a, base = ([normal(n, features) for n in each] for each in ([ranks] * len(widths), widths))
    h = torch.empty(h_shape(tokens, len(widths), top_k * r or ranks), device=DEVICE, dtype=base[0].dtype)
    banks = {
        "banks_a": banks_a,
        "banks_b": [normal(ranks, o) for o in widths],
        "gates": gates,
        "r": r,
        "experts": experts,
    }
    x, out = normal(tokens, features), normal(tokens, sum(widths))
    pair(x, base, out, **banks, h=h, tile=PairTile(**tile), **EARLY)
    pair(x, base, out, tile=PairTile(**tile))


def a_switch(shapes, dtype=torch.bfloat16):
    """shapes: rows, columns and rank of each weight."""
    experts, weights = experts_of(1, 6, 2), torch.rand(1, 2, device=DEVICE)
    for pristine in (True, False):
        segments = []
        for m, n, r in shapes:
            w, left, right = (normal(*shape, dtype=dtype) for shape in ((m, n), (6 * r, m), (6 * r, n)))
            segments.append(Segment(w, left, right, r, 6, source=w.clone() if pristine else None))
        table = SwitchTable(segments, top_k=2)
        switch(table, experts, weights)
        switch(table, experts_of(1, 6, 2), weights, old=(experts, weights))


def a_route():
    experts = torch.empty(3, 2, 2, dtype=torch.int32, device=DEVICE)
    weights, logits = torch.empty(3, 2, 2, device=DEVICE), torch.empty(2, 21, device=DEVICE)
    router = torch.randn(21, 63, device=DEVICE)
    h0, options = torch.randn(2, 63, device=DEVICE), {"num_experts": 7, "scale": 2.0, "logits": logits}
    route(h0, router, experts, weights, **options, **EARLY)
    inner = {"hidden": torch.randn(9, 63, device=DEVICE), "hidden_out": torch.empty(2, 9, device=DEVICE)}
    route(h0, torch.randn(21, 9, device=DEVICE), experts, weights, **options, **inner)
    starts = torch.tensor([0, 1, 1], dtype=torch.int32, device=DEVICE)
    load = torch.zeros(3, 7, dtype=torch.int64, device=DEVICE)
    for found in (starts, None):
        requests = Requests(found, torch.ones(3, device=DEVICE), torch.empty(2, device=DEVICE), 0.5, load)
        route(h0, router, experts, weights, **options, gates=torch.empty(3, 2, 8, device=DEVICE), requests=requests)


def small_kernels(tokens, hidden, heads, kv_heads, dim, length):
    residual, y, weight, out = normal(tokens, hidden), normal(tokens, hidden), normal(hidden), normal(tokens, hidden)
    ids = torch.randint(0, 9, (tokens,), device=DEVICE)
    embed_norm(ids, normal(9, hidden), residual, weight, out, eps=1e-6)
    add_norm(y, residual, weight, out, eps=1e-6, bias=weight)
    swiglu(normal(tokens, 2 * hidden), out, gate_bias=weight, up_bias=weight)
    cache, rotary = normal(2, tokens, kv_heads, length, dim), normal(2, length, dim)
    positions = torch.randint(0, length, (tokens,), device=DEVICE)
    given = Heads(*(normal(n * dim) for n in (heads, kv_heads, kv_heads)), normal(dim), normal(dim), 1e-6)
    attended, place = normal(tokens, heads * dim), Room.make(cache, heads)
    qkv = normal(tokens, (heads + 2 * kv_heads) * dim)
    for options in ({}, {"window": 5, "heads": given}):
        attend(qkv, cache, positions, rotary, attended, place, scaling=0.1, **options)
    pick(normal(tokens, 5001), ids, ids.clone(), room(tokens, 5001, DEVICE), positions=positions, advance=ids, last=9)


if __name__ == "__main__":
    torch.manual_seed(0)
    a_decode(1, 64, (32, 16), 8, 4, 2, 0, **EARLY)
    a_decode(3, 63, (17, 5, 9), 6, 1, 6, 3, torch.float32)
    a_decode(1, 256, (64,), 8, 16, 2, 0)
    a_decode(3, 264, (17, 8), 20, 2, 2, 1, **EARLY)  # more experts than choices
    a_decode(8, 264, (13,), 6, 2, 2, 1, tile=Tile(2, 4))
    a_second_tile()
    a_batch(33, 63, (17, 40), 6, 4, 2, 3, torch.float32)
    a_batch(130, 128, (64,), 8, 16, 2, 0, splits=2)
    a_batch(130, 72, (64, 24, 304), 8, 16, 2, 3)
    a_pair(1, 256, (64,), 8, 16, top_k=2)
    a_pair(8, 520, (40, 17), 8, 4)
    a_pair(20, 64, (48, 24), 4, 8, rows=32, num_warps=4)
    a_pair(8, 256, (48,), 8, 32, rows=32)  # J of 256, and a program of which only half the outputs exist
    a_crowd(33, 192, (72, 40), 4, 8)
    a_crowd(100, 192, (72, 40), 4, 8)
    a_crowd(12, 72, (40,), 4, 4, torch.float32)
    a_crowd(130, 256, (128,), 8, 16)
    a_switch([(63, 40, 4), (17, 129, 1), (256, 192, 16)])
    a_switch([(63, 40, 4)], torch.float32)
    a_switch([(136, 264, 64)])  # in place 256 ranks: the next tile of the weight waits in registers
    a_switch([(136, 136, 128)])  # in place 512: more than a program keeps
    a_route()
    small_kernels(2, 63, 6, 2, 8, 90)
    small_kernels(1, 256, 4, 4, 128, 200)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
