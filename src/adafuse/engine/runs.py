"""runs: neighbours of a group of linears in one launch, and the memory in which its programs hand things over."""

from __future__ import annotations

from functools import lru_cache

import torch

from adafuse.costs import Device, common_form
from adafuse.ops.crowd import crowd, cut_for
from adafuse.ops.decode import decode
from adafuse.ops.launch import processors
from adafuse.ops.ranks import EMPTY, copies_of_h
from adafuse.plan import BlockPlan

_cut_for = lru_cache(cut_for)


class Run:
    """Linears with one input, all adapted (`part`: the block's part of the plan) or none (None).

    columns: where their outputs lie in the group's. handed: how many int32 its programs hand things over in; they hold `empty` before a
    launch.
    """

    empty: int
    handed: int

    def __init__(self, linears, columns: slice, part: BlockPlan | None, rows: int):
        self.linears, self.columns, self.part, self.rows = tuple(linears), columns, part, rows
        self.widths = tuple(len(linear.base.weight) for linear in linears)

    def take(self, room: torch.Tensor):
        """room: of `handed` int32, the run's own."""
        self.room = room

    def __call__(self, x, out, *, after_plan, pdl):
        """out [T, all of the group's outputs]: the columns of these linears. after_plan: the launch ahead wrote the plan."""
        banks = {}
        if self.part is not None:
            matrices = [linear.bank.matrices(x.dtype) for linear in self.linears]
            banks = dict(zip(("banks_a", "banks_b"), zip(*matrices, strict=True), strict=True))
        weights = [linear.base.weight for linear in self.linears]
        self.launch(x, weights, out[:, self.columns], banks, after_plan=after_plan, pdl=pdl)

    def launch(self, x, weights, out, banks, *, after_plan, pdl):
        raise NotImplementedError


class DecodeRun(Run):
    empty = EMPTY.value

    def __init__(self, *given):
        super().__init__(*given)
        active = self.part.chosen.active if self.part else 0
        self._shape = copies_of_h(active), self.rows, len(self.linears), active
        self.handed = self._shape[0] * self._shape[1] * self._shape[2] * active

    def launch(self, x, weights, out, banks, *, after_plan, pdl):
        if self.part is not None:
            banks |= {"chosen": self.part.chosen, "h": self.room.view(self._shape)}
        decode(x, weights, out, **banks, after_plan=after_plan, pdl=pdl)


class CrowdRun(Run):
    """scratch: by name and shape, shared by runs that follow one another."""

    empty = 0

    def __init__(self, linears, columns, part, rows, scratch):
        super().__init__(linears, columns, part, rows)
        weight, self._ranks = linears[0].base.weight, part.chosen.ranks if part else 0
        options = {"processors": processors(weight)}
        self._cut = _cut_for(rows, weight.shape[1], self.widths, self._ranks, weight.dtype, **options)
        self.handed = self._cut.num_flags(rows, len(linears), self._ranks)
        shapes = {"partial": (self._cut.partial_shape, torch.float32)}
        if part is not None:
            shapes["h"] = self._cut.h_shape(rows, len(linears), self._ranks), weight.dtype
        for name, (shape, dtype) in shapes.items():
            if (name, shape) not in scratch:
                scratch[name, shape] = torch.empty(shape, dtype=dtype, device=weight.device)
        self._scratch = {name: scratch[name, shape] for name, (shape, _) in shapes.items()}

    def launch(self, x, weights, out, banks, *, after_plan, pdl):
        if self.part is not None:
            banks |= {"gates": self.part.gates, "r": self.part.chosen.r}
        # It lets others start at once, which must not happen before the plan is there: see the rules in docs/kernels.md.
        crowd(x, weights, out, **banks, **self._scratch, flags=self.room, cut=self._cut, pdl=pdl and not after_plan)


class Runs:
    """The launches of all groups of linears of a step, for so many rows, and the memory of each. `clear` goes before each step.

    All take one form. With one launch of `crowd` a block among those of `decode`, 4 sequences of r 64 took 9.7 ms, with `decode` alone
    6.6 (Mistral-7B, H100).
    """

    def __init__(self, groups, rows: int, config, itemsize: int):
        """groups: linears with one input, and their block's part of the plan or None. config: of the adapters; None: there are none."""
        self._rows, self._scratch = rows, {}
        pieces = [_pieces(*group) for group in groups]
        layers = [
            ((linears[0].base.weight.shape[1], columns.stop - columns.start, len(linears)), config if part else None)
            for group in pieces
            for linears, columns, part in group
        ]
        device = groups[0][0][0].base.weight.device
        form = common_form(layers, rows, itemsize, Device.of(device), ("decode", "crowd"))
        self.of_groups = [[self._run(form, *piece) for piece in group] for group in pieces]
        self._take_room(device)

    def _run(self, form, linears, columns, part):
        if form == "crowd":
            return CrowdRun(linears, columns, part, self._rows, self._scratch)
        return DecodeRun(linears, columns, part, self._rows)

    def _take_room(self, device):
        """One buffer for all, so that one fill empties it."""
        runs = [run for group in self.of_groups for run in group]
        sizes = [run.handed for run in runs]
        self._empty, self._room = runs[0].empty, torch.empty(sum(sizes), dtype=torch.int32, device=device)
        for run, part in zip(runs, self._room.split(sizes), strict=True):
            run.take(part)
        self.clear()

    def clear(self):
        self._room.fill_(self._empty)


def _pieces(group, part):
    """Neighbours of a group that are all adapted, or none: (linears, their columns of the group's output, their part of the plan)."""
    found, start = [], 0
    for linear in group:
        adapted, end = part is not None and linear.bank is not None, start + len(linear.base.weight)
        if found and (found[-1][2] is not None) == adapted:
            linears, columns, _ = found.pop()
            linears, columns = [*linears, linear], slice(columns.start, end)
        else:
            linears, columns = [linear], slice(start, end)
        found.append((linears, columns, part if adapted else None))
        start = end
    return found
