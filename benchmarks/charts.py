"""Charts made from the committed results.

python benchmarks/charts.py  # docs/latency.svg
"""

import json

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from tables import RESULTS, ROOT, case_of, of_first_case

NOT_SPLIT = "not split"

# Of rows in CUDA graphs, and of those that Python launches, which have an axis of their own.
BARS = (
    (
        "hf/compiled",
        "engine/backbone",
        "engine/fused_r16",
        "engine/fused_r64",
        "graphed/layerwise_ours",
        "graphed/pesc",
        "graphed/mola",
        "graphed/layerwise",
        "engine/switch_pristine",
        "engine/switch_in_place",
        "engine/merge_per_matrix",
    ),
    ("hf/eager", "published/pesc", "published/mola", "published/layerwise"),
)
COLORS = {
    "rest": "#3b6ea5",
    "attention": "#8fb3d9",
    "between": "#c9d9ea",
    "adapters": "#d9822b",
    "launching": "#b03a2e",
    "python": "#e6b0aa",
    NOT_SPLIT: "#9a9a9a",
}
TITLES = {
    "rest": "the rest: base linears, head, routing, sampling",
    "attention": "attention",
    "between": "norms, activation (else in the rest)",
    "adapters": "adapters, or merging them",
    "launching": "launches: no kernel runs",
    "python": "Python between launches",
}


def parts_of(name, found):
    """What a bar is made of, in ms. A row that was traced after its graph only: not split."""
    measured = {part: found.get(f"profile/{name}/{part}") for part in COLORS}
    if measured["rest"] is None:
        return {NOT_SPLIT: found[name]["median"]}
    # Noise may make a small part negative.
    return {part: max(row["median"], 0.0) for part, row in measured.items() if row is not None}


def latency(rows, path):
    """A stacked bar a way to compute a token, for the first case."""
    found = of_first_case(rows)
    panels = [[name for name in names if name in found] for names in BARS]
    panels = [names for names in panels if names]
    heights = [len(names) + 2 for names in panels]
    figure, axes = plt.subplots(
        len(panels), figsize=(9, 0.42 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for names, panel in zip(panels, axes[:, 0], strict=True):
        _stack(panel, names, found)
    if "roofline" in found:
        _mark_roofline(axes[0, 0], found["roofline"]["median"])
    model, context, batch = case_of(rows[0])
    axes[0, 0].set_title(f"{model}, context {context}, batch {batch}", loc="left")
    axes[-1, 0].set_xlabel("ms a token")
    handles = {
        label: handle for panel in axes[:, 0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _stack(axes, names, found):
    """The bars of a panel, parts side by side, with the whole at the end."""
    bars, left = [parts_of(name, found) for name in names], [0.0] * len(names)
    for part, color in COLORS.items():
        widths = [bar.get(part, 0.0) for bar in bars]
        if any(widths):
            axes.barh(names, widths, left=left, color=color, label=TITLES.get(part, part))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, end in zip(names, left, strict=True):
        axes.annotate(f" {found[name]['median']:.2f}", (end, name), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _mark_roofline(axes, ms):
    axes.axvline(ms, color="black", linewidth=0.8, linestyle="--")
    axes.annotate(" reading the weights", (ms, -0.8), fontsize=8, va="center", annotation_clip=False)


def main():
    mpl.rcParams["svg.hashsalt"] = "adafuse"
    rows = json.loads((RESULTS / "h100" / "decode.json").read_text())["rows"]
    latency(rows, ROOT / "docs" / "latency.svg")


if __name__ == "__main__":
    main()
