"""The kernels on the linears of whole models: decoding one token, switching weights, batches, prefill. One run, one GPU.

    adafuse bench kernels --out benchmarks/results/h100/kernels.json
    adafuse bench kernels --out /tmp/some.json --only stack --model llama-3.2-1b

Random weights and inputs. All but copies and reads of memory are replayed CUDA graphs. Decoding includes router and plan, and the
experts change with every step; batches include the plan's layout of one routing, not the router. Of a batch, the row without a form is
what the library runs, each group in the form that it takes; the rows beside it show whether that was right. No weight is in the L2
cache, for the rest of the model has passed through it. Rows are written only if the outputs are right.
"""

import argparse
from functools import partial

import record
import torch
from stack import Adapters, Batch, Stack, relative_error, worst
from timing import best_read_times, check, free, graph_of, times

from adafuse.ops.switch import Segment, SwitchTable, switch

MODELS = ("llama-2-7b", "mistral-7b", "llama-3.2-1b")
MIXTURES = {
    "r64": {"num_experts": 8, "r": 64, "top_k": 2},
    "r16": {"num_experts": 8, "r": 16, "top_k": 2},
    "fine": {"num_experts": 64, "r": 1, "top_k": 16, "routing": "layer"},
}
EXPERTS = (4, 8, 32, 128)


def scaled(samples, factor):
    return [sample * factor for sample in samples]


# --- one token -----------------------------------------------------------------------------------------------------------


def stack_rows(model):
    """Backbone and mixtures, each against the time to read its bytes."""
    stack = Stack(model)
    case = {"model": model, "tokens": 1}
    read = best_read_times(stack.flat)

    def measure(run):
        return times(graph_of(run).replay, stack.prepare, repeats=50)

    roofline = record.row("stack/roofline", case, read, "ms")
    cublas = record.row("stack/cublas", case, measure(stack.run_cublas), "ms", vs=roofline)
    backbone = measure(stack.run_backbone)
    check(f"{model} backbone", stack.error())
    rows = [roofline, cublas, record.row("stack/backbone", case, backbone, "ms", vs=roofline)]
    rows.append(record.row("stack/backbone_vs_cublas", case, backbone, "ms", vs=cublas))
    for name, mixture in MIXTURES.items():
        rows += mixture_rows(stack, name, mixture, case, read, cublas, measure)
        free()
    if model == MODELS[0]:
        rows += expert_count_rows(stack, case, measure)
    return rows


def mixture_rows(stack, name, mixture, case, read, cublas, measure):
    adapters = Adapters(stack, **mixture)
    case = {**case, **mixture}
    bound = scaled(read, 1 + adapters.num_bytes / stack.num_bytes)
    roofline = record.row(f"stack/roofline_{name}", case, bound, "ms")
    samples = measure(adapters.run)
    check(f"{stack.model} {name}", adapters.error())
    rows = [roofline, record.row(f"stack/adapters_{name}", case, samples, "ms", vs=roofline)]
    if name == "r64":  # seven launches a block, a fill before each, a router in PyTorch, no early launch
        apart = measure(adapters.run_as_huggingface)
        adapters.collect_separate()
        check(f"{stack.model} {name} as HuggingFace's modules", adapters.error())
        rows.append(record.row(f"stack/adapters_{name}_as_huggingface", case, apart, "ms", vs=roofline))
    beside = measure(adapters.run_beside)
    check(f"{stack.model} {name} beside cuBLAS", adapters.error())
    rows.append(record.row(f"stack/beside_{name}", case, beside, "ms", vs=cublas))
    return rows


def expert_count_rows(stack, case, measure):
    """The number of experts should cost nothing at fixed K and r."""
    rows = []
    for num_experts in EXPERTS:
        mixture = {"num_experts": num_experts, "r": 16, "top_k": 2}
        adapters = Adapters(stack, **mixture)
        first = rows[0] if rows else None
        samples = measure(adapters.run)
        check(f"{stack.model} E {num_experts}", adapters.error())
        rows.append(record.row(f"stack/adapters_E{num_experts}", {**case, **mixture}, samples, "ms", vs=first))
        del adapters
        free()
    return rows


# --- switching -----------------------------------------------------------------------------------------------------------


def switch_rows(model):
    """One launch that switches all matrices, against a copy of as many bytes and against the vendor's matmul per matrix."""
    stack, case = Stack(model), {"model": model, "tokens": 1}
    source = stack.flat.clone()
    copy = record.row("copy/same_bytes", case, times(lambda: stack.flat.copy_(source), repeats=20), "ms")
    rows = [copy]
    for r in (64, 16):
        adapters = Adapters(stack, num_experts=8, r=r, top_k=2)
        mixture = {**case, "num_experts": 8, "r": r, "top_k": 2}
        routings = [routing(seed) for seed in (0, 1)]
        if r == 64:
            vendor = vendor_rows(stack, adapters, source, mixture, copy)
            rows += vendor.values()
        for name, table, old in (
            ("pristine", SwitchTable(segments(stack, adapters, source), top_k=2), None),
            ("in_place", SwitchTable(segments(stack, adapters), top_k=2), routings[1]),
        ):
            stack.flat.copy_(source)
            run = partial(switch, table, *routings[0], old=old)
            samples = times(graph_of(run, warmup=1).replay, repeats=10)
            stack.flat.copy_(source)
            run()
            check(f"switch {name} r {r}", switch_error(stack, adapters, source, routings[0], old))
            rows.append(record.row(f"switch/{name}_r{r}", mixture, samples, "ms", vs=copy))
            if r == 64:
                rival = vendor["addmm" if name == "pristine" else "addmm_in_place"]
                rows.append(record.row(f"switch/{name}_r64_vs_addmm", mixture, samples, "ms", vs=rival))
        del adapters, table
        free()
    return rows


def routing(seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randperm(8, generator=generator)[:2].int()[None].cuda()
    return experts, torch.rand(1, 2, generator=generator).cuda()


def segments(stack, adapters, source=None):
    """Every linear of the stack as a segment; `source` is laid out as stack.flat."""
    found, start = [], 0
    for block in range(stack.blocks):
        for index in range(len(stack.groups)):
            banks = zip(adapters.a[block][index], adapters.b[block][index], strict=True)
            for w, (a, b) in zip(stack.linears(block, index), banks, strict=True):
                untouched = None if source is None else source[start : start + w.numel()].view_as(w)
                found.append(Segment(w, b, a, adapters.r, adapters.num_experts, source=untouched))
                start += w.numel()
    return found


def vendor_rows(stack, adapters, source, case, copy):
    """The chosen experts concatenated beforehand, then a vendor's matmul a matrix: from the copy, in place, or with an addition apart."""
    found = segments(stack, adapters, source)

    def factors(experts):
        chosen = torch.arange(experts * adapters.r, device="cuda")
        return [(s.left[chosen].T.contiguous(), s.right[chosen].contiguous()) for s in found]

    two, four = factors(2), factors(4)

    def addmm():
        for s, (left, right) in zip(found, two, strict=True):
            torch.addmm(s.source, left, right, out=s.weight)

    def addmm_in_place():
        for s, (left, right) in zip(found, four, strict=True):
            s.weight.addmm_(left, right, alpha=1e-3)  # small: it is repeated

    def naive():
        for s, (left, right) in zip(found, two, strict=True):
            torch.add(s.source, left @ right, out=s.weight)

    rows = {}
    for run in (addmm, addmm_in_place, naive):
        samples = times(graph_of(run, warmup=1).replay, repeats=10)
        rows[run.__name__] = record.row(f"switch/{run.__name__}_per_matrix", case, samples, "ms", vs=copy)
    return rows


def switch_error(stack, adapters, source, new, old):
    """Of some matrices, against float64: how far from source + new (- old), relative to the whole."""
    errors = []
    for s in segments(stack, adapters, source)[:: max(1, 7 * stack.blocks // 9)]:
        exact = s.source.double() + delta(s, new) - (delta(s, old) if old else 0)
        errors.append(relative_error(s.weight, exact))
    return worst(errors)


def delta(segment, chosen):
    experts, weights = chosen
    rows = (experts[0].long()[:, None] * segment.r + torch.arange(segment.r, device="cuda")).flatten()
    left = segment.left[rows].double() * weights[0].double().repeat_interleave(segment.r)[:, None]
    return left.T @ segment.right[rows].double()


# --- batches -------------------------------------------------------------------------------------------------------------


def batch_rows(model, tokens, name, repeats):
    """Tokens that choose different experts, against the vendor's matmuls of the base alone, timed before, between and after them."""
    stack, case = Stack(model, tokens=tokens), {"model": model, "tokens": tokens}
    base, base_samples, found = graph_of(stack.run_cublas), [], []
    for r in (16, 64):
        base_samples += times(base.replay, stack.prepare, repeats)
        mixture = {"num_experts": 8, "r": r, "top_k": 2}
        batch = Batch(stack, **mixture)
        allowed = {
            "ratio_of_bytes": round(batch.ratio_of_bytes(), 3),
            "ratio_of_flops": round(batch.ratio_of_flops(), 3),
        }

        about = {**case, **mixture, **allowed}

        def measure(label, form, run, collect=None, batch=batch, about=about):
            samples = times(graph_of(run, warmup=1).replay, stack.prepare, repeats)
            if collect is not None:
                collect()
            check(f"{name}_{label}", batch.error())
            found.append((f"{name}_{label}", {**about, "form": form}, samples))

        # The row without a form is what the library runs: each group in the form that it takes, which the case says.
        taken = zip((group.name for group in stack.groups), batch.choices(), strict=True)
        measure(f"r{r}", ", ".join(f"{group} {form}" for group, form in taken), batch.run)
        for form, run in batch.forms().items():
            measure(f"r{r}_{form}", form, run)
        measure(f"r{r}_as_huggingface", "each linear its own", batch.run_as_huggingface, collect=batch.collect_separate)
        del batch, measure
        free()
    base_samples += times(base.replay, stack.prepare, repeats)
    base = record.row(f"{name}_backbone", case, base_samples, "ms")
    return [base, *(record.row(*each, "ms", vs=base) for each in found)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--only", choices=("stack", "switch", "batch"), help="some of the rows")
    parser.add_argument("--model", choices=MODELS, help="of one model; default: all (switch and batches of the first)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = []

    def measure(kind, part, *options):
        if args.only in (None, kind):
            rows.extend(part(*options))
            record.write(args.out, rows)  # what is there so far, should the machine be taken away
            free()

    for model in [args.model] if args.model else MODELS:
        measure("stack", stack_rows, model)
        if model == (args.model or MODELS[0]):
            measure("switch", switch_rows, model)
            for tokens in (2, 4, 8, 32, 64, 256):
                measure("batch", batch_rows, model, tokens, f"batch/T{tokens}", 20)
            measure("batch", batch_rows, model, 2048, "prefill/T2048", 8)


if __name__ == "__main__":
    main()
