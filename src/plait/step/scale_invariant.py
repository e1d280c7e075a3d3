"""Optimizers that do not lengthen a weight whose length means nothing, being normalized after: SGDP and AdamP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plait.catalogue import paper
from plait.fields import (
    Fraction,
    NonNegative,
    Probability,
    ScheduledNonNegative,
    ScheduledPositive,
    ScheduledProbability,
)
from plait.math.update_rule import exact
from plait.method import method
from plait.sharding import is_sharded
from plait.step.adam import AdamW, corrections
from plait.step.base import Rule, RuleOptimizer
from plait.step.momentum import SGD

TINY = 1e-30
"""Added to lengths that are divided by: a weight or gradient of zeros has no direction."""


@method
class Tangent(Rule):
    """q = p - (w^ . p) w^ if |cos(w, g)| < delta / sqrt(dim w), else p; w <- w - lr (q + ratio * weight_decay * w).

    p: the direction of the rule without this. w^ = w / ||w||. Each row of a weight (what makes one output of a layer or
    convolution) is a vector w if all rows pass the test, else the whole weight is, if it passes. Where a weight passes
    its length has no effect on the loss, so decay is multiplied by `decay_ratio`. Weights of less than two dimensions
    are left as they are, as in the authors' code.

    delta: at least 0; 0 projects nothing. decay_ratio: in [0, 1]. A step holds a copy of the weights that pass.
    """

    weight_decay: ScheduledNonNegative = 0.0
    delta: NonNegative = 0.1
    decay_ratio: Fraction = 0.1

    def optimizer(self, named_parameters: Any) -> TangentOptimizer:
        """Return the optimizer over parameters, (name, parameter) pairs, or groups of either."""
        return TangentOptimizer(self, self.stepped(list(named_parameters)))

    def takes_whole(self, weight: Tensor, group: Mapping[str, Any]) -> bool:
        """Say whether a weight has rows that are spread over processes, or in which a second rounding would be lost."""
        return weight.dim() > 1 and weight.numel() > 0 and (is_sharded(weight) or weight.dtype != exact(weight.dtype))

    def step_whole(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int
    ) -> None:
        """Step a weight in place: the direction without decay, its radial part taken out, then decay."""
        precise, formula = exact(weight.dtype), self.rule()
        for name in formula.states:
            if name not in state:
                state[name] = torch.zeros_like(weight, dtype=precise)
        held, gradient = weight.to(precise), gradient.to(precise)
        numbers = {**group, **type(self).scalars(state["step"], group)}
        given = {name: float(numbers[name]) for name in formula.scalars}
        states = [state[name] for name in formula.states]
        direction, *new = formula.direction(held, gradient, *states, **(given | {"weight_decay": 0.0}))
        state.update(zip(formula.states, new, strict=True))
        decay, rows = given["weight_decay"], tangent_rows(held, gradient, group["delta"])
        if rows:
            decay *= group["decay_ratio"]
            direction = direction - along(held, direction, rows) * held
        weight.copy_(held - float(group["lr"]) * (direction + decay * held))


class TangentOptimizer(RuleOptimizer):
    """Steps all weights as the rule without the projection does, and then puts right those that passed the test.

    What was taken along a weight shows in its move d: w + d - (w^ . d) w^ is the step along the tangent.
    """

    def advance(self) -> None:
        """Take the step along the gradients that are at hand."""
        passed = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not p.numel() or self.method.takes_whole(p, group):
                    continue
                rows = tangent_rows(p, p.grad, group["delta"])
                if rows:
                    passed.append((p, p.clone(memory_format=torch.preserve_format), rows, group))
        super().advance()
        for p, before, rows, group in passed:
            numbers = {**group, **type(self.method).scalars(self.state[p]["step"], group)}
            kept = 1 - float(group["lr"]) * float(numbers["weight_decay"]) * group["decay_ratio"]
            p.sub_(before)
            p.addcmul_(before, kept - along(before, p, rows))


def tangent_rows(weight: Tensor, gradient: Tensor, delta: float) -> int:
    """Return in how many rows a weight passes the test: as many as it has, or 1 as a whole, or 0.

    >>> tangent_rows(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [1.0, -1.0]]), delta=0.1)
    2
    """
    if weight.dim() < 2:
        return 0
    w, g = weight.flatten(1), gradient.flatten(1)
    inner, length, other = (
        torch.linalg.vecdot(w, g),
        torch.linalg.vector_norm(w, dim=1),
        torch.linalg.vector_norm(g, dim=1),
    )
    if bool(_cosine(inner, length, other).max() < delta / math.sqrt(w.shape[1])):
        return len(w)
    whole = _cosine(inner.sum(), torch.linalg.vector_norm(length), torch.linalg.vector_norm(other))
    return int(whole < delta / math.sqrt(w.numel()))


def _cosine(inner: Tensor, length: Tensor, other: Tensor) -> Tensor:
    # Divided one after the other: the product of two lengths may leave the range of the numbers.
    return inner.abs() / (length + TINY) / (other + TINY)


def along(weight: Tensor, direction: Tensor, rows: int) -> Tensor:
    """Return <w, p> / <w, w> of each row, in a shape that multiplies the weight; 0 where that is beyond the numbers.

    >>> along(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 0.0]]), 1)
    tensor([[0.7200]])
    """
    w, p = weight.reshape(rows, -1), direction.reshape(rows, -1)
    length = torch.linalg.vector_norm(w, dim=1) + TINY
    share: Tensor = (torch.linalg.vecdot(w, p) / length / length).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return share.view(-1, *[1] * (weight.dim() - 1))


@paper("heo2021adamp", key="adamp")
@method
class AdamP(Tangent):
    """AdamW without the part of its step along a scale-invariant weight: p = m^ / (sqrt(v^) + eps), see `Tangent`.

    Heo et al., Algorithm 2. Momentum makes weights whose scale means nothing (those before a normalization) longer, and
    a longer weight turns by a smaller angle: steps die away early. AdamP takes the lengthening out. Which weights these
    are is found at every step, from their gradients. Decay is decoupled, as AdamW's.

    betas in [0, 1); eps and weight_decay at least 0. Weights of any shape and real dtype; bad values raise BadInput.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> rule = AdamP([w], lr=0.1)
    >>> w.grad = torch.tensor([[-0.8, 0.6]])
    >>> rule.step()
    >>> w.detach().norm() - 5 < 0.01, w.detach()[0, 0] > 3
    (tensor(True), tensor(True))
    """

    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-8

    direction = staticmethod(AdamW.direction)
    scalars = staticmethod(corrections)


@paper("heo2021adamp", key="sgdp", kind="ground")
@method
class SGDP(Tangent):
    """SGD without the part of its step along a scale-invariant weight: p = m, m <- momentum * m + g, see `Tangent`.

    Heo et al., Algorithm 1; with `nesterov`, p = g + momentum * m. Decay is decoupled and, as in the authors' code,
    divided by 1 - momentum, so that it is as strong as an L2 penalty that enters the mean. Their code without Nesterov
    writes the projected step into its running mean; here the mean stays as the equation has it. Raises BadInput for an
    lr that is not above 0, a momentum outside [0, 1), a delta below 0, a decay_ratio outside [0, 1], `states` other
    than "float32", complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> rule = SGDP([w], lr=0.1)
    >>> w.grad = torch.tensor([[-0.8, 0.6]])
    >>> rule.step()
    >>> w.detach()
    tensor([[3.0800, 3.9400]])
    """

    lr: ScheduledPositive = 1e-2
    momentum: ScheduledProbability = 0.9
    nesterov: bool = False

    @staticmethod
    def direction(
        weight: Any,
        gradient: Any,
        momentum_buffer: Any,
        *,
        momentum: float,
        of_gradient: float,
        of_buffer: float,
        weight_decay: float,
    ) -> tuple[Any, ...]:
        """Return (direction, m)."""
        momentum_buffer = momentum * momentum_buffer + gradient
        step = of_gradient * gradient + of_buffer * momentum_buffer
        return step + weight_decay * weight, momentum_buffer

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return how much of the gradient and of the running mean a step takes, and the decay's strength."""
        decay = group["weight_decay"] / (1 - group["momentum"])
        return {**SGD.scalars(step, group), "weight_decay": decay}
