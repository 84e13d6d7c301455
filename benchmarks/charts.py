"""Charts made from the committed results.

python benchmarks/charts.py  # docs/latency.svg
"""

import json

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from tables import RESULTS, ROOT, case_of, of_first_case

# Bars, and the bare model of each: what is above it is what adapters cost.
BARS = {
    "hf/compiled": None,
    "engine/backbone": None,
    "engine/fused_r16": "engine/backbone",
    "engine/fused_r64": "engine/backbone",
    "graphed/layerwise_ours": "engine/backbone",
    "graphed/pesc": "hf/compiled",
    "engine/switch_pristine": "engine/backbone",
    "engine/switch_in_place": "engine/backbone",
    "graphed/mola": "hf/compiled",
    "graphed/layerwise": "hf/compiled",
    "engine/merge_per_matrix": "engine/backbone",
}
PARTS = {
    "weights": "#3b6ea5",
    "attention": "#8fb3d9",
    "between": "#c9d9ea",
    "bare model": "#9a9a9a",
    "adapters": "#d9822b",
}
TITLES = {
    "weights": "base linears, head, routing, sampling",
    "between": "norms, activation",
    "adapters": "adapters, or merging them",
}


def parts_of(name, base, found):
    """What a bar is made of, in ms: measured parts where there are some, else the bare model and what is above it."""
    whole = found[name]["median"]
    alone = found[base]["median"] if base else whole
    measured = {part: found.get(f"profile/{base or name}/{part}") for part in ("attention", "between")}
    parts = {part: row["median"] for part, row in measured.items() if row is not None}
    rest = alone - sum(parts.values())
    parts["weights" if parts else "bare model"] = rest
    return parts | {"adapters": whole - alone}


def latency(rows, path):
    """A stacked bar a way to compute a token, for the first case."""
    found = of_first_case(rows)
    bars = {name: parts_of(name, base, found) for name, base in BARS.items() if name in found}
    names = list(bars)
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.6))
    left = dict.fromkeys(names, 0.0)
    for part, color in PARTS.items():
        widths = [parts.get(part, 0.0) for parts in bars.values()]
        axes.barh(names, widths, left=[left[name] for name in names], color=color, label=TITLES.get(part, part))
        for name, width in zip(names, widths, strict=True):
            left[name] += width
    for name in names:
        axes.annotate(f" {found[name]['median']:.2f}", (left[name], name), va="center", fontsize=9)
    if "roofline" in found:
        axes.axvline(found["roofline"]["median"], color="black", linewidth=0.8, linestyle="--")
        axes.annotate(
            " reading the weights", (found["roofline"]["median"], -0.8), fontsize=8, va="center", annotation_clip=False
        )
    axes.invert_yaxis()
    axes.set_xlabel("ms a token")
    model, context, batch = case_of(rows[0])
    axes.set_title(f"{model}, context {context}, batch {batch}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main():
    mpl.rcParams["svg.hashsalt"] = "adafuse"
    rows = json.loads((RESULTS / "h100" / "decode.json").read_text())["rows"]
    latency(rows, ROOT / "docs" / "latency.svg")


if __name__ == "__main__":
    main()
