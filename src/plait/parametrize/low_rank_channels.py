"""Weights that are low-rank but for the columns of a few inputs, for training from scratch: LOST."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Positive
from plait.layers import CONVOLUTIONS, matrix_shape, own_bias, own_weight
from plait.math.svd import exact_svd
from plait.method import Method, method
from plait.parametrize.base import Parametrization
from plait.parametrize.low_rank import adapter_dtype, low_rank_branch
from plait.parametrize.low_rank_sparse import FromScratch
from plait.parametrize.refusals import refuse_nonfinite


class LowRankChannels(Parametrization):
    """W -> share * B A + (1 - share) * S,  A: [rank, in], B: [out, rank], S: [out, in] zero in most columns.

    An input of a convolution has as many columns as its kernel has places.
    """

    made_by = "LOST"
    replaces: ClassVar[bool] = True
    channels: Tensor

    def __init__(self, weight: Tensor, rank: int, share: float, count: int, kernel: int) -> None:
        super().__init__()
        self.share, self.kernel = share, kernel
        wide = weight.detach().to(adapter_dtype(weight))
        u, s, vh = exact_svd(wide, rank)
        self.A = nn.Parameter((s.sqrt()[:, None] * vh).contiguous())
        self.B = nn.Parameter((u * s.sqrt()).contiguous())
        left_over = (wide - u * s @ vh).square().sum(0).view(-1, kernel).sum(1)
        self.register_buffer("channels", left_over.topk(count).indices.sort().values)
        self.values = nn.Parameter(wide[:, self.columns()].contiguous())

    def columns(self) -> Tensor:
        """Return the columns that S has."""
        places = torch.arange(self.kernel, device=self.channels.device)
        return (self.channels[:, None] * self.kernel + places).flatten()

    def dense(self, weight: Tensor) -> Tensor:
        """Return share * B A + (1 - share) * S, in the precision of W, of which it has nothing else."""
        product = self.share * (self.B @ self.A)
        values = ((1 - self.share) * self.values).to(product.dtype)  # autocast multiplies in another type
        return product.index_add(1, self.columns(), values).to(weight.dtype)

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return share * B (A x) + (1 - share) * S x + bias, which forms no matrix of the weight's size."""
        if isinstance(layer, nn.Embedding):
            return None
        low = low_rank_branch(layer, inputs, self.A, self.B, self.share)
        if low is None:
            return None
        values = ((1 - self.share) * self.values).to(inputs.dtype)
        bias = own_bias(layer)
        if isinstance(layer, CONVOLUTIONS):
            kept = values.view(len(values), len(self.channels), *layer.kernel_size)
            read = inputs.index_select(-1 - len(layer.kernel_size), self.channels)
            sparse: Tensor = layer._conv_forward(read, kept, bias)
            return low + sparse
        return low + F.linear(inputs[..., self.channels], values, bias)


@paper("li2025lost", key="lost")
@method
class LOST(FromScratch):
    """W' = share * B A + (1 - share) * S, begun from the weight's own start W = U diag(s) V and trained with the rest
    of the model: B = U_r diag(s_r)^(1/2) [out, rank], A = diag(s_r)^(1/2) V_r [rank, in], and S [out, in] has those
    columns of W that are longest in W - B A; its others are zero.

    The inputs that S has are chosen once, the largest singular values go to B A and the rest decides for S. As linear
    maps are computed, no matrix of the weight's size is formed, in either pass; neither is a gradient or a state of an
    optimizer. The unused weight stays in memory until the model is folded. A weight's start may be anything, and a
    pretrained one too.

    rank: at most min(out, in). share: in (0, 1). density: in (0, 1), the share of its inputs (a convolution's channels,
    an embedding's tokens) that S has, at least one. It stands first in the list. Written from the abstract and the
    reviews of the paper, which tell the equation; defaults are ours. The paper's function between A and B is left out:
    with it the layer would be no linear map, and could not be folded. Raises BadInput for a rank above the smaller side
    of a target, a share or density outside (0, 1), a density that leaves a layer no input, layers that have adapters,
    and weights that layers share.

    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> LOST(rank=2, density=0.34).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad][1:]
    [('0.plait.lost.A', (2, 6)), ('0.plait.lost.B', (4, 2)), ('0.plait.lost.values', (4, 2))]
    """

    share: Positive = 0.5
    density: Positive = 0.05

    def build(self, layer: nn.Module, weight: Tensor) -> LowRankChannels:
        """Return what stands in the place of one weight."""
        inputs, kernel = _inputs(layer)
        return LowRankChannels(weight, self.rank, self.share, int(self.density * inputs), kernel)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse ranks, shares and densities that do not fit, layers with adapters, and weights that layers share."""
        for name, value in (("share", self.share), ("density", self.density)):
            if value >= 1:
                raise BadInput(f"LOST.{name} must be in (0, 1), not {value}.")
        super().check(model, methods)
        refuse_nonfinite("LOST", self.targets(model))
        for name, layer in self.targets(model):
            inputs, _ = _inputs(layer)
            if int(self.density * inputs) == 0:
                raise BadInput(f"LOST.density is {self.density}, none of the {inputs} inputs of '{name}': give more.")


def _inputs(layer: nn.Module) -> tuple[int, int]:
    """Return the number of a layer's inputs (channels, tokens), and how many columns of its matrix each of them has."""
    weight = own_weight(layer)
    columns = matrix_shape(layer)[1]
    inputs = weight.shape[1] if isinstance(layer, CONVOLUTIONS) else columns
    return inputs, columns // inputs
