"""Optimizers that read how the gradient changed since the last step: Adan, MARS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.catalogue import paper
from plait.fields import NonNegative, Probability, ScheduledNonNegative, ScheduledPositive
from plait.math.update_rule import maximum, sqrt
from plait.method import method
from plait.step.adam import corrections
from plait.step.base import Rule


def kept(beta: float, count: int, corrected: bool) -> float:
    """Return how much of its past a mean keeps as its 1st, 2nd, ... number enters: nothing of an empty one.

    corrected: as in a mean that starts at zero and is divided by 1 - beta^count, as Adam's; else beta.

    >>> [round(kept(0.5, count, corrected=True), 3) for count in (1, 2, 3)]
    [0.0, 0.333, 0.429]
    """
    if count < 2:
        return 0.0
    return beta * (1 - beta ** (count - 1)) / (1 - beta**count) if corrected else beta


@paper("xie2024adan", key="adan", kind="ground")
@method
class Adan(Rule):
    """w <- (w - lr (m + b2 v) / (sqrt(n) + eps)) / (1 + lr weight_decay), with the means m, v and n of three numbers.

    m is the mean of g by b1, v that of the change d = g_t - g_(t-1) by b2, n that of (g + b2 d)^2 by b3; at the first
    step d = 0. Xie et al.: Nesterov's momentum, without a gradient at the point ahead. Betas are written as in the code
    of all packages; the paper's are 1 - b. Its rates are 5 to 10 times AdamW's, as the authors advise. The paper's
    restart is left out, as in their experiments.

    corrected: means start at zero and are corrected as Adam's, as in the authors' code, by which all their results were
    made. False is Algorithm 1 as printed: m and n start at the first gradient and its square, v at the first change;
    the first batch then keeps b1^t of m's weight. eps stands outside the root, as in the code; the paper prints it
    inside. Raises BadInput for an lr that is not above 0, betas outside [0, 1), an eps or weight_decay below 0, complex
    weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> rule = Adan([w], lr=0.1, weight_decay=1.0)
    >>> w.grad = torch.tensor([3.0, -0.01])
    >>> rule.step()
    >>> w.detach()  # (1 - 0.1) / 1.1 and (1 + 0.1) / 1.1
    tensor([0.8182, 1.0000])
    """

    lr: ScheduledPositive = 1e-3
    betas: tuple[Probability, Probability, Probability] = (0.98, 0.92, 0.99)
    eps: NonNegative = 1e-8
    corrected: bool = True
    weight_decay: ScheduledNonNegative = 0.02

    @staticmethod
    def direction(
        weight: Any,
        gradient: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        exp_avg_diff: Any,
        previous: Any,
        *,
        lr: float,
        beta2: float,
        begun: float,
        kept1: float,
        kept2: float,
        kept3: float,
        eps: float,
        weight_decay: float,
    ) -> tuple[Any, ...]:
        """Return (direction, m, n, v, gradient)."""
        change = begun * (gradient - previous)
        ahead = gradient + beta2 * change
        exp_avg = kept1 * exp_avg + (1 - kept1) * gradient
        exp_avg_diff = kept2 * exp_avg_diff + (1 - kept2) * change
        exp_avg_sq = kept3 * exp_avg_sq + (1 - kept3) * ahead * ahead
        step = (exp_avg + beta2 * exp_avg_diff) / (sqrt(exp_avg_sq) + eps)
        # (w - lr u) / (1 + lr d) is w - lr (u + d w) / (1 + lr d).
        shrunk = (1 / (1 + lr * weight_decay)) * (step + weight_decay * weight)
        return shrunk, exp_avg, exp_avg_sq, exp_avg_diff, gradient

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return b2, whether there is a previous gradient, and how much each mean keeps of its past."""
        (beta1, beta2, beta3), corrected = group["betas"], group["corrected"]
        changes = step if corrected else step - 1  # as printed, the first change is the mean of its own
        return {
            "beta2": beta2,
            "begun": float(step > 1),
            "kept1": kept(beta1, step, corrected),
            "kept2": kept(beta2, changes, corrected),
            "kept3": kept(beta3, step, corrected),
        }


@paper("yuan2025mars", key="mars", kind="ground")
@method
class MARS(Rule):
    """c = g + gamma b1 / (1 - b1) (g_t - g_(t-1)); c <- c / max(||c||, 1); then AdamW's step with c in place of g.

    Yuan et al.'s MARS-AdamW, Algorithm 2: the change of the gradient, as in STORM, takes out a part of what is noise in
    the running mean; gamma = 0 is AdamW with clipped gradients, gamma = 1 all of STORM. ||c|| is the norm of each
    weight tensor alone, as in the authors' code; the paper writes all weights as one vector. At the first step the
    change is 0, as in the paper, whose x_0 is x_1; their code takes g_0 = 0.

    This is the paper's MARS-approx, which its authors recommend: g_(t-1) is the gradient of the last batch. The exact
    one needs a second gradient, of this batch at the last weights, and is left out. Their code steps weights of other
    than two dimensions by AdamW unless asked: `where` gives each rule its weights. Raises BadInput for an lr that is
    not above 0, betas outside [0, 1), a gamma, eps or weight_decay below 0, complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> rule = MARS([w], lr=0.1)
    >>> w.grad = torch.tensor([3.0, -0.01])
    >>> rule.step()
    >>> w.detach()
    tensor([0.9000, 1.1000])
    """

    lr: ScheduledPositive = 3e-3
    betas: tuple[Probability, Probability] = (0.95, 0.99)
    gamma: ScheduledNonNegative = 0.025
    eps: NonNegative = 1e-8
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def normed(weight: Any, gradient: Any, exp_avg: Any, exp_avg_sq: Any, previous: Any, *, correction: float) -> Any:
        """Return c before it is clipped."""
        return gradient + correction * (gradient - previous)

    @staticmethod
    def direction(
        weight: Any,
        gradient: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        previous: Any,
        *,
        norm: Any,
        correction: float,
        beta1: float,
        beta2: float,
        correction1: float,
        correction2: float,
        eps: float,
        weight_decay: float,
    ) -> tuple[Any, ...]:
        """Return (direction, m, v, gradient)."""
        clipped = (1 / maximum(norm, 1.0)) * (gradient + correction * (gradient - previous))
        exp_avg = beta1 * exp_avg + (1 - beta1) * clipped
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * clipped * clipped
        step = (1 / correction1) * exp_avg / (sqrt((1 / correction2) * exp_avg_sq) + eps)
        return step + weight_decay * weight, exp_avg, exp_avg_sq, gradient

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return Adam's numbers, and how strongly the gradient's change counts."""
        beta1, _ = group["betas"]
        correction = group["gamma"] * beta1 / (1 - beta1) if step > 1 else 0.0
        return {**corrections(step, group), "correction": correction}
