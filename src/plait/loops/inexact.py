"""Bilevel descent whose accuracy is certified, and raised only where the line search asks for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.errors import BadInput, NonFinite
from plait.loops.base import (
    Bilevel,
    Flat,
    Loss,
    Problem,
    Tensors,
    conjugate_gradients,
)
from plait.math.transport import require_positive, require_whole

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
class _State:
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


class _Descent:
    """The pieces of MAID: an inexact hypergradient with its bound, and a line search among inexact losses."""

    def __init__(self, problem: Problem, convexity: float, smoothness: float, margin: float, iterations: int) -> None:
        self.problem, self.mu, self.smoothness = problem, convexity, smoothness
        self.margin, self.iterations = margin, iterations
        self.generator = torch.Generator().manual_seed(0)

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

        def product(vector: Tensor) -> Tensor:
            self.problem.evaluations += 1
            (found,) = torch.autograd.grad(slope, x, vector, retain_graph=True)
            return found

        relative = delta / max(float(torch.linalg.vector_norm(right)), 1e-30)
        q, _ = conjugate_gradients(product, right, start, relative, self.iterations)
        self.problem.evaluations += 1
        (crossed,) = torch.autograd.grad(slope, lam, q, allow_unused=True, materialize_grads=True)
        return q, crossed

    def cross_norm(self, state: _State) -> float:
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

    def changes(self, state: _State, slope: Tensor, crossed: Tensor) -> None:
        """Raise the estimates of the Lipschitz constants by a difference, over eps in a random direction."""
        drawn = torch.randn(state.x.shape, generator=self.generator).to(state.x)
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

    def hypergradient(self, state: _State, tolerance: float) -> Tensor:
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

    def spent(self, state: _State) -> bool:
        """Say whether x cannot be told to a higher accuracy in its precision, or was not found to the one asked for."""
        size = max(float(torch.linalg.vector_norm(state.x)), 1.0)
        return state.stalled or state.epsilon < 8 * torch.finfo(state.x.dtype).eps * size

    def line_search(self, state: _State, z: Tensor, sizes: int) -> tuple[Tensor, Tensor, float] | None:
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


@paper("salehi2025adaptively", key="maid", theme="bilevel")
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
    start = problem.hyper.start
    across = torch.randn(start.shape, generator=torch.Generator().manual_seed(1)).to(start)
    x, unit = problem.params.start, across / torch.linalg.vector_norm(across)
    state = _State(x, start, torch.zeros_like(x), accuracy, accuracy, step_size, unit)
    return _descend(_Descent(problem, convexity, smoothness, margin, iterations), state, steps, tolerance, budget)


def _descend(descent: _Descent, state: _State, steps: int, tolerance: float, budget: int) -> Bilevel:
    """Run `maid` from a state."""
    problem, history, remedy, converged = descent.problem, list[dict[str, float]](), "", False
    for _ in range(steps):
        taken, failures = None, 0
        while True:
            z = descent.hypergradient(state, tolerance)
            length = float(torch.linalg.vector_norm(z))
            converged = length + state.error <= tolerance
            taken = None if converged else descent.line_search(state, z, SEARCHED + failures)
            if converged or taken is not None or descent.spent(state) or problem.evaluations >= budget:
                break
            state.epsilon, state.delta, failures = SHRINK * state.epsilon, SHRINK * state.delta, failures + 1
        outer, _ = descent.outer(state.x, state.lam)
        figures = {"outer": outer, "epsilon": state.epsilon, "hypergradient": length, "error": state.error}
        history.append({**figures, "step_size": taken[2] if taken else 0.0, "evaluations": float(problem.evaluations)})
        if converged:
            break
        if taken is None and descent.spent(state):
            remedy = "the inner problem cannot be solved more accurately: give tensors of float64, or raise iterations."
            break
        if taken is not None:
            state.x, state.lam, alpha = taken
            state.alpha, state.epsilon, state.delta = LENGTHEN * alpha, GROW * state.epsilon, GROW * state.delta
        if problem.evaluations >= budget:
            remedy = "the budget was spent: raise budget."
            break
    if not converged and not remedy:
        remedy = f"the hypergradient is {history[-1]['hypergradient']:.2g} after {len(history)} steps: raise steps."
    return problem.found(state.x, state.lam, history, converged, remedy)
