"""readback: tokens on their way from the device to the host, while the device goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Readback:
    """Copies of small tensors [rows] int64 to the host. `slots`: how many may be under way at once; on a CPU there is nothing to copy."""

    def __init__(self, rows: int, device: torch.device, slots: int = 4):
        self._device, self._next = device, 0
        self._slots = []
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._slots = [
                    (torch.zeros(rows, dtype=torch.int64, pin_memory=True), torch.cuda.Event()) for _ in range(slots)
                ]

    def fetch(self, tensor: torch.Tensor) -> Callable[[], list[int]]:
        """A function that waits for the copy begun now, and returns it. It holds until `slots` further ones were begun."""
        if not self._slots:
            return tensor.clone().tolist
        buffer, event = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        part = buffer[: len(tensor)]
        part.copy_(tensor, non_blocking=True)
        event.record(torch.cuda.current_stream(self._device))

        def wait():
            event.synchronize()
            return part.tolist()

        return wait
