"""The page of a Report: one HTML file that needs no other file, no network and no server."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console

from adafuse.base import load_adapted
from adafuse.inspection import Report, inspect_text

# Colours of experts in OKLCH: hues a golden angle apart never come close to repeating, and four levels of lightness set apart what
# colour-blind eyes see as one hue. Start and order of the levels were searched for: of the first 8 experts no two come closer than
# 0.04 in OKLab (twice a just noticeable difference), for normal, protan, deutan or tritan sight, light page or dark.
GOLDEN_ANGLE = 137.508
FIRST_HUE = 148.0
LEVELS = (0, 2, 1, 3)
MARKS = {"\n": "↵", "\r": "←", "\t": "⇥"}
CONTINUED = "◦"  # a token that is only a later part of a character
ENOUGH_CHOICES = 10  # with fewer choices an expert, on average, a text cannot tell which experts are idle
ROW_NAMES = ("load_entropy", "weight_entropy", "same_set", "same_set_chance", "overlap", "overlap_chance")


def run_inspection(adapter, text, out, *, base=None, console=None, **load) -> Report:
    """What `adafuse inspect` does: read the text file, load the adapter on its base, route the text, write the page."""
    console = console or Console()
    _check_out(out)
    words = _read_text(text)
    model, tokenizer = load_adapted(adapter, base, **load)
    report = inspect_text(model, tokenizer, words)
    write_page(report, out)
    entropy, even = report.statistics["load_entropy"].mean().item(), math.log2(report.num_experts)
    line = f"{len(report.pieces)} tokens, entropy of the load {entropy:.2f} of {even:.2f} bits; page: {out}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return report


def write_page(report: Report, path) -> Path:
    """Write the report as one HTML page that needs no other file and no network; returns its path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("adafuse", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"literal": _literal, "percent": _percent}
    page = environment.get_template("page.html.jinja").render(_view(report))
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def expert_colour(expert: int) -> tuple[float, float]:
    """(hue in degrees, lightness level from 0 to 1) of an expert's colour; the page turns them into OKLCH."""
    return (FIRST_HUE + GOLDEN_ANGLE * expert) % 360, LEVELS[expert % len(LEVELS)] / max(LEVELS)


def _check_out(path):
    """Before the model is loaded, not after."""
    if Path(path).is_dir():
        raise ValueError(f"--out {path} is a folder; name a file")
    if not Path(path).parent.is_dir():
        raise ValueError(f"--out {path}: its folder does not exist; make it first")


def _read_text(path) -> str:
    """The file as it is, carriage returns included. ValueError if there is none, or nothing in it, or no UTF-8."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    if not text:
        raise ValueError(f"{path} is empty: there is no token to route")
    return text


def _view(report) -> dict:
    """What the template shows: plain numbers and strings."""
    stats, decisions = report.statistics, report.experts.shape[1]
    load = stats["load"]
    choices_of_even_expert = report.experts.shape[0] * report.experts.shape[2] / report.num_experts
    return {
        "report": report,
        "top_k": report.experts.shape[2],
        "decisions": decisions,
        "names": [f"block {d}" for d in range(decisions)] if report.routing == "layer" else ["all blocks"],
        "tokens": [_token(report, i) for i in range(len(report.pieces))],
        "colours": [expert_colour(e) for e in range(report.num_experts)],
        "load": load.tolist(),
        "highest_load": load.max().item(),
        "of_blocks": ", mean over blocks" if decisions > 1 else "",
        "most_bits": math.log2(report.num_experts),
        "most_weight_bits": math.log2(report.experts.shape[2]),
        "rows": {name: stats[name].tolist() for name in ROW_NAMES},
        "means": {name: stats[name].double().mean().item() for name in ROW_NAMES},
        "mean_weight": stats["weights"][:, 0].mean().item(),
        "collapsed": stats["collapsed"],
        "collapse_known": choices_of_even_expert >= ENOUGH_CHOICES,
        "data": {
            "experts": report.experts.movedim(1, 0).tolist(),
            "weights": (report.weights.movedim(1, 0).double() * 1000).round().int().tolist(),
            "load": [[round(value, 5) for value in row] for row in load.tolist()],
        },
    }


def _token(report, i) -> dict:
    """One token of the page: its text, its first expert, and a mark for what cannot be seen otherwise."""
    piece = report.pieces[i]
    if piece:
        mark = next((sign for character, sign in MARKS.items() if character in piece), "")
    else:
        mark = report.token_names[i] if report.special[i] else CONTINUED
    choices = zip(report.experts[i, 0].tolist(), report.weights[i, 0].tolist(), strict=True)
    return {
        "piece": piece,
        "mark": mark,
        "expert": report.experts[i, 0, 0].item(),
        "choices": ", ".join(f"expert {expert}: {weight:.3f}" for expert, weight in choices),
    }


def _literal(text):
    """Escape what HTML would change: a carriage return would become a line feed, and a null character would vanish."""
    from markupsafe import Markup, escape

    return Markup(str(escape(text)).replace("\r", "&#13;").replace("\0", "\N{SYMBOL FOR NULL}"))


def _percent(share, digits=1):
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"
