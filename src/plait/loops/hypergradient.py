"""Hyperparameters by gradient descent: the outer loss is followed through the solution of the inner problem."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from plait.catalogue import paper
from plait.errors import BadInput, did_you_mean
from plait.loops.base import (
    Bilevel,
    Flat,
    Loss,
    Problem,
    Tensors,
    hypergradient_at,
    require_bounds,
)
from plait.math.transport import require_positive, require_whole

SCHEDULES = ("exponential", "quadratic", "cubic", "exact")
SHRINK, EXACT, GROW = 0.9, 1e-8, 1.05


def tolerances(schedule: str, first: float) -> Iterator[float]:
    """Yield eps_1, eps_2, ...: first * 0.9^k, first / k^2 or first / k^3, all summable, or 1e-8 throughout.

    >>> quadratic = tolerances("quadratic", 0.09)
    >>> [round(next(quadratic), 3) for _ in range(3)]
    [0.09, 0.022, 0.01]
    """
    if schedule not in SCHEDULES:
        raise BadInput(f"there is no schedule '{schedule}' of tolerances{did_you_mean(schedule, SCHEDULES)}.")
    k = 0
    while True:
        k += 1
        falling = {"exponential": SHRINK ** (k - 1), "quadratic": k**-2.0, "cubic": k**-3.0, "exact": 0.0}
        yield max(first * falling[schedule], EXACT)


@paper("pedregosa2016hyperparameter", key="hoag", theme="bilevel")
def hoag(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Tensors,
    hyper: Tensors,
    *,
    steps: int = 50,
    schedule: Literal["exponential", "quadratic", "cubic", "exact"] = "exponential",
    first_tolerance: float = 0.01,
    tolerance: float = 1e-6,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = None,
    iterations: int = 1000,
) -> Bilevel:
    """lambda <- project(lambda - alpha (grad_2 g - (d12 h)^T q)), (d11 h) q = grad_1 g, at x with |grad_1 h| <= eps_k:
    min_lambda g(x(lambda), lambda) over x(lambda) = argmin_x h(x, lambda), with inexact hypergradients.

    Step k solves the inner problem (L-BFGS) and the linear system (conjugate gradients), both from where the last step
    ended, to eps_k relative to their first and present right sides. The sum of eps_k is finite ("exponential": 0.9^k,
    "quadratic": k^-2, "cubic": k^-3, times `first_tolerance`), which makes the method converge; "exact" solves both to
    1e-8 each time. alpha grows by 1.05 after a step by which g fell as a quadratic model of curvature 1 / alpha says it
    should, up to what eps_k leaves open, stays where g fell at all, and is halved otherwise. The Lipschitz constants in
    that last term, which nobody knows, are taken as |g|.

    inner_loss(params, hyper) and outer_loss(params) or outer_loss(params, hyper) return one number; the inner loss is
    twice differentiable and strongly convex in `params`, both are tensors or dicts of tensors. Give hyperparameters in
    the scale in which steps make sense: logarithms, for strengths. bounds: (low, high) of every hyperparameter.
    step_size: the first alpha; None makes the first step 1 long. tolerance: of the projected hypergradient's norm.
    iterations: of each inner solve. Raises BadInput for losses or tensors that cannot be differentiated, NonFinite if
    the hypergradient is.

    >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    >>> inner = lambda w, decay: ((w * x - y) ** 2).sum() + decay.exp() * w**2
    >>> found = hoag(inner, lambda w: (w - 0.5) ** 2, torch.tensor(0.0), torch.tensor(0.0))
    >>> round(float(found.hyper.exp()), 1), found.outer < 1e-6  # w = 5 / (5 + exp(hyper))
    (5.0, True)
    """
    require_whole(1, steps=steps, iterations=iterations)
    require_positive(first_tolerance=first_tolerance, tolerance=tolerance)
    if step_size is not None:
        require_positive(step_size=step_size)
    require_bounds(bounds)
    problem = Problem(inner_loss, outer_loss, Flat(params, "params"), Flat(hyper, "hyper"))
    epsilons = [eps for _, eps in zip(range(steps), tolerances(schedule, first_tolerance), strict=False)]
    return _descend(problem, _StepSize(step_size), epsilons, tolerance, bounds or (-torch.inf, torch.inf), iterations)


def _descend(
    problem: Problem,
    pace: _StepSize,
    epsilons: list[float],
    tolerance: float,
    bounds: tuple[float, float],
    iterations: int,
) -> Bilevel:
    """Run `hoag`, one step for each of the tolerances."""
    x, lam = problem.params.start, problem.hyper.start.clamp(*bounds)
    q, convex, converged, length = torch.zeros_like(x), True, False, torch.inf
    history: list[dict[str, float]] = []
    for eps in epsilons:
        x = problem.solve(x, lam, eps, iterations)
        gradient, q, value, positive = hypergradient_at(problem, x, lam, q, eps, iterations)
        convex = convex and positive
        length = float(torch.linalg.vector_norm(gradient))
        alpha = pace.after(value, eps, length)
        figures = {"outer": value, "tolerance": eps, "hypergradient": length, "step_size": alpha}
        history.append({**figures, "evaluations": float(problem.evaluations)})
        # Only an accurate hypergradient can tell that there is nothing left to gain.
        if float(torch.linalg.vector_norm(lam - (lam - gradient).clamp(*bounds))) <= tolerance:
            converged = True
            break
        after = (lam - alpha * gradient).clamp(*bounds)
        pace.moved, lam = float(torch.linalg.vector_norm(after - lam)), after
    x = problem.solve(x, lam, min(eps, tolerance), iterations)
    remedy = "" if converged else f"the hypergradient is {length:.2g} after {len(history)} steps: raise steps."
    if not convex:
        remedy = "the inner loss is not convex where it was solved: add a term such as a small sum of squares to it."
    return problem.found(x, lam, history, converged and convex, remedy)


class _StepSize:
    """alpha of `hoag`: it grows, stays or is halved by whether the outer loss fell as it should."""

    def __init__(self, first: float | None) -> None:
        self.alpha, self.moved = first, 0.0
        self.before: tuple[float, float] | None = None

    def after(self, value: float, eps: float, length: float) -> float:
        """Return the step size, now that the outer loss is `value`, up to `eps`, after a step of length `moved`."""
        if self.alpha is None:
            self.alpha = 1.0 / length if length else 1.0
        if self.before is not None:
            before, eps_before = self.before
            open_to = (eps_before * (1 + self.moved) + eps) * abs(before)  # by what the inexact losses may be off
            expected = before + open_to - self.moved**2 / (2 * self.alpha)
            self.alpha *= GROW if value <= expected else 1.0 if value <= before else 0.5
        self.before = value, eps
        return self.alpha
