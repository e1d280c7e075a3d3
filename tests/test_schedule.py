"""Schedules beside torch's, step by step, and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from plait.errors import BadInput
from plait.schedule import SCHEDULES, Cosine, Linear, Schedule, Switch, WarmupStableDecay, from_config
from plait.step.momentum import SGD
from plait.train import train

STEPS = 60


def theirs(make: Callable[[torch.optim.Optimizer], Any], peak: float = 0.5) -> list[float]:
    """What torch's scheduler gives at each step."""
    rule = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler, rates = make(rule), []
    for _ in range(STEPS):
        rates.append(rule.param_groups[0]["lr"])
        rule.step()
        scheduler.step()
    return rates


def ours(schedule: Schedule) -> list[float]:
    return [schedule.at(step / STEPS) for step in range(STEPS)]


CASES: dict[str, tuple[Schedule, Callable[[torch.optim.Optimizer], Any]]] = {
    "cosine": (
        Cosine(peak=0.5, end=0.05),
        lambda rule: lr_scheduler.CosineAnnealingLR(rule, STEPS, eta_min=0.05),
    ),
    "restarts of equal length": (
        Cosine(peak=0.5, end=0.05, cycles=4),
        lambda rule: lr_scheduler.CosineAnnealingWarmRestarts(rule, 15, eta_min=0.05),
    ),
    "restarts, each twice as long": (
        Cosine(peak=0.5, cycles=4, growth=2.0),
        lambda rule: lr_scheduler.CosineAnnealingWarmRestarts(rule, 4, T_mult=2),
    ),
    "warmup and cosine": (
        Cosine(peak=0.5, warmup=0.2),
        lambda rule: lr_scheduler.SequentialLR(
            rule,
            [
                lr_scheduler.LambdaLR(rule, lambda step: step / 12),
                lr_scheduler.CosineAnnealingLR(rule, 48),
            ],
            [12],
        ),
    ),
    "linear": (
        Linear(start=0.5, end=0.1, until=0.5),
        lambda rule: lr_scheduler.LinearLR(rule, 1.0, 0.2, 30),
    ),
    "switch": (
        Switch(first=0.5, then=0.05, at_progress=0.5),
        lambda rule: lr_scheduler.MultiStepLR(rule, [30], gamma=0.1),
    ),
    "warmup, stable, decay": (
        WarmupStableDecay(peak=0.5, warmup=0.1, decay=0.3),
        lambda rule: lr_scheduler.LambdaLR(rule, lambda step: min(step / 6, 1.0, (STEPS - step) / 18)),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:The epoch parameter in")
def test_schedules_are_torchs(name: str) -> None:
    schedule, make = CASES[name]
    assert ours(schedule) == pytest.approx(theirs(make), abs=1e-9)


@pytest.mark.parametrize("growth", [0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("cycles", [1, 2, 5])
def test_a_cosine_falls_within_each_cycle_and_begins_each_at_its_peak(growth: float, cycles: int) -> None:
    schedule = Cosine(peak=1.0, cycles=cycles, growth=growth)
    values = [schedule.at(step / 4000) for step in range(4001)]
    rises = [i for i in range(1, 4001) if values[i] > values[i - 1]]
    assert values[0] == 1.0
    assert values[-1] == 0.0
    assert len(rises) == cycles - 1
    assert all(values[i] > 0.99 for i in rises)
    assert all(low <= value <= high for value in values for low, high in [sorted(schedule.extremes())])
    lengths = [b - a for a, b in zip([0, *rises], [*rises, 4000], strict=True)]
    assert all(math.isclose(b / a, growth, rel_tol=0.05) for a, b in pairwise(lengths))


@pytest.mark.parametrize("fields", [{"cycles": 0}, {"growth": 0.0}])
def test_a_cosine_without_a_cycle_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="a cosine has a whole number of cycles and a growth above 0"):
        Cosine(peak=1.0, **fields)


@pytest.mark.parametrize("given", [0.001, [1, 0]])
def test_a_schedule_without_fields_is_refused(given: Any) -> None:
    with pytest.raises(BadInput, match=r"the schedule 'cosine' is written as \{cosine: \{field: number\}\}, not"):
        from_config({"cosine": given})


def test_a_linear_schedule_that_is_over_at_once_is_at_its_end() -> None:
    assert Linear(start=1.0, end=0.0, until=0.0).at(0.0) == 0.0
    switch, step = Switch(first=1.0, then=0.0), Linear(start=1.0, end=0.0, begin=0.5, until=0.5)
    assert [step.at(p) for p in (0.0, 0.4, 0.5, 0.6)] == [switch.at(p) for p in (0.0, 0.4, 0.5, 0.6)]


@pytest.mark.parametrize("schedule", [Cosine(peak=0.1, warmup=0.1), WarmupStableDecay(peak=0.1)])
def test_a_run_that_its_warmup_never_leaves_is_refused(schedule: Schedule) -> None:
    data = (torch.randn(8, 3), torch.randn(8, 2))
    with pytest.raises(BadInput, match=r"SGD.lr is 0 in all of 1 step: train longer, or leave out the warmup."):
        train(torch.nn.Linear(3, 2), data, methods=[SGD(lr=schedule)], steps=1)
    train(torch.nn.Linear(3, 2), data, methods=[SGD(lr=schedule)], steps=2)


def test_every_schedule_is_a_name_of_the_package() -> None:
    import plait

    for kind in SCHEDULES.values():
        assert kind.__name__ in plait.__all__
        assert getattr(plait, kind.__name__) is kind


def test_a_name_that_is_no_field_is_refused_and_copies_are_made() -> None:
    with pytest.raises(BadInput, match=r"^Cosine has no field 'peek' \(did you mean 'peak'\?\).$"):
        Cosine(peek=1.0)  # type: ignore[call-arg]
    schedule = Cosine(peak=1.0)
    assert copy.deepcopy(schedule) == pickle.loads(pickle.dumps(schedule)) == schedule


def test_a_rate_that_begins_late_in_a_long_run_is_not_refused() -> None:
    late, data = SGD(lr=Switch(first=0.0, then=0.1)), (torch.randn(8, 3), torch.randn(8, 2))
    train(torch.nn.Linear(3, 2), data, methods=[late], steps=4000, on_step=lambda now: True)
