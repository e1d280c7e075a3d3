"""Gradients through time: what keeps them from vanishing in recurrent nets (what keeps them from exploding is Clip)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import NonNegative, ScheduledNonNegative
from plait.gradient.base import Gradient
from plait.layers import hooked, layers, require_layers
from plait.method import Ask, Method, Now, method

RECURRENT = (nn.RNN, nn.RNNCell)


def slopes(hidden: Tensor, nonlinearity: str) -> Tensor:
    """Return the derivative of tanh or ReLU, told from its value.

    >>> slopes(torch.tensor([0.0, 0.5]), "tanh"), slopes(torch.tensor([0.0, 0.5]), "relu")
    (tensor([1.0000, 0.7500]), tensor([0., 1.]))
    """
    return 1 - hidden.square() if nonlinearity == "tanh" else (hidden > 0).to(hidden.dtype)


def omega(hidden: Tensor, direct: Tensor, weight: Tensor, nonlinearity: str, bound: float) -> tuple[Tensor, Tensor]:
    """Return sum_k sum_i Omega_ki and its immediate gradient [h, h] with respect to the recurrent weight [h, h].

    hidden [steps, n, h]: h_k = s(W h_{k-1} + ...). direct [steps, n, h]: the gradient that reaches h_k from elsewhere
    than h_{k+1}. Errors of norm at most `bound` are left out.
    """
    slope, error = slopes(hidden, nonlinearity), torch.empty_like(hidden)
    later = torch.zeros_like(hidden[0])
    for k in reversed(range(len(hidden))):
        error[k] = direct[k] + later
        later = (error[k] * slope[k]) @ weight
    before = error * slope
    back = before @ weight
    size, shrunk = error.norm(dim=-1, keepdim=True), back.norm(dim=-1, keepdim=True)
    counted = size > bound
    ratio = torch.where(counted, shrunk / size, 1.0)
    pull = torch.where(counted & (shrunk > 0), 2 * (ratio - 1) / (shrunk * size), 0.0) * back
    return (ratio - 1).square().sum(), before.flatten(0, -2).T @ pull.flatten(0, -2)


class Through(torch.autograd.Function):
    """The identity on hidden states, whose backward pass adds Omega's gradient to that of the recurrent weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, nonlinearity: str, factor: float, bound: float,
                seen: list[Tensor]) -> Tensor:  # fmt: skip
        """[steps, n, h] -> the same."""
        ctx.save_for_backward(hidden, weight)
        ctx.rest = (nonlinearity, factor, bound, seen)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Pass the gradient on, and add factor * dOmega/dW."""
        hidden, weight = ctx.saved_tensors
        nonlinearity, factor, bound, seen = ctx.rest
        (direct,) = gradients
        kind = torch.promote_types(weight.dtype, torch.float32)
        value, change = omega(hidden.to(kind), direct.to(kind), weight.to(kind), nonlinearity, bound)
        seen.append(value)
        return direct, (factor * change).to(weight.dtype), None, None, None, None


@paper("pascanu2013difficulty", key="rnn-clip")
@method
class VanishingGradientRegularizer(Gradient):
    """dE/dW + strength * d+Omega/dW,  Omega = sum_k (|dE/dh_{k+1} dh_{k+1}/dh_k| / |dE/dh_{k+1}| - 1)^2,
    where dh_{k+1}/dh_k = diag(s'(h_{k+1})) W for h_{k+1} = s(W h_k + V x_{k+1} + b), s = tanh or ReLU.

    Errors are to keep their norm on the way back through time, in the directions in which there are errors. As
    published, d+ is the immediate derivative: h_k and dE/dh_{k+1} count as constants, and only the recurrent weight W
    is pulled. Omega is a mean over examples, and the sum over steps of the equation. The authors' code squares both
    norms before it divides them, and takes a mean over steps: their factors (0.5 to 4) are larger by the number of
    steps.

    The other half of the paper is the bound on the whole gradient's norm: Clip(norm=1.0) after this.

    strength: at least 0, or a schedule; 0 is the plain gradient. bound: errors dE/dh of an example of at most this norm
    are left out. Acts on nn.RNN (one layer, one direction) and nn.RNNCell; one call, and further products of [n, h] and
    [h, h] for each time step. Raises BadInput for recurrent layers whose hidden states cannot be seen.

    >>> from plait import train
    >>> x = torch.randn(16, 9, 1, generator=torch.Generator().manual_seed(0))
    >>> last = lambda model, rows: model(rows)[0][:, -1]
    >>> data, methods = (x, x[:, 0]), [VanishingGradientRegularizer(strength=0.5)]
    >>> run = train(nn.RNN(1, 1, batch_first=True), data, methods=methods, call=last, steps=3)
    >>> run.history[-1]["VanishingGradientRegularizer"] > 0
    True
    """

    strength: ScheduledNonNegative = 0.1
    bound: NonNegative = 1e-20

    excludes: ClassVar[tuple[str, ...]] = ("EGN",)  # which needs the true derivatives of each example

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse models without a recurrent layer, and layers that hide their states."""
        for name, layer in require_layers(self, model, self.where, RECURRENT):
            if isinstance(layer, nn.RNN) and (layer.num_layers > 1 or layer.bidirectional):
                raise BadInput(
                    f"VanishingGradientRegularizer cannot see the hidden states inside '{name}': make it several "
                    "nn.RNN of one layer and one direction, or name others in where."
                )

    @contextlib.contextmanager
    def regularizing(self, model: nn.Module, now: Now, seen: list[Tensor]) -> Iterator[None]:
        """Add Omega's gradient in the backward passes that belong to forward passes run meanwhile."""
        strength = now.at(self.strength)

        def through(hidden: Tensor, weight: Tensor, layer: Any) -> Tensor:
            if not weight.requires_grad and torch.is_grad_enabled() and not now.resting:
                raise BadInput(
                    "VanishingGradientRegularizer trains recurrent weights, and one is frozen: unfreeze it (adapters "
                    "freeze the model), or name other layers in where."
                )
            share = float(now.share or 1 / hidden.shape[1])  # of an example in what is differentiated
            given = hidden, weight, layer.nonlinearity, strength * share, self.bound * share, seen
            passed: Tensor = Through.apply(*given)  # type: ignore[no-untyped-call]
            return passed

        def sequence(layer: Any, _: Any, output: Any) -> tuple[Tensor, Tensor]:
            hidden = output[0]
            if not isinstance(hidden, Tensor) or hidden.dim() != 3:
                raise BadInput(
                    "VanishingGradientRegularizer needs padded sequences [n, steps, inputs], not packed ones."
                )
            steps = hidden.transpose(0, 1) if layer.batch_first else hidden
            steps = through(steps, layer.weight_hh_l0, layer)
            # The last state is taken from the sequence, so that all that comes back to the states comes by one way.
            return (steps.transpose(0, 1) if layer.batch_first else steps), steps[-1:]

        def cell(layer: Any, _: Any, output: Tensor) -> Tensor:
            return through(output.view(1, -1, output.shape[-1]), layer.weight_hh, layer).view_as(output)

        with hooked(
            layer.register_forward_hook(sequence if isinstance(layer, nn.RNN) else cell)
            for _, layer in layers(model, self.where, RECURRENT)
        ):
            yield

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle with Omega's gradient added."""

        def regularized(model: nn.Module, now: Now) -> Tensor:
            if now.at(self.strength) == 0:
                return ask(model, now)
            seen: list[Tensor] = []
            with self.regularizing(model, now, seen):
                value = ask(model, now)
            figure = now.at(self.strength) * sum(float(v) for v in seen) / (len(now.batch) if now.batch else 1)
            now.parts[type(self).__name__] = figure
            return value

        return regularized
