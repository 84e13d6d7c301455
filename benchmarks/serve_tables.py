"""Tables of `serve_models.py`'s rows, for tables.py."""

TARGET = 0.93  # of the bound, the least that serving ours is to reach
LATENCIES = {"ttft": "first token", "itl_p50": "next token", "itl_p99": "next token, p99"}
COMPARED = ("backbone", "ours")


def throughput(rows):
    """A line a case: tokens a second of the backbone alone, and what the others have of it."""
    lines = [
        "| model | GPUs | r | in flight | backbone alone, tokens/s | ours, tokens/s | of the backbone | bound | of the bound (target >= "
        f"{TARGET}) | vLLM's LoRA, one | eight in turn |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, found in _cases(rows):
        ours, of_bound = found.get("throughput/ours"), ["", "", "", ""]
        if ours is not None:
            reached = ours["ratio"] / ours["bound"]
            of_bound = [f"{ours['median']:.0f}", f"{ours['ratio']:.3f}", f"{ours['bound']:.3f}", f"{reached:.3f}"]
        loras = [found.get(f"throughput/multilora_{count}") for count in (1, 8)]
        cells = [*of_bound, *("" if lora is None else f"{lora['ratio']:.3f}" for lora in loras)]
        lines.append(f"| {case} | {found['throughput/backbone']['median']:.0f} | {' | '.join(cells)} |")
    return [*lines, "", f"{_load(rows)} The bound and what it counts: at the end of this section."]


def latency(rows):
    """A line a case: milliseconds to the first token and between tokens, of the backbone alone and of ours."""
    columns = [f"{title}: {label}" for title in LATENCIES.values() for label in COMPARED]
    lines = [f"| model | GPUs | r | in flight | {' | '.join(columns)} | failed |", "|---|---|---|---|" + "---|" * 7]
    for case, found in _cases(rows):
        cells = [found.get(f"{metric}/{label}") for metric in LATENCIES for label in COMPARED]
        failed = sum(found[name]["median"] for name in found if name.startswith("errors/"))
        shown = " | ".join("" if cell is None else f"{cell['median']:.1f}" for cell in cells)
        lines.append(f"| {case} | {shown} | {failed:.0f} |")
    return [*lines, "", "Milliseconds, medians over rounds. The first token waits for the prompts of others too."]


def alone(rows):
    """What people use today: one request at a time, the bare model in vLLM."""
    lines = [
        "| model in vLLM, one request at a time | GPUs | ms a token | with ours, r | ms a token |",
        "|---|---|---|---|---|",
    ]
    for _, found in _cases(rows):
        bare, ours = (found.get(f"itl_p50/{label}") for label in COMPARED)
        if bare["case"]["in_flight"] == 1 and ours is not None:
            case = bare["case"]
            lines.append(
                f"| {case['model']} | {case['tensor_parallel']} | {bare['median']:.2f} | {case['r']} | {ours['median']:.2f} |"
            )
    return lines


def _cases(rows):
    """[(model, GPUs, r and number in flight as cells, rows of that case by name without prefix)], in this order."""
    found = {}
    for row in rows:
        case = tuple(row["case"][key] for key in ("model", "tensor_parallel", "r", "in_flight"))
        found.setdefault(case, {})["/".join(row["name"].split("/")[-2:])] = row
    return [(" | ".join(map(str, case)), found[case]) for case in sorted(found)]


def _load(rows):
    case = rows[0]["case"]
    return (
        f"Random weights in bf16, prompts of {case['prompt_tokens']} random tokens and {case['max_tokens']} new ones, "
        f"{case['num_experts']} experts, {case['top_k']} a token on all linears; a LoRA has the rank of all experts of a token."
    )
