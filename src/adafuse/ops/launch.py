"""What the launchers share: the interpreter, programmatic dependent launch, the device's size."""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own, made for kernels too, takes 4 microseconds a call; a launch asks for several.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def launch_options(pdl: bool, maxnreg: int | None = None) -> dict:
    """Keyword arguments PDL (a constexpr of each kernel), launch_pdl and maxnreg. The interpreter has none of these.

    pdl: programmatic dependent launch, which the device must have (`since_hopper`): elsewhere the kernel does not compile.
    """
    if INTERPRETED.value:
        return {"PDL": False}
    options = {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
    return options | ({"maxnreg": maxnreg} if maxnreg else {})


def can_launch(tensor: torch.Tensor) -> bool:
    """Whether kernels run on the tensor: it is on a GPU, or they are interpreted."""
    return tensor.is_cuda or INTERPRETED.value


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's device; an H100's for the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


def since_hopper(tensor: torch.Tensor) -> bool:
    """Whether the tensor's device has what came with Hopper (compute capability 9.0): programmatic dependent launch, and the
    instruction that asks for many bytes into the L2 cache."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def has_mma(tensor: torch.Tensor) -> bool:
    """Whether the tensor's device multiplies 16 x 16 by 16 x 8 numbers of bf16 at once (compute capability 8.0), or is interpreted."""
    return INTERPRETED.value or (tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0))


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """With programmatic dependent launch: let the next kernel start, then wait until all that ran before this one is visible.

    Every program must wait, those with nothing to do too: that this kernel has ended tells the next one that all before it have.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, fp32 in full precision."""
    if INTERPRETED:  # it would take bf16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def prefetch(pointers):
    """Asks for the cache lines at `pointers`, into the L2 cache."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
