"""Markdown tables made from the committed results, written between markers in the docs.

python benchmarks/tables.py          # rewrite the tables
python benchmarks/tables.py --check  # exit code 1 if one is out of date (the tests do this)
"""

import argparse
import json
import os
import re
import statistics
import sys
from pathlib import Path

import serve_tables
from accuracy.heatmap import overlap, shares_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "accuracy.md",
    ROOT / "docs" / "evaluation.md",
    ROOT / "docs" / "kernels.md",
    ROOT / "docs" / "latency.md",
    ROOT / "docs" / "serving.md",
    ROOT / "benchmarks" / "domains" / "SOURCES.md",
)
# <!-- table NAME GPU --> ... <!-- end -->: NAME is a key of TABLES, up to a dot the name of a result file.
MARKED = re.compile(r"(<!-- table ([\w.]+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def train_step(rows):
    """Step times of the mixtures and of LoRA, medians, a line a case."""
    names = {row["name"]: _mixture(row["case"]) for row in rows if row["vs"]}
    lines = [f"| model | tokens a step | LoRA, r {rows[0]['case']['r']} | {' | '.join(names.values())} |"]
    lines.append("|---|---|---|" + "---|" * len(names))
    for lora in (row for row in rows if not row["vs"]):
        where = ("model", "tokens", "checkpointing")
        same = {row["name"]: row for row in rows if all(row["case"][key] == lora["case"][key] for key in where)}
        cells = [f"{same[name]['median']:.0f} ms, {same[name]['ratio']:.2f}x" for name in names]
        note = ", checkpointed" if lora["case"]["checkpointing"] else ""
        lines.append(
            f"| {lora['case']['model']}{note} | {lora['case']['tokens']} | {lora['median']:.0f} ms | {' | '.join(cells)} |"
        )
    return lines


def demo(rows):
    """Held-out accuracy by domain, before and after: mean over the seeds."""
    seeds = sorted({row["case"]["seed"] for row in rows})
    lines = ["| domain | before | after |", "|---|---|---|"]
    for domain in dict.fromkeys(row["case"]["domain"] for row in rows):
        found = [row for row in rows if row["case"]["domain"] == domain]
        means = [
            statistics.mean(row["median"] for row in found if row["name"] == f"demo/{when}")
            for when in ("before", "after")
        ]
        lines.append(f"| {domain} | {means[0]:.0%} | {means[1]:.0%} |")
    items = rows[0]["case"]["items"]
    return [
        *lines,
        "",
        f"{items} items a domain and seed, mean over {len(seeds)} seeds, {rows[0]['case']['steps']} steps of training.",
    ]


def choices(rows):
    """Both programs' numbers, for the base and the adapted model."""
    values = {row["name"].removeprefix("choices/"): row["median"] for row in rows}
    lines = ["| | accuracy, `adafuse eval` | NLL per token | `acc`, lm-eval |", "|---|---|---|---|"]
    for name in ("base", "adapter"):
        accuracy, nll, acc = (values[f"{name}/{what}"] for what in ("adafuse_accuracy", "adafuse_nll", "lm_eval_acc"))
        lines.append(f"| {name} | {accuracy:.1%} | {nll:.3f} | {acc:.1%} |")
    return [*lines, "", f"{rows[0]['case']['items']} held-out questions of the demo, four choices each."]


def kernels(rows):
    """A line a row of each model: the median, and what it is compared with."""
    lines = ["| model | row | ms | compared with | ratio | target |", "|---|---|---|---|---|---|"]
    for row in rows:
        target = _kernel_target(row) if row["case"]["model"] == rows[0]["case"]["model"] else ""
        ratio = f"{row['ratio']:.3f}" if row["ratio"] else ""
        lines.append(
            f"| {row['case']['model']} | {row['name']} | {row['median']:.3f} | {row['vs'] or ''} | {ratio} | {target} |"
        )
    return lines


def kernels_summary(rows):
    """What a mixture costs above the base alone, by kind of step, for the first model."""
    found = {row["name"]: row for row in rows if row["case"]["model"] == rows[0]["case"]["model"]}
    lines = ["| step | base alone | r 16 | r 64 |", "|---|---|---|---|"]
    steps = (
        ("one token", "stack/backbone", "stack/adapters"),
        ("32 tokens of as many sequences", "batch/T32_backbone", "batch/T32"),
        ("256 tokens", "batch/T256_backbone", "batch/T256"),
        ("prompt of 2048 tokens", "prefill/T2048_backbone", "prefill/T2048"),
    )
    for title, base, name in steps:
        alone = found[base]["median"]
        mixtures = [found[f"{name}_r{r}"]["median"] for r in (16, 64)]
        cells = " | ".join(f"{median:.2f} ms, {median / alone:.2f}x" for median in mixtures)
        lines.append(f"| {title} | {alone:.2f} ms | {cells} |")
    one, switched = found["stack/adapters_r64"], found["switch/pristine_r64"]
    cublas = found["stack/cublas"]["median"]
    return [
        *lines,
        "",
        f"Linears of {rows[0]['case']['model']}, bf16, 8 experts, 2 a token, random weights, replayed CUDA graphs. Base alone: our "
        f"kernels for one token (cuBLAS takes {cublas:.2f} ms), cuBLAS for more. One token with r 64 takes {one['ratio']:.3f} times "
        f"what reading its bytes takes; merging its experts into the weights first, as published, {switched['median']:.2f} ms more.",
    ]


def _kernel_target(row):
    """The ratio a row is held to, or nothing."""
    if row["name"].split("_r")[0] in ("batch/T32", "batch/T256") and "ratio_of_bytes" in row["case"]:
        return f"{1.1 * max(row['case']['ratio_of_bytes'], row['case']['ratio_of_flops']):.3f}"
    return KERNEL_TARGETS.get(row["name"], "")


# Of Llama-2-7B; what the kernels are held to.
KERNEL_TARGETS = {
    "stack/backbone": 1.05,
    "stack/backbone_vs_cublas": 0.92,
    "stack/adapters_r64": 1.07,
    "stack/adapters_r16": 1.06,
    "stack/adapters_fine": 1.08,
    "switch/pristine_r64": 1.2,
    "switch/in_place_r64": 1.4,
    "switch/pristine_r64_vs_addmm": 1.0,
    "prefill/T2048_r64": 1.2,
}


def decode(rows):
    """A line a row of the first case: the median, and what it is compared with. Of a profile: `decode_profile`."""
    lines = ["| row | new tokens | ms | compared with | ratio | target |", "|---|---|---|---|---|---|"]
    for name, row in of_first_case(rows).items():
        if name.startswith("profile/") or row["unit"] != "ms":
            continue
        ratio = f"{row['ratio']:.3f}" if row["ratio"] else ""
        new, target = row["case"].get("new_tokens", ""), DECODE_TARGETS.get(name, "")
        cells = (name, new, f"{row['median']:.3f}", row["vs"] or "", ratio, target)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def decode_cases(rows):
    """A line a model, context and number of sequences: what a step takes in each way, and what its bytes take."""
    heads = ["model", "context", "sequences", *DECODE_CASES.values(), "experts of r 64: time", "bytes"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in dict.fromkeys(map(case_of, rows)):
        found = {row["name"]: row["median"] for row in rows if case_of(row) == case}
        times = [f"{found[name]:.2f}" if name in found else "" for name in DECODE_CASES]
        grown = [
            f"{found[mixture] / found[alone]:.2f}x" if mixture in found and alone in found else ""
            for mixture, alone in (("engine/fused_r64", "engine/backbone"), ("roofline_r64", "roofline"))
        ]
        lines.append(f"| {' | '.join(map(str, (*case, *times, *grown)))} |")
    return lines


def decode_summary(rows):
    """What a token takes in each way, for the first case."""
    found = of_first_case(rows)
    lines = ["| a token of Llama-2-7B | ms | of bare HuggingFace, compiled | of ours, r 64 |", "|---|---|---|---|"]
    compiled, ours = found["hf/compiled"]["median"], found["engine/fused_r64"]["median"]
    new = found["engine/fused_r64"]["case"]["new_tokens"]
    for name, title in DECODE_WAYS.items():
        median, own = found[name]["median"], found[name]["case"]["new_tokens"]
        title += "" if own == new else f" ({own} new tokens)"
        lines.append(f"| {title} | {median:.2f} | {median / compiled:.2f}x | {median / ours:.2f}x |")
    launch, eager = found["host/launch"]["median"], found["hf/eager"]["median"]
    what = (
        f"Shapes of Llama-2-7B with random weights, bf16, batch 1, context 256, {new} new tokens where nothing else is said, all linears "
        "adapted, 8 experts, 2 a token that change at every token, greedy sampling included; medians of one run."
    )
    bound = f"Reading what must be read takes {found['roofline_r64']['median']:.2f} ms with the experts of r 64."
    host = (
        f"What is published is launched from Python, so it measures the host too: one launch takes it {launch:.1f} us, a token of the bare "
        f"HuggingFace model without graphs {eager:.0f} ms."
    )
    return [*lines, "", f"{what} {bound} {host}"]


def decode_headline(rows):
    """What knowing the experts beforehand is worth: layer-wise routing, in the form that is as fast as ours can make it, over ours."""
    found = of_first_case(rows)
    layerwise, ours, alone = (
        found[name]["median"] for name in ("graphed/layerwise_ours", "engine/fused_r64", "engine/backbone")
    )
    times = (
        f"**Layer-wise routing on the very same engine and kernels takes {layerwise / ours:.2f} times as long a token**"
    )
    case = "for one sequence of Llama-2-7B with 2 of 8 experts of rank 64 on every linear"
    several = [_times_of_layerwise(rows, batch) for batch in (4, 8)]
    return [
        f"{times}: {layerwise:.2f} ms against {ours:.2f} ms {case}, where the bare model takes {alone:.2f} ms. With 4 sequences it is "
        f"{several[0]}, with 8 {several[1]} times (Mistral-7B, Llama-3.2-1B; NVIDIA H100, [all figures](docs/latency.md))."
    ]


def _times_of_layerwise(rows, batch):
    """The range over the other models and contexts, of so many sequences."""
    times = {"graphed/layerwise_ours": {}, "engine/fused_r64": {}}
    for row in rows:
        if row["case"]["batch"] == batch and row["name"] in times:
            times[row["name"]][row["case"]["model"], row["case"]["context"]] = row["median"]
    layerwise, ours = times.values()
    ratios = sorted(layerwise[case] / ours[case] for case in ours)
    return f"{ratios[0]:.2f} to {ratios[-1]:.2f}"


def decode_profile(rows):
    """Launches of a token and what its time is made of, for the first case."""
    found = of_first_case(rows)
    lines = [
        f"| row | ms | launches | kernels one by one, ms | {' | '.join(DECODE_PARTS.values())} |",
        "|---|---|---|---|" + "---|" * len(DECODE_PARTS),
    ]
    for name in (name for name in found if f"profile/{name}/launches" in found):
        launches, kernels = (found[f"profile/{name}/{what}"]["median"] for what in ("launches", "kernels"))
        cells = " | ".join(_part(found, name, part) for part in DECODE_PARTS)
        lines.append(f"| {name} | {found[name]['median']:.2f} | {launches:.0f} | {kernels:.2f} | {cells} |")
    return lines


def _part(found, name, part):
    """A part's ms; nothing where the row has no such part, "not split" where it was not told from the rest."""
    if row := found.get(f"profile/{name}/{part}"):
        return f"{row['median']:.2f}"
    bare = name in ("hf/eager", "hf/compiled", "engine/backbone")
    graphed = not name.startswith(("hf/eager", "published/"))
    return "" if (part == "adapters" and bare) or (part == "python" and graphed) else "not split"


# Parts of a token's time, as benchmarks/token_parts.py splits it, and what tables call them.
DECODE_PARTS = {
    "launching": "in launches",
    "python": "in Python besides",
    "attention": "in attention",
    "between": "in norms, activation",
    "adapters": "in adapters",
    "rest": "in the rest",
}


def case_of(row):
    """(model, context, batch) of a row of decode."""
    return tuple(row["case"].get(key, "") for key in ("model", "context", "batch"))


def of_first_case(rows):
    """Name -> row, of the case that comes first."""
    return {row["name"]: row for row in rows if case_of(row) == case_of(rows[0])}


# What the README says of each row.
DECODE_WAYS = {
    "hf/compiled": "bare HuggingFace model, torch.compile, static cache, CUDA graph",
    "engine/backbone": "bare model, this engine",
    "engine/fused_r16": "**mixture, r 16, this engine**",
    "engine/fused_r64": "**mixture, r 64, this engine**",
    "graphed/layerwise_ours": "layer-wise routing, r 64, on this engine and its kernels",
    "graphed/layerwise": "layer-wise routing, r 64, HuggingFace's forward in a CUDA graph",
    "engine/switch_pristine": "merging the token's experts in one launch, this engine",
    "published/layerwise": "layer-wise routing, r 64, the way it is published",
}
# Rows of a case's line in `decode_cases`, in ms.
DECODE_CASES = {
    "roofline": "bytes of the bare model",
    "hf/compiled": "HuggingFace, compiled",
    "engine/backbone": "bare",
    "engine/fused_r16": "r 16",
    "engine/fused_r64": "r 64",
    "graphed/layerwise_ours": "layer-wise on our kernels",
    "graphed/layerwise": "layer-wise, HuggingFace's graph",
}
# Of Llama-2-7B, context 256, batch 1: what the ratio is held to.
DECODE_TARGETS = {
    "engine/backbone": "<= 0.82",
    "engine/backbone_vs_roofline": "<= 1.12",
    "engine/fused_r64": "<= 1.08",
    "engine/fused_r16": "<= 1.05",
    "engine/fused_r64_vs_compiled": "<= 0.95",
    "published/layerwise_vs_fused_r64": ">= 2.4",
    "published/mola_vs_fused_r64": ">= 2.4",
    "published/pesc_vs_fused_r64": ">= 2.4",
}


def executions(rows):
    """HuggingFace's forward: the backbone, and above it the reference and the kernels."""
    lines = ["| model | sequences x tokens | backbone, ms | r | reference | fused |", "|---|---|---|---|---|---|"]

    def key(row, *names):
        return tuple(row["case"][name] for name in names)

    same = ("model", "sequences", "tokens")
    backbones = {key(row, *same): row["median"] for row in rows if row["name"] == "forward/backbone"}
    fused = {key(row, *same, "r"): row for row in rows if row["name"] == "forward/fused"}
    for row in (row for row in rows if row["name"] == "forward/reference"):
        model, sequences, tokens = key(row, *same)
        alone, other = backbones[model, sequences, tokens], fused[key(row, *same, "r")]
        cells = " | ".join(f"{each['median']:.0f} ms, {each['ratio']:.2f}x" for each in (row, other))
        lines.append(f"| {model} | {sequences} x {tokens} | {alone:.0f} | {row['case']['r']} | {cells} |")
    return [*lines, "", f"One launch takes this host {rows[0]['median']:.1f} us."]


def drift(rows):
    """Relative error of weights that were switched in place, by tokens and dtype."""
    dtypes = list(dict.fromkeys(row["case"]["dtype"] for row in rows))
    found = {(row["case"]["tokens"], row["case"]["dtype"]): row for row in rows}
    lines = [f"| tokens | {' | '.join(dtypes)} |", "|---|" + "---|" * len(dtypes)]
    for tokens in dict.fromkeys(row["case"]["tokens"] for row in rows):
        cells = " | ".join(f"{found[tokens, dtype]['median']:.1e}" for dtype in dtypes)
        lines.append(f"| {tokens} | {cells} |")
    return lines


def domains(rows):
    """Accuracy of readers that know nothing, by domain."""
    lines = ["| domain | random | choices only | most overlap |", "|---|---|---|---|"]
    for row in rows:
        values = [f"{row[what]:.1%}" for what in ("random", "choices only", "most overlap")]
        lines.append(f"| {row['name'].removeprefix('domains/')} | {' | '.join(values)} |")
    return [*lines, "", f"{rows[0]['case']['items']} test items a domain, seed {rows[0]['case']['seed']}."]


def accuracy(rows):
    """A line a method, best first: accuracy over domains and seeds, what it costs, and what the best pre-gate is above it."""
    rows = [row for row in rows if row["name"].startswith("accuracy/")]
    whole = list(_of_all_seeds(rows, "mean").values())
    lines = [
        "| method | built as, learning rate | accuracy, % | NLL | parameters, M | active rank | MB a token | to layer-wise | "
        "best pre-gate above it | target |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(whole, key=lambda row: -row["median"]):
        name, case = row["name"].removeprefix("accuracy/"), row["case"]
        spread = f" ± {row['std']:.2f}" if row["std"] is not None else ""
        built_as = "" if case["built_as"] == name else f"{case['built_as']}, "
        lines.append(
            f"| {name} | {built_as}{case['learning_rate']:g} | {row['median']:.2f}{spread} | {row['nll']:.3f} | "
            f"{case['params'] / 1e6:.2f} | {case['active_rank']:.3g} | {case['bytes_per_token'] / 1e6:.1f} | "
            f"{_interval(row.get('diff_to_layerwise'))} | "
            f"{_interval(row.get('diff_of_pregate_best'))} | "
            f"{_reached(row.get('diff_of_pregate_best'), ACCURACY_TARGETS.get(name))} |"
        )
    seeds = {row["case"]["seed"] for row in rows} - {"all"}
    items = next(row["case"]["items"] for row in whole)
    further = [
        f"{row['name'].removeprefix('accuracy/')} above {key.removeprefix('diff_to_')}: {_interval(row[key])}."
        for row in whole
        for key in row
        if key.startswith("diff_to_") and key != "diff_to_layerwise" and not key.endswith("_without")
    ]
    return [
        *lines,
        *(["", " ".join(further)] if further else []),
        "",
        f"Mean over domains and {len(seeds)} seeds ± standard deviation over the seeds, {items} test items. NLL: nats per token of the "
        "right answers. MB a token: what is read of experts (bf16) and routers (fp32), unmerged. Differences in points: "
        "middle [95 % interval of a paired bootstrap over seeds and items].",
    ]


def _of_all_seeds(rows, domain):
    """Method -> its row for a domain, or the mean over domains, over all seeds. Trials have no domain."""
    found = (row for row in rows if (row["case"].get("domain"), row["case"]["seed"]) == (domain, "all"))
    return {row["name"].removeprefix("accuracy/"): row for row in found}


def accuracy_headline(rows):
    """What the study found, in a few sentences: pre-gates beside layer-wise routing and plain LoRA."""
    found = _of_all_seeds(rows, "mean")
    best, layerwise = found["pregate_best"], found["layerwise"]
    paper, above = (_interval(found[name]["diff_to_layerwise"]) for name in ("pregate_paper", "pregate_best"))
    active, total = (_interval(found[name]["diff_of_pregate_best"]) for name in ("lora_active", "lora_total"))
    domain, without = min(best["diff_to_layerwise_without"].items(), key=lambda pair: pair[1][1])
    return [
        f"**As accurate as layer-wise routing**: {paper} points in the paper's form, {above} in the best one found "
        f"({best['median']:.1f} % and {layerwise['median']:.1f} % of the answers right; 95 % intervals; SmolLM2-135M, seven domains, five "
        f"seeds), though without one domain, {domain}, the latter is {_interval(without)}. **Not measurably better than a plain LoRA** of "
        f"the rank that a token uses ({active}), and behind one of the rank of all experts together ({total}), which merges into the "
        "weights for free ([the study](docs/accuracy.md))."
    ]


def accuracy_without(rows):
    """A line a domain: the best pre-gate above layer-wise routing there, and without it."""
    lines = ["| domain | pregate_best above layerwise | without this domain |", "|---|---|---|"]
    for domain, without in _of_all_seeds(rows, "mean")["pregate_best"]["diff_to_layerwise_without"].items():
        there = _of_all_seeds(rows, domain)["pregate_best"]["diff_to_layerwise"]
        lines.append(f"| {domain} | {_interval(there)} | {_interval(without)} |")
    return lines


def accuracy_domains(rows):
    """A line a method, a column a domain: mean ± standard deviation over the seeds."""
    found = {
        (row["name"], row["case"]["domain"]): row for row in rows if row["case"]["seed"] == "all"
    }  # trials have none such
    domains = list(dict.fromkeys(domain for _, domain in found))
    names = sorted({name for name, _ in found}, key=lambda name: -found[name, "mean"]["median"])
    lines = [f"| method | {' | '.join(domains)} |", "|---|" + "---|" * len(domains)]
    for name in names:
        of_domains = (found[name, domain] for domain in domains)
        cells = " | ".join(
            f"{row['median']:.1f}" + ("" if row["std"] is None else f" ± {row['std']:.1f}") for row in of_domains
        )
        lines.append(f"| {name.removeprefix('accuracy/')} | {cells} |")
    return lines


def accuracy_trials(rows):
    """What was tried on validation: a line a method with its learning rates, then the forms of the pre-gate, best first."""
    found, rows = {}, [row for row in rows if row["name"].startswith("trials/")]
    tuned = {row["name"] for row in rows if row["case"]["phase"] == "tune"}
    for row in rows:
        place = "tune" if row["name"] in tuned else "search", row["name"].removeprefix("trials/")
        found.setdefault(place, {}).setdefault(row["case"]["learning_rate"], []).append(row["median"])
    means = {place: {rate: statistics.mean(each) for rate, each in by_rate.items()} for place, by_rate in found.items()}
    best_first = sorted(means, key=lambda place: -max(means[place].values()))
    rates = sorted({rate for (phase, _), by_rate in means.items() if phase == "tune" for rate in by_rate if rate})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---|" + "---|" * len(rates)]
    for phase, name in best_first:
        if phase == "tune" and means[phase, name].keys() != {0}:
            cells = (f"{means[phase, name][rate]:.1f}" if rate in means[phase, name] else "" for rate in rates)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| form of the pre-gate, one run each | learning rate | validation, % |", "|---|---|---|"]
    for phase, name in best_first:
        if phase == "search":
            best_rate_first = sorted(means[phase, name].items(), key=lambda pair: -pair[1])
            lines += [f"| {name} | {rate:g} | {accuracy:.2f} |" for rate, accuracy in best_rate_first]
    return [
        *lines,
        "",
        "Accuracy on validation in percent, mean over domains and, by learning rate, over two seeds, or four for the best two rates.",
    ]


def routing(rows):
    """A line a method: how far the domains use the same experts. Then the picture that `study.py heatmap --plot` drew."""
    lines = ["| method | built as | experts in common, two domains, mean | least | most |", "|---|---|---|---|---|"]
    for name, (domains, shares) in shares_of(rows).items():
        common = overlap(shares)
        pairs = {(a, b): common[i, j] for i, a in enumerate(domains) for j, b in enumerate(domains) if i < j}
        least, most = min(pairs, key=pairs.get), max(pairs, key=pairs.get)
        built_as = next(row["case"]["built_as"] for row in rows if row["name"] == f"routing/{name}")
        ends = " | ".join(f"{pairs[pair]:.2f} ({', '.join(pair)})" for pair in (least, most))
        lines.append(f"| {name} | {built_as} | {statistics.mean(pairs.values()):.2f} | {ends} |")
    return [*lines, "", "![Share of each expert by domain](routing.png)"]


# What the low end of the interval is held to: of the best pre-gate above a method.
ACCURACY_TARGETS = {
    "layerwise": -0.5,
    "lora_active": 0,
    "mola_2468": -0.5,
    "mola_5555": -0.5,
    "moral": -0.5,
    "pesc": -0.5,
    "mixlora": -0.5,
}


def _reached(difference, target):
    """Whether the low end of an interval is above a target, in words."""
    if target is None or difference is None:
        return ""
    return f"low end > {target:g}: {'met' if difference[0] > target else '**not met**'}"


def _interval(difference):
    """[low, mid, high] as text."""
    if difference is None:
        return ""
    low, mid, high = difference
    return f"{mid:+.2f} [{low:+.2f}, {high:+.2f}]"


def _mixture(case):
    return f"E {case['num_experts']}, r {case['r']}, K {case['top_k']}, {case['routing']}"


def _source(env, path, document):
    on_gpu = env["gpu"] != "none"
    names = ("torch", *["triton"] * on_gpu, "transformers", "peft", *["vllm"] * ("vllm" in env))
    versions = ", ".join(f"{name} {env[name]}" for name in names)
    name, where = path.relative_to(ROOT), os.path.relpath(path, document.parent)
    machine = env["gpu"] if on_gpu else "CPU"
    return f"{machine}, {versions}, commit {env['git']}, {env['date']}. From [{name}]({where})."


TABLES = {
    "train_step": train_step,
    "demo": demo,
    "choices": choices,
    "kernels": kernels,
    "kernels.summary": kernels_summary,
    "decode": decode,
    "decode.summary": decode_summary,
    "decode.cases": decode_cases,
    "decode.profile": decode_profile,
    "decode.headline": decode_headline,
    "executions": executions,
    "drift": drift,
    "domains": domains,
    "accuracy": accuracy,
    "accuracy.headline": accuracy_headline,
    "accuracy.without": accuracy_without,
    "accuracy.domains": accuracy_domains,
    "accuracy.trials": accuracy_trials,
    "routing": routing,
    "serve": serve_tables.throughput,
    "serve.latency": serve_tables.latency,
    "serve.alone": serve_tables.alone,
}
SENTENCES = {"accuracy.headline", "decode.headline"}  # which say themselves where they are from
NOT_MEASURED = "*Not measured yet.*"  # in place of a table without results


def fill(document):
    """The text of a document with each marked table made anew."""

    def table(match):
        start, name, folder, end = match.groups()
        path = RESULTS / folder / f"{name.partition('.')[0]}.json"
        if not path.is_file():
            return start + NOT_MEASURED + "\n" + end
        result = json.loads(path.read_text())
        source = [] if name in SENTENCES else ["", _source(result["env"], path, document)]
        return start + "\n".join([*TABLES[name](result["rows"]), *source]) + "\n" + end

    return MARKED.sub(table, document.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is out of date")
    check = parser.parse_args().check
    stale = [path for path in DOCUMENTS if fill(path) != path.read_text()]
    for path in stale:
        print(f"{path.name}: {'out of date' if check else 'rewritten'}")
        if not check:
            path.write_text(fill(path))
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
