"""Starts for networks that are trained from scratch: every weight is drawn anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.layers import CONVOLUTIONS, is_transformers_conv1d, matrix_shape, own_weight, require_layers
from plait.method import Method, Now, method
from plait.parametrize.base import Adapter, set_weight, stack


def is_map(layer: nn.Module) -> bool:
    """Say whether a layer is a linear map of activations: Linear, convolution, transformers' Conv1D."""
    return isinstance(layer, (nn.Linear, *CONVOLUTIONS)) or is_transformers_conv1d(layer)


def refuse_adapted(method: Method, model: nn.Module, written: Iterable[Tensor]) -> None:
    """Refuse to write weights that an adapter holds something of: its norms, its singular vectors, what a start took.

    Adapters are made before any start runs, of the weights as they were then.
    """
    title, ids = type(method).__name__, {id(weight) for weight in written}
    for name, layer in model.named_modules():
        for part in stack(layer) if id(layer._parameters.get("weight")) in ids else []:
            made_by = part.made_by or type(part).__name__
            if part.of_weight:
                raise BadInput(
                    f"{title} writes the weight of '{name}', and {made_by} was made of the one before: drop one, or "
                    "part them by where."
                )
            if part.replaces:
                raise BadInput(
                    f"{title} would write the weight of '{name}', but that is not in use beside {made_by}: drop one, "
                    "or part them by where."
                )
            if part.taken() is not None:
                raise BadInput(
                    f"{title} would write the weight of '{name}', of which a start took a part before: put {title} "
                    "before that start."
                )


@method
class FreshStart(Method):
    """A start that draws the weights and biases of linear maps that are trained; a weight that layers share once."""

    def weight(self, shape: tuple[int, int], model: nn.Module, now: Now) -> Tensor:
        """Return a drawn matrix [out, in * kernel]."""
        raise NotImplementedError

    def bias(self, count: int, model: nn.Module, now: Now) -> Tensor:
        """Return a drawn bias [out]."""
        return torch.zeros(count)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse adapters, which keep the pretrained weights, and layers that do not exist."""
        for other in methods:
            if isinstance(other, Adapter):
                title, kind = type(self).__name__, type(other).__name__
                raise BadInput(f"{title} draws weights anew, and {kind} adapts those that are there: drop one.")
        require_layers(self, model, self.where, is_map)

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Draw each weight and bias that is trained."""
        drawn = set[int]()
        for _, layer in require_layers(self, model, self.where, is_map):
            weight = own_weight(layer)
            if not weight.requires_grad or id(weight) in drawn:
                continue
            drawn.add(id(weight))
            set_weight(layer, self.weight(matrix_shape(layer), model, now).to(weight))
            if isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad:
                layer.bias.copy_(self.bias(len(layer.bias), model, now).to(layer.bias))
        if not drawn:
            title = type(self).__name__
            raise BadInput(f"{title}(where={self.where!r}) finds no layer that is trained: change where, or drop it.")
