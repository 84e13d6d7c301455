"""Compiles every kernel that sanitized.py launches for GPUs that need not be there, and launches none. Run by test_forms.py.

usage: python tests/compiled.py CAPABILITY   (90: an H100)
"""

import runpy
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from adafuse.ops import launch


class NoGpu:
    """What Triton asks of a driver to compile, for a GPU of some capability."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_only(capability):
    """From here on a launch compiles. Returns the set that fills up with the kernels: module and name."""
    triton.runtime.driver.set_active(NoGpu(capability))
    run, found = triton.runtime.jit.JITFunction.run, set()

    def compiled(function, *args, warmup, **options):
        kernel = run(function, *args, warmup=True, **options)
        assert kernel.asm["cubin"], function.__name__
        found.add((function.fn.__module__, function.__name__))
        return kernel

    triton.runtime.jit.JITFunction.run = compiled
    return found


def pretend(capability):
    """Answers of the GPU to what the launchers ask. Modules have them by name, so this comes before they are imported."""
    launch.can_launch = lambda tensor: True
    launch.since_hopper = lambda tensor: capability >= 90
    launch.has_mma = lambda tensor: capability >= 80


if __name__ == "__main__":
    capability = int(sys.argv[1])
    pretend(capability)
    found = compile_only(capability)
    runpy.run_path(str(Path(__file__).with_name("sanitized.py")), run_name="__main__")
    ops = {name: vars(module) for name, module in sys.modules.items() if name.startswith("adafuse.ops.")}
    missing = {(name, each) for name, of in ops.items() for each in of if each.endswith("_kernel")} - found
    assert not missing, f"never launched: {sorted(missing)}"
    print(f"{len(found)} kernels compiled")
