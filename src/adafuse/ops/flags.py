"""Flags: how programs of one launch hand over to each other what they wrote. All are int32, and 0 before the launch.

Who reads what was handed over takes it from the L2 cache (`cache_modifier=".cg"`, or a copy to shared memory that Triton makes of a load
in a loop), by addresses: descriptors (TMA) would need a fence of their own.
"""

import triton
import triton.language as tl

from adafuse.ops.launch import INTERPRETED


@triton.jit
def look(flags):
    """Flags, and with those that are set, all that was written before them."""
    if INTERPRETED:
        return tl.load(flags, volatile=True)
    else:  # noqa: RET505 - what is not taken must not be compiled
        return tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [flags.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait_for(flags):
    """Until all `flags` are set."""
    seen = look(flags)
    while tl.min(seen, 0) == 0:
        seen = look(flags)
    tl.debug_barrier()


@triton.jit
def set_flag(flag):
    """After all that this program wrote."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, 1, sem="release")
