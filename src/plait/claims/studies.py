"""What the studies find on the small problem that they come with."""

from __future__ import annotations

from functools import cache

from plait.claims.base import claim
from plait.studies.forgetting import LearningForgetting, lora_forgets


@cache
def _found(seed: int) -> LearningForgetting:
    return lora_forgets(seed=seed)


@claim(
    "lora-forgets",
    says="At its best learning rate LoRA forgets less of the source domain than full fine-tuning at its own.",
    baseline="full fine-tuning at the learning rate that is best on the target",
    figure="rise of the source loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def lora_forgets_less(seed: int) -> tuple[float, float]:
    """Digits, then digits with permuted pixels; both pick their learning rate by the target loss."""
    found = _found(seed)
    return found.best("LoRA").forgotten, found.best("full").forgotten


@claim(
    "lora-forgets",
    says="At its best learning rate full fine-tuning learns more of the target domain than LoRA at its own.",
    baseline="LoRA at the learning rate that is best on the target",
    figure="target loss of full fine-tuning",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def lora_learns_less(seed: int) -> tuple[float, float]:
    """The same runs."""
    found = _found(seed)
    return found.best("full").target, found.best("LoRA").target


@claim(
    "lora-forgets",
    says="Where full fine-tuning has learned the target as well as LoRA does at best, LoRA has forgotten less.",
    baseline="full fine-tuning, between its learning rates and the untouched model",
    figure="rise of the source loss at LoRA's best target loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def lora_forgets_less_at_equal_learning(seed: int) -> tuple[float, float]:
    """The same runs; straight lines join the frontier of full fine-tuning."""
    found = _found(seed)
    best = found.best("LoRA")
    return best.forgotten, found.forgotten_at("full", best.target)
