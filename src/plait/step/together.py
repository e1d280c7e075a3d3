"""Rules that read one number of all gradients together: normalized SGD and AdaGrad-Norm divide by a length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plait.math.update_rule import exact
from plait.method import method
from plait.sharding import is_sharded
from plait.step import states
from plait.step.base import Rule, RuleOptimizer

Norm = Callable[[Tensor], Tensor]
"""The length of a whole weight's tensor, in float64, from the share of it that this process holds."""


@method
class Together(Rule):
    """A rule whose `scalars` may read group["length"], the root of what `square` gives for every weight, added up."""

    def optimizer(self, named_parameters: Any) -> TogetherOptimizer:
        """Return the optimizer over parameters, (name, parameter) pairs, or groups of either."""
        return TogetherOptimizer(self, self.stepped(list(named_parameters)))

    def square(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], norm: Norm) -> Tensor:
        """Return what a weight adds to the square of the length, float64; what it keeps as "squares" counts also in
        steps in which the weight has no gradient.
        """
        raise NotImplementedError


class TogetherOptimizer(RuleOptimizer):
    """Looks at all gradients before it steps any weight; the length stands in every group, where scalars read it."""

    method: Together

    of_a_run = ("length",)

    def advance(self) -> None:
        """Take the step along the gradients that are at hand."""
        total = torch.zeros((), dtype=torch.float64)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradient = (states.share(p)[1] if is_sharded(p) else p.grad).to(exact(p.dtype))
                    gradient = -gradient if group["maximize"] else gradient
                    total += self.method.square(gradient, self.state[p], group, norm_over(p)).cpu()
                elif p.grad is None and "squares" in self.state.get(p, {}):
                    total += self.state[p]["squares"].sum().cpu()
        for group in self.param_groups:
            group["length"] = float(total.sqrt())
        super().advance()


def norm_over(p: Tensor) -> Norm:
    """Return the norm for a weight: squares of float32 may leave its range, so it is float64's."""
    inner = states.whole(p).inner
    return lambda share: inner(share, share).sum().sqrt()
