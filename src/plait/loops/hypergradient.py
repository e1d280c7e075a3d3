"""Hyperparameters by gradient descent: the outer loss is followed through the solution of the inner problem."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.errors import BadInput, did_you_mean
from plait.fields import NonNegative, Positive
from plait.loops.base import (
    Bilevel,
    Flat,
    Loss,
    Problem,
    Tensors,
    as_tensors,
    from_tensors,
    hypergradient_at,
    require_bounds,
)
from plait.loops.solving import SolvingTuner
from plait.math.transport import require_positive, require_whole
from plait.method import method

SCHEDULES = ("exponential", "quadratic", "cubic", "exact")
SHRINK, EXACT, GROW = 0.9, 1e-8, 1.05


def tolerance_of(schedule: str, first: float, k: int) -> float:
    """Return eps_k, k = 1, 2, ...: first * 0.9^(k - 1), first / k^2 or first / k^3, all summable, or 1e-8 throughout.

    >>> [round(tolerance_of("quadratic", 0.09, k), 3) for k in (1, 2, 3)]
    [0.09, 0.022, 0.01]
    """
    falling: dict[str, float] = {
        "exponential": SHRINK ** float(k - 1),
        "quadratic": k**-2.0,
        "cubic": k**-3.0,
        "exact": 0.0,
    }
    return max(first * falling[schedule], EXACT)


@dataclass(frozen=True)
class Descent:
    """Where HOAG stands beside (x, lambda), between two steps."""

    q: Tensor
    """The solution of the linear system."""
    taken: int = 0
    """How many steps were taken."""
    alpha: float = 0.0
    """The step size; 0 where it is not yet known."""
    moved: float = 0.0
    """How far lambda moved in the last step."""
    value: float = math.inf
    """The outer loss before that move, known up to `tolerance`."""
    tolerance: float = 0.0
    length: float = math.inf
    """The hypergradient's norm."""
    left: float = math.inf
    """The norm of the projected hypergradient: how far a move by it would lead."""
    convex: bool = True
    """Whether every Hessian looked positive definite."""


def next_step_size(state: Descent, value: float, eps: float, length: float) -> float:
    """Return alpha, now that the outer loss is `value`, up to `eps`, and the hypergradient has that length."""
    alpha = state.alpha or (1.0 / length if length else 1.0)
    if not state.taken:
        return alpha
    open_to = (state.tolerance * (1 + state.moved) + eps) * abs(state.value)  # by what inexact losses may be off
    expected = state.value + open_to - state.moved**2 / (2 * alpha)
    return alpha * (GROW if value <= expected else 1.0 if value <= state.value else 0.5)


def descend(
    problem: Problem,
    x: Tensor,
    lam: Tensor,
    state: Descent,
    eps: float,
    bounds: tuple[Any, Any],
    iterations: int,
) -> tuple[Tensor, Tensor, Descent]:
    """Take one step of HOAG to the tolerance eps: return (x solved for lambda, the next lambda, the next state)."""
    x = problem.solve(x, lam, eps, iterations)
    gradient, q, value, convex = hypergradient_at(problem, x, lam, state.q, eps, iterations)
    length = float(torch.linalg.vector_norm(gradient))
    alpha = next_step_size(state, value, eps, length)
    after = (lam - alpha * gradient).clamp(*bounds)
    moved = float(torch.linalg.vector_norm(after - lam))
    left = float(torch.linalg.vector_norm(lam - (lam - gradient).clamp(*bounds)))
    convex = convex and state.convex
    return x, after, Descent(q, state.taken + 1, alpha, moved, value, eps, length, left, convex)


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
    if schedule not in SCHEDULES:
        raise BadInput(f"there is no schedule '{schedule}' of tolerances{did_you_mean(schedule, SCHEDULES)}.")
    problem = Problem(inner_loss, outer_loss, Flat(params, "params"), Flat(hyper, "hyper"))
    box = bounds or (-math.inf, math.inf)
    x, lam = problem.params.start, problem.hyper.start.clamp(*box)
    state, converged = Descent(torch.zeros_like(x), alpha=step_size or 0.0), False
    history: list[dict[str, float]] = []
    for k in range(1, steps + 1):
        eps = tolerance_of(schedule, first_tolerance, k)
        x, after, state = descend(problem, x, lam, state, eps, box, iterations)
        figures = {"outer": state.value, "tolerance": eps, "hypergradient": state.length, "step_size": state.alpha}
        history.append({**figures, "evaluations": float(problem.evaluations)})
        # Only an accurate hypergradient can tell that there is nothing left to gain.
        if converged := state.left <= tolerance:
            break
        lam = after
    x = problem.solve(x, lam, min(eps, tolerance), iterations)
    remedy = "" if converged else f"the hypergradient is {state.length:.2g} after {len(history)} steps: raise steps."
    if not state.convex:
        remedy = "the inner loss is not convex where it was solved: add a term such as a small sum of squares to it."
    return problem.found(x, lam, history, converged and state.convex, remedy)


@paper("pedregosa2016hyperparameter", key="hoag", theme="bilevel")
@method
class HOAG(SolvingTuner):
    """u <- u - alpha (grad_u F - J^T q), H q = grad_w F, at w with |grad_w f| <= eps_k, with H = d^2 f / dw^2 and
    J = d^2 f / dw du of the training objective f, and the validation loss F: `hoag`, one step of it every so often.

    From step `warmup` on, after every `every` training steps: f is solved on the training data from the weights that
    training has reached, by L-BFGS, to eps_k times its first gradient; the linear system is solved from its last
    solution, by conjugate gradients, to eps_k; u and alpha move as `hoag` says; training goes on from the solution.

    u are the raw numbers (logarithms, logits) of fields that are `Tuned`. f must be twice differentiable, and strongly
    convex in the weights for the theory; where its Hessian is not positive the linear system is left as far as it was
    solved, and "convex" is 0 in the figures. f must have a derivative in each number: strengths of penalties, label
    smoothing and other terms of the loss; rates of dropout and noise are STN's. f is taken in evaluation mode, on the
    data as they are, all of them or `batches` batches. schedule, first_tolerance: of eps_k. step_size: the first alpha;
    0 makes the first step 1 long. reach: how far a raw number may go from its start; 7 is a factor of 1100 of a
    strength (without an end, a step from where F is flat may lead where it is flat too). iterations: of one solve, and
    of one linear system, at most. Keeps q: one further copy of the trained weights. Raises BadInput without a
    validation set, on several processes, beside constraints, for a number in which f has no derivative and for a model
    that cannot be differentiated twice, NonFinite if the hypergradient is.

    >>> from plait import train
    >>> from plait.penalty.norm import L2
    >>> from plait.schedule import Tuned
    >>> from plait.step.adam import AdamW
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> data, tuner = (x, x.sum(1)), HOAG(warmup=20, every=10)
    >>> methods = [L2(strength=Tuned(start=0.1)), tuner, AdamW(lr=0.03)]
    >>> run = train(torch.nn.Linear(3, 1), data, methods=methods, validation=data, steps=60)
    >>> run.measures[repr(tuner)][-1]["L2.strength"] < 0.05
    True
    """

    schedule: Literal["exponential", "quadratic", "cubic", "exact"] = "exponential"
    first_tolerance: Positive = 0.01
    step_size: NonNegative = 0.0
    reach: Positive = 7.0

    reports: ClassVar[tuple[str, ...]] = ("value", "tolerance", "length", "alpha", "convex")

    def iterate(self, problem: Problem, x: Tensor, lam: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Take one step of HOAG."""
        if "start" not in memory:
            memory |= {"start": lam} | as_tensors(Descent(torch.zeros_like(x), alpha=self.step_size))
        state = from_tensors(Descent, memory | {"q": memory["q"].to(x)})  # a checkpoint comes back on the processor
        eps = tolerance_of(self.schedule, self.first_tolerance, state.taken + 1)
        box = memory["start"] - self.reach, memory["start"] + self.reach
        x, lam, state = descend(problem, x, lam, state, eps, box, self.iterations)
        memory |= as_tensors(state)
        return x, lam
