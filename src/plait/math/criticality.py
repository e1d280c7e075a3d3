"""The statistics of wide networks' preactivations, layer by layer, and where they neither vanish nor explode.

For preactivations z of variance K in one layer the next has K' = C_b + C_W <s(z)^2>_K, with s the activation, C_b the
variance of biases, C_W / inputs that of weights, and <f>_K the mean of f over z ~ N(0, K). Two inputs that are nearly
the same move apart or together by the susceptibilities chi_par (along the length) and chi_perp (across it).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.errors import BadInput, did_you_mean

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "linear": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}
"""Activations by name."""

MODULES = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Sigmoid, nn.Softplus)
"""Activations that are found in a model by their class."""


def activation_of(model: nn.Module, name: str = "auto") -> Activation:
    """Return the activation of that name, or the one kind of activation that a model is made with.

    Raises BadInput for an unknown name, and where a model has no activation of a known class, or several kinds.

    >>> activation_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    Tanh()
    """
    if name != "auto":
        if name not in ACTIVATIONS:
            raise BadInput(f"activation '{name}' is not known{did_you_mean(name, [*ACTIVATIONS, 'auto'])}.")
        return ACTIVATIONS[name]
    found: dict[str, Activation] = {}
    for m in model.modules():
        if isinstance(m, MODULES):
            alone = copy.copy(m)
            if hasattr(alone, "inplace"):
                alone.inplace = False  # it is asked here for its values alone
            found[repr(alone)] = alone
    if len(found) != 1:
        seen = f"several activations ({', '.join(found)})" if found else "no activation that is a module of its own"
        raise BadInput(f"{type(model).__name__} has {seen}: name one (activation='relu', ...).")
    return next(iter(found.values()))


@cache
def _nodes(count: int = 200, reach: float = 12.0) -> tuple[Tensor, Tensor]:
    """Return places t and weights w with sum_i w_i f(t_i) = E f(t), t ~ N(0, 1): Gauss and Legendre's rule on either
    side of 0, where activations may have a kink.
    """
    import numpy

    places, weights = (torch.from_numpy(part) for part in numpy.polynomial.legendre.leggauss(count))
    t, w = reach * (places + 1) / 2, reach * weights / 2
    t, w = torch.cat([-t.flip(0), t]), torch.cat([w.flip(0), w])
    return t, w * torch.exp(-t.square() / 2) / (2 * torch.pi) ** 0.5


def mean(function: Callable[[Tensor], Tensor], variance: float) -> float:
    """Return <f>_K, the mean of f(z) over z ~ N(0, K).

    >>> round(mean(lambda z: z**4, 2.0), 9)
    12.0
    """
    t, w = _nodes()
    return float(w @ function(t * variance**0.5))


def slope(activation: Activation) -> Callable[[Tensor], Tensor]:
    """Return the derivative of an activation, which acts on each number alone."""

    def derivative(z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (found,) = torch.autograd.grad(activation(z).sum(), z)
        return found

    return derivative


def _square(activation: Activation) -> Callable[[Tensor], Tensor]:
    return lambda z: activation(z).square()


def next_variance(activation: Activation, weight: float, bias: float, variance: float) -> float:
    """Return C_b + C_W <s^2>_K.

    >>> round(next_variance(torch.relu, 2.0, 0.0, 3.0), 9)
    3.0
    """
    with torch.no_grad():
        return bias + weight * mean(_square(activation), variance)


def susceptibilities(activation: Activation, weight: float, variance: float) -> tuple[float, float]:
    """Return (chi_par, chi_perp) = (C_W <s^2 (z^2 - K)>_K / (2 K^2), C_W <s'^2>_K), for K > 0.

    >>> [round(chi, 9) for chi in susceptibilities(torch.relu, 2.0, 3.0)]
    [1.0, 1.0]
    """
    with torch.no_grad():
        along = mean(lambda z: activation(z).square() * (z.square() - variance), variance) / (2 * variance**2)
        return weight * along, weight * mean(_square(slope(activation)), variance)


@dataclass(frozen=True)
class Critical:
    """The variances with which an activation is critical, chi_par = chi_perp = 1, and where its kernel tends to.

    kind: "scale-invariant" (every K is a fixed point), "zero" (K falls to 0 like 1 / depth), or "half-stable" (K tends
    to `variance` from one side).
    """

    weight: float
    bias: float
    variance: float
    kind: Literal["scale-invariant", "zero", "half-stable"]


def critical(activation: Activation) -> Critical:
    """Return the variances (C_W, C_b) at which an activation is critical.

    With a_+ and a_- the slopes on either side of 0, C_W = 2 / (a_+^2 + a_-^2) and C_b = 0 for activations that are
    linear on both sides and for those whose fixed point K = 0 is then stable (tanh, sine). Else K solves chi_par =
    chi_perp, C_W = 1 / <s'^2>_K and C_b = K - C_W <s^2>_K (GELU, SiLU). Raises BadInput for an activation with neither
    (sigmoid, softplus): it cannot be critical.

    >>> critical(torch.tanh)
    Critical(weight=1.0, bias=0.0, variance=0.0, kind='zero')
    """
    with torch.no_grad():
        zero = float(activation(torch.zeros(1, dtype=torch.float64)))
        if abs(zero) < 1e-12:
            at_zero = _slopes(activation, 2)
            ratios = [mean(_square(activation), k) / k / at_zero for k in (1e-4, 1e-2, 1.0, 100.0)]
            if max(abs(ratio - 1) for ratio in ratios) < 1e-6:
                return Critical(1 / at_zero, 0.0, 1.0, "scale-invariant")
            if ratios[0] < 1 and ratios[1] < 1:
                return Critical(1 / at_zero, 0.0, 0.0, "zero")
    variance = _half_stable(activation)
    if variance is not None:
        weight = 1 / susceptibilities(activation, 1.0, variance)[1]
        bias = variance - next_variance(activation, weight, 0.0, variance)
        if bias >= 0:
            return Critical(weight, bias, variance, "half-stable")
    raise BadInput("this activation cannot be critical: use one that passes through 0, such as relu, tanh or gelu.")


def _slopes(activation: Activation, power: int) -> float:
    """Return A_p, the mean of the p-th powers of the slopes on either side of 0."""
    sides = torch.tensor([-1e-12, 1e-12], dtype=torch.float64)
    return float((slope(activation)(sides) ** power).mean())


def _half_stable(activation: Activation) -> float | None:
    """Return the K at which both susceptibilities are alike, or None."""

    def gap(log: float) -> float:
        along, across = susceptibilities(activation, 1.0, 10.0**log)
        return along - across

    grid = [-2 + 0.1 * i for i in range(41)]
    for low, high in pairwise(grid):
        if gap(low) * gap(high) < 0:
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (low, middle) if gap(low) * gap(middle) <= 0 else (middle, high)
            return float(10.0**low)
    return None


@dataclass(frozen=True)
class Layer:
    """Preactivations of a layer: the variance K of infinitely wide layers, the correction of order 1 / width to it, and
    the four-point vertex V / width: E z^2 = K + correction, E z^4 - 3 (E z^2)^2 = 3 vertex.
    """

    variance: float
    correction: float
    vertex: float

    @property
    def fluctuation(self) -> float:
        """V / (width K^2): the squared relative deviation of a neuron's variance from draw to draw."""
        return self.vertex / self.variance**2


def recursion(
    activation: Activation, weights: Sequence[float], biases: Sequence[float], widths: Sequence[int], first: float
) -> list[Layer]:
    """Return the statistics of each layer's preactivations, for layers l = 1, 2, ... of which the first has variance K:

    K' = C_b + C_W <s^2>,  v' = C_W^2 (<s^4> - <s^2>^2) / n + chi_par^2 v,
    k' = chi_par k + (C_W / 8) v <s^2 (z^4 - 6 K z^2 + 3 K^2)> / K^4,

    v the vertex and k the correction, 0 in the first layer, and n the width of the layer before. weights, biases: C_W
    and C_b of layers 2, 3, ...; widths: of layers 1, 2, ..., at least as many.

    >>> [round(layer.fluctuation, 6) for layer in recursion(torch.relu, [2.0] * 2, [0.0] * 2, [100] * 2, 1.0)]
    [0.0, 0.05, 0.1]
    """
    layers, square = [Layer(first, 0.0, 0.0)], _square(activation)
    for c_w, c_b, n in zip(weights, biases, widths, strict=False):
        k, shift, vertex = layers[-1].variance, layers[-1].correction, layers[-1].vertex
        with torch.no_grad():
            two, four = mean(square, k), mean(lambda z: square(z).square(), k)
            bend = _bend(square, k)
        along = susceptibilities(activation, c_w, k)[0]
        shift = along * shift + c_w / 8 * vertex * bend
        layers.append(Layer(c_b + c_w * two, shift, c_w**2 * (four - two**2) / n + along**2 * vertex))
    return layers


def _bend(function: Activation, variance: float) -> float:
    """Return 4 times the second derivative of <function> in the variance: <function (z^4 - 6 K z^2 + 3 K^2)> / K^4."""
    k = variance
    return mean(lambda z: function(z) * (z**4 - 6 * k * z.square() + 3 * k**2), k) / k**4


def growth(activation: Activation) -> float:
    """Return nu, with which the fluctuation V / (n K^2) of critical layers grows with depth: nu * depth / width.

    nu = 3 A_4 / A_2^2 - 1 for scale-invariant activations, A_p the mean of the slopes^p (ReLU: 5); a third of that for
    those whose K tends to 0 (tanh: 2/3); for half-stable ones the slope of the recursion at their K.

    >>> round(growth(torch.relu), 6), round(growth(torch.tanh), 2)
    (5.0, 0.67)
    """
    found = critical(activation)
    if found.kind == "zero":
        return _slopes(activation, 4) / _slopes(activation, 2) ** 2 - 1 / 3
    with torch.no_grad():
        two = mean(lambda z: activation(z) ** 2, found.variance)
        four = mean(lambda z: activation(z) ** 4, found.variance)
    return found.weight**2 * (four - two**2) / found.variance**2


def best_ratio(activation: Activation, outputs: int = 1) -> float:
    """Return the ratio of depth to width that the book expects to be most useful, 4 / ((20 + 3 outputs) nu).

    >>> round(best_ratio(torch.relu), 4)
    0.0348
    """
    return 4 / (20 + 3 * outputs) / growth(activation)
