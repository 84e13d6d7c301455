"""The trials on validation and what they choose: the settings of the final runs, fixed before the test items are opened.

A method has a trial for each rate and seed of `tune`. `pregate_best` has as many in `search`, a form of the pre-gate each.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from accuracy.methods import BEST, METHODS, PAPER_FORM, SEARCH
from accuracy.runs import CHOSEN, Run, done, left, read_json, write_json

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
LEAST_GAIN = 0.1  # of the best trial above the base, in a domain that is kept
TUNE_SEEDS = (0, 100)  # two, so that the luck of one seed chooses no rate


def trained(methods) -> list[str]:
    """Those of these methods that train at all."""
    return [name for name in methods if METHODS[name].build is not None]


def tune_runs(methods, rates) -> list[Run]:
    """Seeds and rates outside, methods inside: a study that stops early has tried all methods alike. First what does not train, once."""
    names = trained(methods)
    still = [Run("tune", name, 0.0, TUNE_SEEDS[0], name) for name in methods if name not in names]
    return still + [Run("tune", name, rate, seed, name) for seed in TUNE_SEEDS for rate in rates for name in names]


def search_runs(folder, rates) -> list[Run]:
    """A run for each form of the pre-gate, at the rate that is best for `pregate_paper`; its teacher, if any, at that teacher's best.

    ValueError if `tune` has not finished with these.
    """
    teachers = [method.teacher for method in SEARCH.values() if method.teacher]
    found = {name: choice["learning_rate"] for name, choice in tuned(folder, [PAPER_FORM, *teachers], rates).items()}
    return [
        Run("search", name, found[PAPER_FORM], TUNE_SEEDS[0], name, found.get(method.teacher, 0.0))
        for name, method in SEARCH.items()
    ]


def tuned(folder, methods, rates) -> dict:
    """method -> what is chosen for it: the rate with the best mean accuracy over the seeds. ValueError if a trial is missing."""
    means = _means(_all_results(folder, tune_runs(methods, rates)))
    found = {}
    for name in trained(methods):
        rate = _best_rate(means, name, rates)
        found[name] = _choice(name, rate, 0.0, means[name, rate])
    return found


def choose(folder, methods, rates) -> dict:
    """method -> {"built_as", "learning_rate", "teacher_rate", "validation"} of the final runs, kept in the folder from the first call on.

    `pregate_best`, if asked for, is the best form of the search. Later calls may add methods. ValueError if they would change one.
    """
    found = tuned(folder, [name for name in methods if name != BEST], rates)
    if BEST in methods:
        best = max(_all_results(folder, search_runs(folder, rates)), key=_accuracy)
        found[BEST] = _choice(*(best[key] for key in ("built_as", "learning_rate", "teacher_rate")), _accuracy(best))
    path, before = Path(folder) / CHOSEN, chosen_before(folder)
    if changed := sorted(name for name in found if name in before and before[name] != found[name]):
        raise ValueError(
            f"{path} fixed other settings of {', '.join(changed)}, and the test items may have been seen with them since"
        )
    if before | found != before:
        write_json(path, before | found)
    return found


def chosen_before(folder) -> dict:
    """What `choose` has fixed in this folder; empty before its first call."""
    path = Path(folder) / CHOSEN
    return read_json(path) if path.is_file() else {}


def summary(folder, runs) -> list[str]:
    """A line a method: validation accuracy at each rate, the mean over the seeds found, and a word if the best rate is at an end."""
    means, lines = _means(done(folder, runs)), []
    for name in dict.fromkeys(run.method for run in runs):
        rates = sorted({run.learning_rate for run in runs if run.method == name})
        tried = [(name, rate) in means for rate in rates]
        cells = [
            f"{rate:g}: {means[name, rate]:.2%}" if there else f"{rate:g}: -"
            for rate, there in zip(rates, tried, strict=True)
        ]
        at_end = len(rates) > 1 and all(tried) and _best_rate(means, name, rates) in (rates[0], rates[-1])
        lines.append(f"{name:28} {'   '.join(cells)}" + ("   best at an end of the rates" if at_end else ""))
    return lines


def gains(folder, runs) -> list[str]:
    """A line a domain: accuracy of the base, and of the trial that is best there. Nothing before the base has been scored."""
    results = done(folder, runs)
    before = next((result["score"]["accuracy"] for result in results if not result["learning_rate"]), None)
    if before is None or len(results) == 1:
        return []
    lines = []
    for domain in (name for name in before if name != "mean"):
        most = max(result["score"]["accuracy"][domain] for result in results)
        weak = "" if most - before[domain] >= LEAST_GAIN else "   replace this domain: no method gains 10 points"
        lines.append(f"{domain:28} base {before[domain]:.1%}, best {most:.1%}{weak}")
    return lines


def _all_results(folder, runs):
    """The results of all these runs. ValueError if one is missing."""
    if missing := left(folder, runs):
        raise ValueError(
            f"{len(missing)} of {len(runs)} trials on validation are missing, the first {missing[0].file}; finish "
            f"`{missing[0].phase}` with the same rates first"
        )
    return done(folder, runs)


def _means(results):
    """(method, rate) -> mean accuracy over the seeds."""
    found = {}
    for result in results:
        found.setdefault((result["method"], result["learning_rate"]), []).append(_accuracy(result))
    return {key: statistics.mean(accuracies) for key, accuracies in found.items()}


def _best_rate(means, name, rates):
    """Ties go to the lower rate."""
    return max(sorted(rates), key=lambda rate: means[name, rate])


def _accuracy(result):
    return result["score"]["accuracy"]["mean"]


def _choice(built_as, learning_rate, teacher_rate, validation):
    return {
        "built_as": built_as,
        "learning_rate": learning_rate,
        "teacher_rate": teacher_rate,
        "validation": validation,
    }
