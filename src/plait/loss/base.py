"""Losses: the misfit of each example, unreduced. A loss method wraps the misfit: it adds a term or changes targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.batch import IGNORE
from plait.errors import BadInput
from plait.math.logit_statistics import require_classes
from plait.math.logits import Logits, dense, statistics, wide
from plait.method import Method, Misfit, Now, method

FEW = 512
"""Below so many classes torch's own cross entropy is as good as one shared pass."""


def cross_entropy(output: Any, target: Tensor, now: Now) -> Tensor:
    """-log softmax(output)_target: output [..., classes], a tensor or `Logits`; target [...] of classes (IGNORE counts
    nothing), or [..., classes] of probabilities; returns the shape of the target's examples.
    """
    if target.is_floating_point():
        return -(target * F.log_softmax(wide(dense(output)), -1)).sum(-1)
    if isinstance(output, Logits) or output.shape[-1] >= FEW:
        return statistics(output, target).cross_entropy
    try:
        flat = F.cross_entropy(
            wide(output).flatten(0, -2), target.flatten().long(), ignore_index=IGNORE, reduction="none"
        )
    except IndexError:
        require_classes(target, output.shape[-1])
        raise
    return flat.view(target.shape)


def squared_error(output: Any, target: Tensor, now: Now) -> Tensor:
    """(output - target)^2, summed over the outputs of an example: output [n] or [n, 1] or [n, d], target likewise."""
    if output.numel() != target.numel():
        raise BadInput(
            f"outputs of shape {tuple(output.shape)} do not fit real targets of shape {tuple(target.shape)}: give as "
            "many targets as outputs, or whole numbers for classes."
        )
    squares: Tensor = (output.reshape(target.shape).float() - target.float()).square()
    return squares.flatten(1).sum(1) if squares.dim() > 1 else squares


@method
class Loss(Method):
    """A method of the loss place. Called with (logits, target) it is the cross entropy with its change, unreduced."""

    def __call__(self, output: Any, target: Tensor, now: Now | None = None) -> Tensor:
        """Return the misfit of each example in anybody's loop."""
        return self.loss(cross_entropy)(output, target, now or Now())


def require_logits(method: Method, output: Any, target: Tensor, misfit: Misfit | None = None) -> None:
    """Raise BadInput where a loss of classes meets a regression (as its outputs or its misfit tell), or no logits."""
    shape = tuple[int, ...](getattr(output, "shape", ()))
    unfit = not len(shape) or shape[-1] < 2 or misfit is squared_error
    if target.is_floating_point():  # one row of probabilities for each of logits
        unfit = unfit or len(shape) < 2 or target.shape != shape
    if unfit:
        raise BadInput(
            f"{type(method).__name__} needs logits of classes, [n, classes] or [n, tokens, classes]: drop it for this "
            f"task."
        )


@method
class AddedTerm(Loss):
    """A loss that adds a term per example to the misfit that it wraps."""

    def term(self, output: Any, target: Tensor, now: Now) -> Tensor:
        """Return what is added, of the target's shape; 0 where the target is IGNORE is taken care of."""
        raise NotImplementedError

    def loss(self, misfit: Misfit) -> Misfit:
        """Return misfit + term."""

        def summed(output: Any, target: Tensor, now: Now) -> Tensor:
            require_logits(self, output, target, misfit)
            added = self.term(output, target, now)
            if not target.is_floating_point():
                added = torch.where(target == IGNORE, torch.zeros_like(added), added)
            return misfit(output, target, now) + added

        return summed


def own_predictions(method: Method, output: Any, target: Tensor, now: Now) -> tuple[Tensor, Tensor]:
    """Return (softmax(output) [n, classes], positions [n] of the examples) for methods that remember each example."""
    name = type(method).__name__
    if now.batch is None or len(now.batch) != len(target):
        raise BadInput(f"{name} remembers each example: set now.batch to the batch with its index, or use plait.train.")
    logits = dense(output)
    if logits.dim() != 2:
        raise BadInput(f"{name} is defined for one label an example, not for outputs of shape {tuple(logits.shape)}.")
    return F.softmax(wide(logits), -1), now.batch.index.to(logits.device)


def remembered(memory: dict[str, Tensor], name: str, like: Tensor, index: Tensor, fill: float = 0.0) -> Tensor:
    """Return the memory [examples, *like.shape[1:]] of that name, grown with `fill` to hold every position in index."""
    held = memory.get(name)
    held = like.new_empty(0, *like.shape[1:]) if held is None else held.to(like.device)
    short = int(index.max()) + 1 - len(held) if len(index) else 0
    if short > 0:
        grown = max(short, len(held) // 2)
        held = torch.cat([held, like.new_full((grown, *like.shape[1:]), fill)])
    memory[name] = held
    return held
