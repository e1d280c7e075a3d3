"""Nearest points of sets: the sphere, the ball, the cone of balls, and matrices of which n of every m entries are not
zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sphere(weight: Tensor, radius: Tensor | float) -> Tensor:
    """Return the nearest tensor of Frobenius norm `radius`; 0 stays 0, where no point is nearest.

    >>> sphere(torch.tensor([3.0, 4.0]), 10.0)
    tensor([6., 8.])
    """
    length: Tensor = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    scale: Tensor = radius / length.clamp_min(torch.finfo(torch.float32).tiny)
    return weight * scale.to(weight.dtype)


def ball(weight: Tensor, radius: Tensor | float) -> Tensor:
    """Return the nearest tensor of Frobenius norm at most `radius`; one inside the ball stays bitwise.

    >>> ball(torch.tensor([3.0, 4.0]), 2.5), ball(torch.tensor([3.0, 4.0]), 6.0)
    (tensor([1.5000, 2.0000]), tensor([3., 4.]))
    """
    length = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return weight if length <= radius else sphere(weight, radius)


def cone(weights: Sequence[Tensor], radius: float) -> tuple[list[Tensor], float]:
    """Return the nearest (tensors, radius) with |tensor|_F <= radius for each; of one tensor a second-order cone.

    The radius is the mean of the given one and of the lengths above it; a tensor that is shorter stays bitwise.

    >>> cone([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])], 3.0)
    ([tensor([2.4000, 3.2000]), tensor([1., 0.])], 4.0)
    """
    total, count = radius, 1
    for length in sorted((float(torch.linalg.vector_norm(w.float())) for w in weights), reverse=True):
        if length * count <= total:
            break
        total, count = total + length, count + 1
    found = max(total / count, 0.0)
    return [ball(weight, found) for weight in weights], found


def largest_of_group(weight: Tensor, n: int, m: int) -> Tensor:
    """Return the mask of the n largest magnitudes of every m consecutive entries of the last dimension.

    Of equal magnitudes the first is kept. Up to 8 entries are ranked by their m (m - 1) / 2 pairwise comparisons, which
    read the weight in a few streaming passes; a sort would cost an order of magnitude more.

    >>> largest_of_group(torch.tensor([1.0, -3.0, 2.0, 0.5]), 2, 4)
    tensor([False,  True,  True, False])
    """
    groups = weight.detach().abs().reshape(*weight.shape[:-1], -1, m)
    if m > 8:
        order = groups.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True).flatten(-2)
    entries = [e.contiguous() for e in groups.unbind(-1)]
    beaten = [torch.zeros_like(e, dtype=torch.uint8) for e in entries]
    for i in range(m):
        for j in range(i + 1, m):
            first = entries[i] >= entries[j]
            beaten[j] += first
            beaten[i] += ~first
    return torch.stack([b < n for b in beaten], -1).flatten(-2)
