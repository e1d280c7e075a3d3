"""What runs on the same seeds and the same test examples say about two recipes, and what they cannot say.

A difference is paired: the same seed (the same order of data, the same start where it is drawn) and the same test
examples stand on both sides. Two things could make it up: the luck of the seeds, and the luck of the examples. The t
interval sees only the first, the bootstrap both but is too narrow for a few seeds; a difference counts only if neither
interval holds zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

Floats = NDArray[numpy.float64]
Verdict = Literal["clear", "suggestive", "noise", "unknown"]

LEVEL = 0.95
FEWEST_SEEDS = 3
"""With fewer, two figures that happen to agree look like no noise at all: nothing is called better or worse."""
DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval; the bounds are None where one value says nothing about spread."""

    mean: float
    low: float | None
    high: float | None
    count: int


def t_interval(values: Sequence[float], overlap: float = 0.0, level: float = LEVEL) -> Interval:
    """Return mean +- t_{(1+level)/2, n-1} s sqrt(1/n + overlap).

    overlap: 0 for values drawn apart; where each value comes from another random split of the same data, the size of
    the test part over the training part (the corrected resampled t test, Nadeau and Bengio 2003).

    >>> made = t_interval([1.0, 2.0, 3.0])
    >>> round(made.low, 4), made.mean, round(made.high, 4)
    (-0.4841, 2.0, 4.4841)
    """
    from scipy import stats

    kept = numpy.asarray(values, dtype=float)
    mean = float(kept.mean())
    if len(kept) < 2:
        return Interval(mean, None, None, len(kept))
    half = (
        float(stats.t.ppf((1 + level) / 2, len(kept) - 1))
        * float(kept.std(ddof=1))
        * math.sqrt(1 / len(kept) + overlap)
    )
    return Interval(mean, mean - half, mean + half, len(kept))


def paired_p(differences: Sequence[float], overlap: float = 0.0) -> float | None:
    """Return the two-sided p value of the paired t test; None for one pair. `overlap` as in `t_interval`.

    >>> round(paired_p([0.1, 0.3, 0.2, 0.4]), 4)
    0.0305
    """
    from scipy import stats

    kept = numpy.asarray(differences, dtype=float)
    if len(kept) < 2:
        return None
    spread = float(kept.std(ddof=1)) * math.sqrt(1 / len(kept) + overlap)
    if spread <= 1e-12 * max(1.0, float(numpy.abs(kept).max())):
        return 1.0 if abs(float(kept.mean())) <= 1e-12 else 0.0
    return float(2 * stats.t.sf(abs(float(kept.mean())) / spread, len(kept) - 1))


def bootstrap(differences: Floats, draws: int = DRAWS, seed: int = 0, level: float = LEVEL) -> tuple[Interval, float]:
    """Return the interval and two-sided p of the mean of differences [seeds, examples], drawing both with replacement.

    Seeds and examples are crossed: a drawn example is drawn in every seed.
    """
    generator = numpy.random.default_rng(seed)
    seeds, examples = differences.shape
    by_seed = generator.multinomial(seeds, numpy.full(seeds, 1 / seeds), size=draws) / seeds
    means = numpy.empty(draws)
    for start in range(0, draws, 250):
        chosen = generator.multinomial(
            examples, numpy.full(examples, 1 / examples), size=len(by_seed[start : start + 250])
        )
        means[start : start + 250] = ((by_seed[start : start + 250] @ differences) * chosen).sum(1) / examples
    low, high = numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    tail = min(float((means <= 0).sum()), float((means >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (draws + 1))
    return Interval(float(differences.mean()), float(low), float(high), seeds), p


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's adjusted p values: the chance of even one false alarm among all comparisons stays below the level.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Difference:
    """`other` against `first`: what the paired runs say. `interval` is the wider of the two intervals."""

    first: str
    other: str
    interval: Interval
    p: float | None
    adjusted: float | None
    verdict: Verdict
    better: bool
    """Whether the mean of `other` is the better one."""
    method: str
    pairs: tuple[float, ...] = ()
    """The difference of each seed."""
    overlap: float = 0.0
    drawn: tuple[Interval, float] | None = None
    """What the bootstrap over seeds and test examples says."""


def _shared_examples(first: Sequence[Any], other: Sequence[Any]) -> Floats | None:
    """Return differences [seeds, examples] where every run kept a score for each test example, else None."""
    if not len(first) or any(x is None for x in [*first, *other]) or len({len(x) for x in [*first, *other]}) != 1:
        return None
    made = numpy.asarray(other, dtype=float) - numpy.asarray(first, dtype=float)
    return made if made.shape[1] > 1 else None


def difference(
    names: tuple[str, str],
    first: Sequence[float],
    other: Sequence[float],
    *,
    higher_is_better: bool = True,
    first_examples: Sequence[Any] = (),
    other_examples: Sequence[Any] = (),
    overlap: float = 0.0,
) -> Difference:
    """Return the paired difference of two recipes over the same seeds.

    `*_examples`: where all seeds share one test set and the metric is a mean over it, each seed's scores of its
    examples. overlap: where each seed has a split of its own, as in `t_interval`.
    """
    pairs = [b - a for a, b in zip(first, other, strict=True)]
    examples = _shared_examples(first_examples, other_examples)
    better = float(numpy.mean(pairs)) > 0 if higher_is_better else float(numpy.mean(pairs)) < 0
    how = "paired t over seeds" + (", corrected for overlapping splits" if overlap else "")
    made = Difference(
        *names, t_interval(pairs, overlap), paired_p(pairs, overlap), None, "unknown", better, how,
        tuple(pairs), overlap, None if examples is None else bootstrap(examples),
    )  # fmt: skip
    return _judged(made)


def _judged(found: Difference) -> Difference:
    """Return a difference whose interval and p are of the seeds with those of the bootstrap beside them, judged."""
    low, high, p, how = found.interval.low, found.interval.high, found.p, found.method
    if found.drawn is not None:
        drawn, p_drawn = found.drawn
        assert drawn.low is not None
        assert drawn.high is not None
        if low is not None and high is not None:
            low, high = min(low, drawn.low), max(high, drawn.high)
            how += " and paired bootstrap over seeds and test examples"
        else:
            low, high, how = drawn.low, drawn.high, "paired bootstrap over test examples, of one seed"
        p = p_drawn if p is None else max(p, p_drawn)
    if len(found.pairs) < FEWEST_SEEDS or low is None or high is None:
        verdict: Verdict = "unknown"
    else:
        verdict = "clear" if p is not None and p < 1 - LEVEL and not low <= 0 <= high else "noise"
    return replace(
        found, interval=replace(found.interval, low=low, high=high), p=p, adjusted=p, verdict=verdict, method=how
    )


def borrowing(differences: Sequence[Difference]) -> list[Difference]:
    """Return the same differences, each judged by a spread over seeds that borrows from all; see `shared_spread`."""
    from plait.workbench.shared_spread import FAMILY, half_and_p, moderated, prior

    counts = {len(d.pairs) for d in differences}
    if len(counts) != 1 or (count := counts.pop()) < FEWEST_SEEDS:
        return list(differences)
    variances = [float(numpy.var(d.pairs, ddof=1)) for d in differences]
    variances = [
        own if own > 1e-24 * max(d.interval.mean**2, 1.0) else 0.0
        for own, d in zip(variances, differences, strict=True)
    ]
    if sum(own > 0 for own in variances) < FAMILY:
        return list(differences)
    common, made = prior(variances, count - 1), []
    for d, own in zip(differences, variances, strict=True):
        mean = d.interval.mean
        half, p = half_and_p(mean, *moderated(own, count - 1, common), 1 / count + d.overlap)
        how = "moderated paired t over seeds" + (", corrected for overlapping splits" if d.overlap else "")
        made.append(_judged(replace(d, interval=Interval(mean, mean - half, mean + half, count), p=p, method=how)))
    return made


def allow_for_many(differences: Sequence[Difference]) -> list[Difference]:
    """Return the same differences with Holm's p; what is clear only by itself becomes "suggestive".

    Many differences over few seeds borrow their spread from each other first.
    """
    differences = borrowing(differences)
    adjusted = holm([d.p for d in differences])
    return [
        replace(
            d,
            adjusted=q,
            verdict="suggestive" if d.verdict == "clear" and q is not None and q >= 1 - LEVEL else d.verdict,
        )
        for d, q in zip(differences, adjusted, strict=True)
    ]


def seeds_needed(
    differences: Sequence[float], level: float = LEVEL, power: float = 0.8, most: int = 1000
) -> int | None:
    """Return how many seeds would show a difference of this size and spread with that power; None above `most`."""
    from scipy import stats

    kept = numpy.asarray(differences, dtype=float)
    if len(kept) < 2 or float(kept.std(ddof=1)) == 0.0 or float(kept.mean()) == 0.0:
        return None
    effect = abs(float(kept.mean())) / float(kept.std(ddof=1))
    for count in range(2, most + 1):
        needed = float(stats.t.ppf((1 + level) / 2, count - 1) + stats.t.ppf(power, count - 1)) / math.sqrt(count)
        if effect >= needed:
            return count
    return None


def pareto(points: Sequence[tuple[float, float]], *, higher_is_better: bool = True) -> list[bool]:
    """Say for each (cost, quality) whether no other is at least as good in both and better in one.

    >>> pareto([(1.0, 0.7), (2.0, 0.9), (3.0, 0.8)])
    [True, True, False]
    """
    sign = 1.0 if higher_is_better else -1.0
    kept = [(cost, sign * quality) for cost, quality in points]
    return [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in kept) for cost, quality in kept
    ]
