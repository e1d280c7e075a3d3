"""Optimizers that divide by all the gradients seen so far: AdaGrad for each element, AdaGrad-Norm for all together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.catalogue import paper
from plait.fields import NonNegative, Positive, ScheduledNonNegative, ScheduledPositive
from plait.math.update_rule import sqrt
from plait.method import method
from plait.step.base import Rule
from plait.step.together import Norm, Together


@paper("duchi2011adaptive", key="adagrad", kind="ground")
@method
class AdaGrad(Rule):
    """s <- s + g^2; w <- w - lr g / (sqrt(initial + s) + eps).

    Duchi et al. Each element's rate falls as its own squared gradients add up. `weight_decay` is the L2 penalty's: g <-
    g + weight_decay * w, as in torch. eps is greater than 0. Raises BadInput for an lr or eps that is not above 0, an
    initial or weight_decay below 0, complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> rule = AdaGrad([w], lr=0.1)
    >>> for gradient in (3.0, 4.0):
    ...     w.grad = torch.tensor([gradient])
    ...     rule.step()
    >>> w.detach()
    tensor([-0.1800])
    """

    lr: ScheduledPositive = 1e-2
    eps: Positive = 1e-10
    initial: NonNegative = 0.0
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(
        weight: Any, gradient: Any, squares: Any, *, eps: float, initial: float, weight_decay: float
    ) -> tuple[Any, ...]:
        """Return (direction, s)."""
        gradient = gradient + weight_decay * weight
        squares = squares + gradient * gradient
        return gradient / (sqrt(squares + initial) + eps), squares


@paper("ward2020adagrad", key="adagrad-norm", kind="ground")
@method
class AdaGradNorm(Together):
    """b^2 <- b^2 + ||g||^2; w <- w - lr (g / b + weight_decay * w), ||g|| over all weights, b_0 = `initial`.

    Ward, Wu & Bottou: one rate for all weights, found from the gradients' lengths. Decay is decoupled, since b is one
    for all. The code of AdAdaGrad's authors keeps a b for each row of a weight; the papers have one. initial: greater
    than 0. Raises BadInput for an lr or initial that is not above 0, a weight_decay below 0, complex weights and sparse
    gradients.

    >>> import torch
    >>> v, w = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    >>> rule = AdaGradNorm([v, w], lr=0.1, initial=1e-6)
    >>> v.grad, w.grad = torch.tensor([30.0]), torch.tensor([40.0])
    >>> rule.step()
    >>> v.detach(), w.detach()
    (tensor([-0.0600]), tensor([-0.0800]))
    """

    lr: ScheduledPositive = 1.0
    initial: Positive = 0.1
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(weight: Any, gradient: Any, *, inverse: float, weight_decay: float) -> tuple[Any, ...]:
        """Return (direction,)."""
        return (inverse * gradient + weight_decay * weight,)

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return 1 / b."""
        return {"inverse": 1 / (group["initial"] ** 2 + group["length"] ** 2) ** 0.5}

    def square(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], norm: Norm) -> Tensor:
        """Return the sum of a weight's squared gradient lengths: b^2 is the sum over weights."""
        # One number, with a dimension, where torch's distributed checkpoints look for the device, and not the weight's.
        shape = (1,) * (gradient.dim() + 1)
        squares: Tensor = state.get("squares", 0.0) + norm(gradient).square().reshape(shape)
        state["squares"] = squares
        return squares.sum()
