"""graph: steps captured in CUDA graphs, by what they do, and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import contextmanager

import torch

from adafuse.execution import in_graph

# Decorates what makes tensors that outlive a call: made inside torch.inference_mode() they could not be written to outside of it.
kept_tensors = torch.inference_mode(mode=False)

WARMUP = 2  # runs before a capture: kernels are compiled and loaded in the first


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, **options):
    """`torch.cuda.graph` without the garbage collector: an older graph, held by a cycle of objects, that it freed in the middle would
    end the capture, and leave the process unable to make another."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        if collecting:
            gc.enable()


class Graphs:
    """CUDA graphs of one device, by name, in one memory pool. What a graph reads and writes must stay where it is."""

    def __init__(self, device: torch.device):
        self._device, self._graphs = device, {}
        self._pool = torch.cuda.graph_pool_handle()

    def __contains__(self, name) -> bool:
        return name in self._graphs

    @kept_tensors
    @torch.no_grad()
    def capture(self, name, run: Callable[[], None]):
        """Run `run` twice, then capture it. It must not wait for the device, nor allocate what outlives it."""
        with torch.cuda.device(self._device), in_graph():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with captured(graph, pool=self._pool):
                    run()
            except BaseException:  # Ctrl-C, too
                if not self._graphs:
                    self.clear()
                raise
        self._graphs[name] = graph

    def replay(self, name):
        with torch.cuda.device(self._device):
            self._graphs[name].replay()

    def clear(self):
        """Forget all: what they read has moved. A pool whose graphs are gone must not be captured into again: what is left alive in it
        (a routing that someone holds) keeps it from being made anew."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()
