"""Times on a GPU: CUDA graphs replayed back to back between events, and the two ceilings of memory bandwidth."""

import gc
import statistics

import torch
import triton
import triton.language as tl

from adafuse.engine.graph import captured

LIMIT = 1e-2  # relative RMS error of bf16 outputs


def check(name, error, limit=LIMIT):
    """Ends the program if a relative error is over its limit, or no number."""
    print(f"{name}: relative error {error:.1e}", flush=True)
    if not error < limit:
        raise SystemExit(f"{name}: relative error {error:.1e} is over {limit}; no timing is worth anything")


def free():
    """Give back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def graph_of(run, warmup=2):
    """A CUDA graph of `run()`, compiled and warmed up before the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        run()
    return graph


def times(run, prepare=lambda n: None, repeats=20, warmup=3):
    """Milliseconds of each `run()`. All are queued at once, so that the GPU never waits for the host; `prepare(n)`, outside the
    time, sets the inputs of run n."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + warmup)]
    torch.cuda.synchronize()
    for n, (start, end) in enumerate(events):
        prepare(n)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events[warmup:]]


def launch_times(device, count=1000):
    """Microseconds that PyTorch takes on this host to launch one small kernel: what a model of many small ones cannot go below."""
    x = torch.zeros(1, device=device)

    def run():
        for _ in range(count):
            x.add_(1)

    return [1e3 / count * each for each in times(run, repeats=10)]


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    values = tl.load(x + pid * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(out + pid, tl.max(values.to(tl.float32), 0))


def best_read_times(x, shapes=((8192, 8), (16384, 8), (8192, 4), (32768, 16))):
    """Milliseconds to read x (1-D, bf16, its size a multiple of the blocks) once, with the fastest of some block sizes."""
    found = []
    for block, num_warps in shapes:
        out = torch.empty(x.numel() // block, device=x.device)

        def run(out=out, block=block, num_warps=num_warps):
            _read_kernel[(len(out),)](x, out, BLOCK=block, num_warps=num_warps)

        found.append(times(run, repeats=20))
    return min(found, key=statistics.median)
