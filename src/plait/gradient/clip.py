"""Clipping: a bound on the gradient's norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Positive
from plait.gradient.base import Gradient, norm
from plait.method import Ask, Now, method


@paper("pascanu2013difficulty", key="clip", kind="ground")
@method
class Clip(Gradient):
    """g <- g * min(1, norm / |g|_2), with |g| over all parameters that `where` names together.

    The direction is kept. It stands after what changes the gradient and before what must see it clipped: the list's
    order decides. norm: greater than 0. Raises BadInput for another norm, and for a `where` that matches nothing.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> def ask(model, now):
    ...     model.weight.grad = torch.tensor([[5.0]])
    ...     return torch.tensor(0.0)
    >>> _ = Clip(norm=1.0).gradient(ask)(model, Now())
    >>> round(float(model.weight.grad), 4)
    1.0
    """

    norm: Positive = 1.0

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle with clipped gradients."""

        def clipped(model: nn.Module, now: Now) -> Tensor:
            value = ask(model, now)
            # torch's own norm overflows where a float32 gradient's squares do, and then makes the gradient 0
            length = norm(gradient for _, gradient in self.gradients(model))
            torch.nn.utils.clip_grads_with_norm_([p for _, p in self.parameters(model)], self.norm, length)
            return value

        return clipped
