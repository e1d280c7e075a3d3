"""Penalties of norms: of the whole weight, of its distance to the start, of each neuron's distance to the sphere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.layers import matrix
from plait.method import Now, method
from plait.parametrize.base import dense_weight
from plait.penalty.base import WeightPenalty


@paper("krogh1991weightdecay", key="l2", kind="ground")
@method
class L2(WeightPenalty):
    """1/2 |W|_F^2 of each weight. Unlike AdamW's decay it is part of the objective, and no bias or norm is touched.

    Raises BadInput where no linear map matches.

    >>> L2(strength=1.0).value(torch.tensor([[3.0, 4.0]]))
    tensor(12.5000)
    """

    def value(self, weight: Tensor) -> Tensor:
        """Return half the squared Frobenius norm of [out, in]."""
        return weight.square().sum() / 2

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """Return W / (1 + step)."""
        return weight / (1 + step)


@paper("li2018l2sp", key="l2-sp", kind="ground")
@method
class L2SP(WeightPenalty):
    """1/2 |W - W_0|_F^2, where W_0 is the weight that training started from (in the original: the pretrained one).

    The start is kept in memory once: a copy of every weight that is trained. Raises BadInput where no linear map
    matches.

    >>> model, now = nn.Linear(2, 1), Now()
    >>> L2SP(strength=1.0).penalty(model, now).item()
    0.0
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1.0)
    >>> L2SP(strength=1.0).penalty(model, now).item()
    1.0
    """

    def value_of(self, name: str, layer: nn.Module, now: Now) -> Tensor:
        """Return half the squared distance of one weight to its start."""
        weight, memory = matrix(layer, dense_weight(layer)), now.of(self)
        start = memory.setdefault(name, weight.detach().clone(memory_format=torch.contiguous_format))
        return (weight - start.to(weight)).square().sum() / 2


@paper("georgiou2021normloss", key="norm-loss")
@method
class NormLoss(WeightPenalty):
    """sum_i (1 - |w_i|_2)^2 over the rows w_i of W [out, in * kernel]: each neuron is drawn to the unit sphere.

    A soft constraint to the oblique manifold {W : diag(W W^T) = 1}. strength: 0.01 in the paper. Raises BadInput where
    no linear map matches.

    >>> NormLoss().value(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor(16.)
    """

    def value(self, weight: Tensor) -> Tensor:
        """Return the sum of squared distances of row norms to 1."""
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
        return (1 - norms).square().sum()

    def prox(self, weight: Tensor, step: float) -> Tensor:
        """Return each row w at the norm (|w| + 2 step) / (1 + 2 step): along a ray the problem is a parabola."""
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        return weight * ((norms + 2 * step) / (1 + 2 * step) / norms.clamp_min(torch.finfo(weight.dtype).tiny))
