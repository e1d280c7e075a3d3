"""MAID and LV-HBA: certified errors, certain descent, the authors' iterates, denoisers by their sums, and bad input."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.errors import BadInput, NonFinite
from plait.loops.base import Flat, Problem
from plait.loops.denoising import experts, field_of_experts, total_variation
from plait.loops.inexact import Descent, State, error_bound, maid
from plait.loops.proximal import lv_hba


class Ridge:
    """1/2 |X w - y|^2 + 1/2 exp(u) |w|^2 judged by 1/200 |V w - z|^2, solved in closed form."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        truth = draw(10)
        self.X, self.V = draw(30, 10), draw(100, 10)
        self.y, self.z = self.X @ truth + 4 * draw(30), self.V @ truth + 4 * draw(100)
        self.start = torch.zeros(10, dtype=torch.float64)
        self.convexity = float(torch.linalg.eigvalsh(self.X.T @ self.X)[0])
        self.smoothness = float(torch.linalg.eigvalsh(self.V.T @ self.V / 100)[-1])

    def inner(self, w: Tensor, decay: Tensor) -> Tensor:
        return ((self.X @ w - self.y) ** 2).sum() / 2 + decay.exp() * (w**2).sum() / 2

    def outer(self, w: Tensor) -> Tensor:
        return ((self.V @ w - self.z) ** 2).mean() / 2

    def solution(self, decay: Tensor) -> Tensor:
        return torch.linalg.solve(self.X.T @ self.X + decay.exp() * torch.eye(10), self.X.T @ self.y)

    def gradient(self, decay: Tensor) -> float:
        w = self.solution(decay)
        slope = self.V.T @ (self.V @ w - self.z) / 100
        q = torch.linalg.solve(self.X.T @ self.X + decay.exp() * torch.eye(10), slope)
        return float(-(q @ w) * decay.exp())

    def maid(self, start: float, **given: Any) -> Any:
        sizes = {"convexity": self.convexity, "smoothness": self.smoothness}
        hyper = torch.tensor(start, dtype=torch.float64)
        return maid(self.inner, self.outer, self.start, hyper, **(sizes | given))


# -- MAID ----------------------------------------------------------------------------------------------------------
def test_the_bound_is_the_theorems() -> None:
    given = {
        "convexity": 2.0,
        "smoothness": 3.0,
        "slope": 5.0,
        "cross": 7.0,
        "inverse_change": 0.5,
        "cross_change": 0.2,
    }
    c = 3 * 7 / 2 + 0.5 * 5 * 7 + 0.2 * 5 / 2
    assert error_bound(0.1, 0.01, **given) == pytest.approx(c * 0.1 + 7 / 2 * 0.01 + 0.2 * 3 / 2 * 0.01)


@pytest.mark.parametrize("at", [-2.0, 0.0, 2.0, 4.0])
@pytest.mark.parametrize("accuracy", [1.0, 1e-2])
def test_a_hypergradient_is_within_its_bound_and_points_down(at: float, accuracy: float) -> None:
    task, lam = Ridge(), torch.tensor([at], dtype=torch.float64)
    problem = Problem(task.inner, task.outer, Flat(task.start, "params"), Flat(lam[0], "hyper"))
    descent = Descent(problem, task.convexity, task.smoothness, 1e-4, 1000)
    state = State(task.start, lam, torch.zeros(10).double(), accuracy, accuracy, 1.0, torch.ones(1).double())
    z, exact = float(descent.hypergradient(state, 1e-12)), task.gradient(lam[0])
    assert abs(z - exact) <= state.error
    assert state.error <= (1 - 1e-4) * abs(z)
    assert z * exact > 0
    assert float(torch.linalg.vector_norm(state.x - task.solution(lam[0]))) <= state.epsilon


@pytest.mark.parametrize("start", [-1.0, 6.0])
def test_the_best_decay_is_found_and_the_outer_loss_never_rises(start: float) -> None:
    """The loss itself, of the problem solved in closed form, where each number of steps ends."""
    task = Ridge()
    best = min(float(task.outer(task.solution(u))) for u in torch.linspace(-5, 10, 3000, dtype=torch.float64))
    ends = [task.maid(start, steps=steps).hyper for steps in (1, 2, 4, 7)] + [task.maid(start, steps=60).hyper]
    losses = [float(task.outer(task.solution(u))) for u in [torch.tensor(start).double(), *ends]]
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] == pytest.approx(best, rel=1e-4)


def test_early_steps_are_inexact_and_a_converged_run_says_so() -> None:
    found = Ridge().maid(0.0, steps=100, tolerance=1e-3)
    assert found.converged
    assert found.remedy == ""
    last = found.history[-1]
    assert found.history[0]["epsilon"] > 30 * last["epsilon"]
    assert last["hypergradient"] + last["error"] <= 1e-3
    assert [h["evaluations"] for h in found.history] == sorted(h["evaluations"] for h in found.history)


def test_the_history_has_the_step_size_that_was_taken() -> None:
    """Far too long a first one, so that the search must shorten it: the step is alpha |z| long."""
    start = torch.zeros(2, dtype=torch.float64)
    inner, outer = lambda w, u: ((w - u) ** 2).sum() / 2, lambda w: ((w - 0.5) ** 2).sum() / 2
    sizes = {"convexity": 1.0, "smoothness": 1.0, "steps": 1, "step_size": 5.0}
    found = maid(inner, outer, start, start, **sizes)  # type: ignore[arg-type]
    (step,) = found.history
    assert step["step_size"] < 5.0
    assert float(found.hyper.norm()) == pytest.approx(step["step_size"] * step["hypergradient"])
    assert Ridge().maid(0.0, steps=100, tolerance=1e-3).history[-1]["step_size"] == 0.0  # converged: none was taken


def test_the_budget_ends_a_run() -> None:
    found = Ridge().maid(0.0, steps=300, budget=60)
    assert "budget" in found.remedy
    assert found.history[-2]["evaluations"] < 60 if len(found.history) > 1 else True
    assert not found.converged


def test_float32_stops_where_its_precision_ends() -> None:
    inner = lambda w, u: (((w - 2) ** 2).sum() + u.exp() * (w**2).sum()) / 2  # noqa: E731
    start = torch.zeros(3), torch.tensor(0.0)
    sizes = {"convexity": 1.0, "smoothness": 1.0, "steps": 500, "tolerance": 1e-12}
    found = maid(inner, lambda w: ((w - 1.5) ** 2).sum() / 2, *start, **sizes)  # type: ignore[arg-type]
    assert found.outer < 1e-4
    assert "float64" in found.remedy


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"convexity": 0.0}, "convexity must be"),
        ({"accuracy": -1.0}, "accuracy must be"),
        ({"steps": 0}, "steps must be"),
        ({"margin": 2.0}, r"margin must be in \(0, 1\), not 2.0"),
        ({"margin": 1.0}, "margin must be"),
        ({"margin": "thin"}, "margin must be a finite number greater than 0, not 'thin'"),
    ],
)
def test_bad_numbers_of_maid_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Ridge().maid(0.0, **given)


def test_an_outer_loss_of_the_hyperparameters_is_refused() -> None:
    task = Ridge()
    with pytest.raises(BadInput, match="params alone"):
        maid(task.inner, lambda w, u: (w**2).sum() + u, task.start, torch.tensor(0.0), convexity=1.0, smoothness=1.0)


# -- denoising -----------------------------------------------------------------------------------------------------
def test_total_variation_is_the_sum_over_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    noisy, image = (torch.randn(2, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    hyper = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    a, nu = hyper.exp().tolist()
    expected = float((image - noisy).square().sum()) / 2
    for picture in image:
        for i in range(4):
            for j in range(5):
                right = float(picture[i, j + 1] - picture[i, j]) if j < 4 else 0.0
                down = float(picture[i + 1, j] - picture[i, j]) if i < 3 else 0.0
                expected += a * ((right**2 + down**2 + nu**2) ** 0.5 - nu)
    assert float(total_variation(noisy)(image, hyper)) == pytest.approx(expected)


def test_a_field_of_experts_is_the_sum_over_windows() -> None:
    generator = torch.Generator().manual_seed(1)
    noisy, image = (torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    theta = {name: t.double() for name, t in experts(3, 2, seed=4, strength=-0.5, smoothing=-1.0).items()}
    expected = float((image - noisy).square().sum()) / 2
    for k in range(3):
        strength, nu = float(theta["strength"][k].exp()), float(theta["smoothing"][k].exp())
        for picture in image:
            for i in range(4):
                for j in range(5):
                    answer = float((theta["filters"][k] * picture[i : i + 2, j : j + 2]).sum())
                    expected += strength * ((answer**2 + nu**2) ** 0.5 - nu)
    assert float(field_of_experts(noisy)(image, theta)) == pytest.approx(expected)


def test_a_learned_field_of_experts_denoises_what_it_was_taught() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.zeros(2, 10, 10, dtype=torch.float64)
    clean[0, 3:7, 2:8], clean[1, :, 5:] = 1.0, 1.0
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    theta = {name: t.double() for name, t in experts(3, 2).items()}
    misfit = lambda image: (image - clean).square().sum() / 4  # noqa: E731
    found = maid(field_of_experts(noisy), misfit, noisy, theta, convexity=1.0, smoothness=0.5, budget=600)
    assert found.outer < 0.7 * float(misfit(noisy))
    assert found.hyper.keys() == theta.keys()
    assert not torch.equal(found.hyper["filters"], theta["filters"])


def test_pictures_of_another_shape_are_refused() -> None:
    with pytest.raises(BadInput, match="height, width"):
        total_variation(torch.zeros(4, 4))


# -- LV-HBA --------------------------------------------------------------------------------------------------------
THEIRS = {
    1: (-9.355816, 7.922024, 1.433792),
    20: (2.39502329, -1.07124881, -1.32377449),
    100: (-4.94550573, 5.92555371, -0.98004798),
}


@pytest.mark.parametrize("steps", THEIRS)
def test_iterates_are_the_authors(steps: int) -> None:
    """Their toy problem with a coupled linear constraint (github.com/SUSTech-Optimization/LV-HBA, Toy-example/LLC).

    Run from l = z = 0: x = y = 10 brought onto the constraint, alpha 0.008, beta 0.02, eta 0.01, gamma 10, c_k = 0.025
    (k + 1)^0.3, after 1, 20 and 100 steps; all hundred entries of each block are equal. Agreement to 1e-6 relative.
    """
    f = lambda y, x: (y[:100] ** 2).sum() / 2 - x @ y[:100] + y[100:].sum()  # noqa: E731
    F = lambda y, x: ((x - y[100:]) ** 2).sum() / 2 + ((y[:100] - 1) ** 2).sum() / 2  # noqa: E731

    def project(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = (x.sum() + y.sum()) / 300
        return y - mean, x - mean

    start = torch.full((200,), 10.0, dtype=torch.float64), torch.full((100,), -20.0, dtype=torch.float64)
    found = lv_hba(
        f,
        F,
        *start,
        lambda y, x: x.sum() + y.sum(),
        project,
        equality=True,
        steps=steps,
        step_size=0.008,
        z_step_size=0.02,
        lower_step_size=0.01,
        penalty=0.025,
    )
    ours = [float(found.hyper[0]), float(found.params[0]), float(found.params[100])]
    assert ours == pytest.approx(THEIRS[steps], rel=1e-6)
    assert found.evaluations == 3 * steps


def inside(w: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest (w, radius) with |w| <= radius."""
    length = torch.linalg.vector_norm(w)
    if length <= radius:
        return w, radius
    if length <= -radius:
        return torch.zeros_like(w), torch.zeros_like(radius)
    middle = (length + radius) / 2
    return w * middle / length, middle


@pytest.mark.parametrize("start", [0.1, 2.5])
def test_the_best_radius_of_constrained_least_squares_is_found(start: float) -> None:
    """min |V w - z|^2 over the radius of the ball in which |X w - y|^2 is least, against a fine grid of radii."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    truth = draw(4) / 2
    X, V = draw(8, 4), draw(60, 4)
    y, z = X @ truth + 1.5 * draw(8), V @ truth + 1.5 * draw(60)
    inner = lambda w, r: ((X @ w - y) ** 2).mean() / 2  # noqa: E731
    outer = lambda w: ((V @ w - z) ** 2).mean() / 2  # noqa: E731

    def solved(radius: float) -> Tensor:
        w, size = torch.zeros(4).double(), 1 / float(torch.linalg.eigvalsh(X.T @ X / 8)[-1])
        for _ in range(2000):
            w = w - size * X.T @ (X @ w - y) / 8
            w = w * min(1.0, radius / float(torch.linalg.vector_norm(w)))
        return w

    free = float(torch.linalg.vector_norm(solved(100.0)))
    losses = {r: float(outer(solved(r))) for r in torch.linspace(0.05, free, 60).tolist()}
    best = min(losses.values())
    assert best < 0.95 * losses[max(losses)]  # the constraint matters
    sizes = {"step_size": 0.05, "z_step_size": 0.05, "lower_step_size": 0.1, "proximity": (5.0, 5.0)}
    found = lv_hba(
        inner,
        outer,
        torch.zeros(4).double(),
        torch.tensor(start).double(),
        lambda w, r: torch.linalg.vector_norm(w) - r,
        inside,
        steps=800,
        penalty=2.0,
        **sizes,  # type: ignore[arg-type]
    )
    assert float(outer(solved(float(found.hyper)))) < best + 0.1 * (losses[max(losses)] - best)
    assert float(torch.linalg.vector_norm(found.params)) <= float(found.hyper) + 1e-9


def test_steps_that_are_too_long_stop_the_run() -> None:
    with pytest.raises(NonFinite, match="lower step_size"):
        lv_hba(
            lambda w, r: (w**4).sum(),
            lambda w, r: (w**2).sum(),
            torch.ones(2),
            torch.tensor(2.0),
            lambda w, r: w.sum() - r - 10,
            lambda w, r: (w, r),
            step_size=10.0,
            lower_step_size=10.0,
        )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"growth": 0.6}, "growth"),
        ({"growth": "fast"}, "growth must be a finite number greater than 0, not 'fast'"),
        ({"step_size": "small"}, "step_size must be a finite number greater than 0, not 'small'"),
        ({"proximity": (True, 1.0)}, "proximity"),
        ({"proximity": (0.0, 1.0)}, "proximity"),
        ({"proximity": (1.0,)}, r"proximity must be \(gamma_1, gamma_2\)"),
        ({"constraint": None}, "constraint must be a function, not None"),
        ({"project": None}, "project must be a function, not None"),
        ({"project_params": 3}, "project_params must be a function, not 3"),
        ({"project": lambda w, r: None}, r"project must return \(params, hyper\), .* not None"),
    ],
)
def test_what_lv_hba_cannot_work_with_is_refused(given: dict[str, Any], says: str) -> None:
    square = lambda w, r: (w**2).sum()  # noqa: E731
    functions = {"constraint": lambda w, r: w.sum() - r, "project": inside}
    with pytest.raises(BadInput, match=says):
        lv_hba(square, square, torch.ones(2), torch.tensor(2.0), **(functions | given))
