"""Weights with zeros in a pattern that hardware can use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.constrain.base import Constraint
from plait.errors import BadInput
from plait.fields import Count, Fraction
from plait.layers import CONVOLUTIONS, inputs_divide_by, inputs_last
from plait.math.projections import largest_of_group
from plait.method import Now, method


@paper("mishra2021sparse", key="nm-mask", kind="ground")
@method
class NMMask(Constraint):
    """After each step, of every `m` consecutive inputs of a neuron the `n` largest weights stay, the others become 0.

    The nearest N:M sparse matrix in Frobenius norm. Groups run along the inputs; in a convolution along the
    channels, for each position of the kernel. Until `fixed_from` of the run the mask is chosen anew after each step, so
    that a weight which grows comes back; from there on it is fixed, and kept in memory.

    n, m: 1 <= n < m. where: by default all linear layers whose inputs divide by m. Raises BadInput for other n and m,
    where no layer divides so, and where none that does is trained.

    >>> NMMask(n=1, m=2).project(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    tensor([[ 0., -3.,  2.,  0.]])
    """

    n: Count = 2
    m: Count = 4
    fixed_from: Fraction = 0.5

    def __post_init__(self) -> None:
        if self.n >= self.m:
            raise BadInput(f"NMMask keeps n of m weights: n must be below m, not {self.n} of {self.m}.")

    @property
    def kinds(self) -> Callable[[nn.Module], bool]:
        """Linear maps, but no tables, whose inputs come in groups of m."""
        return partial(inputs_divide_by, size=self.m)

    def mask(self, weight: Tensor) -> Tensor:
        """Return the mask of what stays of [..., in]."""
        return largest_of_group(weight, self.n, self.m)

    def project(self, weight: Tensor) -> Tensor:
        """Return the nearest N:M sparse weight to [..., in]."""
        return weight * self.mask(weight)

    def project_layer(self, name: str, layer: nn.Module, weight: Tensor, now: Now) -> Tensor:
        """Return the masked weight of one layer, in its own shape."""
        memory = now.of(self)
        view = inputs_last(layer, weight)
        mask = memory[name] if name in memory else self.mask(view)
        if now.progress >= self.fixed_from:
            memory[name] = mask
        masked = torch.where(mask, view, torch.zeros((), dtype=view.dtype, device=view.device))
        return masked.movedim(-1, 1) if isinstance(layer, CONVOLUTIONS) else inputs_last(layer, masked)
