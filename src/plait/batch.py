"""A batch of examples: what goes in, what should come out, which examples they are, how much each counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""The target of a token (or example) that has no misfit, as in PyTorch's cross entropy."""


def tree_map(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Apply `function` to every tensor in inputs that are a tensor, or a dict, tuple or list of such."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {key: tree_map(function, value) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(tree_map(function, value) for value in inputs)
    return inputs


@dataclass(frozen=True)
class Batch:
    """`inputs`: a tensor [n, ...] or a dict of such, passed to the model by keyword; `target`: [n] or [n, tokens], or
    [n, classes] probabilities; `index`: [n] positions in the data set; `weight`: [n], 1 unless a data method says so.
    """

    inputs: Any
    target: Tensor
    index: Tensor
    weight: Tensor

    @classmethod
    def of(cls, inputs: Any, target: Tensor, index: Tensor | None = None) -> Batch:
        """Return a batch whose examples count alike.

        >>> len(Batch.of(torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        3
        """
        index = torch.arange(len(target)) if index is None else index
        return cls(inputs, target, index, torch.ones(len(target), device=target.device))

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return replace(
            self,
            inputs=tree_map(lambda t: t.to(device), self.inputs),
            target=self.target.to(device),
            index=self.index.to(device),
            weight=self.weight.to(device),
        )

    def take(self, rows: Tensor | slice) -> Batch:
        """Return some of the examples."""
        return Batch(tree_map(lambda t: t[rows], self.inputs), self.target[rows], self.index[rows], self.weight[rows])

    def uncounted(self) -> Batch:
        """Return the batch with no weight on any example."""
        return replace(self, weight=torch.zeros_like(self.weight))

    def split(self, parts: int) -> Iterator[Batch]:
        """Yield the batch in `parts` micro-batches of nearly equal size; a batch too small gives fewer."""
        size = -(-len(self) // max(parts, 1))
        for start in range(0, len(self), max(size, 1)):
            yield self.take(slice(start, start + size))

    def masses(self) -> Tensor:
        """Return what each example counts [n]: its weight times its targets that count."""
        if self.target.is_floating_point() or self.target.dim() == 0:
            return self.weight
        counts = (self.target != IGNORE).to(self.weight.dtype)
        return (counts.flatten(1).sum(1) if counts.dim() > 1 else counts).mul(self.weight)

    def mass(self) -> Tensor:
        """Return what the batch's misfits are divided by: the sum of weights over all targets that count."""
        return self.masses().sum()


def weighted_sum(misfit: Tensor, weight: Tensor) -> Tensor:
    """Return sum_i weight_i misfit_i for misfit [n] or [n, tokens]."""
    per_example = misfit.flatten(1).sum(1) if misfit.dim() > 1 else misfit
    return (per_example * weight.to(per_example.dtype)).sum()


def are_probabilities(target: Tensor) -> bool:
    """Say whether real targets are rows of probabilities: of at least two numbers, not negative, with a sum of 1.

    >>> are_probabilities(torch.tensor([[0.2, 0.8]])), are_probabilities(torch.tensor([[1.0], [1.0]]))
    (True, False)
    """
    if not target.is_floating_point() or target.dim() < 2 or target.shape[-1] < 2 or bool((target < 0).any()):
        return False
    sums = target.float().sum(-1)
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
