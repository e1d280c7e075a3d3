"""Layers whose output is an equilibrium of their own dynamics, and two ways to find the gradient through it.

u = field(s, x), s = activation(u). A gradient G = dL/ds of a loss that reads the state reaches the parameters as
(d field / d theta)^T delta, where delta = a'(u) * (J^T delta + G), J = d field / ds: the implicit function theorem.
The same delta, but with J in place of J^T, is the derivative ds/db of the equilibrium under a force b G on it,
which needs no backward pass: equilibrium propagation. Both agree where J is symmetric.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Credit = Callable[["Equilibrium", Tensor, Tensor, Tensor], Tensor]
"""(layer, u, x, G) -> delta, all [n, units] but x."""


def steep_sigmoid(u: Tensor) -> Tensor:
    """Return 1 / (1 + e^(2 - 4u)), of slope 1 at u = 1/2, as in the authors' code."""
    return torch.sigmoid(4 * u - 2)


ANALYTIC: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": steep_sigmoid, "tanh": torch.tanh}
"""Activations that are defined for complex numbers too."""

COUPLING = 0.5
"""Couplings start so much smaller than torch's linear layers, so that the dynamics contract."""


class Equilibrium(nn.Module):
    """Maps x [n, ...] to the state s [n, units] at which s = activation(field(s, x)), found by iteration from u = 0.

    A subclass has `units`, `field` and `activation`; both must take complex states, with parameters made complex, if
    forces are to be complex. Each step goes the part `rate` of the way to the field, since symmetric couplings that all
    act at once may end in a cycle of two states. It ends when no entry of u moves by more than `tolerance`, or after
    `iterations` steps: where the dynamics do not settle, the last state is taken, and `moving` says by how much it
    still moved. States are float32 at least; the result has the dtype of x.
    """

    units: int
    tolerance: float = 1e-6
    iterations: int = 300
    rate: float = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.credit: Credit = implicit
        self.moving = math.inf
        self.last: tuple[Tensor, Tensor] | None = None
        """The state and the input of the last pass in training, for penalties."""

    def field(self, state: Tensor, inputs: Tensor) -> Tensor:
        """Return the potential u that a state s [n, units] and an input drive: [n, units]."""
        raise NotImplementedError

    def activation(self, potential: Tensor) -> Tensor:
        """Return s, entry by entry, of a potential u; analytic."""
        raise NotImplementedError

    @torch.no_grad()
    def settle(self, inputs: Tensor, start: Tensor, force: Tensor | float = 0.0) -> Tensor:
        """Return the potential u = field(activation(u), x) + force that is reached from `start`."""
        u = start
        for _ in range(self.iterations):
            before, u = u, torch.lerp(u, self.field(self.activation(u), inputs) + force, self.rate)
            self.moving = float((u - before).abs().max()) if u.numel() else 0.0
            if self.moving <= self.tolerance:
                break
        return u

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the state at equilibrium, which knows its gradient by `credit`."""
        with torch.autocast(inputs.device.type, enabled=False):
            x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
            u = self.settle(x.detach(), x.new_zeros(len(x), self.units))
            state = self.activation(u)
            if self.training:
                self.last = state, x.detach()
            if torch.is_grad_enabled():
                # One application with a graph: what reaches it as a gradient is delta.
                state = _Settled.apply(self.field(state, x), u, x.detach(), self)  # type: ignore[no-untyped-call]
            return state.to(inputs.dtype)


class _Settled(torch.autograd.Function):
    """The state at equilibrium, whose gradient is mapped by the layer's credit."""

    @staticmethod
    def forward(ctx: Any, potential: Tensor, u: Tensor, inputs: Tensor, layer: Equilibrium) -> Tensor:
        ctx.save_for_backward(u, inputs)
        ctx.layer = layer
        return layer.activation(u)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        u, inputs = ctx.saved_tensors
        return ctx.layer.credit(ctx.layer, u, inputs, gradient), None, None, None


def implicit(layer: Equilibrium, u: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Return delta = a'(u) * (J^T delta + G), iterated as the state was, so that it settles where the state does: the
    exact gradient.
    """
    with torch.enable_grad():
        held = u.detach().requires_grad_()
        (slope,) = torch.autograd.grad(layer.activation(held).sum(), held)
    transposed = torch.func.vjp(lambda s: layer.field(s, inputs), layer.activation(u))[1]
    delta = slope * gradient
    for _ in range(layer.iterations):
        before, delta = delta, torch.lerp(delta, slope * (transposed(delta)[0] + gradient), layer.rate)
        if float((delta - before).abs().max()) <= layer.tolerance * float(delta.abs().max()):
            break
    return delta


def nudged(
    layer: Equilibrium, u: Tensor, inputs: Tensor, gradient: Tensor, nudge: float, points: int, scale: float = 1.0
) -> Tensor:
    """Return ds/db at b = 0 of the equilibrium s(b) under a force b G, from its states at forces of size `nudge`.

    points = 1: (s(nudge) - s(0)) / nudge, 2: (s(nudge) - s(-nudge)) / (2 nudge), and generally the mean over
    b = nudge e^(2 pi i k / points), k = 0 ... points - 1, of s(b) / b, which is Cauchy's integral for the derivative by
    the trapezoid rule: its error falls as nudge^points while s is analytic in the disc. gradient / scale is the
    force, so that a gradient that is divided by the number of examples nudges each as if it were alone.
    """
    force = gradient / scale

    def state(direction: complex) -> Tensor:
        if direction.imag == 0:
            return layer.activation(layer.settle(inputs, u, nudge * direction.real * force))
        start = u.to(torch.promote_types(u.dtype, torch.complex64))
        moved = layer.settle(inputs.to(start.dtype), start, nudge * direction * force)
        found: Tensor = (layer.activation(moved) / direction).real
        return found

    free = layer.moving
    if points == 1:
        delta = state(1.0) - layer.activation(u)
    else:
        # Forces come in conjugate pairs, and so do the states.
        delta = state(1.0) - (state(-1.0) if points % 2 == 0 else 0.0)
        for k in range(1, (points + 1) // 2):
            delta = delta + 2 * state(cmath.exp(2j * math.pi * k / points))
        delta = delta / points
    layer.moving = free
    return delta * (scale / nudge)


def asymmetry(layer: Equilibrium, state: Tensor, inputs: Tensor, directions: Tensor) -> Tensor:
    """Return mean_n(|J e|^2 - e^T J J e) / units for one direction e a row: |J - J^T|_F^2 / (2 units) in expectation.

    J = d field / ds at the state; directions [n, units] of independent entries of variance 1. The state is a constant.
    """

    def product(direction: Tensor) -> Tensor:
        found: Tensor = torch.autograd.functional.jvp(
            lambda s: layer.field(s, inputs), state, direction, create_graph=True
        )[1]
        return found

    once = product(directions)
    twice = product(once)
    return (once.square().sum(1) - (directions * twice).sum(1)).mean() / layer.units


class LayeredEquilibrium(Equilibrium):
    """u_l = W_l s_(l-1) + b_l + V_l s_(l+1), s_0 = x: layers of widths w_1, ..., w_L that see those below and above.

    V_l is a weight of its own, or W_(l+1)^T if `symmetric`, which makes J symmetric.

    Maps [n, inputs] to the states of all layers, [n, w_1 + ... + w_L].

    >>> layer = LayeredEquilibrium(3, (4, 2), symmetric=True)
    >>> state = layer(torch.ones(5, 3))
    >>> bool((state - layer.activation(layer.field(state, torch.ones(5, 3)))).abs().max() < 1e-5)
    True
    """

    def __init__(
        self, inputs: int, widths: tuple[int, ...], symmetric: bool = False, activation: str = "sigmoid"
    ) -> None:
        super().__init__()
        self.widths, self.units, self.analytic = tuple(widths), sum(widths), ANALYTIC[activation]
        below = (inputs, *widths[:-1])
        # Sequential, since sharding takes the members of a ModuleList apart, and these are never called themselves.
        self.up = nn.Sequential(*[nn.Linear(a, b) for a, b in zip(below, widths, strict=True)])
        pairs = [] if symmetric else list(zip(widths[1:], widths[:-1], strict=True))
        self.down = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in pairs])
        with torch.no_grad():
            for layer in [*list(self.up)[1:], *self.down]:
                layer.weight.mul_(COUPLING)

    def field(self, state: Tensor, inputs: Tensor) -> Tensor:
        """Return the drive of every layer."""
        parts = [inputs, *torch.split(state, list(self.widths), 1)]
        drives: list[Tensor] = []
        for below, layer in zip(parts, self.up, strict=False):
            weight: Any = layer.weight
            bias: Any = layer.bias
            drives.append(below @ weight.to(state.dtype).mT + bias.to(state.dtype))
        for number in range(len(self.widths) - 1):
            weight = self.down[number].weight.mT if len(self.down) else self.up[number + 1].weight
            drives[number] = drives[number] + parts[number + 2] @ weight.to(state.dtype)
        return torch.cat(drives, 1)

    def activation(self, potential: Tensor) -> Tensor:
        """Return 1 / (1 + e^(2 - 4u)), or what was chosen."""
        return self.analytic(potential)
