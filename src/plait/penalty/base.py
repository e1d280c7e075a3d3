"""Penalties: a scalar of weights, of features or of outputs, added to the objective."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from plait.fields import ScheduledNonNegative
from plait.layers import layers, matrix, own_weight, require_layers, weight_identity
from plait.method import Method, Now, method
from plait.parametrize.base import dense_weight, stack


@method
class Penalty(Method):
    """strength * sum over the layers that `where` names of `value`."""

    strength: ScheduledNonNegative = 0.01


@method
class WeightPenalty(Penalty):
    """A penalty of each layer's weight, as the matrix [out, in * kernel] that the layer uses (adapters included)."""

    def value(self, weight: Tensor) -> Tensor:
        """Return the penalty of one matrix [out, in], a scalar."""
        raise NotImplementedError

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """Return argmin_X value(X) + |X - weight|^2 / (2 step), where there is a closed form."""
        raise NotImplementedError

    def targets(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield (name, layer) of the layers whose weight is trained; a weight that several layers share comes once."""
        seen = set()
        for name, layer in layers(model, self.where):
            weight = own_weight(layer)
            use = (weight_identity(layer), *map(id, stack(layer)))
            trained = [weight, *(p for part in stack(layer) for p in part.parameters())]
            if use not in seen and any(p.requires_grad for p in trained):  # a bias alone does not change the weight
                seen.add(use)
                yield name, layer

    def value_of(self, name: str, layer: nn.Module, now: Now) -> Tensor:
        """Return the penalty of one layer; a penalty with a memory overrides this."""
        return self.value(matrix(layer, dense_weight(layer)))

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return strength * sum of `value` over the weights that are trained."""
        strength = now.at(self.strength)
        by_layer = isinstance(strength, Tensor) and strength.dim() == 1  # a tuned number for each layer
        if not by_layer and strength == 0:
            return 0.0
        values = [self.value_of(name, layer, now) for name, layer in self.targets(model)]
        if not values:
            return torch.zeros(())  # and not 0.0, which says that there is nothing to add for now
        if by_layer:
            return (strength * torch.stack(values)).sum()
        return strength * torch.stack(values).sum()

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse targets that match nothing."""
        require_layers(self, model, self.where)
