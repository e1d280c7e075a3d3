"""CPU kernels of root-mean-square norms and gated activations: one pass over float32 rows, forward and backward.

Import this module only where it is needed: it loads numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from plait.math.logit_kernels import ONE, ZERO, exp_below_zero

HOW: Any = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}, "nogil": True, "cache": True}


@njit(**HOW)
def norm(first: int, last: int, x: Any, weight: Any, eps: float, y: Any, inverse: Any) -> None:
    """Fill inverse[i] = 1 / sqrt(mean(x_i^2) + eps) and y_i = weight * inverse_i * x_i."""
    width = x.shape[1]
    for i in range(first, last):
        row, into, total = x[i], y[i], ZERO
        for j in range(width):
            total += row[j] * row[j]
        scale = ONE / np.sqrt(total / np.float32(width) + np.float32(eps))
        inverse[i] = scale
        for j in range(width):
            into[j] = row[j] * scale * weight[j]


@njit(**HOW)
def norm_backward(first: int, last: int, grad: Any, x: Any, weight: Any, inverse: Any, into: Any) -> None:
    """Fill the gradient in x of sum(grad * y)."""
    width = x.shape[1]
    for i in range(first, last):
        row, above, slope, along = x[i], grad[i], into[i], ZERO
        for j in range(width):
            along += above[j] * weight[j] * row[j]
        scale = inverse[i]
        shrink = along * scale * scale * scale / np.float32(width)
        for j in range(width):
            slope[j] = above[j] * weight[j] * scale - row[j] * shrink


@njit(**HOW)
def _sigmoid(z: Any) -> Any:
    small = exp_below_zero(-abs(z))
    return (ONE if z >= ZERO else small) / (ONE + small)


@njit(**HOW)
def gated(first: int, last: int, gate: Any, up: Any, y: Any) -> None:
    """Fill y = silu(gate) * up."""
    for i in range(first, last):
        z, u, into = gate[i], up[i], y[i]
        for j in range(z.size):
            into[j] = z[j] * _sigmoid(z[j]) * u[j]


@njit(**HOW)
def gated_backward(first: int, last: int, grad: Any, gate: Any, up: Any, into_gate: Any, into_up: Any) -> None:
    """Fill the gradients in gate and up of sum(grad * y)."""
    for i in range(first, last):
        above, z, u, into, other = grad[i], gate[i], up[i], into_gate[i], into_up[i]
        for j in range(z.size):
            half = _sigmoid(z[j])
            other[j] = above[j] * z[j] * half
            into[j] = above[j] * u[j] * half * (ONE + z[j] * (ONE - half))
