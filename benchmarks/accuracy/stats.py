"""Differences between two methods, with an interval: paired bootstrap over seeds and items."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles


def paired_difference(ours, theirs, domains, clusters, seed=0, resamples=RESAMPLES, interval=INTERVAL):
    """(low, mid, high): difference of the mean accuracy of two methods, as a share.

        mid = mean over seeds, mean over domains, mean over a domain's items of (ours - theirs)

    low, high: percentiles of the same over `resamples` resamples. In each, seeds are drawn with replacement, once for both methods
    (a seed is the same data order for both), and so are, within each domain, clusters of items that depend on each other.
    ours, theirs: bool [seeds, items], same seeds and items. domains, clusters: int [items]; a cluster lies in one domain.
    ValueError if the shapes do not agree.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if ours.shape != theirs.shape or ours.shape[1:] != np.shape(domains) or ours.shape[1:] != np.shape(clusters):
        raise ValueError(
            f"ours {list(ours.shape)}, theirs {list(theirs.shape)}, domains {list(np.shape(domains))} and clusters "
            f"{list(np.shape(clusters))} do not belong together: [seeds, items] twice, then [items] twice"
        )
    generator, difference = np.random.default_rng(seed), ours - theirs
    seeds = len(difference)
    seed_share = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    mids, found = [], np.zeros(resamples)
    names = np.unique(domains)
    for name in names:
        sums, sizes = _by_cluster(difference[:, domains == name], clusters[domains == name])
        mids.append(difference[:, domains == name].mean())
        count = len(sizes)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
        # [resamples, seeds]: the mean over the drawn items, for each seed.
        means = drawn @ sums.T / (drawn @ sizes)[:, None]
        found += (means * seed_share).sum(1) / len(names)
    low, high = np.percentile(found, interval)
    return float(low), float(np.mean(mids)), float(high)


def _by_cluster(difference, clusters):
    """(sums [seeds, clusters], sizes [clusters])."""
    _, place = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(place)
    sums = np.stack([np.bincount(place, weights=row, minlength=len(sizes)) for row in difference])
    return sums, sizes
