"""What a run keeps beside its figures so that it can be compared: a score and a fingerprint of its test examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plait.batch import IGNORE, Batch

if TYPE_CHECKING:
    from torch import nn

    from plait.method import Now
    from plait.tasks.base import Data, Task

BATCH = 32


class Part:
    """The first examples of a set."""

    def __init__(self, data: Data, count: int) -> None:
        self.data, self.count = data, min(count, len(data))

    def __len__(self) -> int:
        return self.count

    def batch(self, positions: Tensor) -> Batch:
        """Return the examples at those positions."""
        return self.data.batch(positions)


def _rows(data: Data) -> Iterator[Tensor]:
    for start in range(0, len(data), BATCH):
        yield torch.arange(start, min(start + BATCH, len(data)))


def digest(data: Data) -> str:
    """Return a fingerprint of a set's examples, in their order."""
    from torch.utils._pytree import tree_leaves

    mark = hashlib.sha256()
    for rows in _rows(data):
        batch = data.batch(rows)
        for tensor in (batch.target, *tree_leaves(batch.inputs)):
            mark.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()[:16]


class Scores:
    """The score of each test example, taken from outputs batch by batch; their mean is the headline figure.

    For accuracy: 1 where the likeliest class is the target; for loss: the mean misfit of the example's targets, if
    every example has as many.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.found: dict[int, float] = {}
        self.masses: set[int] = set()

    def take(self, output: Any, batch: Batch, now: Now) -> None:
        """Score the examples of a batch by their outputs, logits or values."""
        if self.task.quality == "accuracy":
            each = (output.argmax(-1) == batch.target).float()
        elif self.task.quality == "loss":
            each = self.task.loss(output, batch.target, now).float()
            if batch.target.dim() > 1:
                counts = (batch.target != IGNORE).flatten(1).sum(1)
                self.masses.update(counts.tolist())
                each = each.flatten(1).sum(1) / counts.clamp_min(1)
        else:
            return
        self.found.update(zip(batch.index.tolist(), each.flatten().tolist(), strict=True))

    def listed(self) -> list[float] | None:
        """Return the scores in the order of the set; None where the headline is not their mean."""
        if not self.found or len(self.masses) > 1:
            return None
        return [round(self.found[row], 6) for row in sorted(self.found)]


@torch.no_grad()
def scores(task: Task, model: nn.Module) -> list[float] | None:
    """Return a score for each test example whose mean is the headline figure; None where it is no such mean."""
    from plait.method import Now
    from plait.tasks.metrics import judging

    taken, now = Scores(task), Now(call=task.call)
    if task.quality not in ("accuracy", "loss"):
        return None
    with judging(model) as device:
        for rows in _rows(task.test):
            now.batch = batch = task.test.batch(rows).to(device)
            taken.take(task.call(model, batch.inputs), batch, now)
    return taken.listed()
