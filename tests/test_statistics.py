"""Paired statistics against scipy and hand-worked cases; how often noise is called a difference, by simulation."""

from __future__ import annotations

import math

import numpy
import pytest
from scipy import stats

from plait.workbench.shared_spread import half_and_p, moderated, prior
from plait.workbench.statistics import (
    allow_for_many,
    bootstrap,
    difference,
    holm,
    paired_p,
    pareto,
    seeds_needed,
    t_interval,
)


def test_t_interval_and_paired_p_agree_with_scipy() -> None:
    values = numpy.random.default_rng(0).normal(0.3, 1.0, 7)
    made = t_interval(values.tolist())
    expected = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert (made.low, made.high) == pytest.approx(expected)
    assert paired_p(values.tolist()) == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)


def test_a_hand_worked_interval() -> None:
    # mean 2, s = 1, n = 4 - here s = sqrt((1+0+0+1)/3), t_{.975,3} = 3.18245: half = 3.18245 * 0.816497 / 2
    made = t_interval([1.0, 2.0, 2.0, 3.0])
    assert made.high == pytest.approx(2 + 3.18245 * 0.8164966 / 2, abs=1e-4)
    # half of the data to test on, half to train on: the variance factor grows from 1/4 to 1/4 + 1
    wider = t_interval([1.0, 2.0, 2.0, 3.0], overlap=1.0)
    assert wider.high is not None
    assert wider.high - 2 == pytest.approx(3.18245 * 0.8164966 * 1.25**0.5, abs=1e-4)


def test_one_seed_and_equal_values() -> None:
    assert t_interval([0.5]).low is None
    assert paired_p([0.5]) is None
    assert paired_p([0.0, 0.0]) == 1.0
    assert paired_p([0.1, 0.1, 0.1]) == 0.0
    assert difference(("a", "b"), [0.5], [0.9]).verdict == "unknown"


def test_the_bootstrap_has_the_standard_error_of_crossed_draws() -> None:
    luck = numpy.random.default_rng(1)
    held = luck.normal(0, 1, (1, 300))
    made, _ = bootstrap(held, draws=4000)
    assert made.low is not None
    assert made.high is not None
    # with one seed it is the bootstrap of a mean: about 1.96 standard errors to each side
    half = 1.96 * held.std() / 300**0.5
    assert made.high - made.low == pytest.approx(2 * half, rel=0.08)
    shared, _ = bootstrap(numpy.repeat(held, 4, axis=0), draws=4000)
    assert shared.high is not None
    assert shared.low is not None
    # four seeds that share the luck of the examples know no more than one
    assert shared.high - shared.low == pytest.approx(made.high - made.low, rel=0.1)


def test_holm_by_hand_and_what_is_clear_only_by_itself() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    first = [0.50, 0.50, 0.50, 0.50]
    strong = difference(("a", "b"), first, [0.60, 0.601, 0.599, 0.6005])
    weak = difference(("a", "c"), first, [0.51, 0.52, 0.515, 0.505])
    assert (strong.verdict, weak.verdict) == ("clear", "clear")
    assert [d.verdict for d in allow_for_many([strong, weak])] == ["clear", "clear"]
    four = allow_for_many([weak] * 4)
    assert [d.verdict for d in four] == ["suggestive"] * 4


def _false_alarms(seeds: int, seed_noise: float, example_noise: float, trials: int = 300) -> float:
    luck, alarms, examples = numpy.random.default_rng(seeds), 0, 150
    for _ in range(trials):
        # no difference in truth: the recipes differ by the luck of the seeds and of the shared test examples
        shared = example_noise * luck.normal(size=(1, examples))
        each = seed_noise * luck.normal(size=(seeds, 1)) + 0.3 * luck.normal(size=(seeds, examples))
        first, other = numpy.zeros((seeds, examples)), shared + each
        made = difference(
            ("a", "b"), first.mean(1).tolist(), other.mean(1).tolist(), first_examples=first, other_examples=other
        )
        alarms += made.verdict == "clear"
    return alarms / trials


@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize(("seed_noise", "example_noise"), [(1.0, 0.0), (0.0, 1.0), (0.1, 1.0)])
def test_noise_is_called_a_difference_in_at_most_one_of_twenty(
    seeds: int, seed_noise: float, example_noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plait.workbench.statistics.bootstrap", lambda d: bootstrap(d, draws=400))
    # 0.05 and three standard errors of 300 trials
    assert _false_alarms(seeds, seed_noise, example_noise) <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_a_true_difference_is_found() -> None:
    luck, found = numpy.random.default_rng(3), 0
    for _ in range(100):
        other = 1.0 + luck.normal(0, 0.3, 5)
        found += difference(("a", "b"), [0.0] * 5, other.tolist()).verdict == "clear"
    assert found >= 95


def test_overlapping_splits_need_the_correction() -> None:
    """Seeds that split one small data set anew share its luck; without the correction noise is called a difference."""
    luck, plain, corrected, trials = numpy.random.default_rng(5), 0, 0, 400
    for _ in range(trials):
        pool = luck.normal(size=100)
        pairs = [pool[luck.permutation(100)[:20]].mean() for _ in range(20)]
        plain += (paired_p(pairs) or 0.0) < 0.05
        corrected += (paired_p(pairs, 20 / 80) or 0.0) < 0.05
    assert plain / trials > 0.2
    assert corrected / trials <= 0.08


def test_seeds_needed_reaches_the_power_that_it_promises() -> None:
    pairs = [0.2, 1.1, -0.4, 0.9, 0.7]
    needed = seeds_needed(pairs)
    assert needed is not None
    spread, luck = float(numpy.std(pairs, ddof=1)), numpy.random.default_rng(0)
    drawn = luck.normal(numpy.mean(pairs), spread, (2000, needed))
    assert (stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.06)


def test_the_pareto_front_where_lower_is_better() -> None:
    assert pareto([(1.0, 3.0), (2.0, 2.0), (2.0, 2.5)], higher_is_better=False) == [True, True, False]


def _family(luck: numpy.random.Generator, effect: float, alike: int = 8) -> list[bool]:
    """Whether each of 40 recipes is told from the first on three seeds; spreads differ from recipe to recipe."""
    spreads = numpy.sqrt(0.01 * alike / luck.chisquare(alike, size=40))
    pairs = effect + spreads[:, None] * luck.normal(size=(40, 3))
    found = [difference(("a", str(n)), [0.0] * 3, row.tolist()) for n, row in enumerate(pairs)]
    return [d.verdict == "clear" for d in allow_for_many(found)]


@pytest.mark.parametrize("alike", [2, 8, 30])
def test_many_differences_over_few_seeds_borrow_their_spread_without_false_alarms(alike: int) -> None:
    luck, trials = numpy.random.default_rng(7), 200
    alarms = sum(any(_family(luck, 0.0, alike)) for _ in range(trials))
    assert alarms / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5
    told = numpy.mean([_family(luck, 0.5, alike) for _ in range(20)])  # five times the spread
    alone = [difference(("a", "b"), [0.0] * 3, [0.4, 0.5, 0.6])] * 7
    assert told > 0.7
    assert {d.verdict for d in allow_for_many(alone)} == {"suggestive"}


def test_a_moderated_variance_lies_between_its_own_and_the_common_one() -> None:
    luck = numpy.random.default_rng(11)
    true = 0.04 * 6 / luck.chisquare(6, size=4000)
    freedom, common = prior((true * luck.chisquare(2, size=4000) / 2).tolist(), 2)
    assert freedom == pytest.approx(6, rel=0.15)
    assert common == pytest.approx(0.04, rel=0.1)
    assert moderated(1.0, 2, (3.0, 0.2)) == (pytest.approx((3 * 0.2 + 2 * 1.0) / 5), 5.0)
    assert moderated(1.0, 2, (math.inf, 0.2)) == (pytest.approx((4 * 0.2 + 2 * 1.0) / 6), 6.0)
    half, p = half_and_p(0.3, 0.04, 8.0, 1 / 3)
    assert half == pytest.approx(2.306 * 0.2 / 3**0.5, rel=1e-3)
    assert p == pytest.approx(2 * 0.0159, rel=0.02)


def test_figures_that_agree_by_chance_say_nothing_about_the_others() -> None:
    """Accuracies are counts: of a few seeds the differences may all be equal, which is no proof of no spread."""
    luck = numpy.random.default_rng(13)
    rows = [[0.02 * value for value in luck.normal(size=3)] for _ in range(30)]
    first, equal = [0.0] * 3, [[1 / 300] * 3, [0.0] * 3]
    alone, joined = (
        allow_for_many([difference(("a", str(n)), first, row) for n, row in enumerate(held)])
        for held in (rows, rows + equal)
    )
    assert [d.p for d in joined[:30]] == pytest.approx([d.p for d in alone])
    assert [d.verdict for d in joined[30:]] == ["noise", "noise"]
