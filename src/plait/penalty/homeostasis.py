"""Networks at equilibrium whose dynamics carry credit backward as they carry signals forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import ScheduledNonNegative
from plait.layers import layers, require_layers
from plait.math.equilibrium import Equilibrium, asymmetry
from plait.method import Method, Now, method
from plait.penalty.base import Penalty


@paper("laborieux2024improving", key="jacobian-homeostasis")
@method
class JacobianHomeostasis(Penalty):
    """strength * E_e[|J e|^2 - e^T J J e] / units = strength * |J - J^T|_F^2 / (2 units),  e ~ N(0, I),

    with J = d field / ds at the equilibrium of each layer that `where` names: functional asymmetry, which biases
    equilibrium propagation. One e for each example and pass, drawn from the run's generator: two products with J,
    never J itself. The state is a constant, as in the authors' code; the diagonal of J (the leak), which is symmetric
    and only adds noise, is left out. Symmetric weights are not demanded: J may be symmetric without them.

    strength: at least 0 (0.1 to 1 for small perceptrons in the authors' runs, 10 to 15 for convolutions). Raises
    BadInput where no equilibrium layer matches.

    >>> from plait.math.equilibrium import LayeredEquilibrium
    >>> layer, now = LayeredEquilibrium(3, (4, 2), symmetric=True), Now()
    >>> _ = layer(torch.ones(500, 3))
    >>> abs(JacobianHomeostasis(strength=1.0).penalty(layer, now).item()) < 0.05
    True
    """

    strength: ScheduledNonNegative = 1.0

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a model without an equilibrium."""
        require_layers(self, model, self.where, Equilibrium)

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return the asymmetry of the layers at the equilibria of the pass under way."""
        strength, total = now.at(self.strength), torch.zeros(())
        if strength == 0:
            return 0.0
        for _, layer in layers(model, self.where, Equilibrium):
            if isinstance(layer, Equilibrium) and layer.last is not None:
                state, inputs = layer.last
                drawn = torch.randn(state.shape, generator=now.generator, device=now.generator.device).to(state)
                total = total.to(state.device) + asymmetry(layer, state, inputs, drawn)
        return strength * total
