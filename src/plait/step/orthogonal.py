"""Steps whose size a matrix norm bounds: Muon, which orthogonalizes what it steps along."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.fields import (
    NonNegative,
    Number,
    Probability,
    ScheduledNonNegative,
    ScheduledPositive,
    ScheduledProbability,
    Size,
)
from plait.math.orthogonal import QUINTIC, orthogonalized, polar_factor, unit
from plait.math.update_rule import exact
from plait.method import method
from plait.step.adam import AdamW, corrections
from plait.step.base import Rule
from plait.step.states import opened


@paper("kovalev2025understanding", key="muon")
@method
class Muon(Rule):
    """m <- momentum * m + (1 - momentum) g; w <- (1 - lr * weight_decay) w - lr * s * U V^T, where m = U S V^T.

    Kovalev: U V^T minimizes <m, d> over all matrices d of spectral norm 1, up to sign, so this is a step to the border
    of a trust region. The same step in other norms is `SignSGD` (largest element) and `NormalizedSGD` (Euclidean). The
    decay keeps ||w|| below s / weight_decay, and is what makes the step that of a constrained problem. With
    `nesterov`, (1 - momentum) g + momentum * m is orthogonalized, as Jordan et al. and torch do; the paper has m.

    U V^T is approximated by `iterations` Newton-Schulz iterations with the given coefficients, in bfloat16 where that
    is faster (`plait.math.orthogonal`); the five of the default leave singular values between about 0.7 and 1.2.
    iterations=0 decomposes exactly, and slowly. s is `scale`: "shape", sqrt(max(1, rows / columns)); "rms",
    0.2 sqrt(max(rows, columns)), with which AdamW's rates and decays can be used; or "none", 1. A convolution is the
    matrix [out, in * kernel], in s too: the authors' file takes height and width of the kernel there.

    Vectors, weights that `where` leaves out, and groups with orthogonal=False are stepped by AdamW, at lr * `others`,
    with `betas` and `eps`. Embeddings and output layers train better so: name the rest in `where`. A transformers
    Conv1D lies the other way round: use scale="rms", which does not see it. Raises BadInput for a `where` that matches
    no weight, an lr that is not above 0, a momentum or betas outside [0, 1), complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> rule = Muon([w], lr=0.1, iterations=0)
    >>> w.grad = torch.tensor([[0.0, 3.0], [0.01, 0.0]])
    >>> rule.step()
    >>> w.detach()
    tensor([[ 0.0000, -0.1000],
            [-0.1000,  0.0000]])
    """

    lr: ScheduledPositive = 2e-2
    momentum: ScheduledProbability = 0.95
    nesterov: bool = True
    weight_decay: ScheduledNonNegative = 0.1
    iterations: Size = 5
    coefficients: tuple[Number, Number, Number] = QUINTIC
    scale: Literal["shape", "rms", "none"] = "shape"
    orthogonal: bool = True
    others: NonNegative = 0.05
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-8

    direction = staticmethod(AdamW.direction)

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return AdamW's numbers, and its rate."""
        return {**corrections(step, group), "rate": group["lr"] * group["others"]}

    def stepped(self, given: list[Any]) -> list[Any]:
        """Return all parameters; those that `where` leaves out in groups of their own."""
        inside, outside = self.parted(given)
        return [*inside, *({**group, "orthogonal": False} for group in outside)]

    @classmethod
    def rounds(cls) -> bool:
        """Say that the state may be rounded."""
        return True

    def takes_whole(self, weight: Tensor, group: Mapping[str, Any]) -> bool:
        """Say whether a weight is orthogonalized."""
        return bool(group["orthogonal"]) and weight.dim() > 1 and weight.numel() > 0

    def keeps(self, weight: Tensor) -> tuple[str, ...]:
        """Return the name of m."""
        return ("momentum_buffer",)

    def step_whole(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int
    ) -> None:
        """Step a matrix or a convolution's kernel in place."""
        precise, momentum, rate = exact(weight.dtype), float(group["momentum"]), float(group["lr"])
        held, gradient = weight.to(precise), gradient.to(precise)
        with opened(state, ("momentum_buffer",), group["states"], precise):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            ahead = gradient.lerp(mean, momentum) if group["nesterov"] else mean
        rows, columns = ahead.flatten(1).shape
        if group["iterations"]:
            lying = unit(ahead.flatten(1))
            del ahead  # the iterations need its memory
            step = orthogonalized(lying, group["iterations"], group["coefficients"])
            step = step.mT if rows > columns else step
        else:
            step = polar_factor(ahead.flatten(1))
        scale = {"shape": math.sqrt(max(1, rows / columns)), "rms": 0.2 * math.sqrt(max(rows, columns)), "none": 1.0}
        if group["weight_decay"]:
            held.mul_(1 - rate * group["weight_decay"])
        held.add_(step.reshape(held.shape), alpha=-rate * scale[group["scale"]])
        if held is not weight:
            weight.copy_(held)
