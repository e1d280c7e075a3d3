"""Sparse fine-tuning of the weights that matter least: SaRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, NonNegative, Range, ScheduledNonNegative
from plait.layers import matrix, own_weight
from plait.math.selection import nth_smallest
from plait.math.svd import gram_svd
from plait.method import Method, Now, method
from plait.parametrize.base import Adapter
from plait.parametrize.sparse import SparseDelta, at, trained


class SmallestEntries(SparseDelta):
    """W -> W + S,  S: [out, in], zero but for values [n] where |W| is at most the threshold; those that are not `open`
    any more [n] are as they were when they were closed, `closed` [n].
    """

    made_by = "SaRA"
    of_weight = True
    open: Tensor
    closed: Tensor

    def __init__(self, weight: Tensor, threshold: float) -> None:
        super().__init__(weight, (weight.detach().abs() <= threshold).flatten().nonzero().flatten())
        self.threshold = threshold
        self.register_buffer("open", torch.ones(len(self.values), dtype=torch.bool))
        self.register_buffer("closed", torch.zeros_like(self.values.detach()))

    def delta(self, weight: Tensor) -> Tensor:
        """Return what is added at each of the places [n]: closed entries have no gradient."""
        return torch.where(self.open, self.values, self.closed)

    @torch.no_grad()
    def select_again(self, weight: Tensor) -> None:
        """Close the entries whose magnitude has grown above the threshold."""
        grown = self.open & ((at(weight, self.support) + self.values).abs() > self.threshold)
        self.closed.copy_(torch.where(grown, self.values, self.closed))
        self.open &= ~grown

    def low_rank_penalty(self, weight: Tensor) -> Tensor:
        """Return |M * (W + S)|_*, the sum of the singular values of what is trained, M one where it is `open`.

        Its gradient, M * U V^T for M * (W + S) = U diag(s) V^T, is all that is formed for the backward pass.
        """
        values = torch.where(self.open, at(weight, self.support) + self.values, 0.0)
        with torch.no_grad():
            trained = values.new_zeros(weight.numel()).index_copy(0, self.support.long(), values).view(weight.shape)
            u, _, vh = gram_svd(trained)
            slope = at(u @ vh, self.support)
        return (slope * values).sum()


@paper("hu2025sara", key="sara")
@method
class SaRA(Adapter):
    """W' = W + S, W frozen, S [out, in] trained where |W_ij| <= theta, zero elsewhere: on entries that matter least.
    Below theta lies the part `share` of all weights of the targets, unless `threshold` gives it. The objective gains
    strength * |M * W'|_*, M one where S is trained: a nuclear norm, which keeps the trained part low in rank. Where the
    k-th of `stages` equal parts of the run ends, entries with |W'_ij| > theta, which have come to matter, are closed:
    they stay as they are, and those still below are trained on.

    Of n entries n values, n places and n marks are held; a linear layer keeps no weight and no gradient of a matrix's
    size (the paper's unstructural backpropagation). The nuclear norm is that of one target at a time, in step t of the
    one with number t mod their count; the authors' code draws it, too one at a time. Ties at theta are in. Written from
    that code and the abstract: the paper's text could not be read. The code also trains biases and norms below theta
    (here: `train`), lets weight decay act on W' (here on S), and takes the rate 1e-3 exp(-350 theta) unless given one.

    share: in (0, 1); the paper finds the smallest 0.1 to 0.2 of the weights to matter least. threshold: above 0 in
    place of a share; 0 for none. strength: at least 0. stages: 1 never closes an entry, 2 selects again once half-way.
    Raises BadInput for a threshold below all weights of the targets, and for a share of weights that are all 0.

    >>> model = nn.Sequential(nn.Linear(6, 5))
    >>> SaRA(share=0.2).parametrize(model)
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.plait.sara.values', (6,))]
    """

    share: Annotated[float, AfterValidator(Range(0, 1, "()"))] = 0.2
    threshold: NonNegative = 0.0
    idle: ClassVar[dict[str, float]] = {}
    strength: ScheduledNonNegative = 1e-4
    stages: Count = 2

    def parametrize(self, model: nn.Module) -> None:
        """Attach one sparse matrix to each target, where its weights are smallest."""
        if self.threshold:
            super().parametrize(model)
            return
        weights = [_weight(layer) for _, layer in self.targets(model)]
        count = max(int(self.share * sum(w.numel() for w in weights)), 1)
        threshold = nth_smallest(lambda: iter(weights), count)
        if threshold == 0:
            raise BadInput(
                f"SaRA.share is {self.share}, and as many weights are 0, none of which could grow and stay open: give "
                "more, or a threshold."
            )
        replace(self, threshold=threshold).parametrize(model)

    def build(self, layer: nn.Module, weight: Tensor) -> SmallestEntries:
        """Return the sparse matrix on top of one weight."""
        return SmallestEntries(weight, self.threshold)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a threshold below all weights."""
        weights = [_weight(layer) for _, layer in self.targets(model)]
        if self.threshold and not any(bool((w.abs() <= self.threshold).any()) for w in weights):
            raise BadInput(
                f"SaRA.threshold is {self.threshold}, below all weights of its targets: give more, or a share."
            )

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return strength * the nuclear norm of what is trained of one target."""
        strength, parts = now.at(self.strength), self._parts(model)
        if not strength or not parts:
            return 0.0
        layer, part = parts[now.step % len(parts)]
        return strength * part.low_rank_penalty(matrix(layer, _weight(layer)))

    def constrain(self, model: nn.Module, now: Now) -> None:
        """Close what has grown, where a stage of the run ends."""
        if self.stages == 1:
            return
        now.timed = True  # the stages follow the number of steps
        before, after = (step * self.stages // max(now.steps, 1) for step in (now.step, now.step + 1))
        if before < after < self.stages:
            for layer, part in self._parts(model):
                part.select_again(matrix(layer, _weight(layer)))

    def _parts(self, model: nn.Module) -> list[tuple[nn.Module, SmallestEntries]]:
        return [(layer, part) for _, layer, part in trained(self, model, SmallestEntries) if len(part.values)]


def _weight(layer: nn.Module) -> Tensor:
    weight = own_weight(layer)
    return weight.detach()
