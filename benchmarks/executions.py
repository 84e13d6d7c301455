"""HuggingFace's own forward of an adapted model, launched kernel by kernel: "reference" against "fused". What "auto" is chosen by.

    adafuse bench executions --out benchmarks/results/h100/executions.json
    adafuse bench executions --tiny --out /tmp/tiny.json        # the plumbing, on a CPU

Random weights in bf16, all linears adapted, no cache: sequences x tokens of each, as in a prompt or a step of a batch. On a slow host the
time is that of its launches, so `host/launch` is a row of its own, and `host/*` are the times until a forward's last kernel is queued,
where the GPU is not what they wait for; `case` says which forms the linears take. Two minutes on an H100, of which its 80 GB of memory
are less than half used.
"""

import argparse
import math
import time

import record
import torch
from shapes import SHAPES
from stack import relative_error
from timing import check, free, launch_times, times
from whole_models import EXPERTS, TINY, adapted, base_model

from adafuse.costs import Device, costs

FORWARDS = (
    (1, 1),
    (8, 1),
    (32, 1),
    (1, 64),
    (1, 512),
    (1, 2048),
    (1, 4096),
    (1, 8192),
    (1, 16384),
)  # sequences, tokens of each
LONG = 4096  # tokens; from here on fewer repeats
QUEUED = 512  # tokens; up to here the GPU does not hold the host up
TINY_FORWARDS = ((1, 1), (2, 12))
RANKS = (16, 64)
LIMIT = 1.5e-1  # relative RMS error of bf16 logits behind all blocks, of one execution against the other


def measured(run, device, size):
    if device == "cuda":
        return times(run, repeats=3, warmup=1) if math.prod(size) >= LONG else times(run, repeats=7, warmup=2)
    found = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def host_times(run, device, repeats=5):
    """Milliseconds until `run()` has queued all its work on a device that has nothing else to do."""
    found = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def host_row(name, case, run, device, size):
    return [record.row(f"host/{name}", case, host_times(run, device), "ms")] if math.prod(size) <= QUEUED else []


def rows_of(name, device):
    """The backbone and both executions, for every forward."""
    base, forwards = base_model(name, device), FORWARDS if device == "cuda" else TINY_FORWARDS
    shape, generator = SHAPES[name], torch.Generator().manual_seed(0)
    router = torch.randn(EXPERTS, shape["hidden_size"], generator=generator).to(device)
    prompts = {size: torch.randint(0, shape["vocab_size"], size, generator=generator).to(device) for size in forwards}

    def forward(model, size):
        return model(input_ids=prompts[size], use_cache=False, logits_to_keep=1).logits

    def case(size, **more):
        return {"model": name, "sequences": size[0], "tokens": size[1], **more}

    backbone, rows = {}, []
    for size in forwards:

        def run(size=size):
            return forward(base, size)

        backbone[size] = record.row("forward/backbone", case(size), measured(run, device, size), "ms")
        rows += [backbone[size], *host_row("backbone", case(size), run, device, size)]
    for r in RANKS:
        model = adapted(base, r if device == "cuda" else 4, router)
        for size in forwards:
            rows += executions(model, forward, size, case(size, r=model.adafuse_config.r), backbone[size], device)
        model.detach()
        free()
    return rows


def executions(model, forward, size, case, backbone, device):
    logits, rows = {}, []
    for execution in ("reference", "fused"):
        model.execution = execution

        def run():
            return forward(model, size)

        about = {**case, "forms": forms(model, math.prod(size))} if execution == "fused" else case
        rows.append(record.row(f"forward/{execution}", about, measured(run, device, size), "ms", vs=backbone))
        rows += host_row(execution, about, run, device, size)
        logits[execution] = run().double()
    check(f"fused against reference, {case}", relative_error(logits["fused"], logits["reference"]), LIMIT)
    return rows


def forms(model, tokens):
    """How many of the linears take which form."""
    gate, dtype = model._gate, model.get_base_model().dtype
    (fused,) = (
        cost
        for cost in costs(gate.layers(dtype), gate.config, tokens, dtype.itemsize, Device.of(model.router.device))
        if cost.execution == "fused"
    )
    return {part.form: part.linears for part in fused.parts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--model", nargs="+", choices=[*SHAPES], default=["llama-2-7b", "llama-3.2-1b"])
    parser.add_argument(
        "--tiny", action="store_true", help="a toy model on a CPU: checks the plumbing, measures nothing"
    )
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    if args.tiny:
        SHAPES["tiny"] = TINY
        args.model = ["tiny"]
    torch.set_grad_enabled(False)
    rows = [] if args.tiny else [record.row("host/launch", {}, launch_times(device), "us")]
    for name in args.model:
        rows += rows_of(name, device)
        record.write(args.out, rows)  # what is there so far, should the machine be taken away
        free()


if __name__ == "__main__":
    main()
