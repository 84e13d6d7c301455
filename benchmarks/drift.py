"""What switching in place leaves in the weights: the error after many tokens, by dtype. Numerics only, nothing is timed.

    adafuse bench drift --out benchmarks/results/h100/drift.json

One matrix of Llama-2-7B (4096 x 4096, entries of standard deviation 0.02), 8 experts of rank 64, 2 a token, drawn anew for every token.
What they add is about 2 % of the matrix, as after a fine-tuning. The error is relative to that.
"""

import argparse

import record
import torch

from adafuse.ops.switch import Segment, SwitchTable, switch

TOKENS = (1, 10, 100, 1000)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def drift(dtype, tokens, device, shape=(4096, 4096), num_experts=8, r=64, part=0.02, seed=0):
    """Errors after each number of `tokens`, relative to what the experts then add. part: that, relative to the matrix."""
    torch.manual_seed(seed)
    rows = num_experts * r
    weight = torch.randn(shape, dtype=torch.float64) * 0.02
    scale = (part * 0.02 / r**0.5) ** 0.5  # of a sum over r ranks; the two experts' weights are below 1
    left, right = (torch.randn(rows, size) * scale for size in shape)
    written, left, right = (each.to(device, dtype).contiguous() for each in (weight, left, right))
    untouched = written.double()
    table, old, errors = SwitchTable([Segment(written, left, right, r, num_experts)], top_k=2), None, []
    for token in range(1, max(tokens) + 1):
        experts = torch.randperm(num_experts)[:2].int()[None].to(device)
        gates = torch.rand(1, 2).to(device)
        switch(table, experts, gates, old=old)
        old = (experts, gates)
        if token in tokens:
            chosen = (experts[0].long()[:, None] * r + torch.arange(r, device=device)).flatten()
            added = (left[chosen].double() * gates[0].double().repeat_interleave(r)[:, None]).T @ right[chosen].double()
            errors.append(((written.double() - untouched - added).norm() / added.norm()).item())
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    out = parser.parse_args().out
    rows = []
    for name, dtype in DTYPES.items():
        for tokens, error in zip(TOKENS, drift(dtype, TOKENS, "cuda"), strict=True):
            rows.append(record.row("drift/in_place", {"tokens": tokens, "dtype": name}, [error] * 2, "relative error"))
    record.write(out, rows)


if __name__ == "__main__":
    main()
