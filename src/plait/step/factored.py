"""An optimizer whose second moment of a matrix is a row and a column: Adafactor, with almost no state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.fields import NonNegative, Positive, ScheduledNonNegative, ScheduledPositive
from plait.math.update_rule import exact, sqrt
from plait.method import method
from plait.step.base import Rule


def mean_square(tensor: Tensor) -> Tensor:
    """Return the root of the mean of the squares; 0 of nothing."""
    found: Tensor = torch.linalg.vector_norm(tensor) / math.sqrt(max(tensor.numel(), 1))
    return found


@paper("shazeer2018adafactor", key="adafactor", kind="ground")
@method
class Adafactor(Rule):
    """w <- w - a U / max(1, RMS(U) / clip), U = G / sqrt(R C / mean(R)), a = max(least, RMS(w)) min(lr, 1 / sqrt(t)).

    Shazeer & Stern, Algorithms 4 and 5. For a weight [..., n, m] R [..., n, 1] and C [..., 1, m] are running means of
    the rows' and columns' means of G^2 + eps; weights of less than two dimensions keep their whole second moment V in
    place of R C / mean(R). The means' rate is b_t = 1 - t^-decay, so the first step needs no correction. No first
    moment, as the authors advise for little memory: a [n, m] matrix has n + m numbers of state in place of Adam's
    2 n m.

    relative: False takes lr itself as a, for a schedule of one's own. Decay is decoupled and multiplied by lr; the
    paper has none. eps is added to G^2, as the paper does; torch's Adafactor bounds R C / mean(R) from below by eps^2
    in its place. lr stands where the paper has 0.01, as in torch. Raises BadInput for an lr, decay, clip or eps that is
    not above 0, for `states` other than "float32", and for complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2, 2))
    >>> rule = Adafactor([w], lr=0.01)
    >>> w.grad = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    >>> rule.step()
    >>> w.detach()
    tensor([[0.9900, 0.9900],
            [0.9900, 0.9900]])
    """

    lr: ScheduledPositive = 1e-2
    decay: Positive = 0.8
    clip: Positive = 1.0
    eps: Positive = 1e-30
    least: NonNegative = 1e-3
    relative: bool = True
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(weight: Any, gradient: Any, exp_avg_sq: Any, *, kept: float, eps: float) -> tuple[Any, ...]:
        """Return (U, V) of a weight of less than two dimensions."""
        exp_avg_sq = kept * exp_avg_sq + (1 - kept) * (gradient * gradient + eps)
        return gradient / sqrt(exp_avg_sq), exp_avg_sq

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return b_t."""
        return {"kept": 1 - step ** -group["decay"]}

    def takes_whole(self, weight: Tensor, group: Mapping[str, Any]) -> bool:
        """Say yes: every weight's own size enters its step."""
        return True

    def keeps(self, weight: Tensor) -> tuple[str, ...]:
        """Return the names of R and C, or of V."""
        return ("row", "column") if weight.dim() > 1 else ("exp_avg_sq",)

    def step_whole(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int
    ) -> None:
        """Step a weight in place."""
        precise, step, rate = exact(weight.dtype), state["step"], float(group["lr"])
        held, gradient = weight.to(precise), gradient.to(precise)
        kept = self.scalars(step, group)["kept"]
        if weight.dim() > 1:
            update = self._factored(gradient, state, kept, group["eps"])
        else:
            before = state.get("exp_avg_sq", torch.zeros_like(gradient))
            update, state["exp_avg_sq"] = self.direction(held, gradient, before, kept=kept, eps=group["eps"])
        length: Any = rate
        if group["relative"]:
            length = mean_square(held).clamp_(min=group["least"]) * min(rate, 1 / math.sqrt(step))
        update.mul_(length / (mean_square(update) / group["clip"]).clamp_(min=1.0))
        if group["weight_decay"] and (weight.dim() > 1 or group["decay_vectors"]):
            held.mul_(1 - rate * group["weight_decay"])
        held.sub_(update)
        if held is not weight:
            weight.copy_(held)

    def _factored(self, gradient: Tensor, state: dict[str, Any], kept: float, eps: float) -> Tensor:
        """Return G / sqrt(R C / mean(R)) after R and C have taken in G^2 + eps."""
        numbers = torch.finfo(gradient.dtype)
        for name, along in (("row", -1), ("column", -2)):
            length = torch.linalg.vector_norm(gradient, dim=along, keepdim=True)
            # Infinity over infinity, and 0 times infinity, would be left of what leaves the range of the numbers.
            most = numbers.max / max(length.numel(), 1)
            mean = length.square_().div_(max(gradient.shape[along], 1)).add_(eps).clamp_(max=most)
            state[name] = kept * state[name] + (1 - kept) * mean if name in state else mean
        row, column = state["row"], state["column"]
        share = (row / row.mean(-2, keepdim=True)).clamp_(min=numbers.tiny)
        scaled: Tensor = gradient * share.rsqrt_()
        return scaled.mul_(column.rsqrt())
