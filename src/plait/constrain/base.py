"""What must hold after each step: a constraint knows one weight and returns the nearest one that obeys."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.layers import is_linear_map, layers, own_weight, require_layers
from plait.method import Method, Now, method


@method
class Constraint(Method):
    """After each step every trained weight that `where` names becomes `project(weight)`.

    Laws: what comes out obeys; projecting again changes nothing; no weight that obeys is nearer.
    """

    @property
    def kinds(self) -> Callable[[nn.Module], bool]:
        """The layers that the constraint is defined for, as a predicate."""
        return is_linear_map

    def project(self, weight: Tensor) -> Tensor:
        """Return the nearest weight that obeys."""
        raise NotImplementedError

    def targets(self, model: nn.Module, now: Now | None = None) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Yield (name, layer, weight) of the trained weights, a shared one once; refuse if there never is one."""
        seen: set[int] = set()
        for name, layer in layers(model, self.where, self.kinds):
            weight = own_weight(layer)
            if weight.requires_grad and id(weight) not in seen:
                seen.add(id(weight))
                yield name, layer, weight
        if not seen and not (now and now.resting):
            raise BadInput(
                f"{type(self).__name__} finds no weight that is trained: drop it, or what freezes the model."
            )

    def project_layer(self, name: str, layer: nn.Module, weight: Tensor, now: Now) -> Tensor:
        """Return the projection of one layer's weight; a constraint with a memory overrides this."""
        return self.project(weight)

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Project each weight, in place."""
        for name, layer, weight in self.targets(model, now):
            weight.copy_(self.project_layer(name, layer, weight, now))

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse targets that match nothing, and weights that cannot be moved."""
        for name, layer in require_layers(self, model, self.where, self.kinds):
            weight = own_weight(layer)
            if weight.requires_grad and not weight.is_leaf:
                raise BadInput(
                    f"{type(self).__name__} cannot move the weight of '{name}', which a parametrization makes at each "
                    "reading: remove that, or name other layers in where."
                )
