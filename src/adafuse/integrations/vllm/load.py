"""load: how many tokens each expert was chosen for, as a log line at intervals and as a counter of Prometheus. Imports
torch, not vLLM.
"""

from __future__ import annotations

import logging
import os
import time

import torch

from adafuse.integrations.vllm.names import INTERVAL

logger = logging.getLogger("vllm.adafuse")  # below vLLM's own, which has a handler


def report_of(vllm_config) -> LoadReport | None:
    """That of the first rank, if the server asked for one."""
    interval = getattr(vllm_config.model_config.hf_config, INTERVAL, 0)
    return LoadReport(interval) if interval and vllm_config.parallel_config.rank == 0 else None


class LoadReport:
    """Reports the growth of a step's `load` [D, E] every `interval` seconds in which the engine runs. Never waits for
    the device.

    As a log line: the share of each expert, over all decisions. Where a server collects the metrics of its processes
    (it has set PROMETHEUS_MULTIPROC_DIR) also as the counter `adafuse_expert_tokens_total`, by decision and expert.
    """

    def __init__(self, interval: float):
        self._interval, self._last = interval, time.monotonic()
        self._begun = False
        self._seen = None  # [D, E] on the host: what was reported
        self._copy, self._copied = None, None
        self._counter = _counter()

    def tick(self, load: torch.Tensor):
        """Called in front of each step, first in front of the first request's: what was counted while warming up is forgotten."""
        if not self._begun:
            self._begun = True
            load.zero_()
        if self._copy is not None:
            if self._copied is None or self._copied.query():
                self._publish(self._copy)
                self._copy = None
            return
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        self._last = now
        self._copy = torch.empty(load.shape, dtype=load.dtype, pin_memory=load.is_cuda)
        self._copy.copy_(load, non_blocking=True)
        if load.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _publish(self, load):
        new = load - self._seen if self._seen is not None else load
        self._seen = load
        if total := int(new.sum()):
            shares = ", ".join(f"{100 * n / total:.1f}" for n in new.sum(0).tolist())
            logger.info("expert load since the last report, %% of %d choices: %s", total, shares)
        if self._counter is not None:
            for decision, row in enumerate(new.tolist()):
                for expert, count in enumerate(row):
                    self._counter.labels(decision=str(decision), expert=str(expert)).inc(count)


def _counter():
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return None
    from prometheus_client import Counter

    return Counter("adafuse_expert_tokens", "Tokens that an expert was chosen for, by decision", ["decision", "expert"])
