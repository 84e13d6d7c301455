"""`shrink` and `expand` beside a base of another kind, against loops over tokens and experts in float64. On a CPU they run under
Triton's interpreter.
"""

import pytest
import torch
from gpus import early_launch
from test_batch_op import ROUTINGS
from test_decode_op import BIG, DEVICE, LIMITS, SIZES, a_case, empty, loop, nan, relative_error

pytest.importorskip("triton")

from adafuse.ops.beside import expand, shrink


def check(size, dtype, kind="uniform", **options):
    x, weights, banks_a, banks_b, chosen = a_case(*size, dtype, kind)
    exact = [loop(x, *each, chosen) for each in zip(weights, banks_a, banks_b, strict=True)]
    h = shrink(x, banks_a, chosen, empty(len(x), len(weights), chosen.active), **options)
    assert relative_error(h.view(torch.float32).transpose(0, 1), torch.stack([of for of, _ in exact])) < 1e-5
    for m, w in enumerate(weights):
        wide = nan(len(x), len(w) + 3, dtype=dtype)  # of a base that computes several linears in one
        y = wide[:, : len(w)]
        y.copy_(x.double() @ w.double().T)
        assert expand(h[:, m], banks_b[m], chosen, y, **options) is y
        assert relative_error(y, exact[m][1]) < LIMITS[dtype]
        assert wide[:, len(w) :].isnan().all()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernels_equal_the_loop(size, dtype):
    check(size, dtype)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_every_routing(kind):
    check((3, 64, (32,), 8, 4, 2, 0), torch.float32, kind=kind)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("pdl", [False, pytest.param(True, marks=early_launch)])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", BIG, ids=str)
def test_the_kernels_equal_the_loop_at_size(size, dtype, pdl):
    check(size, dtype, pdl=pdl)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda x: x.repeat(5, 1)}, r"1 to 8 tokens .* got \[10, 64\]"),
        ({"x": lambda x: x.bfloat16()}, "banks_a is torch.float32 .* x is torch.bfloat16"),
        ({"banks_a": lambda ms: [m[:5] for m in ms]}, "banks_a has 5 rows, but the routing is of 8 ranks"),
        ({"banks_a": lambda ms: [m.requires_grad_() for m in ms]}, "no backward pass"),
        ({"out": lambda h: h[:, :1]}, r"out must be contiguous int32 \[2, 2, 4\]"),
    ],
)
def test_what_shrink_cannot_read_is_refused(changes, message):
    x, _, banks_a, _, chosen = a_case(2, 64, (32, 16), 4, 2, 2, 0, torch.float32)
    arguments = {"x": x, "banks_a": banks_a, "chosen": chosen, "out": empty(2, 2, chosen.active)}
    with pytest.raises(ValueError, match=message):
        shrink(**arguments | {name: change(arguments[name]) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": lambda b: b[:5]}, r"b \[5, 32\] must be contiguous \[8, 32\]"),
        ({"y": lambda y: y[:, :30]}, r"b \[8, 32\] must be contiguous \[8, 30\]"),
        ({"h": lambda h: h[:1]}, r"h must be int32 \[2, 4\]"),
        ({"h": lambda h: h.float()}, "got torch.float32"),
        ({"b": lambda b: b.requires_grad_()}, "no backward pass"),
    ],
)
def test_what_expand_cannot_read_is_refused(changes, message):
    _, _, _, (b, _), chosen = a_case(2, 64, (32, 16), 4, 2, 2, 0, torch.float32)
    arguments = {"h": empty(2, chosen.active), "b": b, "chosen": chosen, "y": nan(2, 32)}
    with pytest.raises(ValueError, match=message):
        expand(**arguments | {name: change(arguments[name]) for name, change in changes.items()})
