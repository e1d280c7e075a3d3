"""Attention and its gradients from chained low-rank factors, in time linear in the number of tokens.

exp(q . k) is replaced by its Taylor polynomial, which is an inner product of monomials. The attention matrix becomes a
product of two thin matrices, its elementwise products with other thin ones stay thin, and no [tokens, tokens] matrix is
formed. The number of monomials grows as a power of the head's width: small heads and small entries, or nothing is won.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from plait.errors import BadInput


def rank_of(width: int, degree: int) -> int:
    """Return the number of monomials of up to that degree in `width` variables.

    >>> rank_of(4, 2)
    15
    """
    return math.comb(width + degree, degree)


def degree_for(bound: float, tolerance: float) -> int:
    """Return the least even degree at which exp(x) is met to `tolerance` times its least value, for |x| <= bound.

    >>> degree_for(0.5, 1e-3), degree_for(4.0, 1e-3)
    (4, 20)
    """
    degree = 0
    if bound == 0:  # exp(0) = 1 is met by the first term
        return degree
    while 2 * bound + (degree + 1) * math.log(bound) - math.lgamma(degree + 2) > math.log(tolerance):
        degree += 2
    return degree


@cache
def _exponents(width: int, degree: int) -> tuple[Tensor, Tensor]:
    """Return the exponents [k, width] of all monomials, and 1 / sqrt(their factorials) [k]."""
    rows = []
    for total in range(degree + 1):
        for chosen in combinations_with_replacement(range(width), total):
            rows += [[chosen.count(i) for i in range(width)]]
    exponents = torch.tensor(rows)
    factorials = [math.prod(math.factorial(e) for e in row) for row in rows]
    weights = torch.tensor(factorials, dtype=torch.float64).rsqrt()
    return exponents, weights


def monomials(rows: Tensor, degree: int) -> Tensor:
    """Return phi(x) [n, k] for rows x [n, width], with phi(x) . phi(y) = sum_(j <= degree) (x . y)^j / j!.

    phi_a(x) = x^a / sqrt(a!) over all multi-indices a of up to that degree.

    >>> x = torch.tensor([[0.5, 1.0]])
    >>> (monomials(x, 2) @ monomials(x, 2).T).item()  # 1 + 1.25 + 1.25^2 / 2
    3.03125
    """
    exponents, weights = _exponents(rows.shape[1], degree)
    exponents = exponents.to(rows.device)
    powers = torch.stack([rows**e for e in range(degree + 1)])  # [degree + 1, n, width]
    product = torch.ones(len(rows), len(exponents), dtype=rows.dtype, device=rows.device)
    for variable in range(rows.shape[1]):
        product = product * powers[exponents[:, variable], :, variable].T
    return product * weights.to(rows)


def factors(q: Tensor, k: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Return thin (U, V) with U V^T about softmax(q k^T / sqrt(width)): [queries, rank], [keys, rank].

    Rows of U V^T sum to 1. degree: even, so that the polynomial is positive. Raises BadInput for an odd one.
    """
    if degree < 0 or degree % 2:
        raise BadInput(f"the degree must be even, so that weights of attention are positive, not {degree}.")
    size = q.shape[-1] ** -0.25
    u, v = monomials(q * size, degree), monomials(k * size, degree)
    return u / (u @ v.sum(0)).unsqueeze(1), v


def attention(q: Tensor, k: Tensor, values: Tensor, degree: int) -> Tensor:
    """Return about softmax(q k^T / sqrt(width)) values: [queries, width of values].

    >>> q = torch.zeros(2, 3)
    >>> attention(q, q, torch.tensor([[1.0], [3.0]]), 2).flatten().tolist()
    [2.0, 2.0]
    """
    u, v = factors(q, k, degree)
    return u @ (v.T @ values)


def chained_gradients(q: Tensor, k: Tensor, values: Tensor, grad: Tensor, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return about the gradients in q, k and values of sum(grad * softmax(q k^T / sqrt(width)) values).

    With f = U V^T, G = grad and H = values, the gradient in the logits is S = f o (G H^T) - diag(r) f, r = the row sums
    of G o (f H). f o (G H^T) is (U * G)(V * H)^T, * the rowwise Kronecker product: thin again. dq = S k / sqrt(width)
    and dk = S^T q / sqrt(width) are chains of thin products, taken from the right, and dv = V (U^T G). Cost: tokens *
    rank * width * width of values.
    """
    u, v = factors(q, k, degree)
    size = q.shape[-1] ** -0.5
    row = (grad * (u @ (v.T @ values))).sum(1, keepdim=True)
    first = torch.einsum("nr,nh,nd->rhd", v, values, k)
    dq = torch.einsum("nr,nh,rhd->nd", u, grad, first) - row * (u @ (v.T @ k))
    back = torch.einsum("nr,nh,nd->rhd", u, grad, q)
    dk = torch.einsum("nr,nh,rhd->nd", v, values, back) - v @ (u.T @ (row * q))
    return dq * size, dk * size, v @ (u.T @ grad)


def lora_gradients(inputs: Tensor, a: Tensor, b: Tensor, scale: float, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients in A [rank, in] and B [out, rank] of an adapter scale * B A, given that in its output.

    grad_output: [tokens, out], such as dq of `chained_gradients`; inputs: [tokens, in]. No [out, in] matrix is formed.
    """
    return scale * ((grad_output @ b).T @ inputs), scale * (grad_output.T @ (inputs @ a.T))
