"""LV-HBA inside a run: the steps of the function, radii that are the best, projections, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import train
from plait.constrain.norm import NormBall
from plait.errors import BadInput, NonFinite
from plait.forward.dropout import Dropout
from plait.loops.constrained import LVHBA
from plait.loops.proximal import lv_hba
from plait.math.projections import ball, cone
from plait.method import Method
from plait.penalty.norm import L2
from plait.schedule import Tuned
from plait.step.momentum import SGD
from test_tuning import data, numbers

EACH = Tuned(start=0.4, each_layer=True)


# -- nearest points ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("radius", [-4.0, -0.5, 0.0, 0.7, 1.5, 9.0])
def test_the_cone_has_no_nearer_point(radius: float) -> None:
    """Against 20 000 allowed points around what is returned, for three weights that share a radius."""
    generator = torch.Generator().manual_seed(0)
    weights = [scale * torch.randn(2, 3, generator=generator) for scale in (0.2, 1.0, 2.0)]
    found, size = cone(weights, radius)
    assert all(float(torch.linalg.vector_norm(w)) <= size + 1e-5 for w in found)

    def distance(moved: list[Tensor], to: float) -> float:
        squares = sum(float((w - m).square().sum()) for w, m in zip(weights, moved, strict=True))
        return squares + (radius - to) ** 2

    least = distance(found, size)
    for _ in range(20_000):
        to = max(size + 0.1 * float(torch.randn((), generator=generator)), 0.0)
        near = [ball(w + 0.05 * torch.randn(2, 3, generator=generator), to) for w in found]
        assert distance(near, to) >= least - 1e-5


def test_a_ball_holds_each_weight_and_leaves_short_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1))
    x, y = data(0)
    run = train(model, (x, 5 * y), methods=[NormBall(radius=1.5), SGD(lr=0.05)], steps=50)
    lengths = [float(torch.linalg.vector_norm(layer.weight.detach())) for layer in (run.model[0], run.model[2])]  # type: ignore
    assert all(length <= 1.5 + 1e-6 for length in lengths)
    assert max(lengths) == pytest.approx(1.5, rel=1e-5)
    short = torch.ones(2, 2)
    assert torch.equal(NormBall(radius=3.0).project(short), short)


# -- the same steps as the function ------------------------------------------------------------------------------------
def test_a_run_takes_the_steps_of_the_function() -> None:
    """SGD on whole batches, a ball around each of two layers, the strength of an L2: weights, radii and strength."""
    (x, y), (v, z) = ((x, (y > 0).long()) for x, y in (data(0, 40), data(1, 50)))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 2))
    names = ["0.weight", "2.weight"]
    start = {n: ball(p.detach(), 0.4) if n in names else p.detach().clone() for n, p in model.named_parameters()}

    def predict(w: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]

    def inner(w: dict[str, Tensor], h: Tensor) -> Tensor:
        decay = sum(w[name].square().sum() for name in names) / 2
        return F.cross_entropy(predict(w, x), y) + h[0].exp() * decay

    def inside(w: dict[str, Tensor], h: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """A cone for each layer's own radius."""
        pairs = [cone([w[name]], float(h[1 + i])) for i, name in enumerate(names)]
        moved = w | {name: pair[0][0] for name, pair in zip(names, pairs, strict=True)}
        return moved, torch.stack([h[0], *(torch.tensor(pair[1]) for pair in pairs)])

    sizes: dict[str, Any] = {"step_size": 0.2, "z_step_size": 0.1, "lower_step_size": 0.3, "proximity": (5.0, 8.0)}
    theirs = lv_hba(
        inner,
        lambda w: F.cross_entropy(predict(w, v), z),
        start,
        torch.tensor([torch.tensor(0.02).log(), 0.4, 0.4]),
        lambda w, h: torch.stack([torch.linalg.vector_norm(w[n]) - h[1 + i] for i, n in enumerate(names)]),
        inside,
        steps=12,
        penalty=2.0,
        growth=0.2,
        **sizes,
    )
    tuner = LVHBA(first_weight=2.0, growth=0.2, **sizes)
    methods: list[Method] = [L2(strength=Tuned(start=0.02)), tuner, NormBall(radius=EACH), SGD(lr=0.2, momentum=0.0)]
    run = train(model, (x, y), methods=methods, validation=(v, z), steps=12, batch_size=64)
    found = numbers(run)
    assert found["L2.strength"] == pytest.approx(float(theirs.hyper[0].exp()), rel=1e-4)
    for i in range(2):
        assert found[f"NormBall.radius {i}"] == pytest.approx(float(theirs.hyper[1 + i]), rel=1e-4)
        assert found[f"NormBall.radius {i}"] != pytest.approx(0.4, rel=1e-2)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.detach(), theirs.params[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [L2(strength=Tuned(start=0.02)), NormBall(radius=EACH)])
def test_a_model_in_float64_takes_the_same_steps(method: Method) -> None:
    (x, y), (v, z) = ((x, (y > 0).long()) for x, y in (data(0, 40), data(1, 50)))
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        methods = [LVHBA(step_size=0.2, lower_step_size=0.3), method, SGD(lr=0.2, momentum=0.0)]
        run = train(model, (x.to(dtype), y), methods=methods, validation=(v.to(dtype), z), steps=5)
        found.append(numbers(run))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# -- where it ends -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", [0.1, 0.5])
def test_the_best_radius_of_constrained_regression_is_found(start: float) -> None:
    """Against a grid of radii, each solved by projected gradients; the best lies inside, where the ball binds."""
    (x, y), (v, z) = data(1, 40, 4.0), data(2, 400, 4.0)

    def solved(radius: float) -> Tensor:
        w, size = torch.zeros(20), 20 / float(torch.linalg.eigvalsh(x.T @ x)[-1])
        for _ in range(3000):
            w = ball(w - size * x.T @ (x @ w - y) / 20, radius)
        return w

    def judged(radius: float) -> float:
        return float((v @ solved(radius) - z).square().mean())

    losses = {radius: judged(radius) for radius in torch.linspace(0.05, 4.0, 40).tolist()}
    best, free = min(losses, key=losses.__getitem__), max(losses)
    assert losses[best] < 0.9 * losses[free]
    sizes: dict[str, Any] = {"step_size": 0.05, "z_step_size": 0.05, "lower_step_size": 0.05}
    torch.manual_seed(0)
    methods = [LVHBA(first_weight=0.2, **sizes), NormBall(radius=Tuned(start=start)), SGD(lr=0.05, momentum=0.0)]
    model = nn.Linear(20, 1, bias=False)
    run = train(model, (x, y), methods=methods, validation=(v, z), steps=1500, batch_size=400)
    radius = numbers(run)["NormBall.radius"]
    assert judged(radius) < losses[best] + 0.1 * (losses[free] - losses[best])
    assert float(torch.linalg.vector_norm(run.model.weight.detach())) <= radius + 1e-6  # type: ignore[arg-type]


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("methods", "says"),
    [
        (lambda: [LVHBA()], "finds nothing to tune"),
        (lambda: [NormBall(radius=EACH), LVHBA()], "put LVHBA first"),
        (lambda: [LVHBA(), Dropout(rate=Tuned(start=0.1, high=0.9))], r"no derivative in Dropout\.rate"),
    ],
)
def test_lists_that_cannot_work_are_refused(methods: Any, says: str) -> None:
    x, y = data(0)
    model = nn.Sequential(nn.Linear(20, 4), nn.Dropout(), nn.Linear(4, 1))
    with pytest.raises(BadInput, match=says):
        train(model, (x, y), methods=methods(), validation=(x, y), steps=2)


def test_a_run_without_a_validation_set_and_steps_that_are_too_long_are_refused() -> None:
    x, y = data(0)
    with pytest.raises(BadInput, match="needs a validation set"):
        train(nn.Linear(20, 1), (x, y), methods=[LVHBA(), NormBall(radius=EACH)], steps=2)
    for long in (LVHBA(step_size=1e30, lower_step_size=1e30), LVHBA(lower_step_size=1e30)):
        with pytest.raises(NonFinite, match="lower step_size and lower_step_size"):
            train(nn.Linear(20, 1), (x, y), methods=[long, L2(strength=Tuned(start=1.0))], validation=(x, y), steps=50)


def test_a_batch_that_is_not_finite_is_left_out_and_changes_no_state() -> None:
    x, y = data(0, 32)
    x = x.clone()
    x[3] = float("nan")
    methods = [LVHBA(step_size=0.1, lower_step_size=0.1), NormBall(radius=Tuned(start=0.1)), SGD(lr=0.1, momentum=0.0)]
    torch.manual_seed(0)
    run = train(nn.Linear(20, 1), (x, y), methods=methods, validation=data(1), steps=20, batch_size=8, nonfinite="skip")
    assert len(run.skipped) == 5  # the one batch of four, in each of five passes
    assert numbers(run)["NormBall.radius"] > 0.2


def test_a_weight_that_is_made_anew_at_each_reading_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(20, 4)), nn.Linear(4, 1))
    with pytest.raises(BadInput, match=r"NormBall cannot move the weight of '0'.*name other layers in where"):
        train(model, data(0), methods=[NormBall()], steps=1)
    train(model, data(0), methods=[NormBall(radius=0.1, where="1")], steps=1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LVHBA(growth=0.5), r"LVHBA.growth must be in \(0, 0.5\), not 0.5"),
        (lambda: LVHBA(proximity=(0.0, 1.0)), "LVHBA.proximity"),
        (lambda: LVHBA(step_size=0.0), "LVHBA.step_size must be"),
        (lambda: NormBall(radius=0.0), "NormBall.radius must be"),
    ],
)
def test_bad_numbers_are_refused(make: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()
