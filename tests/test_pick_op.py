"""The likeliest token against a plain search. On a CPU it runs under Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from adafuse.ops.pick import pick, pick_ref, room

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")


def picked(logits, **moves):
    out, tokens = (torch.full((len(logits),), -9, device=DEVICE) for _ in range(2))
    place = room(*logits.shape, DEVICE)
    for _ in range(2):  # in the same room
        pick(logits.clone(), out, tokens, place, **moves)
    assert torch.equal(tokens, out.clamp(min=0))
    assert torch.equal(out, pick_ref(logits))
    return out.tolist()


@pytest.mark.parametrize("vocab", [5, 2048, 2049, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest(vocab, dtype):
    logits = torch.randn(3, vocab).to(DEVICE, dtype)
    rows = logits.tolist()
    assert picked(logits) == [row.index(max(row)) for row in rows]
    assert picked(-logits.abs() - 5) == [row.index(max(row)) for row in (-logits.abs() - 5).tolist()]


def test_of_equal_ones_the_first():
    logits = torch.zeros(2, 5000, device=DEVICE)
    logits[1, 4100] = logits[1, 2047] = logits[1, 4999] = 1
    assert picked(logits) == [0, 2047]


@pytest.mark.parametrize("place", [0, 3000, 4999])
def test_logits_that_are_no_numbers(place):
    logits = torch.randn(4, 5000, device=DEVICE)
    logits[0, place], logits[1, place], logits[2] = NAN, INF, -INF
    logits[3, place] = -INF
    assert picked(logits)[:3] == [-1, -1, -1]
    assert picked(logits)[3] >= 0


def test_rows_move_up_to_the_last_place():
    positions, advance = torch.tensor([4, 8, 9], device=DEVICE), torch.tensor([1, 0, 1], device=DEVICE)
    picked(torch.randn(3, 100, device=DEVICE), positions=positions, advance=advance, last=9)
    assert positions.tolist() == [6, 8, 9]  # twice


def test_what_the_kernel_cannot_take_is_refused():
    logits, out = torch.randn(2, 100, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="logits must be contiguous floats"):
        pick(logits[:, ::2], out, out.clone(), room(2, 50, DEVICE))
    with pytest.raises(ValueError, match=r"picked must be contiguous int64 \[2\]"):
        pick(logits, out.int(), out, room(2, 100, DEVICE))
    with pytest.raises(ValueError, match=r"room is for \[1, 1\] blocks, the logits have \[2, 1\]"):
        pick(logits, out, out.clone(), room(1, 100, DEVICE))
