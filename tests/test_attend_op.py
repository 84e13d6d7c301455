"""Attention of a decoding step against loops over heads and keys in float64. On a CPU it runs under Triton's interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")

from adafuse.ops.attend import Heads, Room, attend, attend_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # relative RMS
# heads, key-value heads, features of a head, length of the cache, positions of the tokens
SIZES = [
    (4, 2, 8, 64, (0,)),
    (4, 2, 8, 64, (1, 63)),
    (3, 1, 64, 200, (199, 0, 64, 65)),
    (2, 2, 128, 300, (257,)),
    (8, 1, 80, 130, (33, 32, 31)),
    (16, 1, 16, 70, (5,)),
]


def a_case(heads, kv_heads, dim, length, positions, dtype, biased=False, normed=False):
    torch.manual_seed(0)
    tokens = len(positions)

    def normal(*shape):
        return torch.randn(shape).to(DEVICE, dtype)

    # A row more than is used, as in a batch that is not full: the cache's second axis is not contiguous.
    whole = torch.full((2, tokens + 1, kv_heads, length, dim), float("nan"), dtype=dtype, device=DEVICE)
    for row, at in enumerate(positions):  # what lies past a token is garbage
        whole[:, row, :, :at] = normal(2, kv_heads, at, dim)
    angles = torch.arange(length)[:, None] * 0.5 ** torch.arange(dim // 2).repeat(2)
    rotary = torch.stack([angles.cos(), angles.sin()]).to(DEVICE, dtype)
    biases = [normal(n * dim) for n in (heads, kv_heads, kv_heads)] if biased else [None] * 3
    norms = [normal(dim), normal(dim)] if normed else [None] * 2
    qkv = normal(tokens, (heads + 2 * kv_heads) * dim)
    return qkv, whole[:, :tokens], torch.tensor(positions, device=DEVICE), rotary, Heads(*biases, *norms, 1e-2)


def loop(qkv, cache, positions, rotary, heads: Heads, count, window):
    """A token, a head and a key at a time, in float64: the outputs, and the new keys and values."""
    qkv, cache, rotary = (x.double().cpu() for x in (qkv, cache, rotary))
    vectors = [None if v is None else v.double().cpu() for v in heads[:5]]
    _, tokens, kv_heads, _, dim = cache.shape
    outs, new = [], []
    for t in range(tokens):
        at = int(positions[t])
        rows = (
            qkv[t] + torch.cat([v if v is not None else torch.zeros(0) for v in vectors[:3]])
            if vectors[0] is not None
            else qkv[t]
        )
        rows = list(rows.view(-1, dim))

        def turned(x, norm, at=at):
            if norm is not None:
                x = norm * x / ((x * x).mean() + heads.eps).sqrt()
            half = dim // 2
            out = x.clone()
            for i in range(half):
                out[i] = x[i] * rotary[0, at, i] - x[half + i] * rotary[1, at, i]
                out[half + i] = x[half + i] * rotary[0, at, half + i] + x[i] * rotary[1, at, half + i]
            return out

        k_new = [turned(x, vectors[4]) for x in rows[count : count + kv_heads]]
        v_new = rows[count + kv_heads :]
        new.append(torch.stack([torch.stack(k_new), torch.stack(v_new)]))
        out = []
        for head in range(count):
            kv = head // (count // kv_heads)
            q = turned(rows[head], vectors[3])
            first = 0 if window is None else max(0, at - window + 1)
            keys = [*cache[0, t, kv, first:at], k_new[kv]]
            values = [*cache[1, t, kv, first:at], v_new[kv]]
            weights = torch.stack([q @ key * 0.3 for key in keys]).exp()
            out.append(sum(w * value for w, value in zip(weights, values, strict=True)) / weights.sum())
        outs.append(torch.cat(out))
    return torch.stack(outs), torch.stack(new, dim=1)


def relative_error(got, exact):
    return ((got.double().cpu() - exact).norm() / exact.norm()).item()


def check(size, dtype, parts=None, window=None, **kinds):
    heads, _, dim, _, positions = size
    qkv, cache, at, rotary, given = a_case(*size, dtype, **kinds)
    before = cache.clone()
    exact, new = loop(qkv, cache, at, rotary, given, heads, window)
    room = Room.make(cache, heads)
    if parts:
        room = room._replace(
            partial=room.partial.new_full((*room.partial.shape[:2], parts, *room.partial.shape[3:]), math.nan)
        )
    for _ in range(2):  # again, in the same room and on the same cache
        out = torch.full((len(positions), heads * dim), math.nan, dtype=dtype, device=DEVICE)
        assert attend(qkv, cache, at, rotary, out, room, scaling=0.3, window=window, heads=given) is out
        assert relative_error(out, exact) < LIMITS[dtype]
        assert not room.arrived.any()
    for row, place in enumerate(positions):
        assert relative_error(cache[:, row, :, place], new[:, row]) < LIMITS[dtype]
        cache[:, row, :, place] = before[:, row, :, place]
    assert torch.equal(cache.nan_to_num(7), before.nan_to_num(7))  # nothing else was written
    plain = attend_ref(qkv.double(), cache.double(), at, rotary.double(), scaling=0.3, window=window,
                       heads=Heads(*(None if v is None else v.double() for v in given[:5]), given.eps))  # fmt: skip
    assert relative_error(plain, exact) < 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", LIMITS)
def test_attention(size, dtype):
    check(size, dtype)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 32])
@pytest.mark.parametrize("window", [None, 1, 40, 1000])
def test_parts_and_windows(parts, window):
    check((4, 2, 16, 300, (0, 130, 299)), torch.float32, parts=parts, window=window)


@pytest.mark.parametrize(("biased", "normed"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", LIMITS)
def test_biases_and_norms_of_heads(biased, normed, dtype):
    check((6, 3, 16, 90, (70, 3)), dtype, biased=biased, normed=normed)


def test_a_position_past_the_cache_counts_as_the_last():
    """A row that has ended stays within the cache."""
    qkv, cache, at, rotary, _ = a_case(2, 1, 8, 40, (39,), torch.float32)
    room = Room.make(cache, 2)
    outs = [torch.empty(1, 16, device=DEVICE) for _ in range(2)]
    attend(qkv, cache, at, rotary, outs[0], room, scaling=0.3)
    attend(qkv, cache, at + 5, rotary, outs[1], room, scaling=0.3)
    assert torch.equal(*outs)


def test_large_scores_do_not_overflow():
    qkv, cache, at, rotary, _ = a_case(2, 1, 8, 40, (39,), torch.float32)
    exact = attend_ref(qkv.double(), cache.double(), at, rotary.double(), scaling=3000.0)
    out = torch.empty(1, 16, device=DEVICE)
    attend(qkv, cache, at, rotary, out, Room.make(cache, 2), scaling=3000.0)
    assert relative_error(out, exact.cpu()) < 1e-3


def test_what_the_kernel_cannot_take_is_refused():
    qkv, cache, at, rotary, _ = a_case(4, 2, 8, 40, (3,), torch.float32)
    out, room = torch.empty(1, 32, device=DEVICE), Room.make(cache, 4)
    with pytest.raises(ValueError, match=r"qkv must be torch.float32 \[1, 64\] on .*, got torch.float32 \[1, 63\]"):
        attend(qkv[:, 1:], cache, at, rotary, out, room, scaling=1.0)
    with pytest.raises(ValueError, match=r"positions must be torch.int64 \[1\]"):
        attend(qkv, cache, at.int(), rotary, out, room, scaling=1.0)
    with pytest.raises(ValueError, match="the last three contiguous"):
        attend(qkv, cache.transpose(2, 3), at, rotary, out, room, scaling=1.0)
    with pytest.raises(ValueError, match=r"arrived must be torch.int32 \[1, 2\]"):
        attend(qkv, cache, at, rotary, out, room._replace(arrived=room.arrived[:, :1]), scaling=1.0)
    with pytest.raises(ValueError, match="k_bias is missing; biases of q, k and v"):
        attend(qkv, cache, at, rotary, out, room, scaling=1.0, heads=Heads(q_bias=qkv[0, :32].contiguous()))
    with pytest.raises(ValueError, match="34 heads on 2 key-value heads of 8 features; the kernel takes up to 16"):
        attend(qkv, cache, at, rotary, torch.empty(1, 34 * 8, device=DEVICE), room, scaling=1.0)
