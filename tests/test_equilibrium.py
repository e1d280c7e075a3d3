"""Equilibrium propagation against implicit differentiation with dense matrices, and against unrolled dynamics."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.errors import BadInput
from plait.gradient.clip import Clip
from plait.gradient.equilibrium import EquilibriumPropagation
from plait.gradient.sharpness import SAM
from plait.math.equilibrium import Equilibrium, LayeredEquilibrium, asymmetry
from plait.method import Ask, Method, Now
from plait.models.equilibrium import EquilibriumNetwork
from plait.penalty.homeostasis import JacobianHomeostasis
from plait.step.momentum import SGD
from plait.train import train


def network(
    symmetric: bool, activation: Any = "sigmoid", scale: float = 1.5
) -> tuple[EquilibriumNetwork, Tensor, Tensor]:
    """A network in float64 whose dynamics contract, and data."""
    torch.manual_seed(0)
    net = EquilibriumNetwork(4, 3, widths=(6, 5, 4), symmetric=symmetric, activation=activation).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    net.body.tolerance, net.body.iterations = 1e-14, 2000
    generator = torch.Generator().manual_seed(1)
    return net, torch.randn(7, 4, generator=generator).double(), torch.randint(0, 3, (7,), generator=generator)


def plain(inputs: Tensor, target: Tensor) -> Ask:
    def ask(model: nn.Module, now: Now) -> Tensor:
        value = F.cross_entropy(model(inputs), target)
        now.share = 1 / len(inputs)
        value.backward()
        return value.detach()

    return ask


def gradients(net: nn.Module, inputs: Tensor, target: Tensor, method: Method | None = None) -> list[Tensor]:
    net.zero_grad()
    ask = plain(inputs, target)
    (ask if method is None else method.gradient(ask))(net, Now())
    return [p.grad.clone() for p in net.parameters()]


def by_dense_matrices(net: EquilibriumNetwork, inputs: Tensor, target: Tensor, transposed: bool) -> list[Tensor]:
    """The implicit function theorem, one example at a time, with J as a matrix that is solved with: (I - J D)^-1.

    transposed=False puts J where J^T belongs, as equilibrium propagation does.
    """
    body, total = net.body, [torch.zeros_like(p) for p in net.parameters()]
    for x, y in zip(inputs, target, strict=True):
        u = body.settle(x[None], torch.zeros(1, body.units).double())
        s = body.activation(u).requires_grad_()
        J = torch.autograd.functional.jacobian(lambda s, x=x: body.field(s[None], x[None])[0], s[0].detach())
        D = torch.diag(torch.autograd.functional.jacobian(body.activation, u[0]).diagonal())
        loss = F.cross_entropy(net.readout(s[:, -body.widths[-1] :]), y[None]) / len(inputs)
        above = torch.autograd.grad(loss, [s, *net.readout.parameters()])
        J = J.mT if transposed else J
        delta = torch.linalg.solve(torch.eye(body.units).double() - D @ J, D @ above[0][0])
        with torch.enable_grad():
            below = torch.autograd.grad(body.field(s.detach(), x[None]), list(body.parameters()), delta[None])
        total = [t + g for t, g in zip(total, [*below, *above[1:]], strict=True)]
    return total


def close(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    length = max(float(b.abs().max()) for b in other)
    return all(float((a - b).abs().max()) <= tolerance * length for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_the_network_differentiates_through_its_equilibrium(symmetric: bool, activation: str) -> None:
    net, inputs, target = network(symmetric, activation, 0.7)
    found = gradients(net, inputs, target)
    assert close(found, by_dense_matrices(net, inputs, target, transposed=True), 1e-10)

    net.zero_grad()
    u = torch.zeros(7, net.body.units).double()
    for _ in range(300):
        u = net.body.field(net.body.activation(u), inputs)
    logits = net.readout(net.body.activation(u)[:, -4:])
    F.cross_entropy(logits, target).backward()
    assert close(found, [p.grad for p in net.parameters()], 1e-9)
    torch.testing.assert_close(net(inputs), logits)


class One(Equilibrium):
    """One unit that inhibits itself: s = tanh(w s + v x)."""

    units = 1

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(1.0))

    def field(self, state: Tensor, inputs: Tensor) -> Tensor:
        return self.w * state + self.v * inputs

    def activation(self, potential: Tensor) -> Tensor:
        return torch.tanh(potential)


def test_the_gradient_settles_where_only_partial_steps_do() -> None:
    """Eigenvalues of J below -1, or beyond 1 and imaginary: whole steps would run away from the equilibrium."""
    one, pair = One(-1.8), LayeredEquilibrium(1, (1, 1), activation="tanh")
    with torch.no_grad():
        for layer, weight in zip([*pair.up, *pair.down], (0.1, 1.5, -1.5), strict=True):
            layer.weight.fill_(weight)
        for layer in pair.up:
            layer.bias.zero_()
    for net, weight, x in ((one.double(), one.v, 0.1), (pair.double(), pair.up[0].weight, 1.0)):
        net.tolerance, inputs = 1e-12, torch.full((1, 1), x).double()
        net(inputs).sum().backward()
        assert net.moving < 1e-10
        ends = []
        for change in (1e-5, -1e-5):
            with torch.no_grad():
                weight += change
                ends.append(float(net(inputs).sum()))
                weight -= change
        assert float(weight.grad) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("nudge", "points", "tolerance"), [(1e-5, 1, 1e-4), (1e-3, 2, 1e-5), (0.1, 6, 1e-8), (0.2, 12, 1e-7)]
)
def test_propagation_is_exact_where_couplings_are_symmetric(nudge: float, points: int, tolerance: float) -> None:
    net, inputs, target = network(symmetric=True)
    found = gradients(net, inputs, target, EquilibriumPropagation(nudge=nudge, points=points))
    assert close(found, by_dense_matrices(net, inputs, target, transposed=True), tolerance)


def test_propagation_has_the_jacobian_untransposed() -> None:
    net, inputs, target = network(symmetric=False)
    found = gradients(net, inputs, target, EquilibriumPropagation(nudge=0.05, points=8))
    assert close(found, by_dense_matrices(net, inputs, target, transposed=False), 1e-8)
    assert not close(found, by_dense_matrices(net, inputs, target, transposed=True), 1e-2)


THEIRS = {
    "exact": {
        "up.0": (-0.01465499410665122, 0.0026754978511444967),
        "up.1": (0.07107843605414096, 0.001271221873946069),
        "down.0": (0.01941547997769096, 0.00045996706333796826),
        "up.2": (0.03031757337850414, 0.0014392091094257715),
        "down.1": (0.0194528757566921, 0.0001138393187475918),
    },
    "propagated": {
        "up.0": (-0.02590634458881701, 0.001451260220974377),
        "up.1": (-0.005154826135512734, 0.0014495353726094405),
        "down.0": (0.00807067699030972, 0.00013505394442235428),
        "up.2": (0.04263022202500796, 0.0014442758790675673),
        "down.1": (0.0026459225625209094, 9.190099586046371e-05),
    },
}


@pytest.mark.parametrize("which", THEIRS)
def test_both_gradients_are_the_authors(which: str) -> None:
    """Laborieux-Axel/generalized-holo-ep 30592f5 in float64: DiscreteDynamics.rbp and hep_vf with N=0 (ds/db by forward
    differentiation) of a perceptron of widths 5, 4, 3 with separate couplings, 100 iterations; sums and sums of squares
    of the kernels' gradients. Their Cauchy integrals (complex64) agree with hep_vf, N=0, to 1e-5. Tolerance 1e-6.
    """
    draws = numpy.random.RandomState(4)

    def draw(*shape: int) -> Tensor:
        return torch.tensor(draws.standard_normal(shape) * 0.4)

    net = EquilibriumNetwork(4, 3, widths=(5, 4, 3)).double()
    net.body.tolerance, net.body.iterations = 1e-14, 2000
    for layer, shape in zip(net.body.up, ((4, 5), (5, 4), (4, 3)), strict=True):
        layer.weight.data, layer.bias.data = draw(*shape).T.contiguous(), draw(shape[1])
    for layer, shape in zip(net.body.down, ((4, 5), (3, 4)), strict=True):
        layer.weight.data = draw(*shape).T.contiguous()
    net.readout.weight.data, net.readout.bias.data = draw(3, 3).T.contiguous(), draw(3)
    inputs, target = draw(6, 4) / 0.4, torch.tensor([0, 1, 2, 0, 1, 2])
    gradients(net, inputs, target, None if which == "exact" else EquilibriumPropagation(nudge=0.02, points=6))
    for name, (total, squares) in THEIRS[which].items():
        gradient = net.body.get_submodule(name).weight.grad
        assert float(gradient.sum()) == pytest.approx(total, rel=1e-6)
        assert float(gradient.square().sum()) == pytest.approx(squares, rel=1e-6)


def test_the_error_falls_with_the_power_of_the_number_of_points() -> None:
    net, inputs, target = network(symmetric=True)
    exact = gradients(net, inputs, target)

    def error(nudge: float, points: int) -> float:
        found = gradients(net, inputs, target, EquilibriumPropagation(nudge=nudge, points=points))
        return sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)) ** 0.5

    for points in (1, 2, 3, 4):
        assert error(0.4, points) / error(0.2, points) == pytest.approx(2**points, rel=0.35)
    assert error(0.4, 4) < error(0.4, 2) < error(0.4, 1)


def test_examples_are_nudged_as_if_alone() -> None:
    """The gradient of a batch is the mean of its examples', also with one large nudge."""
    net, inputs, target = network(symmetric=False)
    method = EquilibriumPropagation(nudge=1.0, points=1)
    whole = gradients(net, inputs, target, method)
    apart = [gradients(net, inputs[i : i + 1], target[i : i + 1], method) for i in range(7)]
    assert close(whole, [torch.stack(parts).mean(0) for parts in zip(*apart, strict=True)], 1e-9)


def test_what_surrounds_the_equilibrium_is_differentiated_as_usual() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), EquilibriumNetwork(4, 3, (5, 4), symmetric=True)).double()
    net[2].body.tolerance, net[2].body.iterations = 1e-14, 2000
    _, inputs, target = network(True)
    exact = gradients(net, inputs, target)
    assert close(gradients(net, inputs, target, EquilibriumPropagation(nudge=0.1, points=6)), exact, 1e-7)
    assert exact[0].abs().max() > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_homeostasis_is_the_asymmetry_of_the_dense_jacobian(symmetric: bool) -> None:
    """The mean over many directions is |J - J^T|^2 / 2; for layers, sum |W_l+1 - V_l^T|^2."""
    net, inputs, _ = network(symmetric)
    body = net.body
    state = body(inputs).detach()
    directions = torch.randn(4000, body.units, generator=torch.Generator().manual_seed(2)).double()
    value = asymmetry(body, state[:1].expand(4000, -1), inputs[:1].expand(4000, -1), directions)
    J = torch.autograd.functional.jacobian(lambda s: body.field(s[None], inputs[:1])[0], state[0])
    exact = float((J - J.mT).square().sum()) / 2 / body.units
    assert value.item() == pytest.approx(exact, rel=0.1, abs=0.02)
    down = body.down if len(body.down) else [None] * 2
    pairs = zip(body.up[1:], down, strict=True)
    assert exact == pytest.approx(
        sum(float((u.weight - (u.weight if d is None else d.weight.mT)).detach().square().sum()) for u, d in pairs)
        / body.units
    )


def test_homeostasis_has_the_gradient_of_what_it_estimates() -> None:
    net, inputs, _ = network(symmetric=False)
    body = net.body
    state = body(inputs).detach()[:1].expand(4000, -1)
    directions = torch.randn(4000, body.units, generator=torch.Generator().manual_seed(2)).double()
    asymmetry(body, state, inputs[:1].expand(4000, -1), directions).backward()
    expected = 2 * (body.up[1].weight - body.down[0].weight.mT).detach() / body.units
    torch.testing.assert_close(body.up[1].weight.grad, expected, atol=0.05, rtol=0.1)


def test_homeostasis_makes_propagation_point_the_right_way() -> None:
    """Trained for symmetry alone, the asymmetric network's gradients come to be the exact ones."""
    net, inputs, target = network(symmetric=False)
    method, now = JacobianHomeostasis(strength=1.0), Now()
    rule = torch.optim.SGD(net.body.parameters(), lr=0.3)

    def angle() -> float:
        two = (gradients(net, inputs, target), gradients(net, inputs, target, EquilibriumPropagation(nudge=0.1)))
        one, other = (torch.cat([g.flatten() for g in found[:-2]]) for found in two)
        return float(F.cosine_similarity(one, other, 0))

    before = angle()
    for _ in range(400):
        net.zero_grad()
        net(inputs)
        method.penalty(net, now).backward()
        rule.step()
    assert 1 - angle() < 1e-3 < 0.05 < 1 - before


def test_the_oracles_rule_is_put_back_and_weights_are_untouched() -> None:
    net, inputs, target = network(symmetric=False)
    own, before = net.body.credit, copy.deepcopy(net.state_dict())

    def failing(model: nn.Module, now: Now) -> Tensor:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        EquilibriumPropagation().gradient(failing)(net, Now())
    gradients(net, inputs, target, EquilibriumPropagation())
    assert net.body.credit is own
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("more", [[], [SAM(radius=0.05)], [Clip(norm=0.1)]])
def test_micro_batches_add_up_and_methods_combine(more: list[Method]) -> None:
    finals = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        x = torch.randn(24, 4)
        net = EquilibriumNetwork(4, 2, (6, 5))
        methods = [SGD(lr=0.3), EquilibriumPropagation(nudge=0.2), *more]
        train(net, (x, (x[:, 0] > 0).long()), methods=methods, steps=4, batch_size=12, accumulate=accumulate)
        finals.append(net.body.up[0].weight.detach())
    torch.testing.assert_close(*finals, atol=2e-5, rtol=1e-3)


def test_low_precision_relaxes_in_float32() -> None:
    net, inputs, _ = network(symmetric=True)
    half = copy.deepcopy(net).bfloat16()
    half.body.tolerance = 1e-6
    states = half.body(inputs.bfloat16())
    assert states.dtype == torch.bfloat16
    assert half.body.moving <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net.float().body(inputs.float()), net.body(inputs.float()))


class Alone(Equilibrium):
    """A field of one's own: s = tanh(a s + x)."""

    units = 1

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))

    def field(self, state: Tensor, inputs: Tensor) -> Tensor:
        return self.a.to(state.dtype) * state + inputs

    def activation(self, potential: Tensor) -> Tensor:
        return torch.tanh(potential)


def test_a_field_of_ones_own_and_a_hand_solved_case() -> None:
    """At x = 0 the state is 0; ds/dx = 1 / (1 - a) = 2."""
    layer, x = Alone(), torch.zeros(1, 1, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.item() == pytest.approx(2.0, abs=1e-4)
    assert layer.a.grad.item() == 0.0


def test_what_cannot_work_is_refused() -> None:
    for method in (EquilibriumPropagation(), JacobianHomeostasis()):
        with pytest.raises(BadInput, match="finds no layer that it is defined for"):
            method.check(nn.Linear(2, 2), [])
    with pytest.raises(BadInput, match="nudge must be greater than 0"):
        EquilibriumPropagation(nudge=0.0)
    assert isinstance(LayeredEquilibrium(2, (2,)), Equilibrium)
