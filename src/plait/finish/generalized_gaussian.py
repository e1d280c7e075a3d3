"""Weights after training as numbers of a generalized Gaussian distribution, and as eight-bit floating-point numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Fraction, Positive, Range
from plait.layers import own_weight, require_layers
from plait.math.generalized_gaussian import quantiles
from plait.math.minifloat import decode, encode
from plait.method import Method, Now, method
from plait.parametrize.folding import fold


@method
class Rewrite(Method):
    """A method that rewrites each weight when training is over: adapters are folded, shared weights rewritten once."""

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse targets that match nothing."""
        require_layers(self, model, self.where)

    def rewritten(self, weight: Tensor) -> Tensor:
        """Return what takes the place of a weight, of the same shape."""
        raise NotImplementedError

    def weights(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield the weights of the layers, each once."""
        seen = set[int]()
        for _, layer in require_layers(self, model, self.where):
            weight = own_weight(layer)
            if id(weight) not in seen:
                seen.add(id(weight))
                yield weight

    @torch.no_grad()
    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Return the plain model with its weights rewritten."""
        fold(model)
        for weight in self.weights(model):
            weight.copy_(self.rewritten(weight).to(weight))
        return model


@paper("wu2025goodmodel", key="deepshape", kind="ground", theme="quantize")
@method
class DeepShape(Rewrite):
    """w <- (1 - amount) w + amount sign(w) F^-1((r - 1/2) / n), r the rank of |w| among the n weights of a layer and F
    the distribution of |x| for a generalized Gaussian x of the same deviation and the given shape.

    Histogram specification: the weights keep signs, order and deviation, and take on the profile of the shape. The
    smaller the shape, the more of them come near 0, so that they take fewer bits once quantized, and the more the
    function changes. Only the abstract of the paper could be read, and that its code uses the image processing
    technique over all weights with steps of a quantizer; here it goes layer by layer and without a quantizer, which
    RF8 is, after it.

    shape: greater than 0 (1.5 lies between the Gaussian, 2, and the Laplace distribution, 1). amount: in [0, 1]. Raises
    BadInput for numbers outside these ranges, and where no linear map matches.

    >>> layer = nn.Linear(1, 3, bias=False)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[-1.0], [2.0], [3.0]]))
    >>> (DeepShape(shape=1.0).finish(layer, Now()).weight[0] < 0).item()
    True
    """

    shape: Positive = 1.5
    amount: Fraction = 1.0

    def rewritten(self, weight: Tensor) -> Tensor:
        """Return the weights with the profile of the shape."""
        wide = weight.detach().double().flatten()
        deviation = float(wide.square().mean().sqrt())
        targets = torch.empty_like(wide)
        targets[wide.abs().argsort(stable=True)] = quantiles(len(wide), self.shape, deviation).to(wide.device)
        return torch.lerp(wide, wide.sign() * targets, self.amount).view(weight.shape)


@paper("wu2025goodmodel", key="rf8", kind="ground", theme="quantize")
@method
class RF8(Rewrite):
    """w <- the nearest of 255 floating-point numbers of eight bits: a sign, e bits of exponent and 7 - e of mantissa,
    in units of 2^offset, where the offset of a layer is the least at which its largest weight fits.

    No code is spent on infinities or NaN, and small weights keep their digits as far as e reaches below the largest:
    2^e - 1 binades, and evenly spaced numbers from there to 0. `plait.math.minifloat` gives the codes, one byte a
    weight, and offsets; the model that comes out holds the numbers that they stand for.

    The paper's abstract says what the format is for, and no more could be read: the layout is ours.

    exponent: e, 2 to 6. Since the range is fitted, 3 does for most weights; those that spread over many sizes (small
    shapes) need more. Raises BadInput for another exponent, and where no linear map matches.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[1.0, -0.3]]))
    >>> RF8().finish(layer, Now()).weight.detach()
    tensor([[ 1.0000, -0.2969]])
    """

    exponent: Annotated[int, AfterValidator(Range(2, 6))] = 3

    def rewritten(self, weight: Tensor) -> Tensor:
        """Return the weights rounded to eight bits."""
        return decode(*encode(weight, self.exponent), self.exponent)
