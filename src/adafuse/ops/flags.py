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


@triton.jit
def arrive(counter, count):
    """Add `count`, after all that this program wrote."""
    tl.debug_barrier()
    tl.atomic_add(counter, count, sem="release")


@triton.jit
def wait_until(counter, count):
    """Until so many have arrived."""
    counter = counter + tl.arange(0, 1)
    seen = look(counter)
    while tl.min(seen, 0) < count:
        seen = look(counter)
    tl.debug_barrier()


@triton.jit
def waited_until(counter, count):
    """`wait_until` without a loop that Triton sees, for one that it is to pipeline. Returns a 0 of which the compiler does not know: who
    reads what was waited for adds it to the address. Each thread waits for itself, without a barrier."""
    if INTERPRETED:
        wait_until(counter, count)
        seen = count
    else:
        seen = tl.inline_asm_elementwise(
            """{
            .reg .pred missing;
            LOOK:
            ld.acquire.gpu.global.b32 $0, [$1];
            setp.lt.s32 missing, $0, $2;
            @missing bra LOOK;
            }""",
            "=&r,l,r", [counter.to(tl.int64), count], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return tl.minimum(seen - count, 0)
