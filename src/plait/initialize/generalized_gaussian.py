"""Starts whose weights are spread as those of trained models are: many near 0, and heavy tails."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Positive
from plait.finish.generalized_gaussian import RF8, DeepShape
from plait.initialize.fresh import FreshStart
from plait.math.generalized_gaussian import sample
from plait.method import Method, Now, method
from plait.penalty.rate import BackSlash


@paper("wu2025goodmodel", key="gg-init", kind="ground")
@method
class GGInit(FreshStart):
    """w ~ GG(shape, scale) with scale^2 = gain / n * Gamma(1 / shape) / Gamma(3 / shape): variance gain / n; biases 0.

    n: the inputs of a neuron, so that ReLU networks keep their signals' size at gain 2, as at He's start; or with
    fan="out" its layer's outputs, as in the authors' code, where the two differ for weights that are not square.

    For networks that are trained from scratch. shape: greater than 0; 2 is Gaussian, trained models are nearer to 1.
    gain: 2 for ReLU, 1 for sigmoid and none, 2 / (1 + slope^2) for leaky ReLU. where: the linear maps that are drawn,
    of those that are trained. Draws from torch's generator. Raises BadInput beside adapters.

    >>> import torch
    >>> _, model = torch.manual_seed(0), nn.Sequential(nn.Linear(400, 300))
    >>> GGInit(shape=1.0).initialize(model, Now())
    >>> round(400 * float(model[0].weight.detach().var()), 1)
    2.0
    """

    shape: Positive = 1.0
    gain: Positive = 2.0
    fan: Literal["in", "out"] = "in"

    def weight(self, shape: tuple[int, int], model: nn.Module, now: Now) -> Tensor:
        """Return a generalized Gaussian matrix."""
        return sample(shape, self.shape, (self.gain / (shape[1] if self.fan == "in" else shape[0])) ** 0.5)


@paper("wu2025goodmodel", key="gg-prior", places=["initialize", "penalty", "finish"])
def GGPrior(
    shape: float = 1.0,
    gain: float = 2.0,
    strength: Any = 1.0,
    reshape: float | None = None,
    exponent: int | None = 3,
    scratch: bool = True,
    where: str = ".*",
) -> list[Method]:
    """w ~ GG(shape) at the start; loss + strength * mean (|w| + 1)^nu with nu fitted as training goes on; after it
    weights reshaped to GG(reshape), and eight-bit floating-point numbers: one prior from the first draw to the codes.

    Returns [GGInit, BackSlash, DeepShape, RF8], without what is switched off: see each for its equation. scratch: False
    for a pretrained model, whose weights are kept. reshape: a shape below that which training ends with, or None for
    no DeepShape. exponent: bits of RF8's exponent, or None for no RF8. strength: a number or a schedule. gain: as for
    GGInit. where: the layers. Raises BadInput for numbers that these refuse, and, unless scratch is False, beside
    adapters.

    >>> GGPrior(reshape=1.2)
    [GGInit(), BackSlash(strength=1.0), DeepShape(shape=1.2), RF8()]
    """
    made: list[Method] = [GGInit(shape=shape, gain=gain, where=where)] if scratch else []
    made.append(BackSlash(strength=strength, where=where))
    made += [] if reshape is None else [DeepShape(shape=reshape, where=where)]
    return made if exponent is None else [*made, RF8(exponent=exponent, where=where)]
