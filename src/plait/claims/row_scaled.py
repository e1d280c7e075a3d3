"""The claim of ALLoRA, on the turned digits of `plait.claims.parametrize`: short runs gain from leaving 0 sooner."""

from __future__ import annotations

from plait.claims.base import claim
from plait.claims.parametrize import Task, beside, misfit, rotated
from plait.parametrize.low_rank import LoRA
from plait.parametrize.row_scaled import ALLoRA

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@claim(
    "allora",
    says="after 40 steps on turned digits ALLoRA of rank 4 errs less on more of them than LoRA does",
    baseline="LoRA of the same rank with its usual scale, its learning rate chosen from the same five",
    figure="cross entropy on held-out turned digits",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def learns_sooner_than_lora(seed: int) -> tuple[float, float]:
    """Compare at 40 steps on 300 turned digits."""
    return beside(Task(rotated, 300, 40, seed), lambda: [ALLoRA(rank=4)], lambda: [LoRA(rank=4)], RATES, judge=misfit)


@claim(
    "allora",
    says="after 40 steps on turned digits ALLoRA of rank 4 errs less on more of them than LoRA without a scale does",
    baseline="LoRA of the same rank whose scale is 1, its learning rate chosen from the same five",
    figure="cross entropy on held-out turned digits",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def learns_sooner_than_lora_without_a_scale(seed: int) -> tuple[float, float]:
    """Compare at 40 steps on 300 turned digits: all that differs is the gradients of the rows."""
    return beside(
        Task(rotated, 300, 40, seed), lambda: [ALLoRA(rank=4)], lambda: [LoRA(rank=4, alpha=4.0)], RATES, judge=misfit
    )
