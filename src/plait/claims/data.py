"""Claims of the methods that choose or weigh examples, on scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.claims.base import claim
from plait.claims.loss import accuracy, digits, fitted, log_loss
from plait.data.base import Data
from plait.data.pruning import DataDiet
from plait.data.reweighting import LossReweighting
from plait.method import Now, method


@method
class RandomPruning(Data):
    """Keep a random part of the examples from an epoch on: the baseline of pruning by a score."""

    keep: float = 0.7
    epoch: int = 1
    seed: int = 0

    def examples(self, order: Tensor, now: Now) -> Tensor:
        """Leave out what was not drawn."""
        if now.epoch < self.epoch:
            return order
        drawn = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed))
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[drawn[: round(self.keep * len(order))]] = True
        return order[kept[order]]


def pruned(seed: int, score: str, keep: float) -> tuple[float, float]:
    """Return test accuracies after pruning by a score and at random, at equal numbers of steps."""
    x, y, test_x, test_y = digits(seed, 1200)
    diet = DataDiet(keep=keep, epoch=5, score=score)  # type: ignore[arg-type]
    drawn = RandomPruning(keep=keep, epoch=5, seed=seed)
    ours, random = (fitted(seed, (x, y), [m], 500) for m in (diet, drawn))
    return accuracy(ours, test_x, test_y), accuracy(random, test_x, test_y)


@claim(
    "el2n-grand",
    says="keeping the hardest 30 % by EL2N after five epochs beats keeping a random 30 %",
    baseline="random pruning at the same epoch, same steps",
    figure="test accuracy",
    better="higher",
)
def el2n_beats_random(seed: int) -> tuple[float, float]:
    """Prune 70 % of 1200 digits."""
    return pruned(seed, "el2n", 0.3)


@claim(
    "el2n-grand",
    says="keeping the hardest 30 % by GraNd after five epochs beats keeping a random 30 %",
    baseline="random pruning at the same epoch, same steps",
    figure="test accuracy",
    better="higher",
)
def grand_beats_random(seed: int) -> tuple[float, float]:
    """Prune 70 % of 1200 digits."""
    return pruned(seed, "grand", 0.3)


@claim(
    "el2n-grand",
    says="pruning 30 % by EL2N does not cost test accuracy",
    baseline="training on everything, same steps",
    figure="test accuracy",
    better="higher",
    margin=-0.01,
)
def thirty_percent_are_superfluous(seed: int) -> tuple[float, float]:
    """Compare within one percentage point."""
    x, y, test_x, test_y = digits(seed, 1200)
    ours, whole = (fitted(seed, (x, y), methods, 500) for methods in ([DataDiet(keep=0.7, epoch=5)], []))
    return accuracy(ours, test_x, test_y), accuracy(whole, test_x, test_y)


@claim(
    "loss-reweighting",
    says="LinUpper, which lowers the weight of what is already fitted, reaches a lower training loss in the same steps",
    baseline="uniform weights",
    figure="training log loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def converges_faster(seed: int) -> tuple[float, float]:
    """Train for sixteen epochs; what the paper's theory is about."""
    x, y, _, _ = digits(seed, 1200)
    ours, uniform = (fitted(seed, (x, y), methods, 300) for methods in ([LossReweighting()], []))
    return log_loss(ours, x, y), log_loss(uniform, x, y)


@claim(
    "loss-reweighting",
    says="LinUpper generalizes better in the same few steps",
    baseline="uniform weights",
    figure="test log loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def generalizes_sooner(seed: int) -> tuple[float, float]:
    """Train for three epochs, far from convergence."""
    x, y, test_x, test_y = digits(seed, 1200)
    ours, uniform = (fitted(seed, (x, y), methods, 57) for methods in ([LossReweighting()], []))
    return log_loss(ours, test_x, test_y), log_loss(uniform, test_x, test_y)
