"""How many examples a step takes: batches that grow when the gradient's noise outweighs the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from plait.batch import Batch
from plait.catalogue import paper
from plait.fields import Count, Positive, Range
from plait.layers import refuse_batch_norm
from plait.method import Ask, Method, Now, method
from plait.sharding import full, world_size


@paper("lau2024adadagrad", key="adadagrad", theme="optim")
@method
class AdaptiveBatchSize(Method):
    """b <- max(b, ceil(Var_1 / (tolerance^2 ||g||^2))), Var_1 the variance of an example's gradient around the mean g.

    The tests of Lau, Liu & Kolar's AdAdaGrad: together with `AdaGrad` or `AdaGradNorm` it is the paper's method, but
    any rule of the step place will do. A batch is large enough for "norm" while Var_1 / b <= tolerance^2 ||g||^2. For
    "inner-product", the augmented test, while Var_1(<g_i, g>) / b <= tolerance^2 ||g||^4 and the variance of what is
    orthogonal to g, sum of ||g_i - <g_i, g> g / ||g||^2||^2 / (b - 1), over b is at most orthogonality^2 ||g||^2. If a
    test fails the coming batches are as large as would have passed it, up to `most`; they never shrink.

    pieces: the batch's gradient is asked for in so many pieces, whose spread gives Var_1 (m times that of means over m
    examples); as many pieces as examples are the paper's own estimate. It costs one pass over the batch, as
    accumulation does, and for "inner-product" the memory of `pieces` gradients. tolerance: eta or theta of the paper.
    Place it before other gradient methods. A grown batch is worked through in more micro-batches, no larger than
    before, and since a run has its number of steps, not of examples, steps then take longer. Raises BadInput for fewer
    than 2 pieces, for pieces of one example in a model with batch normalization, and beside FullBatch.

    Inner products are those of all weights together, as in the equations; the authors' code adds up one per weight.

    >>> AdaptiveBatchSize(tolerance=0.5, pieces=4).calls
    4
    """

    test: Literal["norm", "inner-product"] = "norm"
    tolerance: Positive = 0.9
    orthogonality: Positive = 5.84
    pieces: Annotated[int, AfterValidator(Range(2))] = 8
    most: Count = 1024

    @property
    def calls(self) -> int:
        """How often a step asks the oracle, for a piece of the batch each time."""
        return self.pieces

    def batch_size(self, size: int, now: Now) -> int:
        """Return what the last test asked for."""
        wanted = now.of(self).get("size")
        return size if wanted is None else max(size, int(wanted))

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle that asks piece by piece, and tests."""

        def asking(model: nn.Module, now: Now) -> Tensor:
            whole, wanted = now.batch, [p for p in model.parameters() if p.requires_grad]
            before = [p.grad for p in wanted]
            mass = _of_all(whole.mass()).clamp_min(1e-12)
            count = _least_of_all(min(self.pieces, len(whole)), mass.device)
            if count == len(whole):
                refuse_batch_norm(self, model)
            value, parts, spread = torch.zeros((), device=mass.device), dict[str, float](), Spread()
            for piece in pieces(whole, count):
                for p in wanted:
                    p.grad = None
                share, now.batch = _of_all(piece.mass()) / mass, piece
                value = value + share * ask(model, now)
                parts = {name: parts.get(name, 0.0) + float(share) * part for name, part in now.parts.items()}
                size = int(_of_all(torch.tensor(len(piece), device=mass.device)))
                spread.add([p.grad for p in wanted], share, size, keep=self.test == "inner-product")
            now.batch, now.parts = whole, parts
            for p, held, found in zip(wanted, before, spread.mean, strict=True):
                p.grad = found if held is None else (held if found is None else held + found)
            if count > 1:
                now.of(self)["size"] = torch.tensor(max(self.needed(spread), self.batch_size(1, now)))
            return value

        return asking

    def needed(self, spread: Spread) -> int:
        """Return the least batch size that passes the test: `most` if the gradient is 0, 1 if it is not finite."""
        length = spread.square
        if length == 0:
            return self.most
        if self.test == "norm":
            size = spread.variance() / self.tolerance**2 / length
        else:
            along, across = spread.along_and_across()
            size = max(along / self.tolerance**2 / length**2, across / self.orthogonality**2 / length)
        return 1 if math.isnan(size) else math.ceil(min(size, self.most))


def pieces(batch: Batch, count: int) -> Iterator[Batch]:
    """Yield a batch in `count` pieces whose sizes differ by at most 1."""
    bounds = [round(number * len(batch) / count) for number in range(count + 1)]
    for begin, end in pairwise(bounds):
        yield batch.take(slice(begin, end))


def _least_of_all(count: int, device: torch.device) -> int:
    """Return the least of all processes' numbers: each must ask as often as the others."""
    if world_size() > 1:
        number = torch.tensor(count, device=device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MIN)
        return int(number)
    return count


def _of_all(number: Tensor) -> Tensor:
    """Return the sum of all processes' numbers: a piece is what all of them have of it."""
    if world_size() > 1:
        number = number.clone()
        torch.distributed.all_reduce(number)
    return number


class Spread:
    """The mean of gradients that come piece by piece, and how far they lie from it."""

    def __init__(self) -> None:
        self.mean: list[Tensor | None] = []
        self.squares: list[float] = []
        self.sizes: list[int] = []
        self.held: list[list[Tensor | None]] = []

    def add(self, gradients: list[Tensor | None], share: Tensor, size: int, *, keep: bool) -> None:
        """Take in the gradient of a piece with that share of the whole and so many examples."""
        self.squares.append(_inner(gradients, gradients))
        self.sizes.append(size)
        if keep:
            self.held.append(gradients)
        parts = [None if g is None else g * share.to(g.dtype) for g in gradients]
        added = zip(self.mean or [None] * len(parts), parts, strict=True)
        self.mean = [old if new is None else (new if old is None else old.add_(new)) for old, new in added]

    @property
    def square(self) -> float:
        """||g||^2 of the mean."""
        return _inner(self.mean, self.mean)

    def variance(self) -> float:
        """Var_1: the pieces' sum of m (||g_j||^2 - 2 <g_j, g> + ||g||^2) / (count - 1), where sum m g_j = b g."""
        total = sum(m * s for m, s in zip(self.sizes, self.squares, strict=True)) - sum(self.sizes) * self.square
        return max(total, 0.0) / (len(self.sizes) - 1)

    def along_and_across(self) -> tuple[float, float]:
        """Return Var_1 of <g_i, g>, and the variance of what is orthogonal to g."""
        length, inner = self.square, [_inner(gradients, self.mean) for gradients in self.held]
        along = sum(m * (one - length) ** 2 for m, one in zip(self.sizes, inner, strict=True))
        across = sum(
            m * max(square - one**2 / length, 0.0)
            for m, square, one in zip(self.sizes, self.squares, inner, strict=True)
        )
        return along / (len(self.sizes) - 1), across / (len(self.sizes) - 1)


def _inner(one: list[Any], other: list[Any]) -> float:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return sum(float(full((a.double() * b.double()).sum())) for a, b in pairs)
