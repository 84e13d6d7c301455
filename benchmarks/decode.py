"""Time of one more token, whole models: the engine, HuggingFace, merging, and the peers' layer-wise routing. One run, one GPU.

    adafuse bench decode --out benchmarks/results/h100/decode.json
    adafuse bench decode --out benchmarks/results/h100/decode.json --append --model mistral-7b --context 4096 --batch 4
    adafuse bench decode --out /tmp/some.json --only engine/backbone engine/fused_r64 --profile
    adafuse bench decode --tiny --out /tmp/tiny.json        # the plumbing, on a CPU

Random weights in bf16, 8 experts, 2 a token, all linears, greedy. Every row samples; then the next token is put in its place from a fixed
list whose experts change at every step, and copied to the host one step behind: a sample is the time from one such copy to the
next. Rows are written only if their logits are right.
"""

import argparse
import gc
import json
import time
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path

import record
import torch
from contestants import EngineRun, HfRun, MergePerMatrix, Without
from layerwise import LayerwiseStep, modules_of
from shapes import SHAPES
from stack import relative_error
from timing import best_read_times
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from adafuse import AdaFuseConfig, AdaFuseModel
from adafuse.baselines import LayerwiseConfig, LayerwiseModel, PescConfig, PescModel
from adafuse.engine.backbone import read_backbone

EXPERTS, TOP_K = 8, 2
LIMIT = 3e-2  # relative RMS error of bf16 logits behind all blocks
MERGED = 1e-1  # where experts were rounded into the weights
LONG, SHORT = 128, 24  # new tokens; SHORT where one takes hundreds of milliseconds
WARMUP = 8  # tokens that are not counted
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97,
}  # fmt: skip
ROWS = (
    "roofline", "hf/eager", "hf/compiled", "engine/backbone", "engine/fused_r64", "engine/fused_r16", "engine/switch_pristine",
    "engine/switch_in_place", "engine/merge_per_matrix", "graphed/layerwise_ours", "published/layerwise", "published/mola",
    "published/pesc", "graphed/layerwise", "graphed/mola", "graphed/pesc",
)  # fmt: skip
BASELINES = {
    "layerwise": (LayerwiseModel, LayerwiseConfig(r=64, num_experts=EXPERTS, top_k=TOP_K, lora_dropout=0.0)),
    "mola": (LayerwiseModel, LayerwiseConfig(r=64, num_experts=(2, 4, 6, 8), top_k=TOP_K, lora_dropout=0.0)),
    "pesc": (PescModel, PescConfig(num_experts=EXPERTS, top_k=TOP_K, adapter_dropout=0.0, lora_dropout=0.0)),
}

TINY_BASELINES = {
    "layerwise": {"r": 4},
    "mola": {"r": 4, "num_experts": (2, 8)},
    "pesc": {"bottleneck": 4, "lora_r": 4},
}


class Bench:
    """One model, context and batch: the base, the prompts, the tokens that are forced, and the rows so far."""

    def __init__(self, model, context, batch, device, only, profile=False, compile_mode=None):
        self.case = {"model": model, "context": context, "batch": batch}
        self.context, self.batch, self.device = context, batch, device
        self.only, self.profile, self.compile_mode = only, profile, compile_mode
        self.tiny = device == "cpu"
        self.new, self.short = (4, 4) if self.tiny else (LONG, SHORT)
        self.base = base_model(model, device)
        self.backbone = read_backbone(self.base)
        shape, generator = SHAPES[model], torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, shape["vocab_size"], (batch, context), generator=generator).to(device)
        self.router = torch.randn(EXPERTS, shape["hidden_size"], generator=generator).to(device)
        self.forced = self._forced_tokens(shape["vocab_size"], generator)
        self.rows, self.logits = {}, {}

    def _forced_tokens(self, vocab, generator):
        """[new, B]: of every row, tokens whose experts are others than those of the token before."""
        ids = torch.randperm(vocab, generator=generator)[:4096].to(self.device)
        h0 = self.backbone.embeddings(ids).float()
        logits = (h0 * torch.rsqrt(h0.square().mean(-1, keepdim=True) + 1e-6)) @ self.router.T
        sets = [tuple(sorted(each)) for each in logits.topk(TOP_K, dim=-1).indices.tolist()]
        rows = []
        for row in range(self.batch):
            taken, at = [], row * 17
            while len(taken) < self.new:
                at = (at + 1) % len(sets)
                if not taken or sets[at] != sets[taken[-1]]:
                    taken.append(at)
            rows.append(ids[taken])
        return torch.stack(rows, dim=1)

    def wants(self, name):
        return any(fnmatch(name, pattern) for pattern in self.only)

    # --- measuring ---------------------------------------------------------------------------------------------------

    def times(self, run, count):
        """Milliseconds of each of `count` tokens, after some that are not counted."""
        host = [torch.zeros(self.batch, dtype=torch.int64, pin_memory=not self.tiny) for _ in range(4)]
        stamps = []
        for n in range(count):
            run.token.copy_(self.forced[n])
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
        return [a.elapsed_time(b) for a, b in pairwise(stamps)][WARMUP:]

    def _stamp(self):
        if self.tiny:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name, run, count=None, vs=(), exact=None, limit=LIMIT, **case):
        """Time a contestant and make its rows. vs: the rows it is compared with, if they are there. exact: logits it should have."""
        start, count = time.time(), count or self.new
        samples = self.times(run, count)
        if not torch.isfinite(self.first).all():
            raise SystemExit(f"{name}: logits are no numbers")
        if exact is not None:
            check(name, relative_error(self.first, exact.double()), limit)
        self.logits[name] = self.first
        self.add_row(name, samples, vs, new_tokens=count, **case)
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
        if self.profile and not self.tiny:
            self.add_profile(name, run)

    def add_row(self, name, samples, vs=(), unit="ms", **case):
        found = [self.rows[other] for other in vs if other in self.rows]
        case = {**self.case, **case}
        self.rows[name] = record.row(name, case, samples, unit, vs=found[0] if found else None)
        for other in found[1:]:
            again = f"{name}_vs_{other['name'].rpartition('/')[2]}"
            self.rows[again] = record.row(again, case, samples, unit, vs=other)

    def add_profile(self, name, run):
        """Kernels a token launches, and how long they run, one by one (those that start early wait within that time)."""
        from torch.profiler import ProfilerActivity, profile

        run.token.copy_(self.forced[0])
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            run.step()
            torch.cuda.synchronize()
        kernels = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in kernels) / 1e3
        self.add_row(f"profile/{name}/launches", [len(kernels)] * 2, unit="launches")
        self.add_row(f"profile/{name}/kernels", [busy] * 2, vs=(name,))

    # --- the rows ----------------------------------------------------------------------------------------------------

    def run(self):
        self.hf_rows()
        self.engine_rows()
        for name in BASELINES:
            self.baseline_rows(name)
        return list(self.rows.values())

    def hf_rows(self):
        if self.wants("hf/eager") or self.wants("engine/backbone"):
            self.add("hf/eager", HfRun(self.base, self.ids, self.new, "eager"))
        if self.wants("hf/compiled"):
            how = "graphed" if self.tiny else "compiled"
            run = HfRun(self.base, self.ids, self.new, how, self.compile_mode)
            self.add("hf/compiled", run, vs=("hf/eager",), exact=self.logits.get("hf/eager"))
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
                exact=self.logits["hf/eager"],
            )
            free()
            if self.profile:
                self.ablations("engine/backbone", self.base)
        for r in (64, 16):
            if self.wants(f"engine/fused_r{r}") or (r == 64 and self._wants_merging()):
                self.adapted_rows(r)

    def _wants_merging(self):
        names = ("engine/switch_pristine", "engine/switch_in_place", "engine/merge_per_matrix")
        return self.batch == 1 and any(self.wants(name) for name in names)

    def adapted_rows(self, r):
        model = self.adapted(r)
        mixture = {"num_experts": EXPERTS, "r": model.adafuse_config.r, "top_k": TOP_K}
        self.times(HfRun(model, self.ids, self.new, "eager"), 1)
        exact = self.first
        if self.wants(f"engine/fused_r{r}"):
            run = EngineRun(model, self.ids, self.new)
            others = ("engine/backbone", f"roofline_r{r}", "hf/compiled")
            self.add(f"engine/fused_r{r}", run, vs=others, exact=exact, **mixture)
            del run
            free()
            if self.profile:
                self.ablations(f"engine/fused_r{r}", model)
        if r == 64 and self.batch == 1:
            self.merging_rows(model, exact, mixture)
        model.detach()
        free()

    def merging_rows(self, model, exact, mixture):
        vs = ("engine/fused_r64", "engine/backbone")
        for source in ("pristine", "in_place"):
            if self.wants(f"engine/switch_{source}"):
                model.switch_source = source
                model.execution = "switch"
                run = EngineRun(model, self.ids, self.new)
                self.add(f"engine/switch_{source}", run, count=self.short, vs=vs, exact=exact, limit=MERGED, **mixture)
                del run
                model.execution = "auto"
                free()
        if self.wants("engine/merge_per_matrix"):
            run = EngineRun(model, self.ids, self.new, make_step=MergePerMatrix)
            self.add("engine/merge_per_matrix", run, count=self.short, vs=vs, exact=exact, limit=MERGED, **mixture)
            run.runner._steps[self.batch, True].restore()
            del run
            free()

    def ablations(self, name, model):
        """What attention and the small kernels cost: the step without them, the token's time minus that."""
        whole = self.rows[name]["median"]
        for part in ("attention", "between"):
            run = EngineRun(model, self.ids, self.new, make_step=partial(Without, leave_out=(part,)))
            left = self.times(run, self.new)
            self.add_row(f"profile/{name}/{part}", [whole - each for each in left], vs=(name,))
            del run
            free()

    def adapted(self, r):
        rank = r // 16 if self.tiny else r
        model = AdaFuseModel(self.base, AdaFuseConfig(r=rank, num_experts=EXPERTS, top_k=TOP_K)).eval()
        model.router.weight.copy_(self.router)
        for bank in model.banks.values():
            bank.b.normal_(std=0.02 / r**0.5)
        return model

    def baseline_rows(self, name):
        rows = [how for how in ("published", "graphed") if self.wants(f"{how}/{name}")]
        ours = name == "layerwise" and self.wants("graphed/layerwise_ours")
        if not rows and not ours:
            return
        cls, config = BASELINES[name]
        config = replace(config, **TINY_BASELINES[name]) if self.tiny else config
        model = cls(self.base, config).eval()
        for key, tensor in model.adapter_tensors().items():
            if key.endswith(("experts_b", "shared_b")):
                tensor.normal_(std=0.002)
        vs, short = ("hf/compiled", "engine/fused_r64"), self.short
        names = ("num_experts", "top_k", "r", "bottleneck", "lora_r")
        mixture = {key: getattr(config, key) for key in names if hasattr(config, key)}
        for how, row_vs in (("published", ("hf/eager", *vs)), ("graphed", vs)):
            if how in rows:
                model.execution = how.replace("graphed", "graph")
                run = HfRun(model, self.ids, short, "eager" if how == "published" else "graphed")
                self.add(
                    f"{how}/{name}", run, count=short, vs=row_vs, exact=self.logits.get(f"published/{name}"), **mixture
                )
                del run
                free()
        if ours:
            self.layerwise_ours(model, config, vs, mixture)
        model.detach()
        del model
        free()

    def layerwise_ours(self, model, config, vs, mixture):
        """Its logits are compared where the cache holds no other prompt than these tokens."""
        modules = modules_of(self.base, len(self.backbone.blocks))
        make = partial(_layerwise_step, modules, config)
        model.execution = "graph"
        exact = model(input_ids=self.forced[:4].T).logits[:, -1].double()
        run = EngineRun.of_backbone(self.backbone, self.ids, self.new, make)
        run.runner.positions[: self.batch] = 0
        for n in range(4):
            run.token.copy_(self.forced[n])
            run.step()
        check("graphed/layerwise_ours", relative_error(run.logits.float(), exact))
        run.runner.positions[: self.batch] = self.context
        self.add("graphed/layerwise_ours", run, vs=(*vs, "graphed/layerwise"), **mixture)
        del run
        free()

    # --- the bound ---------------------------------------------------------------------------------------------------

    def roofline(self):
        """Bytes that one token must read over the best bandwidth of this run: weights, chosen experts, keys and values."""
        buffer = torch.empty(1 << 31, dtype=torch.bfloat16, device=self.device)
        per_byte = [sample / (2 * buffer.numel()) for sample in best_read_times(buffer)]
        del buffer
        free()
        blocks = [
            linear for block in self.backbone.blocks for linear in (*block.qkv, *block.o, *block.gate_up, *block.down)
        ]
        sizes = [linear.base.weight.shape for linear in blocks]
        linears = sum(o * i for o, i in sizes) + self.backbone.head.weight.numel()
        heads = self.backbone.num_kv_heads * self.backbone.head_dim * len(self.backbone.blocks)
        cached = 2 * heads * self.batch * (self.context + self.new // 2)
        bytes_moved = {"roofline": 2 * (linears + cached)}
        for r in (64, 16):
            # Distinct experts of a batch: at most all of them.
            active = min(EXPERTS, TOP_K * self.batch) * r * sum(o + i for o, i in sizes)
            bytes_moved[f"roofline_r{r}"] = 2 * (linears + cached + active)
        for name, moved in bytes_moved.items():
            self.add_row(name, [moved * each for each in per_byte], gigabytes=round(moved / 1e9, 3))


def _layerwise_step(modules, config, backbone, gate, cache, rotary, logits):
    return LayerwiseStep(backbone, modules, config, cache, rotary, logits)


def base_model(name, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    kinds = {"mistral": (MistralConfig, MistralForCausalLM)}
    config, cls = kinds.get(name.partition("-")[0], (LlamaConfig, LlamaForCausalLM))
    more = {"sliding_window": None} if cls is MistralForCausalLM else {}
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = cls(config(**SHAPES[name], max_position_embeddings=8192, **more))
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def check(name, error, limit=LIMIT):
    print(f"{name}: relative error {error:.1e}", flush=True)
    if not error < limit:
        raise SystemExit(f"{name}: relative error {error:.1e} is over {limit}; no timing is worth anything")


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def append(path, rows):
    """Rows of further cases to a file of the same machine and commit."""
    env, known = record.environment(), json.loads(Path(path).read_text()) if Path(path).is_file() else None
    if known is None:
        return rows
    if differing := [key for key in ("gpu", "driver", "torch", "triton", "git") if known["env"][key] != env[key]]:
        raise SystemExit(f"{path} is of another {differing[0]} ({known['env'][differing[0]]}); write to another file")
    cases = {json.dumps([row["name"], row["case"]], sort_keys=True) for row in rows}
    return [r for r in known["rows"] if json.dumps([r["name"], r["case"]], sort_keys=True) not in cases] + rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--append", action="store_true", help="keep the rows of other cases that the file has")
    parser.add_argument("--only", nargs="+", default=["*"], help=f"rows, patterns allowed: {', '.join(ROWS)}")
    parser.add_argument("--model", choices=[*SHAPES], default="llama-2-7b")
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1, choices=(1, 2, 4, 8))
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
    torch.set_grad_enabled(False)
    name, device, context = args.model, "cuda", args.context
    if args.tiny:
        name, device, context = "tiny", "cpu", min(context, 20)
        SHAPES[name] = TINY
    elif not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU; --tiny checks the plumbing without one")
    bench = Bench(name, context, args.batch, device, args.only, args.profile, args.compile_mode)
    rows = bench.run()
    record.write(args.out, append(args.out, rows) if args.append else rows)


if __name__ == "__main__":
    main()
