"""Functions of tensors of fixed shape, replayed from CUDA graphs on a GPU and simply called on a CPU."""

from __future__ import annotations

import torch

from adafuse.engine.graph import captured

WARMUPS = 2  # calls before the first capture (one before later ones): libraries choose kernels and optimisers make their state in them


class Replayed:
    """`function(batch)` for batches of a few shapes, one CUDA graph a shape. All graphs share one pool of memory.

    function: no host synchronisation; what must outlast a call it writes into tensors of its own, since graphs overwrite each other's
    intermediates. It returns a tensor, to be read before the next call. before_capture(): called before each warm-up and before each
    capture, say to set gradients to None.
    Graphs are captured in `prepare`, which runs the function for warm-up: undo what that changes. On a CPU `prepare` does nothing.
    """

    def __init__(self, function, device, before_capture=lambda: None):
        self._function, self._before_capture = function, before_capture
        self._on_gpu = torch.device(device).type == "cuda"
        self._graphs = {}
        if self._on_gpu:
            # Warm-up and capture on one stream: autograd remembers on which one a parameter's gradient is accumulated.
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def prepare(self, batches):
        """Capture the shapes of these batches."""
        if not self._on_gpu:
            return
        for batch in batches:
            inputs = batch.map(torch.clone)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARMUPS if not self._graphs else 1):
                    self._before_capture()
                    self._function(inputs)
                self._before_capture()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with captured(graph, pool=self._pool, stream=self._stream):
                output = self._function(inputs)
            self._before_capture()
            self._graphs[_shape(batch)] = (graph, inputs, output)

    def __call__(self, batch):
        if not self._on_gpu:
            self._before_capture()
            return self._function(batch)
        graph, inputs, output = self._graphs[_shape(batch)]
        for name, tensor in inputs.tensors().items():
            tensor.copy_(getattr(batch, name))
        graph.replay()
        return output


def _shape(batch):
    return (*batch.ids.shape, *batch.slots.shape)
