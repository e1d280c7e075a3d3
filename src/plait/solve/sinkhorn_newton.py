"""Entropic optimal transport to high accuracy: Newton's method on the dual, whose Hessian is nearly sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.catalogue import paper
from plait.errors import BadInput
from plait.math.transport import Array, Problem, ScaledKernel, require_positive, require_whole
from plait.solve.transport import Transport, entropic_result

NEGLIGIBLE = 1e-6
"""Entries of the plan below this part of both their row's and their column's sum are left out of the Hessian."""
FINER = 100.0
"""By how much that part is divided when a Newton step gains little."""
SMALL, FACTOR, COARSE = 0.005, 3.0, 1e-4
"""A regularization below SMALL / FACTOR of the cost's spread is reached in stages that fall by FACTOR, each solved to
the error COARSE."""
DENSE = 0.1
"""Products with a matrix that holds more than this part of its entries are faster when it is stored whole."""


@dataclass(frozen=True)
class _Point:
    """A point of the dual in logarithms of the scalings, the plan's sums there, and the dual's value."""

    x: Array
    y: Array
    rows: Array
    columns: Array
    value: float
    error: float

    @classmethod
    def at(cls, kernel: ScaledKernel, x: Array, y: Array) -> _Point:
        p = kernel.problem
        with np.errstate(over="ignore", invalid="ignore"):
            u, v = np.exp(x), np.exp(y)
            rows, columns = u * (kernel.K @ v), v * (u @ kernel.K)
            value = float(p.a @ x + p.b @ y - rows.sum())
        return cls(x, y, rows, columns, value, p.error(rows, columns))


def _sparse(kernel: ScaledKernel, density: float | None, part: float) -> Any:
    """Return K where the plan is large, and 0 elsewhere."""
    from scipy.sparse import csr_array

    plan = kernel.K * kernel.u[:, None]
    plan *= kernel.v
    if density is None:
        large = (plan > part * plan.sum(1)[:, None]) | (plan > part * plan.sum(0))
    else:
        count = min(max(round(density * plan.size), 1), plan.size)
        large = plan >= np.partition(plan, plan.size - count, axis=None)[plan.size - count]
    ends = np.concatenate([[0], np.cumsum(large.sum(1))])
    if ends[-1] > DENSE * plan.size:
        return np.where(large, kernel.K, 0.0)
    flat = np.flatnonzero(large)
    return csr_array((kernel.K.ravel()[flat], flat % plan.shape[1], ends), shape=plan.shape)


def _direction(point: _Point, sparse: Any, problem: Problem) -> tuple[Array, Array]:
    """Solve [[diag(P 1), S], [S^T, diag(P^T 1)]] (dx, dy) = (a - P 1, b - P^T 1), S the sparse part of the plan P.

    By conjugate gradients on the equation that is left for dy when dx is eliminated.
    """
    from scipy.sparse.linalg import LinearOperator, cg

    u, v, transposed = np.exp(point.x), np.exp(point.y), sparse.T
    short, lacking = problem.a - point.rows, problem.b - point.columns

    def below(z: Array) -> Array:
        right: Array = v * (transposed @ (u * z))
        return right

    def across(z: Array) -> Array:
        left: Array = u * (sparse @ (v * z))
        return left

    size = (len(v), len(v))
    equation = LinearOperator(
        size, matvec=lambda z: point.columns * z - below(across(z) / point.rows), dtype=np.float64
    )
    scale = LinearOperator(size, matvec=lambda z: z / point.columns, dtype=np.float64)
    right = lacking - below(short / point.rows)
    dy, _ = cg(equation, right, rtol=min(0.1, point.error), atol=0.0, M=scale, maxiter=1000)
    return (short - across(dy)) / point.rows, dy


def _search(kernel: ScaledKernel, point: _Point, dx: Array, dy: Array) -> _Point | None:
    """Return the first point along the direction, halving from its end, where the dual rises or the error falls."""
    p = kernel.problem
    slope, step = float((p.a - point.rows) @ dx + (p.b - point.columns) @ dy), 1.0
    while step > 1e-8:
        tried = _Point.at(kernel, point.x + step * dx, point.y + step * dy)
        # Near the optimum the rise of the dual drowns in rounding, while the error is still told exactly.
        if tried.value >= point.value + 1e-4 * step * slope > point.value or tried.error < 0.9 * point.error:
            return tried
        step /= 2
    return None


def _stages(problem: Problem, regularization: float) -> list[float]:
    """Return regularizations that fall by FACTOR to the one that is wanted; only that one if it is not small."""
    stages, spread = [regularization], float(np.ptp(problem.cost))
    while stages[0] * FACTOR <= SMALL * spread:
        stages.insert(0, stages[0] * FACTOR)
    return stages


def _newton(
    kernel: ScaledKernel, tolerance: float, steps: int, sweeps: int, density: float | None
) -> tuple[list[float], int]:
    """Take Newton steps until the error is within the tolerance; return the errors on the way and the steps taken."""
    errors: list[float] = []
    part, taken, sparse, little = NEGLIGIBLE, 0, None, 0
    point = _Point.at(kernel, np.log(kernel.u), np.log(kernel.v))
    while point.error > tolerance and taken < steps:
        sparse = _sparse(kernel, density, part) if sparse is None else sparse
        found = _search(kernel, point, *_direction(point, sparse, kernel.problem))
        taken += 1
        if found is not None:
            kernel.u, kernel.v = np.exp(found.x), np.exp(found.y)
            kernel.moved()
            errors.append(found.error)
        little = little + 1 if found is None or found.error > 0.5 * point.error else 0
        # Far from the optimum one such step is the rule, and the dual rises nevertheless.
        poor = found is None or little > 1
        if poor:
            errors += [kernel.sweep() for _ in range(sweeps)]
            part, density = part / FINER, density and min(1.0, 2 * density)
        if kernel.strays():
            kernel.absorb()
            poor = True
        if found is None or poor:
            sparse, found = None, _Point.at(kernel, np.log(kernel.u), np.log(kernel.v))
        point = found
    return errors, taken


@paper("tang2024accelerating", key="sns", kind="solver", theme="transport")
def sinkhorn_newton(
    a: Any,
    b: Any,
    cost: Any,
    *,
    regularization: float = 0.01,
    tolerance: float = 1e-9,
    warm_up: int = 20,
    steps: int = 100,
    density: float | None = None,
) -> Transport:
    """max_xy a x + b y - sum_ij P_ij, P_ij = exp(x_i + y_j - cost_ij / regularization), by Newton's method on the
    sparse Hessian -[[diag(P 1), S], [S^T, diag(P^T 1)]], where S keeps only the large entries of P.

    Sinkhorn-Newton-Sparse: `warm_up` Sinkhorn iterations, then at most `steps` Newton steps, each solved by conjugate
    gradients and followed by a line search on the dual. Sinkhorn's thousands of iterations become tens where the
    regularization is small; where Sinkhorn itself reaches the tolerance while warming up, no Newton step is taken.
    P is the same plan as that of `sinkhorn`, whose inputs, units and errors hold here; the potentials are
    regularization times x, y.

    density: in (0, 1], the part of the entries of P that S keeps (the paper's rho); None keeps what is above 1e-6 of
    its row's or column's sum. Departing from the paper for the sake of small regularizations: a second step in a row
    that reduces the error by less than a half is followed by `warm_up` iterations of Sinkhorn and an S of twice the
    density (a threshold 100 times lower); and a regularization below 1/600 of the cost's spread is reached in stages
    from a larger one. Below about 1e-5 of the spread the Hessian is singular to rounding: look at `converged`. Raises
    BadInput for what `sinkhorn` refuses (negative masses, different sums, wrong shapes, numbers that are not finite),
    and for a density outside (0, 1].

    >>> import numpy as np
    >>> points = np.random.default_rng(0).random((2, 100, 1))
    >>> cost = (points[0] - points[1].T) ** 2
    >>> found = sinkhorn_newton(np.ones(100), np.ones(100), cost, regularization=1e-3)
    >>> found.converged, found.newton_steps < 10
    (True, True)
    """
    require_positive(regularization=regularization, tolerance=tolerance)
    require_whole(1, warm_up=warm_up)
    require_whole(0, steps=steps)
    if density is not None:
        require_positive(density=density)
        if density > 1:
            raise BadInput(f"density must be in (0, 1], not {density}.")
    problem = Problem.of(a, b, cost)
    stages = _stages(problem, regularization)
    kernel, errors, taken = ScaledKernel(problem, stages[0]), [], 0
    for at in stages:
        if at != kernel.regularization:
            kernel.absorb(at=at)
        wanted = tolerance if at == regularization else max(tolerance, COARSE)
        for _ in range(warm_up):
            errors.append(kernel.sweep())
            if errors[-1] <= wanted:
                break
        gained = _newton(kernel, wanted, steps - taken, warm_up, density)
        errors += gained[0]
        taken += gained[1]
    remedy = (
        f"the error is {errors[-1]:.2g} after {len(errors)} iterations: raise warm_up or steps, or the regularization "
        "or the tolerance, which rounding keeps above about 1e-15 cost / regularization."
    )
    return entropic_result(problem, kernel, errors, tolerance, taken, remedy)
