"""Final runs to rows of the project's result files: accuracy by method, domain and seed, and routing shares."""

from __future__ import annotations

import statistics

import numpy as np

from accuracy.evaluate import unpack
from accuracy.methods import BEST
from accuracy.stats import paired_difference

PERCENT = 100
# Differences that answer a question of their own: is a learned router worth anything, and is more rank?
FURTHER = {"pregate_paper": "random_routing", "lora_total": "lora_active"}


def accuracy_rows(results, groups, reference) -> list[dict]:
    """Rows `accuracy/<method>`: a domain (or "mean", over domains) and a seed (or "all") each. median, p20, p80, std in percent.

    "all" is the mean over the seeds, also in `median`, and std the sample standard deviation, null for one seed. "nll": nats per token of
    the right answers. Rows of "mean", "all" carry `diff_to_<reference>`: [low, mid, high] in percentage points, `stats.paired_difference`
    over the common seeds; those of `FURTHER` one more. The best pre-gate has it for each domain by itself, too, and without each; the
    others have `diff_of_pregate_best`, and that without the domain in which it is furthest ahead.
    groups: of the test items. ValueError if the results are not of these, the reference has none, or the methods were not trained from
    the same seeds, once each.
    """
    if strangers := [result["method"] for result in results if result["score"]["order"] != groups.order]:
        raise ValueError(
            f"results of {', '.join(sorted(set(strangers)))} are of other test items than those of this folder"
        )
    methods = {}
    for result in results:
        by_seed = methods.setdefault(result["method"], {})
        if result["seed"] in by_seed:
            raise ValueError(f"there are two final runs of {result['method']} from seed {result['seed']}; remove one")
        by_seed[result["seed"]] = result
    trained = {name: sorted(found) for name, found in methods.items() if not _untrained(found)}
    if len({tuple(seeds) for seeds in trained.values()}) > 1:
        raise ValueError(f"the methods have final runs from different seeds: {trained}; finish `final` first")
    if reference not in methods:
        raise ValueError(f"there is no final run of {reference!r} to compare with; found: {', '.join(sorted(methods))}")
    rows = []
    for name, by_seed in methods.items():
        for domain in (*groups.names, "mean"):
            found = [_row(name, domain, seed, [result]) for seed, result in sorted(by_seed.items())]
            rows += [*found, _row(name, domain, "all", list(by_seed.values()))]
            if name == BEST:
                rows[-1] |= _by_domain(by_seed, methods[reference], groups, domain, reference)
        if name != reference:
            rows[-1][f"diff_to_{reference}"] = _difference(by_seed, methods[reference], groups)
        if FURTHER.get(name) in methods:
            rows[-1][f"diff_to_{FURTHER[name]}"] = _difference(by_seed, methods[FURTHER[name]], groups)
        if name != BEST and BEST in methods:
            rows[-1]["diff_of_pregate_best"] = _difference(methods[BEST], by_seed, groups)
            rows[-1] |= _without_its_best_domain(methods[BEST], by_seed, groups)
    return rows


def _row(name, domain, seed, results):
    values = [PERCENT * result["score"]["accuracy"][domain] for result in results]
    losses = [result["score"]["nll"][domain] for result in results]
    first = results[0]
    several = len(values) > 1
    low, high = np.percentile(values, [20, 80])
    return {
        "name": f"accuracy/{name}",
        "case": {
            "domain": domain,
            "seed": seed,
            "params": first["account"]["trainable"],
            "active_rank": first["account"]["active_rank"],
            "bytes_per_token": first["account"]["bytes_per_token"],
            "built_as": first["built_as"],
            "learning_rate": first["learning_rate"],
            "items": first["score"]["items"],
        },
        "median": statistics.mean(values),
        "p20": float(low),
        "p80": float(high),
        "std": statistics.stdev(values) if several else None,
        "nll": None if None in losses else statistics.mean(losses),
        "unit": "%",
        "vs": None,
        "ratio": None,
    }


def _by_domain(ours, theirs, groups, domain, reference):
    """The difference of a domain's items alone; for "mean" those of all domains but one, by its name."""
    there = {name: groups.domains == number for number, name in enumerate(groups.names)}
    if domain != "mean":
        return {f"diff_to_{reference}": _difference(ours, theirs, groups, there[domain])}
    without = {name: _difference(ours, theirs, groups, ~inside) for name, inside in there.items()}
    return {f"diff_to_{reference}_without": without} if len(without) > 1 else {}


def _without_its_best_domain(ours, theirs, groups):
    """Of all domains but the one in which the best pre-gate is furthest ahead, by its name: whether one domain makes a lead."""

    def mean(by_seed, domain):
        return statistics.mean(result["score"]["accuracy"][domain] for result in by_seed.values())

    best = max(groups.names, key=lambda domain: mean(ours, domain) - mean(theirs, domain))
    others = groups.domains != groups.names.index(best)
    return {"diff_of_pregate_best_without": {best: _difference(ours, theirs, groups, others)}} if others.any() else {}


def _difference(ours, theirs, groups, items=slice(None)):
    """[low, mid, high] in percentage points, of these items. A method that trains nothing is the same for every seed."""
    untrained = [by_seed for by_seed in (ours, theirs) if _untrained(by_seed)]
    seeds = sorted(set(ours) & set(theirs)) if not untrained else sorted(set(ours if theirs in untrained else theirs))
    if not seeds:
        raise ValueError("two methods have no seed in common, so they cannot be compared in pairs")

    def correct(by_seed):
        only = next(iter(by_seed.values()))
        return np.stack([unpack(by_seed.get(seed, only)["score"]["correct"], len(groups))[items] for seed in seeds])

    found = paired_difference(correct(ours), correct(theirs), groups.domains[items], groups.clusters[items])
    return [PERCENT * value for value in found]


def _untrained(by_seed):
    return next(iter(by_seed.values()))["learning_rate"] == 0


def trial_rows(results) -> list[dict]:
    """Rows `trials/<method or form>`: accuracy of one trial on validation (`tune`, `search`, `refine`), in percent, mean over domains."""
    return [
        {
            "name": f"trials/{result['method']}",
            "case": {name: result[name] for name in ("phase", "learning_rate", "teacher_rate", "seed")},
            "median": PERCENT * result["score"]["accuracy"]["mean"],
            "unit": "%",
            "vs": None,
            "ratio": None,
        }
        for result in results
    ]


def heatmap_rows(results, names) -> list[dict]:
    """Rows `routing/<method>`: for a domain, a seed and a decision (0 where all blocks share one) the share of each expert."""
    rows = []
    for result in results:
        for domain, decisions in zip(names, result.get("routing") or [], strict=False):
            rows += [
                {
                    "name": f"routing/{result['method']}",
                    "case": {
                        "domain": domain,
                        "seed": result["seed"],
                        "decision": decision,
                        "built_as": result["built_as"],
                    },
                    "shares": shares,
                    "unit": "share of the tokens' choices",
                }
                for decision, shares in enumerate(decisions)
            ]
    if not rows:
        raise ValueError("no final run of a model with one router has left its routing shares")
    return rows


def common_environment(results) -> dict:
    """The environment of the runs; of what differs, all values."""
    environments = [result["env"] for result in results]
    return {key: ", ".join(sorted({env[key] for env in environments})) for key in environments[0]}
