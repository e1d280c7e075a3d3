"""Numbers that change over time: `float | Schedule` wherever a field may be annealed.

A schedule is a frozen value; `at(progress)` reads it at a point of the run, 0 at the first step, 1 after the last.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Self

from plait.errors import BadInput, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A number as a function of progress in [0, 1]."""

    def __new__(cls, *positional: Any, **given: Any) -> Self:
        """Refuse a name that is no field, as methods do; a copy is made without any."""
        known = [f.name for f in fields(cls)]
        for name in given if cls in SCHEDULES.values() else ():
            if name not in known:
                raise BadInput(f"{cls.__name__} has no field '{name}'{did_you_mean(name, known)}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        title = next((name for name, kind in SCHEDULES.items() if kind is type(self)), type(self).__name__)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in ("float", "int") and (isinstance(value, bool) or not isinstance(value, Real)):
                raise BadInput(f"the schedule '{title}' needs a number for '{f.name}', not {value!r}.")

    def at(self, progress: float) -> float:
        """Return the number at `progress`."""
        raise NotImplementedError

    def extremes(self) -> Iterable[float]:
        """Return values between which every value of the schedule lies, so that ranges can be checked."""
        raise NotImplementedError


def _require_shares(schedule: str, **shares: float) -> None:
    """Refuse what should be a part of the run and is none, such as a number of steps."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise BadInput(f"the {name} of the schedule '{schedule}' is a part of the run, in [0, 1], not {share!r}.")


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """start + (end - start) * p, where p runs from 0 to 1 between `begin` and `until`; constant outside.

    >>> Linear(start=0.1, end=0.0).at(0.5)
    0.05
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_shares("linear", begin=self.begin, until=self.until)
        if self.begin > self.until:
            raise BadInput(f"a linear schedule begins before it ends, not at {self.begin} and {self.until}.")

    def at(self, progress: float) -> float:
        """Return the number at `progress`."""
        if progress >= self.until:
            return self.end
        part = max(progress - self.begin, 0.0) / max(self.until - self.begin, 1e-12)
        return self.start + (self.end - self.start) * part

    def extremes(self) -> Iterable[float]:
        """Return both ends."""
        return self.start, self.end


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """end + (peak - end) * (1 + cos(pi p)) / 2 after a linear warmup over the first `warmup` of the run.

    `cycles` > 1 restarts the cosine (Loshchilov & Hutter's warm restarts); each cycle is `growth` times as long as the
    one before.

    >>> Cosine(peak=1.0).at(0.5), Cosine(peak=1.0, cycles=2, growth=3.0).at(0.25)
    (0.5, 1.0)
    """

    peak: float
    end: float = 0.0
    warmup: float = 0.0
    cycles: int = 1
    growth: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_shares("cosine", warmup=self.warmup)
        if self.cycles < 1 or self.cycles != int(self.cycles) or self.growth <= 0:
            given = f"cycles={self.cycles} and growth={self.growth}"
            raise BadInput(f"a cosine has a whole number of cycles and a growth above 0, not {given}.")

    def at(self, progress: float) -> float:
        """Return the number at `progress`."""
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        part = (progress - self.warmup) / max(1 - self.warmup, 1e-12)
        part = 1.0 if part >= 1 else self._within(part)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * part)) / 2

    def _within(self, part: float) -> float:
        """Return where in its cycle a point of the run lies, in [0, 1)."""
        lengths = [self.growth**cycle for cycle in range(int(self.cycles))]
        left = part * sum(lengths)
        for length in lengths:
            if left < length * (1 - 1e-12):
                return left / length
            left = max(left - length, 0.0)
        return 1.0

    def extremes(self) -> Iterable[float]:
        """Return the peak and the end (warmup starts at 0, which a rate may be)."""
        return self.peak, self.end


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Linear warmup, constant `peak`, linear decay to `end` over the last `decay` of the run.

    >>> WarmupStableDecay(peak=1.0, warmup=0.1, decay=0.2).at(0.9)
    0.5
    """

    peak: float
    end: float = 0.0
    warmup: float = 0.05
    decay: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_shares("warmup-stable-decay", warmup=self.warmup, decay=self.decay)
        if self.warmup + self.decay > 1 + 1e-12:
            raise BadInput(
                f"the warmup and the decay of the schedule 'warmup-stable-decay' are parts of one run, so their sum is "
                f"at most 1, not {self.warmup:g} + {self.decay:g}."
            )

    def at(self, progress: float) -> float:
        """Return the number at `progress`."""
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        left = min((1 - progress) / max(self.decay, 1e-12), 1.0)
        return round(self.end + (self.peak - self.end) * left, 15)

    def extremes(self) -> Iterable[float]:
        """Return the peak and the end."""
        return self.peak, self.end


@dataclass(frozen=True, kw_only=True)
class Switch(Schedule):
    """`first` before `at_progress`, `then` from there on: two-stage methods.

    >>> Switch(first=0.1, then=0.0, at_progress=0.5).at(0.6)
    0.0
    """

    first: float
    then: float
    at_progress: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_shares("switch", at_progress=self.at_progress)

    def at(self, progress: float) -> float:
        """Return the number at `progress`."""
        return self.first if progress < self.at_progress else self.then

    def extremes(self) -> Iterable[float]:
        """Return both numbers."""
        return self.first, self.then


@dataclass(frozen=True, kw_only=True)
class Tuned(Schedule):
    """A number that is learned on the validation set, by a method that tunes, such as STN, from `start` on.

    It stays above `low`, and below `high` where that is given: a field with an upper end of its range, such as a rate
    of dropout, needs one. What is learned is log(x - low), or log((x - low) / (high - x)). each_layer: a number for
    each layer that the method acts on. Numbers of the same `name` are one; without a name, each stands for itself.

    >>> Tuned(start=0.1, high=0.5).at(0.7)
    0.1
    """

    start: float
    low: float = 0.0
    high: float = math.inf
    each_layer: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.start < self.high:
            raise BadInput(
                f"a tuned number starts between its ends, and {self.start} is not between {self.low} and {self.high}."
            )

    def at(self, progress: float) -> float:
        """Return the start: what was learned stands in `now`."""
        return self.start

    def extremes(self) -> Iterable[float]:
        """Return the start and both ends."""
        return self.low, self.start, min(self.high, sys.float_info.max)


SCHEDULES: dict[str, type[Schedule]] = {
    "linear": Linear,
    "cosine": Cosine,
    "warmup-stable-decay": WarmupStableDecay,
    "switch": Switch,
    "tuned": Tuned,
}


def at(value: float | Schedule, progress: float) -> float:
    """Return a field's number at `progress`, whether it is constant or a schedule.

    >>> at(0.3, 0.9), at(Linear(start=0, end=1), 0.25)
    (0.3, 0.25)
    """
    return value.at(progress) if isinstance(value, Schedule) else value


def from_config(config: dict[str, Any]) -> Schedule:
    """Return the schedule that a recipe writes as `{name: {field: number}}`.

    >>> from_config({"linear": {"start": 1, "end": 0}})
    Linear(start=1, end=0, begin=0.0, until=1.0)
    """
    if len(config) != 1:
        raise BadInput(f"a schedule is written as {{name: {{field: number}}}}, not {config!r}.")
    ((name, given),) = config.items()
    if not isinstance(given, dict | None):
        raise BadInput(f"the schedule '{name}' is written as {{{name}: {{field: number}}}}, not {config!r}.")
    kind = SCHEDULES.get(name)
    if kind is None:
        raise BadInput(f"there is no schedule '{name}'{did_you_mean(name, SCHEDULES)}.")
    known = [f.name for f in fields(kind)]
    for field in dict(given or {}):
        if field not in known:
            raise BadInput(f"the schedule '{name}' has no field '{field}'{did_you_mean(field, known)}.")
    try:
        return kind(**dict(given or {}))
    except TypeError:
        raise BadInput(f"the schedule '{name}' needs its fields: {', '.join(known)}.") from None
