"""CPU kernels of 4-bit codes: numbers from bytes that hold two of them, and the nearest of the 16 levels.

Import this module only where it is needed: it loads numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

HOW: Any = {"error_model": "numpy", "nogil": True, "cache": True}
"""Without fastmath: what the kernels compute is bitwise what torch's own calls do."""


@njit(**HOW)
def numbers(first: int, last: int, into: Any, codes: Any, scales: Any, zeros: Any, pairs: Any) -> None:
    """Fill into[i] with (pairs[byte] - zero) * scale for the bytes [groups, width / 2] of row i; zeros may be empty."""
    for i in range(first, last):
        for group in range(codes.shape[1]):
            row, scale, at = codes[i, group], scales[i, group], group * codes.shape[2] * 2
            zero = np.float32(zeros[i, group]) if zeros.size else np.float32(0)
            for k in range(row.size):
                into[i, at + 2 * k] = (pairs[row[k], 0] - zero) * scale
                into[i, at + 2 * k + 1] = (pairs[row[k], 1] - zero) * scale


@njit(**HOW)
def nearest(first: int, last: int, groups: Any, inverse: Any, between: Any, codes: Any) -> None:
    """Fill codes[i] with how many of `between` lie below groups[i] * inverse[i]."""
    for i in range(first, last):
        for group in range(groups.shape[1]):
            row, scale, into = groups[i, group], inverse[i, group], codes[i, group]
            for j in range(row.size):
                value, count = row[j] * scale, np.uint8(0)
                for edge in between:
                    count += np.uint8(value > edge)
                into[j] = count
