"""The spread of many differences over few seeds, where each borrows from all: Smyth's moderated t (2004).

Three seeds say little about one difference's own spread, but many differences of one study say what spreads are like.
Their variances s_i^2, each of d degrees of freedom, are taken as draws around a common s_0^2 worth d_0 degrees of
freedom, both fitted to the moments of log s_i^2; a difference then counts with the variance

    (d_0 s_0^2 + d s_i^2) / (d_0 + d),   of d_0 + d degrees of freedom.

d_0 counts for 2 d at most: fitted to some forty variances it is at times far too large, and then noise would be called
a difference in one family of nine; with this it is in fewer than one of twenty, and little is missed (by simulation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

MOST = 2
"""How many times its own degrees of freedom a variance may borrow."""
FAMILY = 8
"""With fewer differences there is too little to borrow from."""


def prior(variances: Sequence[float], freedom: int) -> tuple[float, float]:
    """Return (d_0, s_0^2) of variances of `freedom` degrees of freedom each; d_0 is infinite where they differ no more
    than they would around one common variance. Variances of 0 (figures that are counts may agree by chance) are left
    out: their logarithm says nothing.

    >>> d, s = prior([1.0, 2.0, 0.5, 1.5, 0.8, 1.2, 0.9, 1.1], 2)
    >>> d, 0.5 < s < 2
    (inf, True)
    """
    from scipy.optimize import brentq
    from scipy.special import digamma, polygamma

    logs = numpy.log([variance for variance in variances if variance > 0])
    shifted = logs - digamma(freedom / 2) + math.log(freedom / 2)
    left = float(shifted.var(ddof=1)) - float(polygamma(1, freedom / 2))
    if left <= 1e-6:
        return math.inf, math.exp(float(shifted.mean()))
    half = brentq(lambda x: float(polygamma(1, x)) - left, 1e-6, 1e7)
    return 2 * half, math.exp(float(shifted.mean()) + float(digamma(half)) - math.log(half))


def moderated(variance: float, freedom: int, common: tuple[float, float]) -> tuple[float, float]:
    """Return the variance that a difference counts with, and its degrees of freedom."""
    borrowed, shared = min(common[0], MOST * freedom), common[1]
    return (borrowed * shared + freedom * variance) / (borrowed + freedom), borrowed + freedom


def half_and_p(mean: float, variance: float, freedom: float, share: float) -> tuple[float, float]:
    """Return half the 95 % interval, and the two-sided p, of a mean whose own variance is variance * share."""
    from scipy import stats

    spread = math.sqrt(variance * share)
    return float(stats.t.ppf(0.975, freedom)) * spread, float(2 * stats.t.sf(abs(mean) / max(spread, 1e-300), freedom))
