"""What bilevel loops share: two losses of flat vectors, inner solves, hypergradients by implicit differentiation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from plait.errors import BadInput, NonFinite

Loss = Callable[..., Tensor]
Tensors = Tensor | dict[str, Tensor]
T = TypeVar("T")

POLISHED = 100
"""Products with the Hessian in one of Newton's steps, at most."""


@dataclass(frozen=True)
class Bilevel:
    """What a bilevel loop found: parameters and hyperparameters as they were given, and how it went."""

    params: Any
    hyper: Any
    outer: float
    """The outer loss at `params`, solved for `hyper`."""
    history: list[dict[str, float]] = field(repr=False)
    """Per step: outer, tolerance, hypergradient (its norm), step_size, and the cost so far as `evaluations`."""
    evaluations: int
    """Gradients of the inner loss and products with its Hessian, together: what the run cost."""
    converged: bool
    """Whether the projected hypergradient fell to the tolerance."""
    remedy: str = ""
    """What to do when it did not converge, in one sentence."""


class Flat:
    """Tensors, alone or by name, as one vector and back."""

    def __init__(self, given: Any, name: str) -> None:
        parts = [given] if isinstance(given, Tensor) else list(given.values()) if isinstance(given, dict) else []
        if not parts or not all(isinstance(p, Tensor) and p.is_floating_point() for p in parts):
            raise BadInput(f"{name} must be a tensor of real numbers, or a dict of such.")
        self.names = None if isinstance(given, Tensor) else list(given)
        self.shapes, self.dtypes = [p.shape for p in parts], [p.dtype for p in parts]
        self.start = torch.cat([p.detach().reshape(-1) for p in parts])
        if not len(self.start):
            raise BadInput(f"{name} holds no numbers: give at least one.")
        if not torch.isfinite(self.start).all():
            raise BadInput(f"{name} holds NaN or infinite values: start from finite ones.")

    def back(self, vector: Tensor) -> Any:
        """Return a vector as the tensors that were given, of their shapes and types."""
        pieces = torch.split(vector, [shape.numel() for shape in self.shapes])
        kinds = zip(pieces, self.shapes, self.dtypes, strict=True)
        tensors = [piece.view(shape).to(dtype) for piece, shape, dtype in kinds]
        return tensors[0] if self.names is None else dict(zip(self.names, tensors, strict=True))


class Problem:
    """The two losses of vectors, and how often the inner one was differentiated."""

    def __init__(self, inner: Loss, outer: Loss, params: Flat, hyper: Flat) -> None:
        require_functions(inner_loss=inner, outer_loss=outer)
        self.losses, self.params, self.hyper = (inner, outer), params, hyper
        needed = [p for p in inspect.signature(outer).parameters.values() if p.default is p.empty]
        self.alone = len(needed) == 1 and needed[0].kind is not needed[0].VAR_POSITIONAL
        self.evaluations, self.scale = 0, 0.0

    def inner(self, x: Tensor, lam: Tensor) -> Tensor:
        """Return the inner loss."""
        return self.scalar(self.losses[0](self.params.back(x), self.hyper.back(lam)), "inner_loss")

    def outer(self, x: Tensor, lam: Tensor) -> Tensor:
        """Return the outer loss."""
        given = (self.params.back(x),) if self.alone else (self.params.back(x), self.hyper.back(lam))
        return self.scalar(self.losses[1](*given), "outer_loss")

    def scalar(self, value: Any, name: str) -> Tensor:
        """Return a loss as a tensor without dimensions, if it is one number."""
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise BadInput(f"{name} must return a tensor of one number: take the mean or the sum over examples.")
        return value.reshape(())

    def slope(self, x: Tensor, lam: Tensor) -> Tensor:
        """Return the gradient of the inner loss in x, which can be differentiated again."""
        self.evaluations += 1
        value = self.inner(x, lam)
        if not value.requires_grad:
            raise BadInput("inner_loss does not depend on params: compute it from them, without detach or no_grad.")
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return slope

    def found(
        self, x: Tensor, lam: Tensor, history: list[dict[str, float]], converged: bool, remedy: str = ""
    ) -> Bilevel:
        """Return what a loop found at (x, lam)."""
        with torch.no_grad():
            outer = float(self.outer(x, lam))
        params, hyper = self.params.back(x), self.hyper.back(lam)
        return Bilevel(params, hyper, outer, history, self.evaluations, converged, remedy)

    def solve(self, x: Tensor, lam: Tensor, tolerance: float, iterations: int) -> Tensor:
        """Return x moved by L-BFGS until the gradient is at most `tolerance` times the first one that was seen."""
        if not self.scale:
            first = self.slope(x.clone().requires_grad_(), lam)
            self.scale = float(torch.linalg.vector_norm(first.detach())) or 1.0
        return self.descend(x, lam, tolerance * self.scale, iterations)

    def descend(self, x: Tensor, lam: Tensor, length: float, iterations: int) -> Tensor:
        """Return x moved by L-BFGS until the gradient is at most that long."""
        x = x.clone().requires_grad_()
        least, reached = length / x.numel() ** 0.5, None
        rule = torch.optim.LBFGS(
            [x], max_iter=iterations, tolerance_grad=least, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            nonlocal reached
            self.evaluations += 1
            value = self.inner(x, lam)
            (x.grad,) = torch.autograd.grad(value, x)
            if x.grad.abs().max() <= least:
                reached = x.detach().clone()
            return value.detach()

        rule.step(closure)
        if reached is not None:
            return reached
        return x.detach() if rule.state[x]["n_iter"] >= iterations else self.polish(x.detach(), lam, length)

    def polish(self, x: Tensor, lam: Tensor, length: float) -> Tensor:
        """Return x moved by Newton's method until the gradient is at most that long, or does not get shorter.

        A line search compares losses, which are rounded: it ends where gradients are about the root of the precision.
        """
        best, shortest = x, math.inf
        while True:
            at = x.clone().requires_grad_()
            slope = self.slope(at, lam)
            right = slope.detach()
            now = float(torch.linalg.vector_norm(right))
            if not now < 0.5 * shortest:
                return best if not now < shortest else x
            best, shortest = x, now
            if now <= length:
                return x
            product = self.product(slope, at)
            move, _ = conjugate_gradients(product, right, torch.zeros_like(x), 0.5 * length / now, POLISHED)
            x = x - move

    def product(self, slope: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the product with the inner loss's Hessian in x, given its gradient there."""

        def times(vector: Tensor) -> Tensor:
            self.evaluations += 1
            (across,) = torch.autograd.grad(slope, x, vector, retain_graph=True)
            return across

        return times


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, bool]:
    """Solve H q = right to a residual of `tolerance` times |right|; also say whether H looked positive definite.

    >>> conjugate_gradients(lambda v: 2 * v, torch.ones(2), torch.zeros(2), 1e-6, 10)
    (tensor([0.5000, 0.5000]), True)
    """
    q, residual = start, right - product(start) if start.any() else right.clone()
    direction, square = residual, residual.dot(residual)
    enough = (tolerance * torch.linalg.vector_norm(right)) ** 2
    for _ in range(iterations):
        if square <= enough:
            break
        across = product(direction)
        curvature = direction.dot(across)
        if curvature <= 0:
            return q, False
        q = q + square / curvature * direction
        residual = residual - square / curvature * across
        square, before = residual.dot(residual), square
        direction = residual + square / before * direction
    return q, True


def hypergradient_at(
    problem: Problem, x: Tensor, lam: Tensor, q: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor, float, bool]:
    """Return (grad_2 g - (d12 h)^T q, q, the outer loss, whether the Hessian looked positive definite)."""
    x, lam = x.clone().requires_grad_(), lam.clone().requires_grad_()
    value = problem.outer(x, lam)
    if not value.requires_grad:
        raise BadInput("outer_loss does not depend on params: compute it from them, without detach or no_grad.")
    right, direct = torch.autograd.grad(value, (x, lam), allow_unused=True, materialize_grads=True)
    slope = problem.slope(x, lam)

    q, convex = conjugate_gradients(problem.product(slope, x), right, q, tolerance, iterations)
    problem.evaluations += 1
    (cross,) = torch.autograd.grad(slope, lam, q, allow_unused=True, materialize_grads=True)
    found = direct - cross
    if not (torch.isfinite(found).all() and torch.isfinite(value)):
        raise NonFinite("the hypergradient is not finite: bound the hyperparameters, or start from other ones.")
    return found, q, float(value.detach()), convex


def hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Tensors,
    hyper: Tensors,
    *,
    tolerance: float = 1e-6,
    iterations: int = 1000,
) -> tuple[Any, Any]:
    """Return (d outer / d hyper, params solved for hyper), both to `tolerance`: one step's ground of `hoag`.

    >>> inner = lambda w, target: ((w - target) ** 2).sum()
    >>> hypergradient(inner, lambda w: (w**2).sum() / 2, torch.zeros(2), torch.tensor([1.0, 3.0]))[0]
    tensor([1., 3.])
    """
    variables, hypers = Flat(params, "params"), Flat(hyper, "hyper")
    problem = Problem(inner_loss, outer_loss, variables, hypers)
    x = problem.solve(variables.start, hypers.start, tolerance, iterations)
    found, *_ = hypergradient_at(problem, x, hypers.start, torch.zeros_like(x), tolerance, iterations)
    return hypers.back(found), variables.back(x)


def require_functions(**given: Any) -> None:
    """Refuse what cannot be called."""
    for name, function in given.items():
        if not callable(function):
            raise BadInput(f"{name} must be a function, not {function!r}.")


def is_pair(given: Any) -> bool:
    """Say whether something is two numbers."""
    return isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(n, Real) for n in given)


def require_bounds(bounds: tuple[float, float] | None) -> None:
    """Refuse bounds that are not (low, high)."""
    if bounds is not None and not (is_pair(bounds) and bounds[0] < bounds[1]):
        raise BadInput(f"bounds must be (low, high) with low < high, not {bounds!r}.")


def as_tensors(state: Any) -> dict[str, Tensor]:
    """Return the fields of a loop's state as tensors, as a checkpoint holds them: numbers to the last digit.

    >>> from plait.loops.hypergradient import Descent
    >>> as_tensors(Descent(torch.zeros(2), taken=3))["taken"]
    tensor(3)
    """

    def tensor(value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)

    return {f.name: tensor(getattr(state, f.name)) for f in fields(state)}


def from_tensors(kind: type[T], held: dict[str, Tensor]) -> T:
    """Return a loop's state from what `as_tensors` made of it."""
    values = {f.name: held[f.name] for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value if value.dim() else value.item() for name, value in values.items()})
