"""Noise that multiplies each example's gradient: a large batch moves the weights as small ones would."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor

from plait.batch import Batch
from plait.catalogue import paper
from plait.data.base import Data
from plait.fields import Range
from plait.method import Misfit, Now, method
from plait.sharding import gather, rank


@paper("hoffer2017train", key="multiplicative-noise", kind="ground", theme="gradient")
@method
class MultiplicativeNoise(Data):
    """g = 1/M sum_n z_n g_n,  z_n ~ N(1, sigma^2), for the gradients g_n of the M examples of a batch.

    The covariance of the step is then that of a batch `ratio` times smaller, at the same learning rate:
    (1 + sigma^2) / M E[g_n g_n^T], with sigma^2 = ratio - 1 (the paper has sigma^2 in proportion to M; there the mean
    gradient is left out, as it is small against the noise). Scaling the learning rate by sqrt(ratio) instead gives the
    same covariance with longer steps.

    The misfit keeps its value, and its gradient is multiplied; terms that later methods add are not. One z for each
    example of a step: a second question at the same step has the same.

    ratio: the batch against the small one, at least 1; 1 is the plain gradient. Raises BadInput for a smaller ratio,
    and in a run for 1, which changes nothing.

    >>> MultiplicativeNoise(ratio=5.0).sigma
    2.0
    """

    idle: ClassVar[dict[str, float]] = {"ratio": 1}
    ratio: Annotated[float, AfterValidator(Range(1, closed="[)"))] = 16.0

    @property
    def sigma(self) -> float:
        """The standard deviation of z."""
        return math.sqrt(self.ratio - 1)

    def batch(self, batch: Batch, now: Now) -> Batch:
        """Draw z for every example of the step, and leave the batch as it is."""
        counts = gather(torch.tensor(len(batch), device=batch.weight.device))
        most = int(torch.stack(counts).max())
        # All processes draw all numbers, so that their generators stay alike, and each takes its own.
        drawn = torch.randn(len(counts), most, generator=now.generator, device=now.generator.device)
        z = 1 + self.sigma * drawn[rank(), : len(batch)].to(batch.weight)
        order = batch.index.argsort()
        now.of(self).update(index=batch.index[order], noise=z[order])
        return batch

    def loss(self, misfit: Misfit) -> Misfit:
        """Multiply the gradient of each example's misfit, in the passes of a step."""

        def noisy(output: Any, target: Tensor, now: Now) -> Tensor:
            value, held = misfit(output, target, now), now.of(self)
            if now.output is None or "noise" not in held:
                return value  # a measure or a validation looks at the plain misfit
            place = torch.searchsorted(held["index"], now.batch.index).clamp_max(len(held["index"]) - 1)
            z = held["noise"][place].to(value.dtype).view(-1, *[1] * (value.dim() - 1))
            return value + (z - 1) * (value - value.detach())

        return noisy
