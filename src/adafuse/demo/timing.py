"""Decode time of one sequence: what a token costs after the prompt, with the key-value cache."""

from __future__ import annotations

import statistics
import time

import torch

from adafuse.layers import in_eval_mode

WARM_UP = 4  # tokens before the clock counts: allocations, lazy set-up


@torch.no_grad()
def decode_ms(model, ids: list[int], tokens: int) -> float:
    """Median milliseconds of one greedy step (one sequence, one token at a time) over `tokens` steps after the prompt `ids`.

    Nothing ends the sequence, so two models do the same work whatever they say.
    """
    times = []
    with in_eval_mode(model):
        output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True)
        for _ in range(WARM_UP + tokens):
            newest = output.logits[:, -1:].argmax(-1)
            _wait_for(model.device)
            start = time.perf_counter()
            output = model(input_ids=newest, past_key_values=output.past_key_values, use_cache=True)
            _wait_for(model.device)
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[WARM_UP:])


def _wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
