"""Forecasts of the generalization gap, the gradient-norm bound and Lojasiewicz constants, by hand and by simulation."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import SGD, Batch, Now, train
from plait.errors import BadInput
from plait.loss.base import cross_entropy, squared_error
from plait.measure.generalization import GeneralizationGap, GradientNormBound, gradient_term, losses_and_slopes
from plait.measure.lojasiewicz import UniformLGI, fit_lojasiewicz


def data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] + 0.5 * torch.randn(count, generator=torch.Generator().manual_seed(seed + 1)) > 0).long()


def test_the_trace_and_norm_are_those_of_the_covariance() -> None:
    x, y = data(30)
    torch.manual_seed(0)
    model, now = nn.Linear(4, 2), Now(examples=100)
    now.misfit, now.calibration = (
        cross_entropy,
        lambda count: iter([Batch.of(x[:15], y[:15]), Batch.of(x[15:], y[15:])]),
    )
    found = GeneralizationGap(lr=0.2, batches=2).measure(model, now)
    rows = []
    for one, target in zip(x, y, strict=True):
        model.zero_grad()
        F.cross_entropy(model(one), target).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    trace = float(torch.cov(torch.stack(rows).T).trace())
    assert found["trace of covariance"] == pytest.approx(trace, rel=1e-5)
    mean = torch.stack(rows).mean(0)
    assert found["gradient norm"] == pytest.approx(float(mean @ mean) - trace / 30, rel=1e-5)
    assert found["change per step"] == pytest.approx(0.2 * trace / 100, rel=1e-5)
    bias = GeneralizationGap(lr=0.2, batches=2, where="bias").measure(model, now)
    alone = float(torch.cov(torch.stack(rows)[:, 8:].T).trace())
    assert bias["trace of covariance"] == pytest.approx(alone, rel=1e-5)


def test_a_step_opens_the_gap_by_as_much_on_average_over_training_sets() -> None:
    """One step of full-batch gradient descent from the same weights on each of 200 training sets of 20 examples."""
    torch.manual_seed(0)
    start = nn.Linear(4, 2)
    x, y = data(16_000, 7)

    def loss(model: nn.Module, rows: slice) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(x[rows]), y[rows]))

    actual, predicted, rate = [], [], 0.02
    for number in range(200):
        rows = slice(20 * number, 20 * number + 20)
        model, now = copy.deepcopy(start), Now(examples=20)
        now.misfit, now.calibration = cross_entropy, lambda count, rows=rows: iter([Batch.of(x[rows], y[rows])])  # type: ignore[misc]
        predicted.append(GeneralizationGap(lr=rate).measure(model, now)["change per step"])
        before = loss(model, slice(4000, 16_000)) - loss(model, rows)
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad
        actual.append(loss(model, slice(4000, 16_000)) - loss(model, rows) - before)
    mean, error = numpy.mean(actual), numpy.std(actual) / 200**0.5
    assert abs(float(numpy.mean(predicted)) - mean) < 3 * error + 0.02 * mean
    assert error < 0.2 * mean


def test_the_predicted_gap_is_the_trapezoid_of_its_changes() -> None:
    x, y = data(16)
    probe = GeneralizationGap()
    torch.manual_seed(0)
    done = train(nn.Linear(4, 2), (x, y), methods=[SGD(lr=0.3), probe], steps=7, batch_size=16, measure_every=2)
    seen = done.measures[repr(probe)]
    assert [p["step"] for p in seen] == [2, 4, 6, 7]
    expected = 2 * seen[0]["change per step"]
    for before, after in pairwise(seen):
        mean = (before["change per step"] + after["change per step"]) / 2
        expected += (after["step"] - before["step"]) * mean
    assert seen[-1]["predicted gap"] == pytest.approx(expected)
    assert seen[0]["change per step"] == pytest.approx(0.3 * seen[0]["trace of covariance"] / 16)


def test_one_example_has_no_covariance() -> None:
    with pytest.raises(BadInput, match="at least two examples"):
        train(nn.Linear(4, 2), data(1), methods=[GeneralizationGap()], steps=1)


def test_slopes_are_gradients_in_the_inputs() -> None:
    x, y = data(6)
    torch.manual_seed(0)
    model, now = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), Now()
    now.misfit = cross_entropy
    losses, slopes = losses_and_slopes(model, now, [Batch.of(x[:4], y[:4]), Batch.of(x[4:], y[4:])])
    for i in range(6):
        one = x[i].clone().requires_grad_()
        value = F.cross_entropy(model(one), y[i])
        value.backward()
        assert float(losses[i]) == pytest.approx(value.item(), rel=1e-5)
        assert float(slopes[i]) == pytest.approx(float(one.grad.square().sum()), rel=1e-5)  # type: ignore[union-attr]
    now.calibration = lambda count: iter([Batch.of(torch.zeros(3, 4).long(), y[:3])])
    probe = GradientNormBound()
    probe.initialize(model, now)
    with pytest.raises(BadInput, match="one tensor of real numbers"):
        probe.measure(model, now)
    with pytest.raises(BadInput, match="has not seen the start"):
        GradientNormBound(deviation=1.0).measure(model, now)


def test_the_gradient_term_bounds_the_moments_of_the_risk() -> None:
    """ln E exp(a (E l - l)) <= a G(a) for Gaussian inputs; equal for a linear loss, where it is sharp."""
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)).double()
    kinds: list[tuple[Any, bool]] = [
        (lambda z: z @ torch.tensor([0.6, -0.3]).double(), True),
        (lambda z: F.softplus(2 * z[:, 0] + z[:, 1]), False),
        (lambda z: (z - 1).square().sum(1) / 4, False),
    ]
    for loss, sharp in kinds:
        point = x.clone().requires_grad_()
        losses = loss(point)
        (slope,) = torch.autograd.grad(losses.sum(), point)
        losses = losses.detach()
        for a in (0.2, 1.0):
            moment = float(torch.logsumexp(a * (losses.mean() - losses), 0)) - math.log(len(x))
            bound = a * gradient_term(losses, slope.square().sum(1), a)
            assert moment <= bound * 1.02
            assert (abs(moment / bound - 1) < 0.02) == sharp


def test_the_bound_is_the_sum_of_its_parts_and_holds() -> None:
    """Gaussian inputs, labels of a teacher: the risk on fresh data stays below, in every run."""
    for seed in range(3):
        x, y = data(2000, 10 * seed)
        y = (x[:, 0] > 0).long()
        torch.manual_seed(seed)
        probe = GradientNormBound(deviation=0.05, power=0.5)
        model = nn.Linear(4, 2)
        start = [p.detach().clone() for p in model.parameters()]
        done = train(model, (x[:200], y[:200]), methods=[SGD(lr=0.1), probe], steps=30, batch_size=50)
        figures = done.measures[repr(probe)][-1]
        moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(done.model.parameters(), start, strict=True))
        assert figures["divergence"] == pytest.approx(moved / (2 * 0.05**2), rel=1e-4)
        strength = math.sqrt(200)
        parts = (figures["divergence"] + math.log(20)) / strength + figures["gradient term"]
        assert figures["bound"] == pytest.approx(figures["empirical risk"] + parts)
        with torch.no_grad():
            assert figures["bound"] > float(F.cross_entropy(done.model(x[200:]), y[200:]))


@pytest.mark.parametrize("delta", [0.0, 1.0, 1e6])
def test_the_bound_fails_with_a_probability(delta: float) -> None:
    with pytest.raises(BadInput, match=r"^GradientNormBound.delta must be in \(0, 1\), not "):
        GradientNormBound(delta=delta)


def test_constants_are_the_authors() -> None:
    """Numbers of the authors' fit (least squares of the logarithms, the lowest point left out), to 1e-9."""
    draw = numpy.random.default_rng(0)
    loss = numpy.sort(draw.random(20))[::-1] + 0.05
    norm = 1.7 * loss**0.6 * numpy.exp(0.1 * draw.standard_normal(20))
    points = torch.tensor(numpy.stack([numpy.arange(20.0), loss, norm], 1))
    found = UniformLGI().constants(points, 0)
    assert found["theta"] == pytest.approx(0.4065177582588913, rel=1e-9)
    assert found["c"] == pytest.approx(1.424482586822031, rel=1e-9)
    assert all(
        found["c"] * (a - loss.min()) ** found["theta"] <= b * (1 + 1e-9) for a, b in zip(loss, norm, strict=True)
    )


def test_a_parabola_has_theta_one_half_and_the_run_is_as_long_as_the_path() -> None:
    """L = w^2: |L'| = 2 sqrt(L), r = sqrt(L(w_0)) = |w_0|, exactly the way to the minimum."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(3.0)
    probe = UniformLGI(batches=1, minimum=0.0)
    done = train(model, (torch.ones(4, 1), torch.zeros(4, 1)), squared_error, [SGD(lr=0.01, momentum=0.0), probe],
                 steps=20, batch_size=4, measure_every=1)  # fmt: skip
    figures = done.measures[repr(probe)][-1]
    assert (figures["theta"], figures["c"]) == (pytest.approx(0.5, abs=1e-5), pytest.approx(2.0, rel=1e-5))
    assert figures["path"] == pytest.approx(3 * 0.98, rel=1e-4)  # the first point is that after the first step
    assert figures["estimate"] == pytest.approx(figures["path"] / 2)
    assert "theta" not in done.measures[repr(probe)][1]
    assert [p["step"] for p in done.measures[repr(probe)]][-2:] == [19, 20]


def test_a_network_travels_no_further_than_its_constants_allow() -> None:
    """Small steps of the whole batch are nearly gradient flow."""
    x, y = data(32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    probe = UniformLGI(batches=1, minimum=0.0)
    before: list[Tensor] = []

    def note(now: Now) -> None:
        if now.step == 1:
            before.extend(p.detach().clone() for p in model.parameters())

    methods: list[Any] = [SGD(lr=0.02, momentum=0.0), probe]
    done = train(model, (x[:12], 2.0 * y[:12, None] - 1), squared_error, methods, steps=300, batch_size=12,
                 measure_every=10, on_step=note)  # fmt: skip
    figures = done.measures[repr(probe)][-1]
    apart = sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True)) ** 0.5
    assert 0 < apart <= figures["path"]


def test_fewer_points_than_three_give_no_constants() -> None:
    flat = torch.tensor([[1.0, 2.0, 1.0], [2.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert UniformLGI(minimum=0.0).constants(flat, 10) == {}
    assert UniformLGI().constants(flat[:2], 10) == {}
    assert fit_lojasiewicz(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]), 0.0) == (
        pytest.approx(1.0),
        pytest.approx(3.0),
    )
