"""Steps of a fixed length, whatever the gradient's: its sign for each element, or its direction for all together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plait.catalogue import paper
from plait.fields import ScheduledNonNegative, ScheduledPositive, ScheduledProbability
from plait.math.update_rule import sign
from plait.method import method
from plait.step import states
from plait.step.base import Rule
from plait.step.together import Norm, Together


@paper("bernstein2018signsgd", key="signsgd", kind="ground")
@method
class SignSGD(Rule):
    """m <- momentum * m + (1 - momentum) g; w <- w - lr (sign(m) + weight_decay * w).

    Bernstein et al.; Signum with momentum, signSGD at momentum 0. It descends fastest in the norm of the largest
    element. The sign of 0 is 0. Decay is decoupled. momentum in [0, 1). Raises BadInput for another momentum, an lr
    that is not above 0, a weight_decay below 0, complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> rule = SignSGD([w], lr=0.1)
    >>> w.grad = torch.tensor([3.0, -0.01, 0.0])
    >>> rule.step()
    >>> w.detach()
    tensor([0.9000, 1.1000, 1.0000])
    """

    lr: ScheduledPositive = 1e-4
    momentum: ScheduledProbability = 0.9
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(weight: Any, gradient: Any, exp_avg: Any, *, momentum: float, weight_decay: float) -> tuple[Any, ...]:
        """Return (direction, m)."""
        exp_avg = momentum * exp_avg + (1 - momentum) * gradient
        return sign(exp_avg) + weight_decay * weight, exp_avg


@paper("cutkosky2020momentum", key="normalized-sgd", kind="ground")
@method
class NormalizedSGD(Together):
    """m <- momentum * m + (1 - momentum) g; w <- w - lr (m / ||m|| + weight_decay * w), ||m|| over all weights.

    Cutkosky & Mehta: every step has the length lr. A step whose m is 0 moves nothing. Decay is decoupled. momentum in
    [0, 1). Raises BadInput for another momentum, an lr that is not above 0, a weight_decay below 0, complex weights and
    sparse gradients.

    >>> import torch
    >>> v, w = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    >>> rule = NormalizedSGD([v, w], lr=0.1)
    >>> v.grad, w.grad = torch.tensor([30.0]), torch.tensor([40.0])
    >>> rule.step()
    >>> v.detach(), w.detach()
    (tensor([-0.0600]), tensor([-0.0800]))
    """

    lr: ScheduledPositive = 1e-2
    momentum: ScheduledProbability = 0.9
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(
        weight: Any, gradient: Any, exp_avg: Any, *, momentum: float, inverse: float, weight_decay: float
    ) -> tuple[Any, ...]:
        """Return (direction, m)."""
        exp_avg = momentum * exp_avg + (1 - momentum) * gradient
        return inverse * exp_avg + weight_decay * weight, exp_avg

    @classmethod
    def scalars(cls, step: int, group: Any) -> dict[str, float]:
        """Return 1 / ||m||, or 0."""
        return {"inverse": 1 / group["length"] if group["length"] else 0.0}

    def square(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], norm: Norm) -> Tensor:
        """Return ||m||^2 of a weight, as m will be."""
        mean = (1 - group["momentum"]) * gradient
        if "exp_avg" in state:
            kind = states.DTYPES.get(state["exp_avg"].dtype, "float32")
            mean += group["momentum"] * states.read(state, ("exp_avg",), kind)["exp_avg"]
        return norm(mean).square()
