"""Claims of sparse matrices on frozen weights, on `plait.claims.parametrize`'s digits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from plait.claims.base import claim
from plait.claims.parametrize import Task, accuracy, beside, rotated, tuned
from plait.method import Method
from plait.parametrize.low_rank import LoRA
from plait.parametrize.masked import RAMT
from plait.parametrize.pruned import DSEE
from plait.parametrize.sparse_growth import SpIEL
from plait.parametrize.sparse_smallest import SaRA

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DENSITY = 0.0625
"""Of two matrices of 64 x 64: 512 numbers, as many as LoRA of rank 2 trains."""


def moved(images: Tensor) -> Tensor:
    """Return the images moved to the right by one of their eight columns: a near domain."""
    return images.view(-1, 8, 8).roll(1, 2).flatten(1)


@claim(
    "sft",
    says="SpIEL (512 entries on two layers, whose places move) adapts a network to turned digits better than LoRA does",
    baseline="LoRA of rank 2 on the same layers (512 numbers), its learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
)
def sparse_entries_adapt_better_than_low_rank(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits."""
    return beside(
        Task(rotated, 300, 100, seed),
        lambda: [SpIEL(density=DENSITY, where="0|2")],
        lambda: [LoRA(rank=2, where="0|2")],
        RATES,
    )


@claim(
    "sft",
    says="SpIEL whose places move adapts a network to turned digits better than the same with places drawn once",
    baseline="growth='none': 512 entries at fixed random places, the learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
)
def moving_places_adapt_better_than_fixed_ones(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits."""
    return beside(
        Task(rotated, 300, 100, seed),
        lambda: [SpIEL(density=DENSITY, where="0|2")],
        lambda: [SpIEL(density=DENSITY, where="0|2", growth="none")],
        RATES,
    )


@claim(
    "sft",
    says="SpIEL (512 entries on two layers, whose places move) adapts a network to digits that are moved by a column "
    "better than LoRA does",
    baseline="LoRA of rank 2 on the same layers (512 numbers), its learning rate chosen from the same four",
    figure="accuracy on held-out moved digits",
    better="higher",
    seeds=10,
)
def sparse_entries_adapt_better_to_a_near_domain(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 moved digits."""
    return beside(
        Task(moved, 300, 100, seed),
        lambda: [SpIEL(density=DENSITY, where="0|2")],
        lambda: [LoRA(rank=2, where="0|2")],
        RATES,
    )


@claim(
    "sft",
    says="512 entries of two layers at fixed random places adapt a network to turned digits better than LoRA does",
    baseline="LoRA of rank 2 on the same layers (512 numbers), its learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
    first_seed=100,
)
def a_fixed_mask_adapts_better_than_low_rank(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits, on other seeds than the claims above, which led to this one."""
    return beside(
        Task(rotated, 300, 100, seed),
        lambda: [SpIEL(density=DENSITY, where="0|2", growth="none")],
        lambda: [LoRA(rank=2, where="0|2")],
        RATES,
    )


def learned_and_kept(seed: int, task: Task, methods: Callable[[], Sequence[Method]]) -> float:
    """Return the mean of the accuracies on held-out digits that are turned, as trained on, and upright, as before."""
    model, upright = tuned(seed, methods, task, RATES), Task(lambda images: images, 300, 100, seed)
    return (accuracy(model, task.test) + accuracy(model, upright.test)) / 2


@claim(
    "sara",
    says="after 100 steps on turned digits SaRA (the smallest 0.2 of two layers) knows turned and upright digits "
    "better than LoRA does",
    baseline="LoRA of rank 6 on the same layers (1536 numbers, SaRA trains 1638), the rate chosen from the same four",
    figure="mean of the accuracies on held-out turned digits and on held-out upright digits",
    better="higher",
    seeds=10,
)
def learns_and_keeps_more_than_low_rank(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits."""
    task = Task(rotated, 300, 100, seed)
    ours = learned_and_kept(seed, task, lambda: [SaRA(share=0.2, where="0|2")])
    return ours, learned_and_kept(seed, task, lambda: [LoRA(rank=6, where="0|2")])


@claim(
    "dsee",
    says="DSEE of rank 3 with 128 sparse entries on each of two layers, nothing pruned, adapts a network to turned "
    "digits better than LoRA does",
    baseline="LoRA of rank 4 on the same layers (1024 numbers, as many), its learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
)
def sparse_entries_help_a_low_rank_update(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits, with a factor of 4 in front of both updates."""
    return beside(
        Task(rotated, 300, 100, seed),
        lambda: [DSEE(rank=3, alpha=12.0, entries=128, sparsity=0.0, where="0|2")],
        lambda: [LoRA(rank=4, alpha=16.0, where="0|2")],
        RATES,
    )


@claim(
    "dsee",
    says="DSEE that prunes half of two layers where the update is small classifies turned digits better than one that "
    "prunes where the weight is small",
    baseline="the same with score='weight', its learning rate chosen from the same four",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=10,
)
def small_updates_tell_better_what_to_prune(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits, of which 50 come after the weights are pruned."""
    task = Task(rotated, 300, 100, seed)
    pruning = functools.partial(DSEE, rank=3, alpha=12.0, entries=128, sparsity=0.5, where="0|2")
    ours = tuned(seed, lambda: [pruning()], task, RATES)
    theirs = tuned(seed, lambda: [pruning(score="weight")], task, RATES)
    return accuracy(ours, task.test), accuracy(theirs, task.test)


MASK_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""Masks begin at 0.01, and close at 0.005."""


@claim(
    "r-amt",
    says="of 100 digits that are moved by a column, masks on two layers learn more with gradient dropout than without",
    baseline="drop=0, the learning rate chosen from the same four",
    figure="accuracy on held-out moved digits",
    better="higher",
    seeds=10,
)
def gradient_dropout_helps_with_few_examples(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 100 moved digits."""
    return beside(
        Task(moved, 100, 100, seed), lambda: [RAMT(where="0|2")], lambda: [RAMT(drop=0.0, where="0|2")], MASK_RATES
    )


@claim(
    "r-amt",
    says="masks on two layers that are trained on 100 digits moved by a column know moved and upright digits better "
    "than LoRA does",
    baseline="LoRA of rank 2 on the same layers, its learning rate chosen from four",
    figure="mean of the accuracies on held-out moved digits and on held-out upright digits",
    better="higher",
    seeds=10,
)
def masks_keep_more_than_low_rank(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 100 moved digits."""
    task, upright = Task(moved, 100, 100, seed), Task(lambda images: images, 100, 100, seed)
    ours = tuned(seed, lambda: [RAMT(where="0|2")], task, MASK_RATES)
    theirs = tuned(seed, lambda: [LoRA(rank=2, where="0|2")], task, RATES)
    mine, other = (accuracy(m, task.test) + accuracy(m, upright.test) for m in (ours, theirs))
    return mine / 2, other / 2
