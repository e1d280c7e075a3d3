"""The claim of TriAdaptLoRA, on the turned digits of `plait.claims.parametrize`: ranks given out while training."""

from __future__ import annotations

from plait.claims.base import claim
from plait.claims.parametrize import Task, beside, rotated
from plait.parametrize.low_rank import LoRA
from plait.parametrize.rank_growth import TriAdaptLoRA

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@claim(
    "triadaptlora",
    says="TriAdaptLoRA of mean rank 4 in the end adapts a network to turned digits better than LoRA of rank 4",
    baseline="LoRA of rank 4 on the same three layers, its learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=24,
    first_seed=1000,
)
def growing_ranks_adapt_better_than_equal_ones(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits; ranks grow every five steps from the tenth on."""
    return beside(
        Task(rotated, 300, 100, seed), lambda: [TriAdaptLoRA(rank=4, most=10, period=5)], lambda: [LoRA(rank=4)], RATES
    )
