"""Methods that choose or weigh examples, and how they look at the whole training set."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from plait.batch import Batch
from plait.method import Method, Now, method
from plait.sharding import world_size


@method
class Data(Method):
    """A method of the data place: `examples` thins out or reorders an epoch, `batch` weighs or mixes a batch."""


def sweep(now: Now) -> Iterator[Batch]:
    """Yield batches that hold every training example of this process once, in the order of `now.calibration`."""
    seen: set[int] = set()
    for batch in now.calibration(sys.maxsize):
        fresh = [row for row, position in enumerate(batch.index.tolist()) if position not in seen]
        seen.update(batch.index.tolist())
        if fresh:
            yield batch.take(torch.tensor(fresh, device=batch.index.device))
        if len(fresh) < len(batch):
            return


def of_all_processes(scores: Tensor) -> Tensor:
    """Return scores [examples] of which each process knows some; the others are -inf."""
    if world_size() > 1:
        torch.distributed.all_reduce(scores, torch.distributed.ReduceOp.MAX)
    return scores
