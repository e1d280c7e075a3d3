"""Claims of adapters of full rank, on `plait.claims.parametrize`'s turned digits, each beside LoRA of equal size."""

from __future__ import annotations

from plait.claims.base import claim
from plait.claims.parametrize import Task, beside, rotated
from plait.parametrize.block import Bone
from plait.parametrize.low_rank import LoRA
from plait.parametrize.random_bases import RandLoRA
from plait.parametrize.sequential import Hydra

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@claim(
    "bone",
    says="Bone with blocks of 4 (512 numbers on two layers) adapts a network to turned digits better than LoRA does",
    baseline="LoRA of rank 2 on the same layers (512 numbers), its learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
)
def blocks_adapt_better_than_low_rank(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits."""
    return beside(
        Task(rotated, 300, 100, seed), lambda: [Bone(rank=4, where="0|2")], lambda: [LoRA(rank=2, where="0|2")], RATES
    )


@claim(
    "randlora",
    says="RandLoRA of rank 16 (640 numbers on two layers) adapts a network to turned digits better than LoRA does",
    baseline="LoRA of rank 3 on the same layers (768 numbers), its learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
)
def random_bases_adapt_better_than_low_rank(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits; alpha is 20 times the rank, as its authors' default."""
    return beside(
        Task(rotated, 300, 100, seed),
        lambda: [RandLoRA(rank=16, alpha=320.0, where="0|2")],
        lambda: [LoRA(rank=3, where="0|2")],
        RATES,
    )


@claim(
    "hydra",
    says="Hydra of rank 2 (1024 numbers on two layers) adapts a network to turned digits better than LoRA does",
    baseline="LoRA of rank 4 on the same layers (1024 numbers), its learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
)
def two_branches_adapt_better_than_one(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits; both with a factor of 4 in front of their branches."""
    return beside(
        Task(rotated, 300, 100, seed),
        lambda: [Hydra(rank=2, scale=4.0, where="0|2")],
        lambda: [LoRA(rank=4, alpha=16.0, where="0|2")],
        RATES,
    )
