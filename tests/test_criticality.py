"""Criticality against scipy's integrals of the definitions and against drawn networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad
from torch import nn

from plait import BadInput, LoRA, Now, train
from plait.batch import Batch
from plait.initialize.criticality import CriticalInit
from plait.math.criticality import ACTIVATIONS, activation_of, best_ratio, critical, growth, recursion, susceptibilities
from plait.measure.criticality import SignalPropagation

X = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))


def integral(function: Callable[[float], float], variance: float) -> float:
    """E f(z), z ~ N(0, K), on either side of 0."""

    def density(z: float) -> float:
        return function(z) * math.exp(-z * z / 2 / variance) / math.sqrt(2 * math.pi * variance)

    edge = 12 * math.sqrt(variance)
    return quad(density, -edge, 0, limit=200)[0] + quad(density, 0, edge, limit=200)[0]


def gelu(z: float) -> float:
    return z * (1 + math.erf(z / math.sqrt(2))) / 2


def silu(z: float) -> float:
    return z / (1 + math.exp(-z))


SLOW = {"tanh": math.tanh, "gelu": gelu, "silu": silu, "relu": lambda z: max(z, 0.0), "sin": math.sin}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("variance", [0.3, 4.0])
def test_susceptibilities_are_the_derivatives_that_they_stand_for(name: str, variance: float) -> None:
    """chi_par is d K' / d K and chi_perp the mean of the squared slope: both by differences of scipy's integrals."""
    s, weight, h = SLOW[name], 1.7, 1e-5
    along, across = susceptibilities(ACTIVATIONS[name], weight, variance)
    k = weight * (integral(lambda z: s(z) ** 2, variance + h) - integral(lambda z: s(z) ** 2, variance - h)) / (2 * h)
    assert along == pytest.approx(k, rel=1e-4)
    slope = integral(lambda z: ((s(z + h) - s(z - h)) / (2 * h)) ** 2, variance)
    assert across == pytest.approx(weight * slope, rel=1e-4)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_half_stable_points_solve_their_equations(name: str) -> None:
    s, found = SLOW[name], critical(ACTIVATIONS[name])
    assert found.kind == "half-stable"
    k = found.bias + found.weight * integral(lambda z: s(z) ** 2, found.variance)
    assert k == pytest.approx(found.variance, rel=1e-8)
    assert susceptibilities(ACTIVATIONS[name], found.weight, found.variance) == pytest.approx((1.0, 1.0), rel=1e-6)
    along = (
        found.weight * integral(lambda z: s(z) ** 2 * (z * z - found.variance), found.variance) / 2 / found.variance**2
    )
    assert along == pytest.approx(1.0, rel=1e-6)
    assert found.bias > 0


def test_gelus_fixed_point_has_a_closed_form() -> None:
    assert critical(ACTIVATIONS["gelu"]).variance == pytest.approx((3 + math.sqrt(17)) / 2, rel=1e-9)


def test_known_starts() -> None:
    found = {name: critical(ACTIVATIONS[name]) for name in ("relu", "linear", "tanh", "sin", "elu")}
    assert [round(c.weight, 6) for c in found.values()] == [2.0, 1.0, 1.0, 1.0, 1.0]
    assert all(c.bias == 0 for c in found.values())
    assert critical(nn.LeakyReLU(0.3)).weight == pytest.approx(2 / (1 + 0.09))
    for name in ("sigmoid", "softplus"):
        with pytest.raises(BadInput, match="cannot be critical"):
            critical(ACTIVATIONS[name])


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu"])
def test_the_recursion_is_that_of_drawn_networks(name: str) -> None:
    """6,000 networks of width 64 with all their weights: what is left is of order 1 / width^2, and sampling error."""
    activation, width, depth, draws = ACTIVATIONS[name], 64, 4, 6000
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(draws, width, generator=generator)
    for _ in range(depth - 1):
        weight = torch.randn(draws, width, width, generator=generator) * math.sqrt(1.5 / width)
        z = torch.bmm(weight, activation(z).unsqueeze(2)).squeeze(2)
        z = z + math.sqrt(0.1) * torch.randn(z.shape, generator=generator)
    predicted = recursion(activation, [1.5] * 3, [0.1] * 3, [width] * 3, 1.0)[-1]
    squares = z.double().square()
    second = float(squares.mean())
    assert second == pytest.approx(predicted.variance + predicted.correction, rel=0.01)
    pairs = (squares.sum(1).square() - squares.square().sum(1)) / (width * (width - 1))
    assert float(pairs.mean()) - second**2 == pytest.approx(predicted.vertex, rel=0.25)
    assert float(squares.square().mean()) - 3 * second**2 == pytest.approx(3 * predicted.vertex, rel=0.35)


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_the_correction_of_order_one_over_width(name: str) -> None:
    """Given a layer, the neurons of the next are independent and Gaussian, so that 100,000 variances are soon drawn."""
    activation, width, generator = ACTIVATIONS[name], 48, torch.Generator().manual_seed(0)
    variance = torch.ones(100_000, 1)
    for _ in range(3):
        z = variance.sqrt() * torch.randn(len(variance), width, generator=generator)
        variance = 0.1 + 1.5 * activation(z).square().mean(1, keepdim=True)
    layer = recursion(activation, [1.5] * 3, [0.1] * 3, [width] * 3, 1.0)[-1]
    assert float(variance.double().mean()) - layer.variance == pytest.approx(layer.correction, rel=0.15)


def test_fluctuations_grow_with_depth_over_width() -> None:
    fluctuations = [one.fluctuation for one in recursion(torch.relu, [2.0] * 50, [0.0] * 50, [1000] * 50, 1.0)]
    assert fluctuations[-1] == pytest.approx(50 * growth(torch.relu) / 1000, rel=1e-6)
    deep = [one.fluctuation for one in recursion(torch.tanh, [1.0] * 400, [0.0] * 400, [1000] * 400, 1.0)]
    assert (deep[-1] - deep[-101]) * 1000 / 100 == pytest.approx(growth(torch.tanh), rel=0.02)


def test_ratios_fall_with_outputs_and_growth() -> None:
    assert best_ratio(torch.relu, 1) == pytest.approx(4 / 23 / 5)
    assert best_ratio(torch.tanh, 10) == pytest.approx(4 / 50 * 1.5)


def deep(activation: Callable[[], nn.Module], depth: int = 8, width: int = 400) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [40] + [width] * depth
    return nn.Sequential(*(p for i in range(depth) for p in (nn.Linear(sizes[i], sizes[i + 1]), activation())))


def probed(model: nn.Module) -> dict[str, float]:
    now = Now(batch=Batch.of(X, X[:, 0]))
    now.calibration = lambda count: iter([now.batch])
    return SignalPropagation().measure(model, now)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU])
def test_signals_go_through_as_predicted(activation: Callable[[], nn.Module]) -> None:
    model = deep(activation)
    start = probed(model)
    CriticalInit().initialize(model, Now())
    figures = probed(model)
    assert figures["layers"] == 8
    assert abs(figures["ratio"] - 1) < 3 * math.sqrt(figures["fluctuation"])
    assert 0.65 < figures["chi perpendicular"] < 1.15  # of tanh only in the limit of depth, where K is 0
    assert figures["depth / width"] == pytest.approx(7 / 400)
    assert start["chi perpendicular"] < 0.5


def test_activations_in_place_are_those_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    plain = copy.deepcopy(model)
    plain[3] = nn.ReLU()
    assert probed(model) == probed(plain)
    assert model[3].inplace


def test_each_kind_of_layer_is_drawn_with_its_inputs() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleList([nn.Linear(300, 200), nn.Conv2d(40, 60, 3, bias=False), Conv1D(200, 300), nn.Embedding(9, 4)])
    table = model[3].weight.detach().clone()
    CriticalInit(activation="relu").initialize(model, Now())
    for layer, inputs in ((model[0], 300), (model[1], 360), (model[2], 300)):
        assert inputs * float(layer.weight.detach().var()) == pytest.approx(2.0, rel=0.03)
    assert torch.equal(model[3].weight, table)


def test_only_what_is_trained_is_drawn_and_by_the_runs_seed() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[0].requires_grad_(False)
    held, again = model[0].weight.clone(), copy.deepcopy(model)
    for net in (model, again):
        CriticalInit().initialize(net, Now())
    assert torch.equal(model[0].weight, held)
    assert torch.equal(model[2].weight, again[2].weight)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    tied[2].weight = tied[0].weight
    CriticalInit().initialize(tied, Now())
    assert tied[2].weight is tied[0].weight


def test_a_kernel_of_gelu_uses_biases() -> None:
    model = deep(nn.GELU, 2)
    CriticalInit().initialize(model, Now())
    assert float(model[2].bias.detach().var()) == pytest.approx(0.17292, rel=0.4)


def refused(model: nn.Module, *methods: object) -> str:
    with pytest.raises(BadInput) as problem:
        train(model, (X, X[:, :3]), methods=methods, steps=1)
    return str(problem.value)


def test_what_cannot_work_is_refused() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(40, 4), nn.Tanh(), nn.Linear(4, 3))

    assert "LoRA adapts those that are there" in refused(net(), LoRA(rank=2), CriticalInit())
    assert "did you mean 'tanh'" in refused(net(), CriticalInit(activation="tanhh"))
    assert "no activation that is a module" in refused(nn.Linear(40, 3), CriticalInit())
    both = nn.Sequential(nn.Linear(40, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    assert "several activations" in refused(both, CriticalInit())
    assert "two linear layers" in refused(nn.Sequential(nn.Linear(40, 3), nn.Tanh()), SignalPropagation())
    frozen = net().requires_grad_(False)
    with pytest.raises(BadInput, match="no layer that is trained"):
        CriticalInit().initialize(frozen, Now())
    assert isinstance(activation_of(net()), nn.Tanh)
