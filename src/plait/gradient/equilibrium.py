"""Gradients of networks at equilibrium without a backward pass through their dynamics."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Positive
from plait.gradient.base import Gradient
from plait.layers import layers, require_layers
from plait.math.equilibrium import Equilibrium, nudged
from plait.method import Ask, Method, Now, method


@paper("laborieux2024improving", key="eq-prop")
@method
class EquilibriumPropagation(Gradient):
    """g = (d field / d theta)^T delta,  delta = 1/N sum_k s(b_k) / b_k,  b_k = nudge e^(2 pi i k / N), k = 0 ... N - 1,
    with s(b) the equilibrium under the force b dL/ds on it, and field(s, x) what drives the units.

    Generalized, holomorphic equilibrium propagation: delta is ds/db at b = 0 by Cauchy's integral, exact up to
    O(nudge^N) for analytic dynamics, where one nudge (points = 1) or two opposite ones (points = 2) of finite size are
    biased. This credit needs no backward pass through the dynamics, but has their Jacobian J in place of J^T: it is
    the exact gradient where J is symmetric (coupled by the same weights both ways), and the worse the less it is so;
    JacobianHomeostasis makes it so. What is above and below the equilibrium is differentiated as usual.

    The force is the loss's gradient at the free equilibrium, whatever the loss; in the paper it follows the nudged
    state (for two losses that are analytic). Both have the same derivative at b = 0.

    nudge: greater than 0, for an example's own loss (0.05 and 0.5 in the paper); the error falls as said only while
    states are analytic in the disc of that size, which shrinks as couplings grow. points: N, 1 to 6 there. where: the
    equilibrium layers (plait.models.equilibrium.EquilibriumNetwork, or any plait.math.equilibrium.Equilibrium). One
    call; N further relaxations, of which the complex ones come in conjugate pairs. The weights are untouched. Raises
    BadInput where no equilibrium layer matches, where nothing in or below one is trained, and beside EGN.

    >>> from plait import train
    >>> from plait.models.equilibrium import EquilibriumNetwork
    >>> import torch
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> net = EquilibriumNetwork(4, 2, widths=(8, 8), symmetric=True)
    >>> run = train(net, (x, (x[:, 0] > 0).long()), methods=[EquilibriumPropagation()], steps=30)
    >>> run.history[-1]["objective"] < run.history[0]["objective"]
    True
    """

    nudge: Positive = 0.1
    points: Count = 4

    excludes: ClassVar[tuple[str, ...]] = ("EGN",)  # which needs the true derivatives of each example

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a model without an equilibrium."""
        require_layers(self, model, self.where, Equilibrium)

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle whose credit comes from nudged equilibria."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            given: list[Equilibrium] = []

            def credit(layer: Equilibrium, u: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
                given.append(layer)
                return nudged(layer, u, inputs, gradient, self.nudge, self.points, now.share or 1.0)

            found = [layer for _, layer in layers(model, self.where, Equilibrium) if isinstance(layer, Equilibrium)]
            before = [layer.credit for layer in found]
            for layer in found:
                layer.credit = credit
            try:
                value = ask(model, now)
            finally:
                for layer, own in zip(found, before, strict=True):
                    layer.credit = own
            if not given and not now.resting:
                raise BadInput(
                    "EquilibriumPropagation gave no credit, for nothing in or below the equilibrium is trained: "
                    "unfreeze it (adapters freeze the model), or drop the method."
                )
            return value

        return asked
