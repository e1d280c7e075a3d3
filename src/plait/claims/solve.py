"""Transport solvers against what one would do without them."""

from __future__ import annotations

from math import inf, log10
from time import process_time
from typing import Any

from plait.claims.base import claim
from plait.solve.sinkhorn_newton import sinkhorn_newton
from plait.solve.sparse_transport import sparse_transport
from plait.solve.transport import sinkhorn


def _clouds(seed: int, n: int) -> tuple[Any, Any, Any]:
    """Two clouds of n points in the unit square with uneven masses; squared distances, the largest 1."""
    import numpy as np

    rng = np.random.default_rng(seed)
    a, b = rng.random(n) + 0.1, rng.random(n) + 0.1
    cost = ((rng.random((n, 1, 2)) - rng.random((n, 2))) ** 2).sum(-1)
    return a / a.sum(), b / b.sum(), cost / cost.max()


@claim(
    "sns",
    says="To a marginal error of 1e-9 at a regularization of 1/500 of the largest cost, Sinkhorn-Newton-Sparse takes "
    "fewer iterations than Sinkhorn (figures are log10).",
    baseline="Sinkhorn, from the same start",
    figure="log10 of the iterations, Newton steps and warm-up together",
    better="lower",
    margin=1.0,
)
def takes_a_tenth_of_the_iterations(seed: int) -> tuple[float, float]:
    """400 points; a run that stops short of the tolerance counts as infinitely many iterations."""
    given = _clouds(seed, 400)
    runs = [
        sinkhorn_newton(*given, regularization=0.002),
        sinkhorn(*given, regularization=0.002, iterations=20_000),
    ]
    ours, theirs = (log10(run.iterations) if run.converged else inf for run in runs)
    return ours, min(theirs, log10(20_000))


@claim(
    "sns",
    says="At equal processor time its marginal error is lower than Sinkhorn's (figures are log10).",
    baseline="Sinkhorn, given the same processor seconds",
    figure="log10 of the marginal error",
    better="lower",
    seeds=3,
)
def is_nearer_in_equal_time(seed: int) -> tuple[float, float]:
    """500 points; Sinkhorn is given as many iterations as fit the time that the other took, and ten more."""
    given = _clouds(seed, 500)
    sinkhorn_newton(*given, regularization=0.002)
    began = process_time()
    ours = sinkhorn_newton(*given, regularization=0.002)
    spent = process_time() - began
    began = process_time()
    sinkhorn(*given, regularization=0.002, iterations=50)
    each = (process_time() - began) / 50
    theirs = sinkhorn(*given, regularization=0.002, iterations=int(spent / each) + 10)
    return log10(ours.error), log10(theirs.error)


def _truncated(plan: Any, k: int) -> Any:
    """The k largest entries of each column, with the column's sum restored."""
    import numpy as np

    kept = np.where(plan >= np.sort(plan, axis=0)[-k], plan, 0.0)
    return kept * (plan.sum(0) / kept.sum(0))


@claim(
    "sparse-ot",
    says="With at most half of the nonzeros that quadratic regularization would use in its fullest column, its plan "
    "misses the masses by less than that plan cut down to as many.",
    baseline="quadratic regularization, the k largest entries of each column, columns rescaled",
    figure="L1 distance of the plan's sums from the masses",
    better="lower",
)
def misses_less_than_truncation(seed: int) -> tuple[float, float]:
    """100 tokens to 10 experts."""
    import numpy as np

    rng = np.random.default_rng(seed)
    a, b, cost = np.full(100, 0.01), np.full(10, 0.1), rng.random((100, 10))
    full = sparse_transport(a, b, cost, k=100, regularization=20.0, form="semi-dual")
    k = max(int((full.plan > 0).sum(0).max()) // 2, 10)
    ours = sparse_transport(a, b, cost, k=k, regularization=20.0, form="semi-dual")
    cut = _truncated(full.plan, k)
    return ours.error, float(np.abs(cut.sum(1) - a).sum() + np.abs(cut.sum(0) - b).sum())


@claim(
    "sparse-ot",
    says="Routed by it, tokens get more of their affinity to experts of equal load than by a greedy choice.",
    baseline="tokens, by the size of their best affinity, take the best expert that has room",
    figure="mean affinity of a token to its expert",
    better="higher",
)
def routes_better_than_greedy(seed: int) -> tuple[float, float]:
    """128 tokens, 8 experts with room for 16 each and unevenly liked; both fill every expert exactly."""
    import numpy as np

    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((128, 8)) + np.linspace(0, 1.5, 8)
    found = sparse_transport(np.ones(128), np.full(8, 16.0), -scores, k=24, regularization=0.5, form="semi-dual")
    return _filled(found.plan, scores), _filled(scores, scores)


def _filled(wish: Any, scores: Any) -> float:
    """Mean score when the pairs are taken by descending wish, each token once and each expert 16 times."""
    import numpy as np

    room, free, total = np.full(8, 16), np.ones(128, bool), 0.0
    for token, expert in zip(*np.unravel_index(np.argsort(-wish, axis=None), wish.shape), strict=True):
        if free[token] and room[expert]:
            free[token], room[expert], total = False, room[expert] - 1, total + scores[token, expert]
    return float(total / 128)
