"""Weights that are low-rank and sparse from the first step on, for training from scratch: SLTrain."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Positive
from plait.layers import matrix_shape, own_bias
from plait.method import Method, method
from plait.parametrize.base import Parametrization, Parametrize, new_or_at_the_ends, refuse_shared, stack
from plait.parametrize.low_rank import adapter_dtype, check_rank
from plait.parametrize.sparse import low_rank_and_sparse, random_places, recomputed_output


class LowRankSparse(Parametrization):
    """W -> scale * B A + S,  A: [rank, in], B: [out, rank], S: [out, in] with values [n] on a fixed support [n]."""

    made_by = "SLTrain"
    replaces: ClassVar[bool] = True
    support: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, count: int) -> None:
        super().__init__()
        self.scale, kind = scale, adapter_dtype(weight)
        out, into = weight.shape
        bound = into**-0.5
        self.A = nn.Parameter(torch.empty(rank, into, dtype=kind).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(out, rank, dtype=kind))
        self.values = nn.Parameter(torch.empty(count, dtype=kind).uniform_(-bound, bound))
        self.register_buffer("support", random_places(weight, count))

    def dense(self, weight: Tensor) -> Tensor:
        """Return scale * B A + S, in the precision of W, of which it has nothing else."""
        return low_rank_and_sparse(self.A, self.B, self.values, self.support, self.scale).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return (scale * B A + S) x + bias, forming the weight anew for the backward pass, for linear layers."""
        bias = own_bias(layer)
        return recomputed_output(
            layer, inputs, self.values, self.support, A=self.A, B=self.B, scale=self.scale, bias=bias
        )


@method
class FromScratch(Parametrize):
    """A parametrization that replaces a weight, and is trained from scratch with the rest of the model.

    rank: of its low-rank part, at most min(out, in).
    """

    rank: Count = 128

    def left_out(self, model: nn.Module) -> set[str]:
        """Return fresh layers, and a transformers model's embeddings and output layer: they are trained as they are."""
        return new_or_at_the_ends(model)

    def prepare(self, model: nn.Module) -> None:
        """Freeze the weights that are not used any more."""
        for _, layer in self.targets(model):
            layer.weight.requires_grad_(False)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse ranks that do not fit, layers with adapters, and weights that several layers share."""
        check_rank(self, self.rank, model)
        refuse_shared(self, model)
        for name, layer in self.targets(model):
            if stack(layer):
                raise BadInput(f"{type(self).__name__} replaces the weight of '{name}': put it first in the list.")


@paper("han2024sltrain", key="sltrain")
@method
class SLTrain(FromScratch):
    """W' = (alpha / rank) B A + S, S zero but for a share `density` of its entries, whose places are drawn once, all
    equally likely, and stay; B, A and the values of S are trained from scratch, with the rest of the model.

    A [rank, in] ~ U(-1 / sqrt(in), 1 / sqrt(in)), B [out, rank] = 0, values [n] as A: W' starts as S alone, whatever
    the layer's weight was, which is frozen and unused. Neither gradient nor optimizer state of a matrix's size is held,
    and linear layers form W' anew in the backward pass. The unused weight stays in memory until the model is folded
    (the authors' code has none): of the paper's savings, those of gradients and optimizer are had, not that of weights.

    rank: at most min(out, in). alpha: numerator of the scale. density: in (0, 1), a share of each matrix that is at
    least one entry. `where=".*"` leaves out layers that are new, and a transformers model's embeddings and output
    layer. It stands first in the list. Written from the authors' code and a summary of the paper with its equations.
    Raises BadInput for a rank above the smaller side of a target, a density that leaves a matrix no entry, layers that
    have adapters, and weights that layers share.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> SLTrain(rank=2, density=0.25).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad][1:]
    [('0.plait.sltrain.A', (2, 6)), ('0.plait.sltrain.B', (4, 2)), ('0.plait.sltrain.values', (6,))]
    """

    alpha: Positive = 32.0
    density: Positive = 0.03

    def build(self, layer: nn.Module, weight: Tensor) -> LowRankSparse:
        """Return what stands in the place of one weight."""
        return LowRankSparse(weight, self.rank, self.alpha / self.rank, int(self.density * weight.numel()))

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse ranks and densities that do not fit, layers with adapters, and weights that several layers share."""
        if self.density >= 1:
            raise BadInput(f"SLTrain.density must be in (0, 1), not {self.density}.")
        super().check(model, methods)
        for name, layer in self.targets(model):
            out, into = matrix_shape(layer)
            if int(self.density * out * into) == 0:
                raise BadInput(
                    f"SLTrain.density is {self.density}, no entry of the {out} x {into} matrix of '{name}': give more."
                )
