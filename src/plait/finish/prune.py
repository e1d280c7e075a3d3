"""Pruning after training: weights that matter least become 0, in a pattern that hardware can use."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.layers import inputs_divide_by, inputs_last, own_weight, require_layers
from plait.math.projections import largest_of_group
from plait.method import Method, Now, method
from plait.parametrize.folding import fold


@paper("mishra2021sparse", key="magnitude-pruning", kind="ground")
@method
class MagnitudePruning(Method):
    """W <- W * mask, mask = 1 for the n largest |W| of every m consecutive inputs of a neuron.

    2:4 is what sparse tensor cores run; 1:m and others are as valid. Adapters are folded first, so that what is pruned
    is what is used. In a convolution groups run along the channels. A weight shared by two layers is pruned once.

    n, m: 1 <= n < m. where: by default all linear layers and convolutions whose inputs divide by m.

    Raises BadInput if n is not below m, or no layer divides.

    >>> layer = nn.Linear(4, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    >>> MagnitudePruning().finish(layer, Now()).weight.detach()
    tensor([[ 0., -3.,  2.,  0.]])
    """

    n: Count = 2
    m: Count = 4

    def __post_init__(self) -> None:
        if self.n >= self.m:
            raise BadInput(f"MagnitudePruning keeps n of m weights: n must be below m, not {self.n} of {self.m}.")

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the layers to be pruned: linear maps, but no tables, whose inputs come in groups of m."""
        return require_layers(self, model, self.where, partial(inputs_divide_by, size=self.m))

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse targets that match nothing."""
        self.targets(model)

    @torch.no_grad()
    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Return the pruned model."""
        fold(model)
        for _, layer in self.targets(model):
            view = inputs_last(layer, own_weight(layer))
            view.mul_(largest_of_group(view, self.n, self.m))
        return model
