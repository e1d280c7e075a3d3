"""Weights that pass through a bounded nonlinear function."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Positive
from plait.method import Method, method
from plait.parametrize.base import Parametrization, Parametrize, refuse_shared, set_weight, stack
from plait.parametrize.low_rank import adapter_dtype


class Companded(Parametrization):
    """v -> a arctan(v / b), with a = exp(log_a) and b = exp(log_b), scalars of the layer."""

    made_by = "WeightCompander"
    of_weight = True

    def __init__(self, a: float, b: float, learn: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.tensor(math.log(a), dtype=dtype), requires_grad=learn)
        self.log_b = nn.Parameter(torch.tensor(math.log(b), dtype=dtype), requires_grad=learn)

    def dense(self, weight: Tensor) -> Tensor:
        """Return a arctan(v / b)."""
        return (self.log_a.exp() * torch.arctan(weight.to(self.log_a.dtype) / self.log_b.exp())).to(weight.dtype)


@paper("cakaj2023compander", key="weight-compander")
@method
class WeightCompander(Parametrize):
    """W = psi(v) = a arctan(v / b): the layer's own weight becomes v, and the weight that it uses lies within a pi / 2.
    The slope of psi is a / b at zero and falls with |v|: small weights are pushed away from zero, large ones held back.

    a and b are scalars of each layer and, with `learn`, trained. They start where the largest |W| is 1 / `bound` of the
    bound a pi / 2 and the slope at zero is `expansion`. v starts at b tan(W / a), so that the function of the layer
    does not change when the method is attached; the weight in the state dict is then v until the model is folded.

    Not checked against the paper's equations: of its text only the abstract could be had, which says that each weight
    goes through a nonlinear function that bounds it and drives it away from zero, with hyperparameters that may be
    learned. The arctangent is from memory of the paper; the start, `bound`, `expansion` and one pair of scalars for
    each layer are choices made here, so figures of the paper are not to be expected of the defaults.

    bound > 1; expansion > 0, above 1 to expand. Raises BadInput for a bound of at most 1, for layers that have
    adapters, and for weights that layers share.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> WeightCompander().parametrize(model)
    >>> sorted(model.state_dict())
    ['0.bias', '0.plait.weightcompander.log_a', '0.plait.weightcompander.log_b', '0.weight']
    """

    bound: Positive = 2.0
    expansion: Positive = 2.0
    learn: bool = True

    @torch.no_grad()
    def build(self, layer: nn.Module, weight: Tensor) -> Companded:
        """Return the function of one weight, and turn the weight into v."""
        largest = float(weight.abs().max()) or 1.0
        a = 2 * self.bound * largest / math.pi
        b = a / self.expansion
        set_weight(layer, b * torch.tan(weight.to(adapter_dtype(weight)) / a))
        return Companded(a, b, self.learn, adapter_dtype(weight))

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a bound that the weights exceed, layers with adapters, and weights that several layers share."""
        if self.bound <= 1:
            raise BadInput(f"WeightCompander.bound must be greater than 1, not {self.bound}.")
        refuse_shared(self, model)
        for name, layer in self.targets(model):
            if stack(layer):
                raise BadInput(f"WeightCompander changes the weight of '{name}' itself: put it first in the list.")
