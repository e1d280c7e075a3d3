"""What training did to the spectrum of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Fraction
from plait.layers import evaluating, layers, matrix, own_weight, require_layers
from plait.math.svd import gram_svd
from plait.method import Method, Now, method
from plait.parametrize.base import dense_weight, stack, untouched_weight


def novelty(before: Tensor, after: Tensor, top: int) -> Tensor:
    """Return the largest |cosine| of each of the `top` first left singular vectors of `after` with any of `before`.

    before, after: [out, in]; returns [min(top, out, in)], in [0, 1].
    """
    known, _, _ = gram_svd(before)
    new, _, _ = gram_svd(after, min(top, *after.shape))
    return (new.T @ known).abs().amax(1)


def intruder_dimensions(before: Tensor, after: Tensor, top: int = 10, epsilon: float = 0.5) -> int:
    """Return how many of the `top` first left singular vectors of `after` have no |cosine| >= epsilon with `before`.

    >>> before = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> intruder_dimensions(before, before + 9 * torch.ones(3, 3), top=1, epsilon=0.8)
    1
    >>> intruder_dimensions(before, 2 * before, top=3, epsilon=0.8)
    0
    """
    return int((novelty(before, after, top) < epsilon).sum())


@paper("shuttleworth2024illusion", key="intruder-dims", kind="probe")
@method
class IntruderDimensions(Method):
    """The number of j <= top with max_i |<u_j, v_i>| < epsilon, over the left singular vectors u_j of each adapted
    weight and all v_i of the same weight before training.

    A weight under adapters is compared with itself as it was before any start; the weight of a layer without adapters
    that is trained is copied when training starts (that many bytes are kept, and saved with checkpoints). Layers that
    are neither are left out.

    top: how many vectors of each weight. epsilon: in [0, 1]; the higher, the more count as new. Returns "intruders",
    the sum, "per_layer", its mean, and "layers". Raises BadInput if nothing that matches is adapted or trained.

    >>> from plait import LoRA, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 8), (x, -3 * x), methods=[LoRA(rank=2), IntruderDimensions(top=4)], steps=2)
    >>> run.measures["IntruderDimensions(top=4)"][-1]["layers"]
    1
    """

    top: Count = 10
    epsilon: Fraction = 0.5

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a pattern that matches no layer."""
        require_layers(self, model, self.where)

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Copy the weights that are trained themselves."""
        held = now.of(self)
        with evaluating(model):  # a weight that torch computes (spectral_norm) may move its buffers when it is read
            for name, layer in layers(model, self.where):
                if own_weight(layer).requires_grad:
                    held[name] = untouched_weight(layer).detach().clone()

    @torch.no_grad()
    def measure(self, model: nn.Module, now: Now) -> dict[str, float]:
        """Count the intruders in each layer."""
        held, counts = now.of(self), []
        for name, layer in layers(model, self.where):
            if name in held or stack(layer):
                before = held[name] if name in held else untouched_weight(layer)
                weights = matrix(layer, before), matrix(layer, dense_weight(layer))
                counts.append(intruder_dimensions(*weights, self.top, self.epsilon))
        if not counts:
            raise BadInput(
                f"IntruderDimensions(where={self.where!r}) sees no layer that is adapted, or was trained when training "
                f"began: change where, or put it in the list of methods before training."
            )
        return {"intruders": sum(counts), "per_layer": sum(counts) / len(counts), "layers": len(counts)}
