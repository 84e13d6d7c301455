"""Time of one more token, whole models: the engine, HuggingFace, merging, and the peers' layer-wise routing. One run, one GPU.

    adafuse bench decode --out benchmarks/results/h100/decode.json
    adafuse bench decode --out benchmarks/results/h100/decode.json --append --model mistral-7b --context 256 4096 --batch 1 4 8
    CUDA_VISIBLE_DEVICES=1 adafuse bench decode ... --append   # beside another on GPU 0, into the same file
    adafuse bench decode --out /tmp/some.json --only engine/backbone engine/fused_r64 --profile
    adafuse bench decode --tiny --out /tmp/tiny.json        # the plumbing, on a CPU

Random weights in bf16, 8 experts, 2 a token, all linears, greedy. Every row samples; then the next token is put in its place from a fixed
list whose experts change at every step ("_text": the tokens of a text, see text.json), and copied to the host one step behind: a sample is
the time from one such copy to the next. Rows are written only if their logits are right.
"""

import argparse
import statistics
import time
from fnmatch import fnmatch
from functools import cached_property, partial
from itertools import pairwise, product
from typing import NamedTuple

import record
import torch
from contestants import EngineRun, HfRun, MergePerMatrix, Without, parts_compiled
from layerwise import LayerwiseStep, modules_of
from shapes import SHAPES
from stack import relative_error
from timing import best_read_times, free, launch_times
from token_parts import Token, bare_of, busy, kernels_of
from whole_models import (
    BASELINES,
    EXPERTS,
    TINY,
    TOP_K,
    adapted,
    base_model,
    bytes_of_a_token,
    forced_tokens,
    in_fp32,
    mean_distinct,
    text_tokens,
    unchanged,
    with_baseline,
)

from adafuse.engine.backbone import read_backbone

LIMIT = 1.5  # times the error against fp32 that HuggingFace's own forward has in bf16
MERGED = 2  # the same where experts are rounded into the weights, or the router's weights to bf16
# New tokens. FEW: of what is published, where one takes hundreds of milliseconds, if no other number is asked for. The cache has room for
# NEW in every row.
NEW, FEW = 128, 12
MERGING = ("merge_per_matrix", "switch_pristine", "switch_in_place")
ROWS = (
    "roofline", "host/launch", "hf/eager", "hf/compiled", "engine/backbone", "engine/fused_r64", "engine/fused_r16",
    "engine/switch_pristine", "engine/switch_in_place", "engine/merge_per_matrix", "graphed/layerwise_ours", "published/layerwise",
    "published/mola", "published/pesc", "graphed/layerwise", "graphed/mola", "graphed/pesc",
)  # fmt: skip


class Measured(NamedTuple):
    """Of a contestant: ms of its tokens, how many it made, and the kernels of a step, if they were traced."""

    samples: list
    count: int
    kernels: list


class Bench:
    """One model, context and batch: the base, the prompts, the tokens that are forced, and the rows so far."""

    def __init__(self, model, context, batch, device, only, profile=False, compile_mode=None, until=None, few=FEW):
        self.case = {"model": model, "context": context, "batch": batch}
        self.context, self.batch, self.device = context, batch, device
        self.only, self.profile, self.compile_mode, self.until = only, profile, compile_mode, until
        self.tiny = device == "cpu"
        self.new, self.few = (3, 3) if self.tiny else (NEW, few)
        self.base = base_model(model, device)
        self.backbone = read_backbone(self.base)
        shape, generator = SHAPES[model], torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, shape["vocab_size"], (batch, context), generator=generator).to(device)
        self.router = torch.randn(EXPERTS, shape["hidden_size"], generator=generator).to(device)
        embeddings = self.backbone.embeddings
        self.forced = forced_tokens(embeddings, self.router, batch, self.new, generator)
        self.experts_a_step = mean_distinct(embeddings, self.router, self.forced)
        self.rows, self.tokens, self.wrong = {}, {}, []

    def wants(self, name):
        if not any(fnmatch(name, pattern) for pattern in self.only):
            return False
        if self.until is not None and time.time() > self.until:
            print(f"{name}: left out, the time is over", flush=True)
            return False
        return True

    # --- measuring ---------------------------------------------------------------------------------------------------

    def times(self, run, count, forced=None):
        """Milliseconds of each of `count` tokens, after some that are not counted. forced [count, B]: the tokens, None: the list."""
        forced = self.forced if forced is None else forced
        host = [torch.zeros(self.batch, dtype=torch.int64, pin_memory=not self.tiny) for _ in range(4)]
        stamps = []
        run.restart()
        for n in range(count):
            run.token.copy_(forced[n])
            run.step()
            if n == 0:
                self.first = run.logits.float().clone()
            host[n % 4].copy_(run.picked, non_blocking=True)
            stamps.append(self._stamp())
            if n and not self.tiny:
                stamps[n - 1].synchronize()  # the host reads a token while the next is computed
        if self.tiny:
            return [1e3 * (b - a) for a, b in pairwise(stamps)]
        torch.cuda.synchronize()
        warmup = 8 if count == NEW else 0 if count < FEW else 3  # tokens that are not counted
        return [a.elapsed_time(b) for a, b in pairwise(stamps)][warmup:]

    def _stamp(self):
        if self.tiny:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name, run, *, exact, count=None, vs=(), limit=LIMIT, **case):
        """Time a contestant and make its rows. vs: the rows it is compared with, if they are there. exact: what `exact` found, or None
        where logits were compared before."""
        measured = self.measure(name, run, exact=exact, count=count, limit=limit)
        if measured is not None:
            self.take(name, measured, vs, **case)

    def measure(self, name, run, *, exact, count=None, limit=LIMIT):
        """Times of a contestant's tokens, and with --profile a step's kernels; None if its logits are wrong."""
        start, count = time.time(), count or self.new
        samples = self.times(run, count)
        if exact is not None and not self.is_right(name, self.first, *exact, limit):
            return None
        kernels = []
        if self.profile:
            run.restart()
            run.token.copy_(self.forced[0])
            kernels = kernels_of(run.step)
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
        return Measured(samples, count, kernels)

    def take(self, name, measured, vs=(), **case):
        self.add_row(name, measured.samples, vs, new_tokens=measured.count, **case)
        self.tokens[name] = Token(name, self.rows[name]["median"], measured.kernels)

    def add_row(self, name, samples, vs=(), unit="ms", **case):
        found = [self.rows[other] for other in vs if other in self.rows]
        case = {**self.case, **case}
        self.rows[name] = record.row(name, case, samples, unit, vs=found[0] if found else None)
        for other in found[1:]:
            again = f"{name}_vs_{other['name'].rpartition('/')[2]}"
            self.rows[again] = record.row(again, case, samples, unit, vs=other)

    def part_rows(self):
        """What the tokens' times are made of: `token_parts`."""
        launch = self.rows["host/launch"]["median"] if "host/launch" in self.rows else None
        if launch is not None:  # again: whether tracing has slowed the launches of the rows that came after it
            self.add_row("profile/host/launch", launch_times(self.device), vs=("host/launch",), unit="us")
        for name, token in self.tokens.items():
            self.add_row(f"profile/{name}/launches", [len(token.kernels)] * 2, unit="launches")
            one_by_one = sum(kernel.end - kernel.start for kernel in token.kernels)
            parts = {"kernels": one_by_one, "busy": busy(token.kernels)}
            parts |= token.parts(launch, self.tokens.get(bare_of(name)))
            for part, ms in parts.items():
                self.add_row(f"profile/{name}/{part}", [ms] * 2, vs=(name,))

    # --- the rows ----------------------------------------------------------------------------------------------------

    def run(self):
        if self.wants("host/launch") and not self.tiny:
            self.add_row("host/launch", launch_times(self.device), unit="us")
        self.hf_rows()
        self.engine_rows()
        for name in BASELINES:
            self.baseline_rows(name)
        if self.profile:
            self.part_rows()

    def exact(self, model):
        """The first token's logits [B, V] computed in fp32, as fp64, and the error of those in bf16, both by HuggingFace's forward."""
        self.times(HfRun(model, self.ids, self.new, "eager"), 1)
        rounded = self.first
        with in_fp32(model):
            self.times(HfRun(model, self.ids, self.new, "eager"), 1)
        free()
        logits = self.first.double()
        return logits, relative_error(rounded, logits)

    def is_right(self, name, logits, exact, rounded, limit):
        """Whether logits are within `limit` times the error `rounded`; if not the run goes on without the row, and fails at its end."""
        error, limit = relative_error(logits, exact), 1e-5 if self.tiny else limit * rounded  # the toy is in fp32
        print(f"{name}: relative error {error:.1e}, allowed {limit:.1e}", flush=True)
        if not error < limit:
            self.wrong.append(name)
        return error < limit

    @cached_property
    def exact_backbone(self):
        """What `exact` finds of the bare model. First asked for while no adapter is attached."""
        return self.exact(self.base)

    def hf_rows(self):
        if self.wants("hf/eager"):
            self.add("hf/eager", HfRun(self.base, self.ids, self.new, "eager"), exact=self.exact_backbone)
        if self.wants("hf/compiled"):
            how = "graphed" if self.tiny else "compiled"
            run = HfRun(self.base, self.ids, self.new, how, self.compile_mode)
            self.add("hf/compiled", run, vs=("hf/eager",), exact=self.exact_backbone)
            del run
            torch.compiler.reset()
        free()

    def engine_rows(self):
        if self.wants("roofline") and not self.tiny:
            self.roofline()
        if self.wants("engine/backbone"):
            self.add(
                "engine/backbone",
                EngineRun(self.base, self.ids, self.new),
                vs=("hf/compiled", "roofline"),
                exact=self.exact_backbone,
            )
            free()
        for r in (64, 16):  # one right after the other, so that they are compared on a GPU of one temperature
            if self.wants(f"engine/fused_r{r}"):
                self.fused_rows(r)
        if self.profile:
            self.ablations("engine/backbone", self.base)
        if self.batch == 1 and any(self.wants(f"engine/{way}") for way in MERGING):
            self.merging_rows()

    def text_row(self, name, run, mixture):
        """The same with the tokens of a text, where experts do not change at every one."""
        if self.batch == 1 and name in self.rows:
            forced, share = text_tokens(self.backbone.embeddings, self.router, self.new)
            samples = self.times(run, self.new, forced)
            self.add_row(f"{name}_text", samples, (name,), new_tokens=self.new, changes=round(share, 3), **mixture)

    def _adapted(self, r):
        """(model, what `exact` finds of it, its part of the case)."""
        model = adapted(self.base, r // 16 if self.tiny else r, self.router)
        mixture = {"num_experts": EXPERTS, "r": model.adafuse_config.r, "top_k": TOP_K}
        mixture["experts_a_step"] = round(self.experts_a_step, 3)
        return model, self.exact(model), mixture

    def fused_rows(self, r):
        model, exact, mixture = self._adapted(r)
        name, others = f"engine/fused_r{r}", ("engine/backbone", f"roofline_r{r}", "hf/compiled")
        run = EngineRun(model, self.ids, self.new)
        self.add(name, run, vs=others, exact=exact, **mixture)
        if r == 64:
            self.text_row(name, run, mixture)
        del run
        free()
        if self.profile:
            self.ablations(name, model)
        model.detach()
        free()

    def merging_rows(self):
        model, exact, mixture = self._adapted(64)
        vs = ("engine/fused_r64", "engine/backbone")
        if self.wants("engine/merge_per_matrix"):
            run = EngineRun(model, self.ids, self.new, make_step=MergePerMatrix)
            self.add("engine/merge_per_matrix", run, vs=vs, exact=exact, limit=MERGED, **mixture)
            run.runner._steps[self.batch, True].restore()
            del run
            free()
        for source in ("pristine", "in_place"):
            if self.wants(f"engine/switch_{source}"):
                with unchanged(self.backbone):
                    self.switch_rows(model, source, exact, mixture, vs)
                free()
        model.detach()
        free()

    def switch_rows(self, model, source, exact, mixture, vs):
        model.switch_source = source
        model.execution = "switch"
        run = EngineRun(model, self.ids, self.new)
        self.add(f"engine/switch_{source}", run, vs=vs, exact=exact, limit=MERGED, **mixture)
        self.text_row(f"engine/switch_{source}", run, mixture)
        model.execution = "auto"

    def ablations(self, name, model):
        """What the engine's step is shorter without some of its launches: attention, and the small kernels between the linears."""
        if name not in self.tokens:
            return
        token = self.tokens[name]
        for part in ("attention", "between"):
            run = EngineRun(model, self.ids, self.new, make_step=partial(Without, leave_out=(part,)))
            token.left_out[part] = token.ms - statistics.median(self.times(run, self.new))
            del run
            free()

    def baseline_rows(self, name):
        published, graphed = (self.wants(f"{how}/{name}") for how in ("published", "graphed"))
        ours = name == "layerwise" and self.wants("graphed/layerwise_ours")
        if not (published or graphed or ours):
            return
        model, config = with_baseline(self.base, name, self.tiny)
        vs = ("hf/compiled", "engine/fused_r64")
        names = ("num_experts", "top_k", "r", "bottleneck", "lora_r")
        mixture = {key: getattr(config, key) for key in names if hasattr(config, key)}
        model.execution = "published"
        exact = self.exact(model) if published or graphed else None
        if published:
            run = HfRun(model, self.ids, self.new, "eager")
            self.add(f"published/{name}", run, count=self.few, vs=("hf/eager", *vs), exact=exact, **mixture)
            del run
            free()
        if graphed:
            self.graphed_rows(f"graphed/{name}", model, vs, exact, mixture)
        if ours:
            self.layerwise_ours(model, config, vs, mixture)
        model.detach()
        del model
        free()

    def graphed_rows(self, name, model, vs, exact, mixture):
        """The row is the fastest of the forms that a graph can hold; the others get rows that are named after them."""
        found = {}
        for form in (each for each in model.executions if each != "published"):
            measured = self._graphed(f"{name} as {form}", model, form, exact)
            if measured is not None:
                found[form] = measured
            free()
        for form in sorted(found, key=lambda form: statistics.median(found[form].samples)):
            if name not in self.rows:
                self.take(name, found[form], vs, form=form, **mixture)
            else:
                self.take(f"{name}_{form}", found[form], (name,), form=form, **mixture)

    def _graphed(self, name, model, form, exact):
        model.execution = "graph"  # of the prompts: kernels for many tokens need not be compiled
        run = HfRun(model, self.ids, self.new, "graphed", start=False)
        model.execution = form
        with parts_compiled(model, backend="eager" if self.tiny else "inductor"):
            run.start()
            return self.measure(name, run, exact=exact)

    def layerwise_ours(self, model, config, vs, mixture):
        """Its logits are compared where the cache holds no other prompt than these tokens."""
        modules = modules_of(self.base, len(self.backbone.blocks))
        make = partial(_layerwise_step, modules, config)
        model.execution = "graph"
        few = self.forced[:3]
        ids = few.T
        rounded = model(input_ids=ids).logits[:, -1]
        with in_fp32(model):
            exact = model(input_ids=ids).logits[:, -1].double()
        run = EngineRun.of_backbone(self.backbone, self.ids, self.new, make)
        run.runner.positions[: self.batch] = 0
        for token in few:
            run.token.copy_(token)
            run.step()
        if not self.is_right("graphed/layerwise_ours", run.logits, exact, relative_error(rounded, exact), MERGED):
            return
        self.add("graphed/layerwise_ours", run, exact=None, vs=(*vs, "graphed/layerwise"), **mixture)
        del run
        free()

    def roofline(self):
        """The bytes that one token must read, over the best bandwidth of this run."""
        buffer = torch.empty(1 << 31, dtype=torch.bfloat16, device=self.device)
        per_byte = [sample / (2 * buffer.numel()) for sample in best_read_times(buffer)]
        del buffer
        free()
        cached = self.context + self.new // 2
        for name, moved in bytes_of_a_token(self.backbone, self.batch, cached, self.experts_a_step).items():
            case = {} if name == "roofline" else {"experts_a_step": round(self.experts_a_step, 3)}
            self.add_row(name, [moved * each for each in per_byte], gigabytes=round(moved / 1e9, 3), **case)


def _layerwise_step(modules, config, backbone, gate, cache, rotary, logits):
    return LayerwiseStep(backbone, modules, config, cache, rotary, logits)


def append(path, rows):
    """Rows of further cases to a file of the same machine and commit: models as in SHAPES, contexts and batches in order."""
    models = list(SHAPES)
    rows = record.appended(path, rows, _place)
    return sorted(rows, key=lambda row: (models.index(row["case"]["model"]), *_place(row)[2:]))


def _place(row):
    """What a row is of: a later one of the same takes its place, whatever else it found."""
    return row["name"], *(row["case"][key] for key in ("model", "context", "batch"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--append", action="store_true", help="keep the rows of other cases that the file has")
    parser.add_argument("--only", nargs="+", default=["*"], help=f"rows, patterns allowed: {', '.join(ROWS)}")
    parser.add_argument("--model", nargs="+", choices=[*SHAPES], default=["llama-2-7b"])
    parser.add_argument("--context", nargs="+", type=int, default=[256], help="tokens of the prompt")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], choices=(1, 2, 4, 8))
    parser.add_argument(
        "--published-tokens", type=int, default=FEW, choices=range(FEW, NEW + 1), metavar="N",
        help=f"new tokens of the rows of what is published, {FEW} (the default) to {NEW}",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, help="rows that would begin later are left out")
    parser.add_argument(
        "--profile", action="store_true", help="launches, and what parts of a step cost, as rows of their own"
    )
    parser.add_argument("--compile-mode", help="torch.compile's, for hf/compiled")
    parser.add_argument(
        "--tiny", action="store_true", help="a toy model on a CPU: checks the plumbing, measures nothing"
    )
    args = parser.parse_args()
    if unknown := [each for each in args.only if not any(fnmatch(name, each) for name in ROWS)]:
        parser.error(f"--only {unknown[0]} names no row; there are {', '.join(ROWS)}")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU; --tiny checks the plumbing without one")
    if args.tiny:
        SHAPES["tiny"] = TINY
        args.model, args.context = ["tiny"], [20]
    torch.set_grad_enabled(False)
    until = time.time() + 60 * args.minutes if args.minutes else None
    rows, wrong = [], []
    for case in product(args.model, args.context, args.batch):
        options = {"profile": args.profile, "compile_mode": args.compile_mode, "until": until}
        options["few"] = args.published_tokens
        bench = Bench(*case, "cpu" if args.tiny else "cuda", args.only, **options)
        try:
            bench.run()
        finally:  # what was measured is there if something later fails
            rows += bench.rows.values()
            wrong += bench.wrong
            if rows:
                with record.alone(args.out):
                    record.write(args.out, append(args.out, rows) if args.append else rows)
        del bench
        free()
    if wrong:
        raise SystemExit(f"the logits of {', '.join(wrong)} are wrong: no rows were written for them")


if __name__ == "__main__":
    main()
