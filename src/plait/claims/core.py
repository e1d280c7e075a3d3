"""Claims of adapters of which only a core is trained, on the turned digits of `plait.claims.parametrize`."""

from __future__ import annotations

from plait.claims.base import claim
from plait.claims.parametrize import Task, beside, misfit, rotated
from plait.initialize.full_step import LoRASB
from plait.parametrize.core import LoRAXS
from plait.parametrize.low_rank import LoRA

RATES = (3e-3, 1e-2, 3e-2, 1e-1)


@claim(
    "lora-xs",
    says="at about as many trained numbers (LoRA-XS of rank 12: 388; LoRA of rank 1: 330), LoRA-XS adapts better",
    baseline="LoRA of rank 1, its learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
)
def adapts_better_at_equal_size(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits; the output layer has 10 rows, so its core is of rank 10."""
    return beside(
        Task(rotated, 300, 100, seed),
        lambda: [LoRAXS(rank=12, where="0|2"), LoRAXS(rank=10, where="4")],
        lambda: [LoRA(rank=1)],
        RATES,
    )


@claim(
    "lora-sb",
    says="with its start, a core of rank 8 fits turned digits better after 60 steps than with LoRA-XS's own start",
    baseline="LoRA-XS of the same rank, its learning rate chosen from the same four",
    figure="cross entropy on held-out turned digits",
    better="lower",
    seeds=10,
    first_seed=100,
)
def starts_better_than_the_weights_own_triplets(seed: int) -> tuple[float, float]:
    """Compare at 60 steps on 300 turned digits."""
    return beside(
        Task(rotated, 300, 60, seed),
        lambda: [LoRAXS(rank=8), LoRASB(batches=8, step_size=1e-3)],
        lambda: [LoRAXS(rank=8)],
        RATES,
        judge=misfit,
    )
