"""Claims of the ground that users expect beside LoRA, on the turned digits of `plait.claims.parametrize`."""

from __future__ import annotations

from plait.claims.base import claim
from plait.claims.parametrize import ADAPTER_RATES, Task, beside, misfit, rotated, tuned
from plait.gradient.factor_rate import LoRAPlus
from plait.initialize.orthonormal import OLoRA
from plait.parametrize.freeze import BitFit
from plait.parametrize.low_rank import LoRA
from plait.parametrize.scaling import IA3

RATES = (1e-2, 3e-2, 1e-1)


@claim(
    "ia3",
    says="scaling two layers (192 numbers) adapts a network to turned digits better than training the 138 biases does",
    baseline="BitFit, its learning rate chosen from the same three",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
)
def scales_adapt_better_than_biases(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits."""
    return beside(Task(rotated, 300, 100, seed), lambda: IA3(outputs="0", inputs="2|4"), lambda: [BitFit()], RATES)


@claim(
    "bitfit",
    says="training the 138 biases alone adapts a network to turned digits better than it does untouched",
    baseline="training the last layer's 10 biases",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
)
def biases_adapt(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits."""
    return beside(Task(rotated, 300, 100, seed), lambda: [BitFit()], lambda: [BitFit(keep="4.bias")], RATES)


@claim(
    "olora",
    says="after 20 steps on turned digits LoRA of rank 4 with this start fits them better than with its own",
    baseline="LoRA of the same rank, its learning rate chosen from the same three",
    figure="cross entropy on the digits that are trained on",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def fits_sooner_than_lora_alone(seed: int) -> tuple[float, float]:
    """Compare at 20 steps on 300 turned digits."""
    return beside(
        Task(rotated, 300, 20, seed),
        lambda: [LoRA(rank=4), OLoRA()],
        lambda: [LoRA(rank=4)],
        ADAPTER_RATES,
        judge=misfit,
        on="train",
    )


@claim(
    "lora-plus",
    says="after 20 steps on turned digits LoRA of rank 4 with a 16 times larger rate for B fits them better",
    baseline="LoRA of the same rank, its learning rate chosen from the same five",
    figure="cross entropy on the digits that are trained on",
    better="lower",
    seeds=10,
)
def a_rate_for_each_factor_fits_sooner(seed: int) -> tuple[float, float]:
    """Compare at 20 steps on 300 turned digits; rates reach low enough for the larger one to be B's alone."""
    task, rates = Task(rotated, 300, 20, seed), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    ours = tuned(seed, lambda: [LoRA(rank=4), LoRAPlus()], task, rates)
    theirs = tuned(seed, lambda: [LoRA(rank=4)], task, rates)
    return misfit(ours, task.train), misfit(theirs, task.train)
