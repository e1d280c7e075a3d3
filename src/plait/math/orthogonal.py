"""The orthogonal factor U V^T of a matrix U S V^T, near enough, by a few matrix products: Newton-Schulz iterations.

An iteration is X <- (a I + b A + c A^2) X, A = X X^T, on the side of X [m, n] that has fewer rows. It moves each
singular value s to a s + b s^3 + c s^5 and leaves the vectors alone. Every A, and every polynomial in A, is symmetric:
of such a product only the blocks on and above the diagonal are computed. Where n is larger than m, most iterations
need no X at all: polynomials in A commute, so A and the product Q of the polynomials are carried on, [m, m] each, and
X becomes Q X once for several iterations (Zhang, Amsel, Chen and Dao, 2026, who call it Gram Newton-Schulz).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from plait.math.update_rule import exact

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan et al.: steep at 0, so that five iterations bring all that was above 0.01 into about [0.7, 1.2]."""
PHASES = (2, 3)
"""Iterations between two computations of A from X, the first time and after: rounding puts eigenvalues of A below 0,
and each iteration makes these about twelve times larger."""
PANELS, SMALL = 3, 256
"""Into how many panels of rows a symmetric product is cut; matrices of fewer rows than SMALL are not."""


@cache
def has_fast_bfloat16(device: str) -> bool:
    """Say whether bfloat16 products are faster than float32 ones here: a GPU, or a CPU with instructions for them."""
    if device != "cpu":
        return True
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def product(left: Tensor, right: Tensor, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return alpha * left @ right + beta * plus, rounded once, of matrices or batches of them; left @ right if None."""
    if plus is None:
        return torch.matmul(left, right)
    add = torch.addmm if left.dim() == 2 else torch.baddbmm
    made: Tensor = add(plus, left, right, beta=beta, alpha=alpha)
    return made


def symmetric_product(
    left: Tensor, right: Tensor, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return `product` [..., m, m] of left [..., m, k] and right [..., k, m] where it is known to be symmetric.

    Of m >= SMALL rows, panel after panel is computed from its diagonal block on to the right, and mirrored: 2/3 of the
    work.
    """
    rows = left.shape[-2]
    if rows < SMALL:
        return product(left, right, plus, beta, alpha)
    made = left.new_empty(*left.shape[:-1], rows)
    size = -(-rows // PANELS)
    for at in range(0, rows, size):
        end = min(at + size, rows)
        added = None if plus is None else plus[..., at:end, at:]
        panel = product(left[..., at:end, :], right[..., at:], added, beta, alpha)
        made[..., at:end, at:] = panel
        made[..., end:, at:end] = panel[..., end - at :].mT
    return made


def iterate(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Return X [..., m, n] after one iteration."""
    a, b, c = coefficients
    gram = symmetric_product(x, x.mT)
    return product(symmetric_product(gram, gram, gram, b, c), x, x, a)


def iterate_gram(x: Tensor, coefficients: tuple[float, float, float], iterations: int) -> Tensor:
    """Return X after so many iterations on A, and on the product Q of their polynomials, which multiplies X last."""
    a, b, c = coefficients
    gram = symmetric_product(x, x.mT)
    rest = symmetric_product(gram, gram, gram, b, c)
    whole = rest
    if iterations > 1:
        whole = rest.clone()
        whole.diagonal(dim1=-2, dim2=-1).add_(a)
    for _ in range(1, iterations):
        half = symmetric_product(rest, gram, gram, a)
        gram = symmetric_product(rest, half, half, a)
        rest = symmetric_product(gram, gram, gram, b, c)
        whole = symmetric_product(rest, whole, whole, a)
    return product(whole, x) if iterations > 1 else product(rest, x, x, a)


def _length(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=dtype)
    return found


def unit(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return each matrix [..., rows, columns] divided by its Frobenius norm, lying so that its fewer rows come first.

    dtype: of the result; unless given, bfloat16 where its products are faster, else float32, and float64 for float64.
    """
    precise = exact(matrix.dtype)
    if dtype is None:
        fast = precise == torch.float32 and has_fast_bfloat16(matrix.device.type)
        dtype = torch.bfloat16 if fast else precise
    made = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    scale = 1 / _length(matrix, precise)
    # Squares may leave the range of float32. A GPU is not asked whether they do, for it would be waited for.
    if matrix.numel() and not (matrix.is_cpu and bool(((scale > 0) & (scale < 1e15)).all())):
        peak = torch.linalg.vector_norm(matrix, math.inf, dim=(-2, -1), keepdim=True, dtype=precise)
        scale = 1 / peak.clamp_min(torch.finfo(precise).tiny)
        scale /= _length(torch.mul(matrix, scale, out=made), precise).clamp_min(0.5)  # below 1 for zeros alone
    torch.mul(matrix, scale, out=made)
    return made.mT if matrix.shape[-2] > matrix.shape[-1] else made


def orthogonalized(x: Tensor, iterations: int = 5, coefficients: tuple[float, float, float] = QUINTIC) -> Tensor:
    """Return about U V^T of what `unit` returned, in its precision."""
    rows, columns = x.shape[-2:]
    if 4 * columns < 5 * rows:  # the detour over A would cost more than it saves
        for _ in range(iterations):
            x = iterate(x, coefficients)
        return x
    done = 0
    while done < iterations:
        some = min(PHASES[done > 0], iterations - done)
        x, done = iterate_gram(x, coefficients, some), done + some
    return x


def newton_schulz(
    matrix: Tensor,
    iterations: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return about U V^T of each matrix U S V^T, [..., rows, columns], in the precision of the products.

    iterations: at least 1. dtype: in which the products are taken, as in `unit`. A matrix of zeros stays one.

    >>> drawn = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    >>> torch.linalg.svdvals(newton_schulz(drawn, 12, (2.0, -1.5, 0.5), torch.float32)).round(decimals=4)
    tensor([1., 1., 1., 1.])
    """
    made = orthogonalized(unit(matrix, dtype), iterations, coefficients)
    return made.mT if matrix.shape[-2] > matrix.shape[-1] else made


def polar_factor(matrix: Tensor) -> Tensor:
    """Return U V^T of U S V^T, by decomposition, over the singular values that are not rounding of 0.

    >>> polar_factor(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    tensor([[0., 1.],
            [0., 0.]])
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    floor = s[..., :1] * max(matrix.shape[-2:]) * torch.finfo(s.dtype).eps
    made: Tensor = (u * (s > floor).to(s.dtype)[..., None, :]) @ vh
    return made
