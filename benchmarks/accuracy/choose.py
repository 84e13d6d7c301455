"""The trials on validation and what they choose: the settings of the final runs, fixed before the test items are opened.

A method has a trial for each rate and seed of `tune`, and its best two rates from two further seeds in `refine`. `pregate_best` has as
many: a form of the pre-gate each in `search`, at one rate, and the best two forms at two further rates in `refine`.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from accuracy.methods import BEST, FIRST_RATE_OF, METHODS, SEARCH
from accuracy.runs import CHOSEN, Run, done, left, read_json, write_json

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
LEAST_GAIN = 0.1  # of the best trial above the base, in a domain that is kept
TUNE_SEEDS = (0, 100)  # two, so that the luck of one seed chooses no rate
REFINED = 2  # rates of a method, or forms, that are tried again
REFINE_SEEDS = (200, 300)
REFINE_FACTORS = (0.5, 2)  # of the rate of a form


def trained(methods) -> list[str]:
    """Those of these methods that train at all."""
    return [name for name in methods if METHODS[name].build is not None]


def tune_runs(methods, rates) -> list[Run]:
    """Seeds and rates outside, methods inside: a study that stops early has tried all methods alike. First what does not train, once."""
    names = trained(methods)
    still = [Run("tune", name, 0.0, TUNE_SEEDS[0], name) for name in methods if name not in names]
    return still + [Run("tune", name, rate, seed, name) for seed in TUNE_SEEDS for rate in rates for name in names]


def search_runs(folder, rates) -> list[Run]:
    """A run for each form of the pre-gate, at the rate that `tune` found best for layer-wise routing; its teacher, if any, at that
    teacher's best.

    ValueError if `tune` has not finished with these.
    """
    teachers = [method.teacher for method in SEARCH.values() if method.teacher]
    found = {name: best[0] for name, best in best_rates(folder, [FIRST_RATE_OF, *teachers], rates).items()}
    return [
        Run("search", name, found[FIRST_RATE_OF], TUNE_SEEDS[0], name, found.get(method.teacher, 0.0))
        for name, method in SEARCH.items()
    ]


def refine_runs(folder, methods, rates) -> list[Run]:
    """The best rates of each method from further seeds, and, for `pregate_best`, the best forms at further rates. ValueError if `tune` or
    `search` has not finished."""
    best = best_rates(folder, [name for name in methods if name != BEST], rates)
    runs = [
        Run("refine", name, rate, seed, name)
        for seed in REFINE_SEEDS
        for place in range(REFINED)
        for name, found in best.items()
        for rate in found[place : place + 1]
    ]
    if BEST in methods:
        runs += [
            Run("refine", found["built_as"], factor * found["learning_rate"], TUNE_SEEDS[0], found["built_as"])
            for found in best_forms(folder, rates)
            for factor in REFINE_FACTORS
        ]
    return runs


def best_rates(folder, methods, rates) -> dict:
    """method -> its rates with the best mean accuracies over the seeds of `tune`, best first, ties to the lower one. ValueError if a trial
    is missing."""
    means = _means(_all_results(folder, tune_runs(methods, rates)))
    return {
        name: sorted(sorted(rates), key=lambda rate, name=name: -means[name, rate])[:REFINED]
        for name in trained(methods)
    }


def best_forms(folder, rates) -> list[dict]:
    """The results of the best forms of `search`, best first, equals by name. One that learns from a teacher costs more than the training
    that all have alike: it is tried, told and never chosen."""
    found = [result for result in _all_results(folder, search_runs(folder, rates)) if not result["teacher_rate"]]
    return sorted(found, key=lambda result: (-_accuracy(result), result["built_as"]))[:REFINED]


def refined(folder, methods, rates) -> dict:
    """method -> what is chosen for it: of its best rates the one with the best mean over the seeds of `tune` and `refine`. ValueError if
    a trial is missing."""
    runs = refine_runs(folder, methods, rates)
    means = _means([*done(folder, tune_runs(methods, rates)), *_all_results(folder, runs)])
    found = {}
    for name in trained(methods):
        rate = _best_rate(means, name, {run.learning_rate for run in runs if run.method == name})
        found[name] = _choice(name, rate, means[name, rate])
    return found


def best_form(folder, rates) -> dict:
    """What is chosen for `pregate_best`: the best single run of the refined forms, at its rate."""
    again = _all_results(folder, refine_runs(folder, [BEST], rates))
    best = max([*best_forms(folder, rates), *again], key=_accuracy)
    return _choice(best["built_as"], best["learning_rate"], _accuracy(best))


def choose(folder, methods, rates) -> dict:
    """method -> {"built_as", "learning_rate", "validation"} of the final runs, kept in the folder from the first call on.

    `pregate_best`, if asked for, is the best form of the search. Later calls may add methods. ValueError if they would change one.
    """
    best = {BEST: best_form(folder, rates)} if BEST in methods else {}
    found = refined(folder, [name for name in methods if name != BEST], rates) | best
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
    return [
        f"{domain:28} base {before:.1%}, best {most:.1%}"
        + ("" if most - before >= LEAST_GAIN else "   replace this domain: no method gains 10 points")
        for domain, before, most in _gains(folder, runs)
    ]


def check_gains(folder, runs, least=LEAST_GAIN):
    """ValueError for a domain in which no trial is so much better than the base: it is replaced before test is opened."""
    weak = [domain for domain, before, most in _gains(folder, runs) if most - before < least]
    if weak:
        raise ValueError(
            f"no method gains {100 * least:g} points over the base in {', '.join(weak)}: replace the domain, and begin anew"
        )


def _gains(folder, runs):
    """(domain, accuracy of the base, of the best trial) of each domain."""
    results = done(folder, runs)
    before = next((result["score"]["accuracy"] for result in results if not result["learning_rate"]), None)
    if before is None or len(results) == 1:
        return []
    return [
        (domain, before[domain], max(result["score"]["accuracy"][domain] for result in results))
        for domain in before
        if domain != "mean"
    ]


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


def _choice(built_as, learning_rate, validation):
    return {"built_as": built_as, "learning_rate": learning_rate, "validation": validation}
