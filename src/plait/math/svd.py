"""The largest singular triplets of a matrix: exact, sketched, incremental over rows, or of a sum seen piece by piece.

Every function returns (U [out, k], S [k], Vh [k, in]) in float32 or better, with S falling and signs that are fixed:
the entry of largest magnitude in each row of Vh is positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]

ROWS = 512
"""How many rows of a matrix are widened to float64 at once."""

OVERSAMPLE = 8
"""How many more directions than asked for a sketch carries."""


def signed(u: Tensor, s: Tensor, vh: Tensor) -> Triplets:
    """Return the triplets with the entry of largest magnitude in each right singular vector positive."""
    rows = torch.arange(len(vh), device=vh.device)
    sign = torch.where(vh[rows, vh.abs().argmax(1)] < 0, -1.0, 1.0).to(vh.dtype)
    return u * sign, s, vh * sign[:, None]


def wide(matrix: Tensor) -> Tensor:
    """Return the matrix in float32, or in its own type if that is wider."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def exact_svd(matrix: Tensor, rank: int | None = None) -> Triplets:
    """Return the `rank` largest triplets (all of them unless given) of a full decomposition.

    >>> _, s, _ = exact_svd(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> s.tolist()
    [3.0, 2.0]
    """
    u, s, vh = torch.linalg.svd(wide(matrix), full_matrices=False)
    return signed(u[:, :rank], s[:rank], vh[:rank])


def _add_gram(gram: Tensor, rows: Tensor) -> None:
    gram.addmm_(rows.T, rows)


def gram_svd(matrix: Tensor, rank: int | None = None) -> Triplets:
    """Return the triplets from the eigenvectors of the smaller of M M^T and M^T M, formed in float64.

    Faster than a full decomposition of a long or wide matrix; singular values below about 1e-8 of the largest are
    noise, and their vectors on the longer side are zero.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    long = matrix if tall else matrix.T
    side = long.shape[1]
    gram = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for at in range(0, len(long), ROWS):
        _add_gram(gram, long[at : at + ROWS].double())
    values, vectors = torch.linalg.eigh(gram)
    del gram
    kept = side if rank is None else min(rank, side)
    s, near = values.flip(0).clamp_min(0).sqrt()[:kept], vectors[:, side - kept :].flip(1)
    del vectors
    floor = s[:1] * 1e-8 if len(s) else s
    inverse = torch.where(s > floor, 1 / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
    far = torch.cat([long[at : at + ROWS].double() @ near for at in range(0, len(long), ROWS)]) * inverse
    u, vh = (far, near.T) if tall else (near, far.T)
    kind = wide(matrix[:0, :0]).dtype
    return signed(u.to(kind), s.to(kind), vh.to(kind).contiguous())


def orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis [n, k] of the span of the columns [n, k]."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def sketched_svd(matrix: Tensor, rank: int, iterations: int = 2, seed: int = 0, near: Tensor | None = None) -> Triplets:
    """Return about the `rank` largest triplets by randomized subspace iteration (Halko, Martinsson and Tropp, 2011).

    With M the matrix, lying so that its columns are the fewer: Q = orth((M^T M)^iterations Omega), where Omega has rank
    + 8 Gaussian columns, then the decomposition of the narrow M Q. iterations: at least 1; the error falls with each.
    near: right singular vectors [k, in], k <= rank, of a matrix like M, to start from in place of as many of the
    Gaussian ones; then the order of the rows changes nothing but rounding. A matrix with a side of at most rank + 8 is
    decomposed exactly.

    >>> draw = torch.Generator().manual_seed(0)
    >>> m = torch.randn(40, 3, generator=draw) @ torch.randn(3, 30, generator=draw)
    >>> u, s, vh = sketched_svd(m, 3)
    >>> torch.allclose(u * s @ vh, m, atol=1e-4)
    True
    """
    matrix, width = wide(matrix), rank + OVERSAMPLE
    if width >= min(matrix.shape):
        return gram_svd(matrix, rank)
    tall = matrix.shape[0] >= matrix.shape[1]
    narrow = matrix if tall else matrix.T
    generator = torch.Generator().manual_seed(seed)
    if near is None:
        basis = torch.randn(narrow.shape[1], width, generator=generator).to(matrix)
    else:  # all of them vectors of the inputs, so that the order of the rows does not matter
        others = torch.randn(matrix.shape[1], width - len(near), generator=generator)
        basis = torch.cat([near.T.to(matrix), others.to(matrix)], dim=1)
        basis = basis if tall else matrix @ basis
    for _ in range(iterations):
        basis = orthonormal(narrow.T @ (narrow @ basis))
    u, s, vh = gram_svd(narrow @ basis, rank)
    vh = vh @ basis.T
    return signed(u, s, vh) if tall else signed(vh.T, s, u.T.contiguous())


def near_one(matrix: Tensor) -> Tensor:
    """Return a matrix times the power of two that brings its largest element to about 1: no digit changes, and products
    of what is very large or small stay within the range of the numbers.

    >>> near_one(torch.tensor([3e30, 0.0]))
    tensor([0.5916, 0.0000])
    """
    return torch.ldexp(matrix, -torch.frexp(matrix.abs().max()).exponent)


def leading_rows(matrix: Tensor, rank: int, iterations: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (U [m, rank], U^T M [rank, n]), U about the leading left singular vectors of M [m, n], m <= n.

    The same subspace iteration as `sketched_svd`, with a Rayleigh-Ritz step in the precision of M in place of the
    decomposition: with Q = orth((M M^T)^iterations Omega) and Q^T M M^T Q = V diag(S^2) V^T, U = Q V_rank. U is
    orthonormal to rounding; singular values below about 3e-4 of the largest (in float32) are mixed among themselves.
    A matrix with a side of at most rank + 8 is decomposed exactly.

    >>> u, rows = leading_rows(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 1)
    >>> rows.tolist()
    [[0.0, 3.0, 0.0]]
    """
    matrix, width = wide(matrix), rank + OVERSAMPLE
    if width >= len(matrix):
        u = gram_svd(matrix, rank)[0].contiguous()
        return u, u.T @ matrix
    basis = torch.randn(len(matrix), width, generator=torch.Generator().manual_seed(seed)).to(matrix)
    for _ in range(iterations):
        basis = orthonormal(matrix @ near_one(matrix.T @ basis))
    rows = basis.T @ matrix
    near = near_one(rows)
    rotation = torch.linalg.eigh(near @ near.T)[1].flip(1)[:, :rank]
    rows, u = rotation.T @ rows, basis @ rotation
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)
    return u * sign.T, rows * sign


class RowSVD:
    """The right singular vectors of centred rows that arrive in batches (Ross et al., 2008): memory [rank, in].

    After all rows X [n, in] were added: `values`, `vectors` are about the largest singular values and right singular
    vectors of X - mean(X), up to rounding while nothing had to be cut off; `total` is the sum of all squared values,
    which stays NaN once a row was not finite: then nothing is decomposed any more. Each addition is decomposed by
    subspace iteration, from the vectors that were there before.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 0
        self.values, self.vectors, self.mean, self.total = (torch.zeros(0) for _ in range(4))

    def add(self, rows: Tensor) -> None:
        """Take in rows [n, in]."""
        rows = wide(rows)
        if len(rows) == 0:
            return
        mean = rows.mean(0)
        if self.count == 0:
            self.vectors = rows.new_zeros(0, rows.shape[1])
            self.values, self.total, self.mean = rows.new_zeros(0), rows.new_zeros((), dtype=torch.float64), mean
        centred, count = rows - mean, len(rows)
        weight = (self.count * count / (self.count + count)) ** 0.5
        shift = weight * (self.mean - mean)
        self.total = self.total + centred.double().square().sum() + shift.double().square().sum()
        self.count += count
        if not torch.isfinite(self.total):
            return
        stacked = torch.cat([self.values[:, None] * self.vectors, centred, shift[None]])
        _, values, vectors = sketched_svd(stacked, min(self.rank, *stacked.shape), near=self.vectors)
        real = values > 1e-6 * values[:1]  # the rest is rounding of rows that span less
        self.values, self.vectors = values[real], vectors[real]
        self.mean = self.mean + (mean - self.mean) * (count / self.count)

    def explained(self) -> Tensor:
        """Return the part of the rows' variance that each vector explains: [rank], falling."""
        return self.values.double().square() / self.total.clamp_min(torch.finfo(torch.float64).tiny)


class SumSVD:
    """The largest triplets of a sum of matrices [out, in] that are seen one at a time, over several passes.

    Pass 1 sums Y = G Omega, pass 2 sums Z = Q^T G with Q = orth(Y); Q Z is the sketch of Halko et al., and each further
    pair of passes starts from orth(Z^T) and is one power iteration. Being linear in G, the sketch is the same however
    the sum was split among micro-batches or processes. It holds width * (out + in) numbers.

    whole: sum the matrices as they are, which takes a single pass and out * in numbers; so it is always for a matrix
    with a side of at most `width`.
    """

    def __init__(
        self, shape: tuple[int, int], width: int, seed: int, device: torch.device, whole: bool = False
    ) -> None:
        self.direct = whole or width >= min(shape)
        self.shape, self.seed, self.seen, self.left = shape, seed, 0, True
        self.sum = torch.zeros(shape if self.direct else (shape[0], width), device=device)
        if not self.direct:
            drawn = torch.randn(shape[1], width, generator=torch.Generator().manual_seed(seed))
            self.other = drawn.to(device)

    @staticmethod
    def numbers(shape: tuple[int, int], width: int) -> int:
        """Return how many numbers such a sketch holds."""
        rows, columns = shape
        return rows * columns if width >= min(shape) else width * (rows + columns)

    def add(self, piece: Tensor) -> None:
        """Add one matrix [out, in] to the sum."""
        piece = piece.float()
        self.seen += 1
        if self.direct:
            self.sum += piece
        elif self.left:
            self.sum.addmm_(piece, self.other)
        else:
            self.sum.addmm_(self.other.T, piece)

    def turn(self) -> None:
        """End a pass that another pass follows."""
        if self.direct:
            return
        self.other = orthonormal(self.sum if self.left else self.sum.T)
        self.left = not self.left
        rows, columns = self.shape
        width = self.other.shape[1]
        self.sum = self.other.new_zeros((rows, width) if self.left else (width, columns))

    def svd(self, rank: int, divisor: float = 1.0) -> Triplets:
        """Return the `rank` largest triplets of the sum / divisor, after the last pass."""
        if self.direct:
            u, s, vh = sketched_svd(self.sum, rank, seed=self.seed)
            return u, s / divisor, vh
        u, s, vh = gram_svd(self.sum / divisor, rank)
        return signed(self.other @ u, s, vh)
