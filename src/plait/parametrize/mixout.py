"""Random mixing of the trained weights with the weights where training began."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Probability
from plait.layers import CONVOLUTIONS, layers
from plait.method import method
from plait.parametrize.base import Parametrization, Parametrize, dense_weight


class Mixture(Parametrization):
    """W -> ((1 - M) * origin + M * W - p * origin) / (1 - p), M: Bernoulli(1 - p) while training; W otherwise."""

    made_by = "Mixout"
    of_weight = True

    def __init__(self, weight: Tensor, p: float, kernel: int, over: str) -> None:
        super().__init__()
        self.p, self.kernel, self.over = p, kernel, over
        self.origin = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)

    def dense(self, weight: Tensor) -> Tensor:
        """Return W, the mean of `sample`."""
        return weight

    def sample(self, weight: Tensor) -> Tensor:
        """Return the mixture of one pass: origin + M * (W - origin) / (1 - p)."""
        if self.p == 0:
            return weight
        keep = 1 - self.p
        if self.over == "weights":
            mask = torch.empty_like(weight).bernoulli_(keep)
        else:
            units = torch.empty(weight.shape[1] // self.kernel, dtype=weight.dtype, device=weight.device)
            mask = units.bernoulli_(keep).repeat_interleave(self.kernel)
        origin = self.origin.detach().to(weight.dtype)
        return torch.addcmul(origin, mask / keep, weight - origin)


@paper("lee2020mixout", key="mixout")
@method
class Mixout(Parametrize):
    """W' = ((1 - M) * U + M * W - p * U) / (1 - p) = U + M * (W - U) / (1 - p), M ~ Bernoulli(1 - p): in each training
    pass some weights return to U, where they were when the method was attached (pretrained). E[W'] = W, which is used
    outside training. dropout is the case U = 0.

    p in [0, 1); 0 is plain training. over: "neurons" draws M for each input of a layer (its outgoing weights change
    together, as in the paper), "weights" for each weight. The gradient is that of the equation, M / (1 - p): the
    published code leaves the 1 / (1 - p) out of its backward pass. Keeps a copy of each weight.

    `where=".*"` leaves out layers that are new with the task: they have no pretrained weight. Raises BadInput where
    none of its weights is trained.

    >>> model = nn.Sequential(nn.Linear(3, 2, bias=False))
    >>> Mixout(p=0.5).parametrize(model)
    >>> bool((model(torch.eye(3)) == model[0].weight.t()).all())
    True
    """

    idle: ClassVar[dict[str, float]] = {"p": 0}
    p: Probability = 0.7
    over: Literal["neurons", "weights"] = "neurons"

    def left_out(self, model: nn.Module) -> set[str]:
        """Return the layers that are new with the task."""
        from plait.parametrize.freeze import is_fresh

        return {name for name, _ in layers(model) if is_fresh(model, name)}

    def prepare(self, model: nn.Module) -> None:
        """Refuse weights that nothing trains: they are at their origin in every pass."""
        with torch.enable_grad():
            if not any(dense_weight(layer).requires_grad for _, layer in self.targets(model)):
                raise BadInput("Mixout finds no weight that is trained: drop it, or what freezes the model.")

    def build(self, layer: nn.Module, weight: Tensor) -> Mixture:
        """Return the mixture of one weight with what it is now."""
        kernel = weight.shape[1] // layer.weight.shape[1] if isinstance(layer, CONVOLUTIONS) else 1
        return Mixture(weight, self.p, int(kernel), self.over)
