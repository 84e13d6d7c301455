"""What tests ask of a GPU."""

from contextlib import contextmanager

import pytest
import torch


def _starts_kernels_early():
    if not torch.cuda.is_available():
        return False
    from adafuse.ops.launch import since_hopper

    return since_hopper(torch.empty(0, device="cuda"))


early_launch = pytest.mark.skipif(
    not _starts_kernels_early(), reason="needs programmatic dependent launch: a GPU of compute capability 9.0"
)


@contextmanager
def no_host_sync():
    """What waits for the device in here raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
