"""Clipping inside the backward pass: a bound on the gradient that reaches each pixel of an image or feature map."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Positive
from plait.gradient.base import Gradient
from plait.layers import hooked, layers
from plait.method import Ask, Method, Now, method

Norm = Literal["euclidean", "largest"]


def clip_pixels(gradient: Tensor, bound: float | Tensor, channels: int = 1, norm: Norm = "euclidean") -> Tensor:
    """v <- v * min(1, bound / |v|) for the vector v of each pixel, which runs over the dimension `channels`.

    >>> clip_pixels(torch.tensor([[[3.0, 0.3], [4.0, 0.4]]]), 1.0)
    tensor([[[0.6000, 0.3000],
             [0.8000, 0.4000]]])
    """
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if norm == "euclidean":
        size = torch.linalg.vector_norm(wide, dim=channels, keepdim=True)
    else:
        size = wide.abs().amax(channels, keepdim=True)
    clipped: Tensor = wide * (bound / size).clamp(max=1)  # bound / 0 is infinite, and so clipped to 1
    return clipped.to(gradient.dtype)


def pixelwise_clipped(image: Tensor, bound: float, channels: int = 1, norm: Norm = "euclidean") -> Tensor:
    """Return the image itself; what comes back to it in the backward pass is clipped at each pixel.

    For loops of one's own: render, clip, encode, differentiate.

    >>> image = torch.ones(1, 3, 2, 2, requires_grad=True)
    >>> (100 * pixelwise_clipped(image, 0.1)).sum().backward()
    >>> torch.linalg.vector_norm(image.grad, dim=1).amax().item() <= 0.1 + 1e-6
    True
    """
    passed = image.view_as(image)
    if passed.requires_grad:
        passed.register_hook(lambda g: clip_pixels(g, bound, channels, norm))
    return passed


@paper("pan2024enhancing", key="pgc")
@method
class PixelwiseGradientClipping(Gradient):
    """v <- v * min(1, bound / |v|), v the gradient of an example's objective with respect to one pixel of an image.

    The image is the output of the layer that `where` names: what a trained model renders before a frozen encoder reads
    it, in score distillation through a latent diffusion model. The encoder's backward pass leaves a few pixels with
    huge gradients; each is held back alone, its direction kept, before it reaches any weight. The gradient of the
    weights is that of no objective. One call.

    v is the gradient of the example's own objective, whatever the batch, the accumulation, the precision and the number
    of processes: the bound, 0.1 in the authors' settings, means the same in each.

    bound: greater than 0. channels: the dimension of the output that runs over a pixel's channels (1: [n, c, h, w]; -1:
    [n, h, w, c]). norm: "euclidean"; "largest", the largest entry, is what the authors' code takes. Raises BadInput
    where `where` names no layer. In a loop of one's own: `pixelwise_clipped`. Written from the authors' code and the
    abstract: the paper's full text could not be read for this.

    >>> PixelwiseGradientClipping(where="renderer", bound=0.1)
    PixelwiseGradientClipping(where='renderer')
    """

    bound: Positive = 0.1
    channels: int = 1
    norm: Norm = "euclidean"

    excludes: ClassVar[tuple[str, ...]] = ("EGN",)  # which needs the true derivatives of each example

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse to clip everywhere, and at no layer."""
        if self.where == ".*" or not list(layers(model, self.where, nn.Module)):
            raise BadInput(
                f"PixelwiseGradientClipping(where={self.where!r}) names no layer: set where to the one whose output is "
                "the image."
            )

    @contextlib.contextmanager
    def clipping(self, model: nn.Module, now: Now) -> Iterator[None]:
        """Clip, in the backward passes that belong to forward passes run meanwhile."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            image = output[0] if isinstance(output, tuple) else output
            if not isinstance(image, Tensor) or not -image.dim() <= self.channels < image.dim():
                raise BadInput(
                    f"PixelwiseGradientClipping(where={self.where!r}) needs a layer whose output is a tensor with a "
                    f"dimension {self.channels}: name another layer, or set channels."
                )
            if not image.requires_grad and torch.is_grad_enabled() and not now.resting:
                raise BadInput(
                    f"PixelwiseGradientClipping(where={self.where!r}) sees no gradient, for nothing before that layer "
                    "is trained: unfreeze what renders the image, or name another layer."
                )
            if image.requires_grad:
                bound = self.bound * (now.share or 1 / len(image))
                image.register_hook(lambda g: clip_pixels(g, bound, self.channels, self.norm))

        with hooked(layer.register_forward_hook(hook) for _, layer in layers(model, self.where, nn.Module)):
            yield

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle whose backward pass is clipped at the layer."""

        def clipped(model: nn.Module, now: Now) -> Tensor:
            with self.clipping(model, now):
                return ask(model, now)

        return clipped
