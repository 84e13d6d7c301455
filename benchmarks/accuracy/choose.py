"""From validation results to the settings of the final runs, which are fixed before the test items are opened."""

from __future__ import annotations

from pathlib import Path

from accuracy.methods import BEST, METHODS, SEARCH
from accuracy.runs import CHOSEN, read_json, results_of, write_json


def trained(methods) -> list[str]:
    """Those of these methods that train at all."""
    return [name for name in methods if METHODS[name].build is not None]


def best_of(results, names, rates) -> dict:
    """name -> the result with the best mean accuracy on validation, ties to the lower rate. ValueError if a trial is missing."""
    best = {}
    for name in names:
        found = [result for result in results if result["method"] == name and result["learning_rate"] in rates]
        if missing := sorted(set(rates) - {result["learning_rate"] for result in found}):
            raise ValueError(
                f"{name} was not tried on validation at {missing}; finish `tune` and `search` with the same rates first"
            )
        best[name] = min(found, key=lambda result: (-result["score"]["accuracy"]["mean"], result["learning_rate"]))
    return best


def choose(folder, methods, rates) -> dict:
    """method -> {"built_as", "learning_rate", "validation"} of the final runs, kept in the folder from the first call on.

    `pregate_best`, if asked for, is the best trial of the search. Later calls may add methods. ValueError if they would change one.
    """
    tuned = best_of(results_of(folder, "tune"), trained(name for name in methods if name != BEST), rates)
    found = {name: _choice(name, result) for name, result in tuned.items()}
    if BEST in methods:
        searched = best_of(results_of(folder, "search"), SEARCH, rates)
        name = max(searched, key=lambda name: searched[name]["score"]["accuracy"]["mean"])
        found[BEST] = _choice(name, searched[name])
    path = Path(folder) / CHOSEN
    before = read_json(path) if path.is_file() else {}
    if changed := sorted(name for name in found if name in before and before[name] != found[name]):
        raise ValueError(
            f"{path} fixed other settings of {', '.join(changed)}, and the test items may have been seen with them since"
        )
    if before | found != before:
        write_json(path, before | found)
    return found


def summary(results, names, rates) -> list[str]:
    """A line a method: mean validation accuracy at each rate, and a word if the best rate is at an end of the list."""
    lines = []
    for name in names:
        found = {r["learning_rate"]: r["score"]["accuracy"]["mean"] for r in results if r["method"] == name}
        cells = [f"{rate:g}: {found[rate]:.2%}" if rate in found else f"{rate:g}: -" for rate in sorted(rates)]
        at_end = len(rates) > 1 and set(rates) <= set(found) and max(rates, key=found.get) in (min(rates), max(rates))
        lines.append(f"{name:28} {'   '.join(cells)}" + ("   best at an end of the rates" if at_end else ""))
    return lines


def _choice(built_as, result):
    return {
        "built_as": built_as,
        "learning_rate": result["learning_rate"],
        "validation": result["score"]["accuracy"]["mean"],
    }
