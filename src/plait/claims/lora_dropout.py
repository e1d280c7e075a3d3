"""Claims of LoRA dropout and of the two random starts, on the turned digits of `plait.claims.parametrize`."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.claims.base import claim
from plait.claims.parametrize import Task, beside, misfit, rotated
from plait.initialize.factor import RandomFactor
from plait.parametrize.low_rank import LoRA
from plait.parametrize.low_rank_dropout import LoRADropout

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def noisy(images: Tensor) -> Tensor:
    """Return turned images with Gaussian noise, always the same."""
    turned = rotated(images)
    return turned + 0.5 * torch.randn(turned.shape, generator=torch.Generator().manual_seed(0))


@claim(
    "lora-dropout",
    says="fine-tuned for long on 60 noisy turned digits, LoRA of rank 8 with this dropout errs less on more of them",
    baseline="LoRA of the same rank, its learning rate chosen from the same five",
    figure="cross entropy on held-out noisy turned digits",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def overfits_less(seed: int) -> tuple[float, float]:
    """Compare at 200 steps on 60 digits."""
    return beside(
        Task(noisy, 60, 200, seed), lambda: [LoRADropout(rank=8)], lambda: [LoRA(rank=8)], RATES, judge=misfit
    )


@claim(
    "lora-init-ab",
    says="after 40 steps on turned digits, LoRA whose A starts at random has a lower loss than one whose B does",
    baseline="Init[B], its learning rate chosen from the same five",
    figure="cross entropy on held-out turned digits",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def init_a_beats_init_b(seed: int) -> tuple[float, float]:
    """Compare rank 4 at 40 steps on 300 digits."""
    return beside(
        Task(rotated, 300, 40, seed),
        lambda: [LoRA(rank=4), RandomFactor(factor="A")],
        lambda: [LoRA(rank=4), RandomFactor(factor="B")],
        RATES,
        judge=misfit,
    )
