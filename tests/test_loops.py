"""Hypergradients: closed forms, differences of exactly solved problems, schedules, and bad input."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from plait.errors import BadInput, NonFinite
from plait.loops.base import conjugate_gradients, hypergradient
from plait.loops.hypergradient import hoag, tolerance_of


class Ridge:
    """1/2 ||X w - y||^2 + 1/2 sum_i exp(decay_i) w_i^2, judged by 1/(2n) ||V w - z||^2; solved in closed form."""

    def __init__(self, seed: int = 0, noise: float = 6.0, kind: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind)  # noqa: E731
        truth = draw(20)
        self.X, self.V = draw(30, 20), draw(100, 20)
        self.y, self.z = self.X @ truth + noise * draw(30), self.V @ truth + noise * draw(100)
        self.start = torch.zeros(20, dtype=kind)

    def inner(self, w: Tensor, decay: Tensor) -> Tensor:
        return ((self.X @ w - self.y) ** 2).sum() / 2 + (decay.exp() * w**2).sum() / 2

    def outer(self, w: Tensor) -> Tensor:
        return ((self.V @ w - self.z) ** 2).mean() / 2

    def hessian(self, decay: Tensor) -> Tensor:
        return self.X.T @ self.X + torch.diag(decay.exp().expand(20))

    def solution(self, decay: Tensor) -> Tensor:
        return torch.linalg.solve(self.hessian(decay), self.X.T @ self.y)

    def gradient(self, decay: Tensor) -> Tensor:
        """d outer / d decay_i = -(H^-1 grad outer)_i exp(decay_i) w_i; summed when one decay serves all."""
        w = self.solution(decay)
        slope = self.V.T @ (self.V @ w - self.z) / 100
        each = -torch.linalg.solve(self.hessian(decay), slope) * decay.exp() * w
        return each if decay.numel() == 20 else each.sum().reshape(decay.shape)


@pytest.mark.parametrize("shape", [(), (1,), (20,)])
def test_the_hypergradient_of_ridge_regression_is_the_closed_form(shape: Any) -> None:
    task, decay = Ridge(), torch.full(shape, 1.5, dtype=torch.float64)
    found, w = hypergradient(task.inner, task.outer, task.start, decay, tolerance=1e-10)
    torch.testing.assert_close(w, task.solution(decay), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, task.gradient(decay), atol=1e-5, rtol=0)


def test_a_looser_tolerance_gives_a_hypergradient_that_is_off_by_as_much() -> None:
    task, decay = Ridge(), torch.zeros((), dtype=torch.float64)
    exact = task.gradient(decay)
    off = [
        float((hypergradient(task.inner, task.outer, task.start, decay, tolerance=eps)[0] - exact).abs() / exact.abs())
        for eps in (1e-1, 1e-3, 1e-6)
    ]
    assert off[0] > 10 * off[1] > 100 * off[2]
    assert off[2] < 1e-4


@pytest.mark.parametrize("schedule", ["exponential", "quadratic", "cubic", "exact"])
def test_the_best_decay_of_ridge_regression_is_found(schedule: Any) -> None:
    task = Ridge()
    grid = torch.linspace(-5, 8, 2000, dtype=torch.float64)
    best = min(float(task.outer(task.solution(decay))) for decay in grid)
    found = hoag(task.inner, task.outer, task.start, torch.zeros(1, dtype=torch.float64), schedule=schedule, steps=80)
    assert found.outer == pytest.approx(best, rel=1e-4)
    torch.testing.assert_close(found.params, task.solution(found.hyper), atol=1e-3, rtol=0)
    assert float(task.gradient(found.hyper).abs()) < 0.02 * float(
        task.gradient(torch.zeros(1, dtype=torch.float64)).abs()
    )


def test_many_hyperparameters_are_moved_at_once() -> None:
    task = Ridge()
    one = hoag(task.inner, task.outer, task.start, torch.zeros(1, dtype=torch.float64), schedule="cubic")
    each = hoag(task.inner, task.outer, task.start, torch.zeros(20, dtype=torch.float64), schedule="cubic")
    assert each.outer < 0.9 * one.outer
    assert len({float(value) for value in each.hyper}) == 20


def test_inexact_steps_cost_less_than_exact_ones() -> None:
    task = Ridge()
    runs = [
        hoag(task.inner, task.outer, task.start, torch.zeros(1, dtype=torch.float64), schedule=schedule, steps=30)
        for schedule in ("quadratic", "exact")
    ]
    assert runs[0].evaluations < 0.8 * runs[1].evaluations
    assert runs[0].outer == pytest.approx(runs[1].outer, rel=1e-3)


def test_steps_stay_within_bounds_and_end_where_the_gradient_points_outside() -> None:
    task = Ridge()
    found = hoag(
        task.inner,
        task.outer,
        task.start,
        torch.zeros(1, dtype=torch.float64),
        schedule="exact",
        bounds=(-1.0, 1.0),
    )
    assert found.hyper.item() == pytest.approx(1.0, abs=1e-12)  # the best decay lies at 3.8
    assert found.converged
    assert found.remedy == ""


def test_modules_and_an_outer_loss_that_depends_on_the_hyperparameters() -> None:
    """A dict of parameters; the hypergradient is that of differences of problems solved to the end."""
    generator = torch.Generator().manual_seed(0)
    X, V = torch.randn(40, 3, generator=generator).double(), torch.randn(40, 3, generator=generator).double()
    t, s = (X.sum(1) > 0).long(), (V.sum(1) > 0.3).long()
    model = nn.Linear(3, 2).double()

    def inner(params: dict[str, Tensor], hyper: dict[str, Tensor]) -> Tensor:
        decay = sum((p**2).sum() for p in params.values())
        return F.cross_entropy(functional_call(model, params, X), t) + hyper["decay"].exp() * decay

    def outer(params: dict[str, Tensor], hyper: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, params, V) * hyper["scale"], s)

    params = {name: p.detach() for name, p in model.named_parameters()}

    def hyper(decay: float, scale: float) -> dict[str, Tensor]:
        return {"decay": torch.tensor(decay).double(), "scale": torch.tensor(scale).double()}

    def value(*given: float) -> float:
        solved = hypergradient(inner, outer, params, hyper(*given), tolerance=1e-10)[1]
        return float(outer(solved, hyper(*given)))

    found, solved = hypergradient(inner, outer, params, hyper(-2.0, 1.5), tolerance=1e-10)
    assert solved.keys() == params.keys()
    assert float(found["decay"]) == pytest.approx((value(-1.999, 1.5) - value(-2.001, 1.5)) / 0.002, abs=1e-5)
    assert float(found["scale"]) == pytest.approx((value(-2.0, 1.501) - value(-2.0, 1.499)) / 0.002, abs=1e-5)
    run = hoag(inner, outer, params, hyper(-2.0, 1.5), steps=10)
    assert run.outer < value(-2.0, 1.5)
    assert model.weight.grad is None


def test_the_same_start_gives_the_same_run_and_float32_works() -> None:
    task = Ridge(kind=torch.float32)
    runs = [hoag(task.inner, task.outer, task.start, torch.zeros(1), steps=20) for _ in range(2)]
    assert torch.equal(runs[0].hyper, runs[1].hyper)
    assert runs[0].hyper.dtype == torch.float32
    assert runs[0].history == runs[1].history


def test_tensors_of_several_types_come_back_as_they_were_given() -> None:
    """The losses see them so too: a product with float32 inputs would fail in float64."""
    inputs = torch.ones(3, 2)
    start = {"w": torch.zeros(2), "b": torch.zeros((), dtype=torch.float64)}
    weigh = {"w": torch.zeros((), dtype=torch.float64), "b": torch.zeros(())}

    def inner(params: dict[str, Tensor], hyper: dict[str, Tensor]) -> Tensor:
        misfit = (inputs @ params["w"] + params["b"] - 1).square().mean()
        return misfit + sum(hyper[name].exp() * p.square().sum() for name, p in params.items())

    found = hoag(inner, lambda params: (params["w"].sum() + params["b"] - 0.5) ** 2, start, weigh, steps=5)
    assert {name: t.dtype for name, t in found.params.items()} == {name: t.dtype for name, t in start.items()}
    assert {name: t.dtype for name, t in found.hyper.items()} == {name: t.dtype for name, t in weigh.items()}
    assert found.outer < found.history[0]["outer"]


@pytest.mark.parametrize("schedule", ["exponential", "quadratic", "cubic"])
def test_tolerances_fall_and_their_sum_is_finite(schedule: str) -> None:
    first = [tolerance_of(schedule, 0.01, k) for k in range(1, 2001)]
    assert first[0] == 0.01
    assert all(a >= b for a, b in pairwise(first))
    assert sum(first) < 0.01 * 11
    assert sum(first[1000:]) < 0.02 * sum(first)


def test_conjugate_gradients_solve_and_notice_a_hessian_that_is_not_positive() -> None:
    generator = torch.Generator().manual_seed(0)
    root, right = torch.randn(9, 9, generator=generator).double(), torch.randn(9, generator=generator).double()
    matrix = root @ root.T + torch.eye(9)
    q, positive = conjugate_gradients(lambda v: matrix @ v, right, torch.zeros(9).double(), 1e-12, 100)
    torch.testing.assert_close(q, torch.linalg.solve(matrix, right))
    assert positive
    assert not conjugate_gradients(lambda v: -v, right, torch.zeros(9).double(), 1e-12, 100)[1]


def test_an_inner_loss_that_is_not_convex_is_told() -> None:
    saddle = lambda w, h: (w[0] - h) ** 2 - 1e-3 * w[1] ** 2 + 0 * w.sum()  # noqa: E731
    found = hoag(saddle, lambda w: ((w - 1) ** 2).sum(), torch.zeros(2), torch.tensor(0.5), steps=2)
    assert not found.converged
    assert "not convex" in found.remedy


QUADRATIC = (lambda w, h: ((w - h) ** 2).sum(), lambda w: ((w - 1) ** 2).sum(), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize(
    ("which", "value", "says"),
    [
        (0, lambda w, h: w - h, "one number"),
        (1, lambda w: 3.0, "one number"),
        (0, lambda w, h: (h**2).sum(), "does not depend on params"),
        (1, lambda w: torch.zeros(()), "does not depend on params"),
        (2, torch.zeros(2, dtype=torch.long), "real numbers"),
        (2, [1.0, 2.0], "real numbers"),
        (3, torch.tensor([float("nan"), 0.0]), "NaN"),
        (2, torch.zeros(0), "params holds no numbers"),
        (3, {"a": torch.zeros(0)}, "hyper holds no numbers"),
        (0, None, "inner_loss must be a function, not None"),
        (1, torch.zeros(()), "outer_loss must be a function"),
    ],
)
def test_losses_and_tensors_that_cannot_work_are_refused(which: int, value: Any, says: str) -> None:
    given = [*QUADRATIC[:which], value, *QUADRATIC[which + 1 :]]
    with pytest.raises(BadInput, match=says):
        hoag(*given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"step_size": "small"}, "step_size must be a finite number greater than 0, not 'small'"),
        ({"schedule": "expontial"}, "did you mean 'exponential'"),
        ({"steps": 0}, "steps must be"),
        ({"steps": 2.5}, "steps must be a whole number of at least 1, not 2.5"),
        ({"iterations": True}, "iterations must be a whole number"),
        ({"tolerance": 0.0}, "tolerance must be"),
        ({"step_size": -1.0}, "step_size must be"),
        ({"bounds": (1.0, 0.0)}, "low < high"),
        ({"bounds": (1.0,)}, "low < high"),
        ({"bounds": 1.0}, "low < high"),
    ],
)
def test_bad_numbers_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        hoag(*QUADRATIC, **given)


def test_a_hypergradient_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(NonFinite, match="bound the hyperparameters"):
        hoag(QUADRATIC[0], lambda w: (w - 1).sum().log(), torch.zeros(2), torch.zeros(2))
