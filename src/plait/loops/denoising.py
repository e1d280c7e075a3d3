"""Denoising as the inner problem of a bilevel loop: total variation and fields of experts, smooth and convex."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.errors import BadInput


def _huber(values: Tensor, smoothing: Tensor | float) -> Tensor:
    """Return sum sqrt(v^2 + nu^2) - nu."""
    root: Tensor = (values.square() + smoothing**2).sqrt() - smoothing
    return root.flatten(-2).sum(-1)


def total_variation(noisy: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return h(x, [a, n]) = sum over images of 1/2 |x - y|^2 + e^a sum_ij sqrt(|D x|_ij^2 + e^2n) - e^n: total
    variation, smoothed.

    noisy: images y [n, height, width]. D: differences to the right and down, of one pixel together. The strength e^a
    and the smoothing e^n are learned through their logarithms, a tensor [2]. h is 1-strongly convex in x, which has the
    shape of y.

    >>> h = total_variation(torch.zeros(1, 4, 4))
    >>> float(h(torch.ones(1, 4, 4), torch.tensor([0.0, -9.0]))) == 8.0
    True
    """
    _require_images(noisy)

    def loss(image: Tensor, hyper: Tensor) -> Tensor:
        strength, smoothing = hyper.exp().unbind()
        right = F.pad(image[..., 1:] - image[..., :-1], (0, 1))
        down = F.pad(image[..., 1:, :] - image[..., :-1, :], (0, 0, 0, 1))
        root = (right.square() + down.square() + smoothing**2).sqrt() - smoothing
        return (image - noisy).square().sum() / 2 + strength * root.sum()

    return loss


def field_of_experts(noisy: Tensor) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """Return h(x, theta) = sum over images of 1/2 |x - y|^2 + sum_k e^a_k sum_ij sqrt((c_k * x)_ij^2 + e^2n_k) - e^n_k.

    A field of experts with smoothed absolute values. noisy: images y [n, height, width]. theta: {"filters": c [experts,
    side, side], "strength": a [experts], "smoothing": n [experts]}. * is a convolution over whole windows. h is
    1-strongly convex in x, which has the shape of y.

    >>> theta = {"filters": torch.ones(2, 3, 3) / 9, "strength": torch.zeros(2), "smoothing": torch.zeros(2)}
    >>> float(field_of_experts(torch.zeros(1, 4, 4))(torch.zeros(1, 4, 4), theta))
    0.0
    """
    _require_images(noisy)

    def loss(image: Tensor, theta: dict[str, Tensor]) -> Tensor:
        answers = F.conv2d(image[:, None], theta["filters"][:, None])
        roots = _huber(answers, theta["smoothing"].exp()[:, None, None])
        return (image - noisy).square().sum() / 2 + (theta["strength"].exp() * roots).sum()

    return loss


def experts(count: int, side: int, seed: int = 0, strength: float = -4.0, smoothing: float = -2.0) -> dict[str, Tensor]:
    """Return where a field of experts begins: `count` random filters with mean 0 and length 1.

    >>> {name: tuple(t.shape) for name, t in experts(3, 5).items()}
    {'filters': (3, 5, 5), 'strength': (3,), 'smoothing': (3,)}
    """
    filters = torch.randn(count, side, side, generator=torch.Generator().manual_seed(seed))
    filters = filters - filters.mean((1, 2), keepdim=True)
    filters = filters / filters.flatten(1).norm(dim=1)[:, None, None]
    return {
        "filters": filters,
        "strength": torch.full((count,), strength),
        "smoothing": torch.full((count,), smoothing),
    }


def _require_images(noisy: Tensor) -> None:
    if noisy.dim() != 3 or not noisy.is_floating_point():
        raise BadInput(f"noisy must be images of real numbers [n, height, width], not of shape {tuple(noisy.shape)}.")
