"""CPU kernel of Adam's moments: one pass over float32 rows.

Import this module only where it is needed: it loads numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

HOW: Any = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True, "cache": True}


@njit(**HOW)
def moments(
    first: int, last: int, gradient: Any, mean: Any, square: Any, into: Any, beta1: float, beta2: float, eps: float
) -> None:
    """Step mean_i and square_i to those of gradient_i, and fill into_i with mean_i / (sqrt(square_i) + eps)."""
    kept1, new1, kept2, new2 = np.float32(beta1), np.float32(1 - beta1), np.float32(beta2), np.float32(1 - beta2)
    least = np.float32(eps)
    for i in range(first, last):
        g, m, v, quotient = gradient[i], mean[i], square[i], into[i]
        for j in range(g.size):
            m[j] = kept1 * m[j] + new1 * g[j]
            v[j] = kept2 * v[j] + new2 * g[j] * g[j]
            quotient[j] = m[j] / (np.sqrt(v[j]) + least)
