"""Adam's moments of a matrix, and their quotient: by a compiled kernel where it runs, else in torch's own calls."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from plait.math.threads import over_rows

KERNEL_FROM = 2**14
"""Of how many elements a matrix is worth the kernel, and a part of one a thread."""


def step_moments(gradient: Tensor, mean: Tensor, square: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, in place; return m / (sqrt(v) + eps). All are [rows, columns].

    >>> mean, square = torch.zeros(1, 2), torch.zeros(1, 2)
    >>> step_moments(torch.tensor([[2.0, -4.0]]), mean, square, (0.5, 0.75), 0.0)
    tensor([[ 1., -1.]])
    >>> mean, square
    (tensor([[ 1., -2.]]), tensor([[1., 4.]]))
    """
    if (kernels := _kernels_for(gradient, mean, square)) is not None:
        quotient = torch.empty_like(gradient)
        over_rows(kernels.moments, gradient, mean, square, quotient, *betas, eps, least=KERNEL_FROM)
        return quotient
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    return mean / square.sqrt().add_(eps)


@cache
def _kernels() -> ModuleType | None:
    try:
        from plait.math import moment_kernels
    except (ImportError, RuntimeError):  # no numba for this platform, or nowhere to keep what it compiled
        return None
    return moment_kernels


def _kernels_for(*given: Tensor) -> ModuleType | None:
    """Return the compiled kernel where it runs on these tensors: float32, on a CPU, and not small."""
    for tensor in given:
        if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            return None
        if not tensor.is_contiguous() or tensor.numel() < KERNEL_FROM:
            return None
    return _kernels()
