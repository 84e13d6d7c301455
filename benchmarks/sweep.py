"""Times the kernels with other tiles than their defaults, to choose the defaults: a row a tile, best first at the end.

adafuse bench sweep --kernel decode --out /tmp/decode.json
adafuse bench sweep --kernel crowd --tokens 32 --out /tmp/crowd.json
adafuse bench sweep --kernel batch --tokens 2048 --out /tmp/batch.json
"""

import argparse
import statistics
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import record
import torch
from bench_kernels import MIXTURES, MODELS, routing, segments
from shapes import SHAPES
from stack import MOST_OF_A_CROWD, Adapters, Batch, Stack
from timing import best_read_times, check, free, graph_of, times

from adafuse.costs import FEW_TOKENS
from adafuse.ops import decode as decode_op
from adafuse.ops.batch import expand_tiles, shrink_tiles
from adafuse.ops.switch import SwitchTable, Tile, switch

DECODE = (
    {},
    {"copies": 8},
    {"copies": 16},
    {"copies": 32},
    {"block_j": 4},
    {"resident": 0},
    {"block_o": 2},
)
# Of `decode` with several tokens, by tensor cores.
FEW = (
    {},
    {"chunks": 2},
    {"chunks": 4},
    {"resident": 0},
    {"block_o": 8},
)
# One token among ordinary kernels: whether rows are asked for a quarter at a time.
AMONG = ({}, {"patient": True})
# Two programs a processor, three and four; half and twice as many warps for the same rows, and twice the rows.
PAIR = (
    {},
    {"pdl": False},
    {"x_ahead": 4},
    {"ahead": 6, "maxnreg": 64},
    {"ahead": 12, "maxnreg": 128},
    {"num_warps": 4},
    {"num_warps": 16, "ahead": 6, "maxnreg": 64},
    {"rows": 32, "ahead": 4, "maxnreg": 128},
)
# The same for more than 16 tokens, whose sums take registers.
PAIR_OF_MANY = (
    {},
    {"pdl": False},
    {"x_ahead": 4},
    {"maxnreg": 168},
    {"num_warps": 4},
    {"rows": 32, "ahead": 4, "maxnreg": 168},
)
CROWD = (
    {},
    {"num_stages": 4},
    {"slots": 396, "num_stages": 3},  # three programs a processor, and four
    {"slots": 528, "block_i": 64, "num_stages": 4},
    {"block_i": 128, "num_stages": 3},
    {"block_o": 64, "num_warps": 4, "num_stages": 4},
)
# The same for 65 to 128 tokens.
CROWD_OF_100 = (
    {},
    {"num_stages": 6},
    {"num_warps": 8, "num_stages": 4, "block_o": 256},
    {"num_warps": 8, "num_stages": 6, "block_o": 64},
)
SPLITS_AND_BLOCKS = ((1, 32, 128), (1, 32, 256), (1, 64, 128), (2, 32, 128), (2, 64, 128), (4, 64, 64), (4, 128, 64))
SHRINK = (
    {},
    *(
        {"splits": splits, "block_n": n, "block_i": i, "num_warps": 4, "num_stages": 3}
        for splits, n, i in SPLITS_AND_BLOCKS
    ),
)
EXPAND = (
    {},
    {"pdl": True},
    {"held": 16, "strip": 1, "block_o": 128, "num_warps": 8, "num_stages": 3},
    {"held": 16, "strip": 1, "block_o": 64, "num_warps": 4, "num_stages": 5},
    {"held": 256, "strip": 4},
    {"held": 128, "strip": 4},
)
BATCH = {
    "tiles": ({}, {"block_t": 64}),
    "gated": ({}, {"in_order": True}, {"in_order": False}),
    "matmul": ({}, {"group": 8}, {"num_stages": 4}, {"block_o": 128}),
}
PRISTINE = tuple(Tile(stagger=n) for n in (0, 1, 5))
IN_PLACE = (
    *(Tile(num_stages=2, registers=True, stagger=n) for n in (0, 1, 3, 5, 11)),
    Tile(strip=86, num_stages=2, registers=True),
)


SOME = 13  # every so many groups are checked, each kind of group among them


class Sweep:
    """Collects rows; a tile that does not compile or compute is reported and left out."""

    def __init__(self):
        self.rows = []

    def time(self, name, case, run, vs=None, prepare=lambda n: None, repeats=20, error=None, poison=lambda: None):
        """poison: called when all is captured, so that outputs of an earlier run cannot pass for this one's."""
        try:
            graph = graph_of(run, warmup=1)
            poison()
            samples = times(graph.replay, prepare, repeats)
            if error is not None:
                check(name, error())
        # A tile too large for the device says so in many ways; one that computes something else ends the program.
        except (Exception, SystemExit) as failure:
            print(f"{name} {case}: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            return
        self.rows.append(record.row(name, case, samples, "ms", vs=vs))
        print(f"{statistics.median(samples):9.4f} ms  {name} {case}", flush=True)


@contextmanager
def tiles(default, changes):
    """Decode's default tiles (`default`: which of Tile's) with other values in these fields."""
    original = getattr(decode_op.Tile, default)
    setattr(decode_op.Tile, default, lambda *args: replace(original(*args), **changes))
    try:
        yield
    finally:
        setattr(decode_op.Tile, default, original)


def sweep_decode(sweep, model, _):
    stack = Stack(model)
    bound = best_read_times(stack.flat)
    for name, mixture in MIXTURES.items():
        for changes in DECODE:
            changed = {key: value for key, value in changes.items() if key != "copies"}
            adapters = Adapters(stack, **mixture, copies=changes.get("copies"))
            more = 1 + adapters.num_bytes / stack.num_bytes
            roofline = record.row(f"roofline_{name}", {}, [sample * more for sample in bound], "ms")
            with tiles("default", changed):
                sweep.time(name, changes, adapters.run, roofline, stack.prepare, 30, adapters.error)
            del adapters
            free()
        sweep.rows.append(roofline)


def sweep_few(sweep, model, tokens):
    """A few tokens: the kernel that reads the chosen experts of each, and the one that reads all experts once."""
    stack = Stack(model, tokens=tokens)
    bound = record.row("read", {}, best_read_times(stack.flat), "ms")
    sweep.rows.append(bound)
    sweep.time("cublas", {"tokens": tokens}, stack.run_cublas, bound, stack.prepare)
    sweep.time("backbone", {"tokens": tokens}, stack.run_backbone, bound, stack.prepare, error=stack.error)
    for r in (16, 64):
        mixture = {"num_experts": 8, "r": r, "top_k": 2}
        adapters = Adapters(stack, **mixture)
        for changes in FEW:
            case = {"tokens": tokens, **changes}
            with tiles("of_fragments", changes):
                sweep.time(f"decode_r{r}", case, adapters.run, bound, stack.prepare, error=adapters.error)
        del adapters
        free()
        batch = Batch(stack, **mixture)
        sweep.time(f"crowd_r{r}", {"tokens": tokens}, batch.forms()["crowd"], bound, stack.prepare, error=batch.error)
        del batch
        free()


def sweep_mixed(sweep, model, tokens):
    """A few tokens of r 64 where groups take different forms: what a step loses, or gains, by it, with early launch and without."""
    stack = Stack(model, tokens=tokens)
    bound = record.row("read", {}, best_read_times(stack.flat), "ms")
    sweep.rows.append(bound)
    batch = Batch(stack, num_experts=8, r=64, top_k=2)
    for crowds in range(len(stack.groups) + 1):
        forms = ["crowd"] * crowds + ["decode"] * (len(stack.groups) - crowds)
        for pdl in (True, False):
            case = {"tokens": tokens, "crowd": crowds, "pdl": pdl}
            sweep.time("forms", case, partial(batch.run, forms, pdl=pdl), bound, stack.prepare, error=batch.error)


def sweep_among(sweep, model, tokens, ranks, rs):
    """A few tokens among ordinary kernels, as in vLLM."""
    stack = Stack(model, tokens=tokens, ranks=ranks, among=True)
    bound = record.row("read", {}, best_read_times(stack.flat), "ms")
    sweep.rows.append(bound)
    case = {"tokens": tokens, "ranks": ranks}

    def each(name, run, error):
        for changes in AMONG[: 2 if tokens == 1 else 1]:
            with tiles("default", changes):
                sweep.time(name, {**case, **changes}, partial(run, pdl=False), bound, stack.prepare, error=error)

    def pairs(name, batch, error, bare):
        for given in PAIR_OF_MANY if tokens > 16 else PAIR:
            if bare and "pdl" in given:  # one launch, which never starts early
                continue
            run = partial(batch.run, "pair", bare=bare, **given)
            sweep.time(name, {**case, **given}, run, bound, stack.prepare, error=error, poison=stack.poison)

    sweep.time("cublas", case, stack.run_cublas, bound, stack.prepare)
    if tokens <= FEW_TOKENS:
        each("backbone", stack.run_backbone, partial(stack.error, SOME))
    for r in rs:
        mixture = {"num_experts": 8, "r": r, "top_k": 2}
        if tokens <= FEW_TOKENS:
            adapters = Adapters(stack, **mixture)
            each(f"decode_r{r}", adapters.run, partial(adapters.error, SOME))
            del adapters
            free()
        batch = Batch(stack, **mixture)
        if tokens > 1:
            each(f"crowd_r{r}", partial(batch.run, "crowd"), batch.error)
        if r == rs[0]:
            pairs("pair", batch, partial(stack.error, SOME), bare=True)
        pairs(f"pair_r{r}", batch, batch.error, bare=False)
        del batch
        free()


def sweep_groups(sweep, model, tokens, ranks, rs):
    """Each group of linears by itself in every block, among ordinary kernels: where a form loses to another."""
    stack = Stack(model, tokens=tokens, ranks=ranks, among=True)
    stack.run_cublas()  # inputs for all groups
    read = best_read_times(stack.flat)
    batches = {r: Batch(stack, num_experts=8, r=r, top_k=2) for r in rs}
    forms = ["decode"] * (tokens <= FEW_TOKENS) + ["crowd"] * (tokens <= MOST_OF_A_CROWD) + ["gated"] * (tokens > 32)
    for index, group in enumerate(stack.groups):
        case = {"tokens": tokens, "ranks": ranks, "group": group.name}
        share = group.features * sum(group.widths) * stack.blocks * 2 / stack.num_bytes
        bound = record.row(f"read {group.name}", case, [share * sample for sample in read], "ms")
        sweep.rows.append(bound)
        sweep.time("cublas", case, partial(stack.run_cublas, index), bound, stack.prepare)
        if "crowd" in forms:
            run = partial(batches[rs[0]].run, "crowd", index, bare=True, pdl=False)
            sweep.time("crowd of the base", case, run, bound, stack.prepare)
        for r, batch in batches.items():
            for form in forms:
                options = {} if form == "gated" else {"pdl": False}
                sweep.time(f"{form}_r{r}", case, partial(batch.run, form, index, **options), bound, stack.prepare)


def sweep_batch(sweep, model, tokens):
    stack = Stack(model, tokens=tokens)
    repeats = 20 if tokens < 1000 else 6
    base = record.row("cublas", {}, times(graph_of(stack.run_cublas).replay, stack.prepare, repeats), "ms")
    sweep.rows.append(base)
    for r in (16, 64):
        batch = Batch(stack, num_experts=8, r=r, top_k=2)
        for name, variants in BATCH.items():
            for given in variants:
                run = partial(batch.run, name, **given)
                sweep.time(f"{name}_r{r}", given, run, base, stack.prepare, repeats, batch.error, stack.poison)
        del batch
        free()


def sweep_pieces(sweep, model, tokens):
    """The two kernels of a batch by themselves, for q, k and v of 32 blocks."""
    stack = Stack(model, tokens=tokens)
    xs = [torch.randn(tokens, stack.hidden, device="cuda").bfloat16() for _ in range(stack.blocks)]
    for r in (16, 64):
        batch = Batch(stack, num_experts=8, r=r, top_k=2)
        tiles = batch.tiles()
        h = shrink_tiles(xs[0], batch.a[0][0], tiles)

        def shrink(given, batch=batch, tiles=tiles, h=h):
            for block, x in enumerate(xs):
                shrink_tiles(x, batch.a[block][0], tiles, h, **given)

        def expand(given, batch=batch, tiles=tiles, h=h):
            for block in range(stack.blocks):
                y = stack.outputs[block][0].split(stack.groups[0].widths, dim=1)
                expand_tiles(h, batch.b[block][0], tiles, y, **given)

        for name, run, variants in (("shrink", shrink, SHRINK), ("expand", expand, EXPAND)):
            for given in variants:
                sweep.time(f"{name}_r{r}", given, partial(run, given), repeats=8)
        del batch, tiles, h, shrink, expand, run
        free()


def sweep_crowd(sweep, model, tokens):
    stack = Stack(model, tokens=tokens)
    base = record.row("cublas", {}, times(graph_of(stack.run_cublas).replay, stack.prepare), "ms")
    sweep.rows.append(base)
    for r in (16, 64):
        batch = Batch(stack, num_experts=8, r=r, top_k=2)
        for given in CROWD if tokens <= 64 else CROWD_OF_100:
            sweep.time(
                f"r{r}", given, partial(batch.run, "crowd", **given), base, stack.prepare, 20, batch.error, stack.poison
            )
        del batch
        free()


def sweep_switch(sweep, model, _):
    stack = Stack(model)
    source = stack.flat.clone()
    copy = record.row("copy", {}, times(lambda: stack.flat.copy_(source)), "ms")
    sweep.rows.append(copy)
    for r in (64,):
        adapters = Adapters(stack, num_experts=8, r=r, top_k=2)
        new, old = routing(0), routing(1)
        for name, tiles, found, before in (
            ("pristine", PRISTINE, segments(stack, adapters, source), None),
            ("in_place", IN_PLACE, segments(stack, adapters), old),
        ):
            for tile in tiles:
                table = SwitchTable(found, top_k=2, tile=tile)
                sweep.time(f"{name}_r{r}", vars(tile), partial(switch, table, *new, old=before), copy, repeats=6)
            stack.flat.copy_(source)
        del adapters, found, table
        free()


def main():
    kernels = {
        "decode": sweep_decode,
        "few": sweep_few,
        "mixed": sweep_mixed,
        "among": sweep_among,
        "groups": sweep_groups,
        "batch": sweep_batch,
        "pieces": sweep_pieces,
        "crowd": sweep_crowd,
        "switch": sweep_switch,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=kernels, required=True)
    parser.add_argument("--model", choices=SHAPES, default=MODELS[0], help="whose shapes")
    parser.add_argument("--tokens", type=int, default=32, help="of a crowd or batch")
    parser.add_argument(
        "--ranks", type=int, default=1, help="tensor-parallel ranks that share a linear, for `among` and `groups`"
    )
    parser.add_argument("--r", nargs="+", type=int, default=[16, 64], help="of the experts, for `among` and `groups`")
    parser.add_argument("--out", required=True, help="JSON file to write")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    sweep, more = Sweep(), [args.ranks, args.r] if args.kernel in ("among", "groups") else []
    kernels[args.kernel](sweep, args.model, args.tokens, *more)
    record.write(args.out, sorted(sweep.rows, key=lambda row: (row["name"], row["median"])))


if __name__ == "__main__":
    main()
