"""Claims of SPT, on the turned digits of `plait.claims.parametrize`."""

from __future__ import annotations

from plait.claims.base import claim
from plait.claims.parametrize import ADAPTER_RATES, Task, beside, misfit, rotated
from plait.initialize.sensitivity import SPT
from plait.parametrize.low_rank import LoRA
from plait.parametrize.sparse_growth import SpIEL

SHARE = 0.11


@claim(
    "spt",
    says="986 numbers that are placed by sensitivity adapt a network to turned digits better than LoRA's 1024 do",
    baseline="LoRA of rank 4 on the first two layers, its learning rate chosen from the same three",
    figure="accuracy on held-out turned digits",
    better="higher",
)
def adapts_better_than_lora(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits."""
    return beside(
        Task(rotated, 300, 100, seed),
        lambda: [SPT(share=SHARE, rank=4)],
        lambda: [LoRA(rank=4, where="0|2")],
        ADAPTER_RATES,
    )


@claim(
    "spt",
    says="the most sensitive 11 percent of a network's numbers adapt it to turned digits better than random ones do",
    baseline="training 11 percent of each matrix at random places, the learning rate chosen from the same three",
    figure="accuracy on held-out turned digits",
    better="higher",
)
def sensitive_places_adapt_better_than_random_ones(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits."""
    return beside(
        Task(rotated, 300, 100, seed),
        lambda: [SPT(share=SHARE, rank=4)],
        lambda: [SpIEL(density=SHARE, growth="none")],
        ADAPTER_RATES,
    )


@claim(
    "spt",
    says="in 5 steps the most sensitive 11 percent of a network's numbers fit turned digits better than random ones do",
    baseline="training 11 percent of each matrix at random places, the learning rate chosen from the same three",
    figure="cross entropy on the digits that are trained on",
    better="lower",
)
def sensitive_places_fit_sooner_than_random_ones(seed: int) -> tuple[float, float]:
    """Compare at 5 steps on 300 turned digits: a place is sensitive if a step on it takes much from the loss."""
    return beside(
        Task(rotated, 300, 5, seed),
        lambda: [SPT(share=SHARE, rank=4)],
        lambda: [SpIEL(density=SHARE, growth="none")],
        ADAPTER_RATES,
        judge=misfit,
        on="train",
    )
