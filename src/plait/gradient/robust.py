"""Robust averages of per-example gradients: what few examples pull at is held back."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Range
from plait.gradient.base import Gradient
from plait.layers import refuse_batch_norm
from plait.math.per_example import per_example_gradients
from plait.method import Ask, Method, Now, method
from plait.passes import frozen_statistics, rewind
from plait.sharding import gather, is_sharded


def winsorized_mean(gradients: Tensor, percentile: float) -> Tensor:
    """Return the mean over examples [n, ...] of values clipped, entry by entry, to the (c+1)-th largest and smallest.

    The c outermost values of either side become the next one. c = percentile percent of n, rounded up: 0 is the plain
    mean, near 50 the median.

    >>> winsorized_mean(torch.tensor([[0.0], [1.0], [2.0], [100.0]]), 25.0)
    tensor([1.5000])
    """
    cut = math.ceil(len(gradients) * percentile / 100 - 1e-9)
    cut = min(cut, (len(gradients) - 1) // 2)
    columns = gradients.movedim(0, -1).contiguous()
    high, low = (columns.topk(cut + 1, largest=largest).values[..., -1] for largest in (True, False))
    return gradients.clamp(low, high).mean(0)


def everywhere(rows: Tensor) -> Tensor:
    """Return the rows [n, ...] of all processes, in one order on each; processes may have different n."""
    lengths = [int(n) for n in gather(torch.tensor(len(rows), device=rows.device))]
    padded = torch.cat([rows, rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])])
    return torch.cat([part[:n] for part, n in zip(gather(padded), lengths, strict=True)])


@paper("chatterjee2022generalization", key="winsorized-gradient", kind="ground")
@method
class WinsorizedGradient(Gradient):
    """g_j = mean_i clip(g_ij, (c+1)-th smallest of g_.j, (c+1)-th largest of g_.j), c = `percentile` percent of the
    batch, rounded up.

    Entries of the gradient that only a few examples pull at are suppressed, so that what is memorized is learned last:
    the causal test of coherence. 0 is the plain gradient. Penalties keep their gradient whole. Examples are those of
    the whole batch, over all micro-batches and processes; a weight scales its example's gradient. What `where` does not
    name keeps its plain gradient.

    percentile: in [0, 50), well below the share of the batch that any pattern to be learned has. The examples of one of
    k classes are a k-th of the batch: at 100 / k percent and above what they alone pull at, which is most of what they
    teach the last layer, is cut off, and nothing is learned (the published experiments clip 1 to 8 of 100 examples, of
    ten classes). The oracle is asked once, and each example is differentiated once more: n + 1 backward passes a step,
    and memory for n gradients. Meant for small models and adapters, without batch norm. Stands before all other
    gradient methods. Raises BadInput for another percentile, behind another gradient method, for a model with batch
    norm, and for weights that are sharded over processes.

    >>> WinsorizedGradient(percentile=5.0)
    WinsorizedGradient(percentile=5.0)
    """

    percentile: Annotated[float, AfterValidator(Range(0, 50, closed="[)"))] = 4.0

    first: ClassVar[bool] = True

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse what stands before it, and layers that mix examples."""
        super().check(model, methods)
        refuse_batch_norm(self, model)

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle whose gradient of the misfit is a robust mean over examples."""
        if self.percentile == 0:
            return ask

        def robust(model: nn.Module, now: Now) -> Tensor:
            value, parts = ask(model, now), now.parts
            plain = (
                model if now.model is None else now.model
            )  # a wrapper would wait for a backward pass after each call
            trained = [p for _, p in self.parameters(plain)]
            if any(map(is_sharded, trained)):
                raise BadInput(
                    "WinsorizedGradient differentiates each example alone, and weights are sharded over processes: use "
                    "sharding='none'."
                )
            if not trained:  # what `where` names rests in this round
                return value
            back = rewind(now)
            with frozen_statistics(plain):
                every = list(per_example_gradients(plain, now.batch, now, trained))
            back()
            weight = everywhere(now.batch.masses())
            weight = weight * len(weight) / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
            for number, p in enumerate(trained):
                rows = everywhere(torch.stack([g[number] for g in every]))
                rows = rows * weight.to(rows.dtype).view(-1, *[1] * p.dim())
                if p.grad is not None:
                    p.grad = p.grad + (winsorized_mean(rows, self.percentile) - rows.mean(0))
            now.parts = parts
            return value

        return robust
