"""Bilevel descent whose accuracy is certified, and raised only where the line search asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.errors import BadInput, NonFinite
from plait.fields import Count, Positive, Probability
from plait.loops.base import (
    Bilevel,
    Flat,
    Loss,
    Problem,
    Tensors,
    as_tensors,
    conjugate_gradients,
    from_tensors,
)
from plait.loops.solving import SolvingTuner
from plait.loops.tuning import FURTHEST
from plait.math.transport import require_positive, require_whole
from plait.method import method

BACKTRACK, SHRINK, GROW, LENGTHEN = 0.9, 0.5, 1.05, 10 / 9
"""Factors of the step size that is refused, of the accuracy, up and down, and of the step size that was taken."""
SEARCHED, REFINED, RENEWED = 10, 40, 5
"""Step sizes of the first line search, one more at each rise of the accuracy; refinements of one hypergradient, at
most; after how many hypergradients the Lipschitz constants are estimated again."""
DESCENT = 1e-8
"""The part of alpha |z|^2 by which a step must lower the outer loss."""


def error_bound(
    epsilon: float,
    delta: float,
    *,
    convexity: float,
    smoothness: float,
    slope: float,
    cross: float,
    inverse_change: float,
    cross_change: float,
) -> float:
    """Return omega = c eps + |J| / mu delta + L_J L_g / mu eps^2: how far a hypergradient may be off, of x within eps
    of the solution and a linear system solved to delta, with c = L_g |J| / mu + L_inv |grad g| |J| + L_J |grad g| / mu.

    convexity: mu. smoothness: L_g. slope: |grad g|. cross: |J|. inverse_change, cross_change: the Lipschitz constants
    L_inv of H^-1 and L_J of J.

    >>> numbers = {"slope": 1.0, "cross": 1.0, "inverse_change": 0.0, "cross_change": 0.0}
    >>> error_bound(0.1, 0.1, convexity=2.0, smoothness=1.0, **numbers)
    0.1
    """
    c = smoothness * cross / convexity + inverse_change * slope * cross + cross_change * slope / convexity
    return c * epsilon + cross / convexity * delta + cross_change * smoothness / convexity * epsilon**2


@dataclass
class State:
    """Where the descent is: x and hyperparameters, the linear system's solution, accuracies, and what is known."""

    x: Tensor
    lam: Tensor
    q: Tensor
    epsilon: float
    delta: float
    alpha: float
    across: Tensor
    """A unit vector of hyperparameters, near the one that J stretches most."""
    inverse_change: float = 0.0
    cross_change: float = 0.0
    error: float = torch.inf
    asked: int = 0
    """How many hypergradients were formed."""
    stalled: bool = False
    """Whether the inner problem could not be solved to the accuracy that was asked for."""
    length: float = torch.inf
    """The hypergradient's norm."""
    taken: float = 0.0
    """The last step size; 0 where no step was taken."""
    converged: bool = False
    """Whether the hypergradient and its error together were at most the tolerance."""


def start_of(x: Tensor, lam: Tensor, accuracy: float, step_size: float) -> State:
    """Return where the descent begins."""
    across = torch.randn(lam.shape, generator=torch.Generator().manual_seed(1)).to(lam)
    across = across / torch.linalg.vector_norm(across)
    return State(x, lam, torch.zeros_like(x), accuracy, accuracy, step_size, across)


class Descent:
    """The pieces of MAID: an inexact hypergradient with its bound, and a line search among inexact losses."""

    def __init__(self, problem: Problem, convexity: float, smoothness: float, margin: float, iterations: int) -> None:
        self.problem, self.mu, self.smoothness = problem, convexity, smoothness
        self.margin, self.iterations = margin, iterations

    def outer(self, x: Tensor, lam: Tensor) -> tuple[float, Tensor]:
        """Return (g(x), grad g(x))."""
        x = x.clone().requires_grad_()
        value = self.problem.outer(x, lam)
        if not value.requires_grad:
            raise BadInput("outer_loss does not depend on params: compute it from them, without detach or no_grad.")
        (slope,) = torch.autograd.grad(value, x)
        return float(value.detach()), slope

    def linear(self, x: Tensor, lam: Tensor, right: Tensor, start: Tensor, delta: float) -> tuple[Tensor, Tensor]:
        """Return (q, J^T q), H q = right to a residual of delta."""
        x, lam = x.clone().requires_grad_(), lam.clone().requires_grad_()
        slope = self.problem.slope(x, lam)
        relative = delta / max(float(torch.linalg.vector_norm(right)), 1e-30)
        q, _ = conjugate_gradients(self.problem.product(slope, x), right, start, relative, self.iterations)
        self.problem.evaluations += 1
        (crossed,) = torch.autograd.grad(slope, lam, q, allow_unused=True, materialize_grads=True)
        return q, crossed

    def cross_norm(self, state: State) -> float:
        """Return |J| by two steps of the power method, from where the last ones ended."""
        x, lam = state.x.clone().requires_grad_(), state.lam.clone().requires_grad_()
        u = torch.zeros_like(x, requires_grad=True)
        slope, length = self.problem.slope(x, lam), 0.0
        (back,) = torch.autograd.grad(slope, lam, u, create_graph=True, allow_unused=True, materialize_grads=True)
        if not back.requires_grad:
            return 0.0
        for _ in range(2):
            self.problem.evaluations += 2
            (forward,) = torch.autograd.grad(back, u, state.across, retain_graph=True)
            length = float(torch.linalg.vector_norm(forward))
            (again,) = torch.autograd.grad(slope, lam, forward, retain_graph=True)
            state.across = again / torch.linalg.vector_norm(again).clamp_min(1e-30)
        return length

    def changes(self, state: State, slope: Tensor, crossed: Tensor) -> None:
        """Raise the estimates of the Lipschitz constants by a difference, over eps in a random direction."""
        drawn = torch.randn(state.x.shape, generator=torch.Generator().manual_seed(state.asked)).to(state.x)
        near = state.x + state.epsilon * drawn / torch.linalg.vector_norm(drawn)
        q, _ = self.linear(near, state.lam, slope, state.q, state.delta)
        x, lam = near.requires_grad_(), state.lam.clone().requires_grad_()
        self.problem.evaluations += 1
        (there,) = torch.autograd.grad(
            self.problem.slope(x, lam), lam, state.q, allow_unused=True, materialize_grads=True
        )
        off = [float(torch.linalg.vector_norm(d)) for d in (q - state.q, there - crossed, slope, state.q)]
        state.inverse_change = max(state.inverse_change, off[0] / max(off[2] * state.epsilon, 1e-30))
        state.cross_change = max(state.cross_change, off[1] / max(off[3] * state.epsilon, 1e-30))

    def hypergradient(self, state: State, tolerance: float) -> Tensor:
        """Return z = -J^T q, refined until its error is at most (1 - margin) |z|; stop where |z| is below tolerance."""
        for _ in range(REFINED):
            state.x = self.problem.descend(state.x, state.lam, state.epsilon * self.mu, self.iterations)
            left = self.problem.slope(state.x.clone().requires_grad_(), state.lam).detach()
            state.stalled = float(torch.linalg.vector_norm(left)) > state.epsilon * self.mu
            _, slope = self.outer(state.x, state.lam)
            state.q, crossed = self.linear(state.x, state.lam, slope, state.q, state.delta)
            if not torch.isfinite(crossed).all():
                raise NonFinite("the hypergradient is not finite: start from other hyperparameters.")
            if state.asked % RENEWED == 0:
                self.changes(state, slope, crossed)
            state.asked += 1
            state.error = error_bound(
                state.epsilon,
                state.delta,
                convexity=self.mu,
                smoothness=self.smoothness,
                slope=float(torch.linalg.vector_norm(slope)),
                cross=self.cross_norm(state),
                inverse_change=state.inverse_change,
                cross_change=state.cross_change,
            )
            length = float(torch.linalg.vector_norm(crossed))
            if state.error <= (1 - self.margin) * length or length + state.error <= tolerance or self.spent(state):
                break
            state.epsilon, state.delta = SHRINK * state.epsilon, SHRINK * state.delta
        return -crossed

    def spent(self, state: State) -> bool:
        """Say whether x cannot be told to a higher accuracy in its precision, or was not found to the one asked for."""
        return state.stalled or self.finest(state)

    def finest(self, state: State) -> bool:
        """Say whether x cannot be told to a higher accuracy in its precision."""
        size = max(float(torch.linalg.vector_norm(state.x)), 1.0)
        return state.epsilon < 8 * torch.finfo(state.x.dtype).eps * size

    def line_search(self, state: State, z: Tensor, sizes: int) -> tuple[Tensor, Tensor, float] | None:
        """Return (x, hyperparameters, step size) at which the outer loss has certainly fallen, or None."""
        value, slope = self.outer(state.x, state.lam)
        least = value - float(torch.linalg.vector_norm(slope)) * state.epsilon
        square = float(z.dot(z))
        for i in range(sizes):
            alpha = state.alpha * BACKTRACK**i
            lam = state.lam - alpha * z
            x = self.problem.descend(state.x, lam, state.epsilon * self.mu, self.iterations)
            after, slope = self.outer(x, lam)
            length = float(torch.linalg.vector_norm(slope))
            most = after + length * state.epsilon + self.smoothness / 2 * state.epsilon**2
            if most - least <= -DESCENT * alpha * square:
                return x, lam, alpha
        return None

    def step(self, state: State, tolerance: float, budget: int) -> tuple[float, float]:
        """Move the state by one step, or make it more accurate where none is certain; return its eps and outer loss.

        Once the budget of evaluations is spent, accuracy is raised no further.
        """
        failures, found = 0, None
        while True:
            z = self.hypergradient(state, tolerance)
            state.length = float(torch.linalg.vector_norm(z))
            state.converged = state.length + state.error <= tolerance
            found = None if state.converged else self.line_search(state, z, SEARCHED + failures)
            if state.converged or found is not None or self.spent(state) or self.problem.evaluations >= budget:
                break
            state.epsilon, state.delta, failures = SHRINK * state.epsilon, SHRINK * state.delta, failures + 1
        epsilon, (outer, _) = state.epsilon, self.outer(state.x, state.lam)
        state.taken = 0.0
        if found is not None:
            state.x, state.lam, state.taken = found
            state.alpha = LENGTHEN * state.taken
            state.epsilon, state.delta = GROW * state.epsilon, GROW * state.delta
        return epsilon, outer


def maid(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Tensors,
    hyper: Tensors,
    *,
    convexity: float,
    smoothness: float,
    steps: int = 50,
    accuracy: float = 0.1,
    step_size: float = 1.0,
    margin: float = 1e-4,
    tolerance: float = 1e-6,
    budget: int = 100_000,
    iterations: int = 2000,
) -> Bilevel:
    """lambda <- lambda - alpha z, z = -J^T q, |H q - grad g(x)| <= delta, |x - x(lambda)| <= |grad h(x)| / mu <= eps,
    with eps, delta and alpha found on the way: the method of adaptive inexact descent, of min g(x(lambda)).

    eps and delta are halved until the bound omega of |z - gradient| is at most (1 - margin) |z|, so that -z descends.
    Then alpha is the largest of rho^i alpha_0 at which the outer loss has certainly fallen:
    g(x') + |grad g(x')| eps + L/2 eps^2 <= g(x) - |grad g(x)| eps - c alpha |z|^2. Where none is, all is made more
    accurate; after a step eps, delta and alpha may grow again. So early steps are cheap, and nothing is tuned by hand.

    inner_loss(params, hyper) is twice differentiable and mu-strongly convex, outer_loss(params) convex with an
    L-Lipschitz gradient; both return one number. convexity: mu; smoothness: L. The Lipschitz constants of H^-1 and J in
    the bound are estimated from differences, and |J| by the power method. accuracy: the first eps and delta. step_size:
    the first alpha. margin: in (0, 1); the smaller, the less accurate steps may be. budget: gradients of the inner loss
    and products with its second derivatives, after which no step begins. tolerance: of |z| and its error together. Give
    hyperparameters in the scale in which steps make sense: logarithms, for strengths. history has, for each step:
    outer, epsilon, hypergradient, error, step_size (0 where none was taken), evaluations. Raises BadInput for losses or
    tensors that cannot be differentiated, NonFinite if the hypergradient is.

    >>> x, y = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> inner = lambda w, decay: (((w * x - y) ** 2).sum() + decay.exp() * w**2) / 2
    >>> start = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    >>> found = maid(inner, lambda w: (w - 0.5) ** 2 / 2, *start, convexity=5.0, smoothness=1.0)
    >>> round(float(found.hyper.exp()), 1)  # w = 5 / (5 + exp(hyper))
    5.0
    """
    require_whole(1, steps=steps, iterations=iterations, budget=budget)
    require_positive(convexity=convexity, smoothness=smoothness, accuracy=accuracy)
    require_positive(step_size=step_size, tolerance=tolerance, margin=margin)
    if margin >= 1:
        raise BadInput(f"margin must be in (0, 1), not {margin}.")
    problem = Problem(inner_loss, outer_loss, Flat(params, "params"), Flat(hyper, "hyper"))
    if not problem.alone:
        raise BadInput("maid's outer_loss must be a function of params alone: its certificate covers no other.")
    descent = Descent(problem, convexity, smoothness, margin, iterations)
    state = start_of(problem.params.start, problem.hyper.start, accuracy, step_size)
    history, remedy = list[dict[str, float]](), ""
    for _ in range(steps):
        epsilon, outer = descent.step(state, tolerance, budget)
        figures = {"outer": outer, "epsilon": epsilon, "hypergradient": state.length, "error": state.error}
        history.append({**figures, "step_size": state.taken, "evaluations": float(problem.evaluations)})
        if state.converged:
            break
        if not state.taken and descent.spent(state):
            remedy = "the inner problem cannot be solved more accurately: give tensors of float64, or raise iterations."
            break
        if problem.evaluations >= budget:
            remedy = "the budget was spent: raise budget."
            break
    if not state.converged and not remedy:
        remedy = f"the hypergradient is {history[-1]['hypergradient']:.2g} after {len(history)} steps: raise steps."
    return problem.found(state.x, state.lam, history, state.converged, remedy)


@paper("salehi2025adaptively", key="maid", theme="bilevel")
@method
class MAID(SolvingTuner):
    """u <- u - alpha z, z = -J^T q, |H q - grad_w F| <= delta, |grad_w f| / mu <= eps, with H = d^2 f / dw^2 and
    J = d^2 f / dw du of the training objective f, and the validation loss F: `maid`, one step of it every so often.

    From step `warmup` on, after every `every` training steps: f is solved on the training data from the weights that
    training has reached, no more accurately than it takes for -z to descend for certain; alpha is the largest at which
    F has certainly fallen, and eps, delta and alpha go on from one time to the next. Training goes on from the solution
    at the new numbers. Where no step is certain the numbers stay ("taken" is 0 in the figures), for good where eps has
    come to the precision of the weights.

    u are the raw numbers (logarithms, logits) of fields that are `Tuned`: strengths of penalties, label smoothing and
    other terms of the loss; rates of dropout and noise are STN's. The certificate is of an f that is mu-strongly convex
    in the weights, convexity = mu: the least strength of an L2 of all of them, Tuned(low=mu), beside a convex loss. It
    is of a convex F with an L-Lipschitz gradient, smoothness = L: for softmax regression half the largest eigenvalue of
    X^T X / n. Of other models both numbers are wishes, and the method a line search. accuracy, step_size: the first
    eps and alpha. margin: in [0, 1). tolerance: of |z| and its error, together, at which nothing is left to gain.
    budget: gradients and products of one time, after which it becomes no more accurate. f is taken in evaluation mode,
    on the data as they are, all of them or `batches` batches. Keeps q: one further copy of the trained weights. Raises
    BadInput without a validation set, on several processes, beside constraints, for a number in which f has no
    derivative and for a model that cannot be differentiated twice, NonFinite if the hypergradient is.

    >>> from plait import train
    >>> from plait.penalty.norm import L2
    >>> from plait.schedule import Tuned
    >>> from plait.step.adam import AdamW
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> data, tuner = (x, x.sum(1)), MAID(convexity=1.0, smoothness=4.0, step_size=10.0, warmup=20)
    >>> methods = [L2(strength=Tuned(start=1.0)), tuner, AdamW(lr=0.03)]
    >>> run = train(torch.nn.Linear(3, 1), data, methods=methods, validation=data, steps=80)
    >>> run.measures[repr(tuner)][-1]["L2.strength"] < 0.05
    True
    """

    convexity: Positive
    smoothness: Positive
    accuracy: Positive = 0.1
    step_size: Positive = 1.0
    margin: Probability = 1e-4
    tolerance: Positive = 1e-6
    budget: Count = 300

    reports: ClassVar[tuple[str, ...]] = ("epsilon", "error", "length", "taken")

    def iterate(self, problem: Problem, x: Tensor, lam: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Take one step of MAID."""
        if "q" not in memory:
            memory |= _kept(start_of(x, lam, self.accuracy, self.step_size))
        state = from_tensors(State, memory | {"x": x, "lam": lam, "q": memory["q"].to(x)})
        descent = Descent(problem, self.convexity, self.smoothness, self.margin, self.iterations)
        if descent.finest(state):
            return x, lam
        descent.step(state, self.tolerance, problem.evaluations + self.budget)
        memory |= _kept(state)
        return state.x, state.lam.clamp(-FURTHEST, FURTHEST)


def _kept(state: State) -> dict[str, Tensor]:
    """Return what a run must remember of a state: all but the weights and numbers, which it has."""
    return {name: tensor for name, tensor in as_tensors(state).items() if name not in ("x", "lam")}
