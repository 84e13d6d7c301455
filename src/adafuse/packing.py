"""bitsandbytes on a CPU: in eval mode it repacks its 4-bit weights for a kernel that gradients do not pass, and never back.

Training after an evaluation would go on with wrong gradients and no error. So an adapted base keeps its first layout.
"""

from __future__ import annotations

from torch import nn

_MAY_PACK = "support_avx512bf16_for_cpu"  # bitsandbytes' own flag of a Linear4bit


def forbid_packing(base) -> list[nn.Module]:
    """Turn the repacking off; returns the linears that would have done it, for `allow_packing`."""
    linears = [module for module in base.modules() if getattr(module, _MAY_PACK, False)]
    for linear in linears:
        setattr(linear, _MAY_PACK, False)
    return linears


def allow_packing(linears):
    """Undo `forbid_packing`."""
    for linear in linears:
        setattr(linear, _MAY_PACK, True)


def refuse_packed(base):
    """ValueError if a linear was repacked before the adapter came: it cannot be trained through."""
    for name, module in base.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has repacked the 4-bit weights of {name} for inference on this CPU (by a forward in eval mode), and "
                "gradients do not pass them; load the base again and attach the adapter before the first forward"
            )
