"""Penalties that draw the rows of a weight towards orthonormality, all of them or in groups."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from plait.catalogue import paper
from plait.fields import Count
from plait.method import method
from plait.penalty.base import WeightPenalty


def deviation(sets: Tensor) -> Tensor:
    """Return sum_s |G_s - I|_F^2 for matrices [s, rows, columns], G = A A^T or A^T A, whichever is smaller.

    The smaller Gram matrix is the one that can be the identity; where rows > columns, A A^T never can.
    """
    if sets.shape[1] > sets.shape[2]:
        sets = sets.mT
    gram = sets @ sets.mT
    # |G - I|^2 = |G|^2 - 2 tr G + n, without forming an identity for each set.
    trace = sets.square().sum()
    return gram.square().sum() - 2 * trace + sets.shape[0] * sets.shape[1]


@paper("kurtz2023gor", key="gor")
@method
class GOR(WeightPenalty):
    """sum_s |A_s A_s^T - I|_F^2 over sets A_s of a layer's filters (|A_s^T A_s - I|_F^2 where A_s is tall).

    The `out` rows of W [out, in * kernel] stand in G groups of out / G consecutive filters, as in group normalization.
    sets="across": set i holds the i-th filter of every group (the authors' "intra"), out / G sets of G filters.
    sets="within": set g holds the filters of group g (the authors' "inter"), G sets of out / G filters.
    Cost: the Gram matrices of the sets, in all 1/G (within) or G/out (across) of those of all filters.

    groups: how many at most. smallest: filters that a group has at least; the largest divisor of `out` that obeys both
    is taken (the authors stop with an error where min(groups, out / smallest) is no divisor). Raises BadInput where no
    linear map matches.

    >>> import torch
    >>> GOR(groups=2, smallest=1, sets="across").value(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    tensor(0.)
    """

    groups: Count = 8
    smallest: Count = 4
    sets: Literal["across", "within"] = "within"

    def groups_of(self, out: int) -> int:
        """Return how many groups `out` filters stand in."""
        most = max(1, min(self.groups, out // self.smallest))
        return next(g for g in range(most, 0, -1) if out % g == 0)

    def value(self, weight: Tensor) -> Tensor:
        """Return the deviation from orthonormality of the sets of rows of [out, in]."""
        groups = self.groups_of(len(weight))
        sets = weight.reshape(groups, len(weight) // groups, -1)
        return deviation(sets.transpose(0, 1) if self.sets == "across" else sets)
