"""The picture of `heatmap`: which experts each domain's tokens use, and how far two domains use the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DECISIONS_SHOWN = 3  # of those that a token has: the first, the middle, the last


def shares_of(rows) -> dict:
    """method -> (domains, [domains, D, E]) from rows `routing/<method>`, the first seed of each."""
    found = {}
    for name in dict.fromkeys(row["name"].removeprefix("routing/") for row in rows):
        mine = [row for row in rows if row["name"] == f"routing/{name}"]
        mine = [row for row in mine if row["case"]["seed"] == mine[0]["case"]["seed"]]
        domains = list(dict.fromkeys(row["case"]["domain"] for row in mine))
        shares = [
            [row["shares"] for row in sorted(mine, key=_decision) if row["case"]["domain"] == domain]
            for domain in domains
        ]
        found[name] = (domains, np.array(shares))
    return found


def overlap(shares) -> np.ndarray:
    """[domains, domains]: sum over experts of the smaller share, mean over decisions. 1: the same experts; 0: none in common."""
    return np.minimum(shares[:, None], shares[None]).sum(-1).mean(-1)


def draw(rows, path):
    """A line of panels a method: shares of the experts by domain, at up to three decisions; then the domains' overlap."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib; run: pip install 'adafuse[plots]'") from None
    methods = shares_of(rows)
    columns = 1 + max(len(_shown(shares)) for _, shares in methods.values())
    figure = Figure(figsize=(3 + 4 * columns, 3.4 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), columns, squeeze=False)
    for line, (name, (domains, shares)) in zip(panels, methods.items(), strict=True):
        last, shown = shares.shape[1] - 1, _shown(shares)
        for axis, decision in zip(line, shown, strict=False):
            where = f"block {decision}" if last else "all blocks"
            _panel(figure, axis, shares[:, decision], domains, f"{name}, {where}: share of the choices", "expert")
        for axis in line[len(shown) : -1]:
            axis.set_axis_off()
        _panel(figure, line[-1], overlap(shares), domains, "experts in common", None)
        line[-1].set_xticks(range(len(domains)), domains, rotation=90)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _shown(shares):
    """The decisions that have a panel each."""
    last = shares.shape[1] - 1
    return sorted({round(last * i / (DECISIONS_SHOWN - 1)) for i in range(DECISIONS_SHOWN)})


def _panel(figure, axis, values, domains, title, below):
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    axis.set_title(title, fontsize=9)
    axis.set_yticks(range(len(domains)), domains)
    if below:
        axis.set_xlabel(below)
    figure.colorbar(image, ax=axis)


def _decision(row):
    return row["case"]["decision"]
