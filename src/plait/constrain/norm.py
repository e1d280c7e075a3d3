"""Weights of fixed norm, and of bounded norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.constrain.base import Constraint
from plait.fields import Fraction, NonNegative, ScheduledPositive
from plait.math.projections import ball, sphere
from plait.method import Ask, Now, method


@paper("gupta2021lawn", key="lawn")
@method
class LAWN(Constraint):
    """After `warmup` of the run each layer's weight stays on the sphere |W|_F = c, its norm at that moment:
    g <- g - W <W, g> / |W|^2 before the optimizer's step, W <- c W / |W| after it.

    Logits cannot grow for the sake of a small loss, so that gradients keep their size and the network goes on moving.
    Any optimizer; biases and gains are free. The original also takes the radial part out of the optimizer's direction;
    the rescaling alone gives the same weight up to the square of the step. A weight that is 0 is left free.

    warmup: part of the run that is trained freely, in [0, 1]. where: the layers of the final homogeneous network, in
    the original: those after the last normalization or embedding that scales by itself. Raises BadInput where no linear
    map matches, and where none that does is trained.

    The paper's full text was not at hand: what is said here of the original is from memory and to be checked.

    >>> LAWN().project(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    warmup: Fraction = 0.1
    radius: NonNegative = 0.0
    """The norm c of every layer; 0 for each layer's own norm at the end of the warmup."""

    def project(self, weight: Tensor) -> Tensor:
        """Return the nearest weight of norm `radius`, of norm 1 where the radius is each layer's own."""
        return sphere(weight, self.radius or 1.0)

    def norms(self, model: nn.Module, now: Now) -> dict[str, Tensor]:
        """Return each layer's fixed norm, as it was when the constraint began."""
        held = now.of(self)
        for name, _, weight in self.targets(model, now):
            if name not in held:
                wide = torch.promote_types(weight.dtype, torch.float32)
                norm: Tensor = torch.linalg.vector_norm(weight.detach(), dtype=wide)
                held[name] = torch.full_like(norm, self.radius) if self.radius and norm > 0 else norm
        return held

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle whose gradients are tangent to the spheres."""

        @torch.no_grad()
        def tangent(model: nn.Module, now: Now) -> Tensor:
            with torch.enable_grad():
                value = ask(model, now)
            if now.progress < self.warmup:
                return value
            plain = model if now.model is None else now.model  # a wrapper gives layers other names
            self.norms(plain, now)
            for _, _, weight in self.targets(plain, now):
                if weight.grad is not None:
                    along = (weight * weight.grad).sum() / weight.square().sum().clamp_min(1e-30)
                    weight.grad.sub_(weight * along)
            return value

        return tangent

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Put each weight back on its sphere, once the warmup is over."""
        if now.progress < self.warmup:
            return
        held = self.norms(model, now)
        for name, _, weight in self.targets(model, now):
            if held[name] > 0:
                weight.copy_(sphere(weight, held[name]))


@paper("srivastava2014dropout", key="norm-ball", kind="ground")
@method
class NormBall(Constraint):
    """W <- W min(1, radius / |W|_F) after each step: each layer's weight stays in the ball |W|_F <= radius.

    In the original the ball is of the weights into one unit; here it is of a layer. Unlike a decay it does nothing to
    weights that are short enough. radius: may be scheduled, or learned with `LVHBA`, also one for each layer. where:
    the layers; biases and gains are free. Raises BadInput where no linear map matches, and where none is trained.

    >>> NormBall(radius=2.5).project(torch.tensor([[3.0, 4.0]]))
    tensor([[1.5000, 2.0000]])
    """

    radius: ScheduledPositive = 3.0

    def project(self, weight: Tensor) -> Tensor:
        """Return the nearest weight of norm at most `radius`, where that is a number."""
        return ball(weight, Now().at(self.radius))

    def bounded(self, model: nn.Module, now: Now) -> Iterator[tuple[Tensor, Tensor | float]]:
        """Yield (weight, radius) of each layer."""
        weights, radius = [weight for _, _, weight in self.targets(model, now)], now.at(self.radius)
        by_layer = isinstance(radius, Tensor) and radius.dim() == 1
        yield from zip(weights, radius if by_layer else [radius] * len(weights), strict=True)  # type: ignore[arg-type]

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Project each weight, in place."""
        for weight, radius in self.bounded(model, now):
            weight.copy_(ball(weight, radius))
