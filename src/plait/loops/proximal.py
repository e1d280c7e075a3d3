"""Constrained bilevel problems from first derivatives alone, through a proximal Lagrangian value function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plait.errors import BadInput, NonFinite
from plait.loops.base import Bilevel, Flat, Loss, Problem, Tensors, is_pair, require_functions
from plait.math.transport import require_positive, require_whole

Project = Callable[[Any, Any], tuple[Any, Any]]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """The numbers of the method: steps of (y, hyper), z, and (theta, lambda), proximities, and the penalty's growth."""

    step_size: float
    z_step_size: float
    lower_step_size: float
    proximity: tuple[float, float]
    penalty: float
    growth: float
    bounds: tuple[float, float]


@dataclass(frozen=True)
class Saddle:
    """What follows the saddle of the proximal Lagrangian: theta, the multiplier l, its anchor z; and the step k."""

    theta: Tensor
    multiplier: Tensor
    z: Tensor
    number: int = 0

    def follow(self, y: Tensor, slope: Tensor, values: Tensor, sizes: Sizes) -> Saddle:
        """Return (theta, l) after a step, given f_y + l g_y and g at theta."""
        near, slack = sizes.proximity
        theta = self.theta - sizes.lower_step_size * (slope + (self.theta - y) / near)
        lower = self.multiplier - sizes.lower_step_size * (-values + (self.multiplier - self.z) / slack)
        return replace(self, theta=theta, multiplier=lower.clamp_min(sizes.bounds[0]))

    def directions(self, y: Tensor, outer: Pair, inner: Pair, below: Tensor, sizes: Sizes) -> Pair:
        """Return what (x, y) descends, given (F_x, F_y) and (f_x, f_y) there, and f_x + l g_x at theta."""
        weight = sizes.penalty * (self.number + 1) ** sizes.growth
        in_x = outer[0] / weight + inner[0] - below
        return in_x, outer[1] / weight + inner[1] - (y - self.theta) / sizes.proximity[0]

    def relax(self, sizes: Sizes) -> Saddle:
        """Return the state at the end of a step, with z closer to l."""
        z = (self.z + sizes.z_step_size * (self.multiplier - self.z) / sizes.proximity[1]).clamp(*sizes.bounds)
        return replace(self, z=z, number=self.number + 1)


def lv_hba(
    inner_loss: Loss,
    outer_loss: Loss,
    params: Tensors,
    hyper: Tensors,
    constraint: Loss,
    project: Project,
    *,
    project_params: Callable[[Any], Any] | None = None,
    equality: bool = False,
    steps: int = 1000,
    step_size: float = 0.01,
    z_step_size: float = 0.01,
    lower_step_size: float = 0.01,
    proximity: tuple[float, float] = (10.0, 10.0),
    penalty: float = 1.0,
    growth: float = 0.3,
    multiplier_bound: float = 1000.0,
    tolerance: float = 1e-6,
) -> Bilevel:
    """theta <- theta - eta (f_y(x, theta) + l g_y(x, theta) + (theta - y) / gamma_1), l <- [l + eta (g(x, theta) -
    (l - z) / gamma_2)]_+; x <- x - alpha (F_x / c_k + f_x(x, y) - f_x(x, theta) - l g_x(x, theta)),
    y <- y - alpha (F_y / c_k + f_y(x, y) - (y - theta) / gamma_1), (x, y) <- project; z <- z + beta (l - z) / gamma_2.

    LV-HBA, for min F(x, y) where y is a solution of min_y f(x, y) subject to g(x, y) <= 0. (theta, l) follow the saddle
    of the Lagrangian with proximal terms, whose value v(x, y, z) bounds f from below: F / c_k + f - v is descended with
    c_k = penalty * (k + 1)^growth. No second derivative is asked for, f need not be strongly convex, and nothing is
    solved within a step. Here x stands for `hyper`, y for `params`.

    inner_loss f, outer_loss F and constraint g are functions of (params, hyper); F may be of params alone; the first
    two return one number, g a tensor of any shape. project(params, hyper): the nearest pair with g <= 0, and whatever
    else must hold. project_params: the nearest theta in a set that f is restricted to. equality: g = 0, so that l and z
    may be negative. step_size: alpha; z_step_size: beta; lower_step_size: eta; proximity: (gamma_1, gamma_2). growth:
    in (0, 0.5). multiplier_bound: of |z|. tolerance: of the movement of (x, y), divided by alpha. A step costs three
    gradients of f, which `evaluations` counts. Raises BadInput for functions that do not return such tensors, NonFinite
    if a step leads out of the numbers.

    >>> f = lambda w, r: ((w - 3.0) ** 2).sum() / 2  # the solution is min(3, r)
    >>> F = lambda w, r: ((w - 1.0) ** 2).sum() / 2
    >>> inside = lambda w, r: (torch.minimum(w, (w + r) / 2), torch.maximum(r, (w + r) / 2))
    >>> sizes = {"step_size": 0.1, "z_step_size": 0.1, "lower_step_size": 0.1}
    >>> found = lv_hba(f, F, torch.tensor(0.0), torch.tensor(2.0), lambda w, r: w - r, inside, steps=2000, **sizes)
    >>> abs(float(found.hyper) - 1.0) < 0.1
    True
    """
    require_whole(1, steps=steps)
    require_functions(constraint=constraint, project=project)
    if project_params is not None:
        require_functions(project_params=project_params)
    require_positive(step_size=step_size, z_step_size=z_step_size, lower_step_size=lower_step_size, penalty=penalty)
    require_positive(multiplier_bound=multiplier_bound, tolerance=tolerance, growth=growth)
    if not is_pair(proximity):
        raise BadInput(f"proximity must be (gamma_1, gamma_2), two numbers, not {proximity!r}.")
    for number in proximity:
        require_positive(proximity=number)
    if growth >= 0.5:
        raise BadInput(f"growth must be in (0, 0.5), not {growth}.")
    problem = Problem(inner_loss, outer_loss, Flat(params, "params"), Flat(hyper, "hyper"))
    bounds = (-multiplier_bound if equality else 0.0, multiplier_bound)
    sizes = Sizes(step_size, z_step_size, lower_step_size, proximity, penalty, growth, bounds)
    return _Descent(problem, constraint, project, project_params, sizes).run(steps, tolerance)


def slopes(value: Tensor, *at: Tensor) -> Any:
    """Return gradients, 0 where the value does not depend on an input."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(t) for t in at)
    return torch.autograd.grad(value, at, allow_unused=True, materialize_grads=True)


def bounded(problem: Problem, constraint: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Return g as a vector."""
    value = constraint(problem.params.back(y), problem.hyper.back(x))
    if not isinstance(value, Tensor):
        raise BadInput("constraint must return a tensor, at most 0 where (params, hyper) are allowed.")
    return value.reshape(-1)


def lagrangian(problem: Problem, constraint: Loss, saddle: Saddle, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of f(x, theta) + l g(x, theta) in x and theta, and g."""
    x, theta = x.clone().requires_grad_(), saddle.theta.clone().requires_grad_()
    problem.evaluations += 1
    values = bounded(problem, constraint, x, theta)
    in_x, in_theta = slopes(problem.inner(theta, x) + saddle.multiplier.dot(values), x, theta)
    return in_x, in_theta, values.detach()


class _Descent:
    """LV-HBA on flat vectors."""

    def __init__(
        self,
        problem: Problem,
        constraint: Loss,
        project: Project,
        project_params: Callable[[Any], Any] | None,
        sizes: Sizes,
    ) -> None:
        self.problem, self.sizes, self.project_params = problem, sizes, project_params
        self.constraint, self.project = constraint, project
        self.y, self.x = self.projected(problem.params.start, problem.hyper.start)
        values = bounded(problem, constraint, self.x, self.y)
        self.saddle = Saddle(self.y.clone(), torch.zeros_like(values), torch.zeros_like(values))

    def projected(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest (y, x) that is allowed."""
        pair = self.project(self.problem.params.back(y), self.problem.hyper.back(x))
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise BadInput(f"project must return (params, hyper), the nearest that are allowed, not {pair!r}.")
        y, x = (Flat(part, "what project returns").start for part in pair)
        return y, x

    def step(self) -> tuple[float, float, float]:
        """Move everything once; return (the outer loss, the largest constraint, the movement of (x, y) / alpha)."""
        problem, constraint = self.problem, self.constraint
        _, slope, values = lagrangian(problem, constraint, self.saddle, self.x)
        self.saddle = self.saddle.follow(self.y, slope, values, self.sizes)
        if self.project_params is not None:
            theta = self.project_params(problem.params.back(self.saddle.theta))
            self.saddle = replace(self.saddle, theta=Flat(theta, "what project_params returns").start)
        below, _, _ = lagrangian(problem, constraint, self.saddle, self.x)
        x, y = self.x.clone().requires_grad_(), self.y.clone().requires_grad_()
        outer = problem.outer(y, x)
        problem.evaluations += 1
        pairs = slopes(outer, x, y), slopes(problem.inner(y, x), x, y)
        in_x, in_y = self.saddle.directions(self.y, *pairs, below, self.sizes)
        size = self.sizes.step_size
        moved_y, moved_x = self.projected(self.y - size * in_y, self.x - size * in_x)
        far = torch.linalg.vector_norm(torch.cat([moved_x - self.x, moved_y - self.y])) / size
        self.saddle, self.x, self.y = self.saddle.relax(self.sizes), moved_x, moved_y
        return float(outer.detach()), float(values.max()) if len(values) else 0.0, float(far)

    def run(self, steps: int, tolerance: float) -> Bilevel:
        """Take the steps."""
        history: list[dict[str, float]] = []
        far = torch.inf
        for _ in range(steps):
            outer, most, far = self.step()
            if not torch.isfinite(torch.tensor([outer, far])).all():
                raise NonFinite("LV-HBA left the numbers: lower step_size and lower_step_size.")
            spent = float(self.problem.evaluations)
            history.append({"outer": outer, "constraint": most, "movement": far, "evaluations": spent})
            if far <= tolerance:
                break
        remedy = "" if far <= tolerance else f"(x, y) still moves by {far:.2g}: raise steps, or lower step_size."
        return self.problem.found(self.y, self.x, history, far <= tolerance, remedy)
