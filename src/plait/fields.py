"""The kinds of number that a method's field can be, each with its range.

A bad value is refused when the method is made, in one sentence: field, value, range.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainValidator
from pydantic_core import PydanticCustomError

from plait.schedule import Schedule, from_config


@dataclass(frozen=True)
class Range:
    """An interval; `low` and `high` belong to it when `closed` says so ("[]", "(]", "[)", "()")."""

    low: float = -math.inf
    high: float = math.inf
    closed: str = "[]"

    def __call__(self, value: Any) -> Any:
        """Return `value` if it lies in the range; a schedule may end at a low end that is itself outside, such as 0."""
        numbers = list(value.extremes()) if isinstance(value, Schedule) else [value]
        for number in numbers:
            above = number >= self.low if self.closed[0] == "[" or max(numbers) > self.low else number > self.low
            below = number <= self.high if self.closed[1] == "]" else number < self.high
            if not (above and below):
                raise PydanticCustomError("range", "must be {range}", {"range": str(self)})
        return value

    def __str__(self) -> str:
        if math.isinf(self.high):
            if math.isinf(self.low):
                return "a finite number"
            return f"at least {self.low:g}" if self.closed[0] == "[" else f"greater than {self.low:g}"
        return f"in {self.closed[0]}{self.low:g}, {self.high:g}{self.closed[1]}"


def _schedule(value: Any) -> Any:
    return from_config(value) if isinstance(value, dict) else value


_POSITIVE = AfterValidator(Range(0, closed="()"))
_NON_NEGATIVE = AfterValidator(Range(0, closed="[)"))
_FRACTION = AfterValidator(Range(0, 1))
_PROBABILITY = AfterValidator(Range(0, 1, closed="[)"))
_NUMBER = AfterValidator(Range(closed="()"))

Count = Annotated[int, AfterValidator(Range(1))]
"""A whole number of at least 1."""
Size = Annotated[int, AfterValidator(Range(0))]
"""A whole number of at least 0."""
Positive = Annotated[float, _POSITIVE]
"""A number greater than 0."""
NonNegative = Annotated[float, _NON_NEGATIVE]
"""A number of at least 0."""
Fraction = Annotated[float, _FRACTION]
"""A number in [0, 1]."""
Probability = Annotated[float, _PROBABILITY]
"""A number in [0, 1): the chance that something is dropped, or a decay rate."""
Number = Annotated[float, _NUMBER]
"""Any finite number."""


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if not bounds[0] < bounds[1]:
        raise PydanticCustomError("order", "must be a smaller number and a larger one")
    return bounds


Bounds = Annotated[tuple[NonNegative, Positive], AfterValidator(_ascending)]
"""Two numbers of at least 0, the second larger than the first."""

_SCHEDULE = BeforeValidator(_schedule)
ScheduledPositive = Annotated[float | Schedule, _SCHEDULE, _POSITIVE]
"""A number greater than 0, or a schedule of such."""
ScheduledNonNegative = Annotated[float | Schedule, _SCHEDULE, _NON_NEGATIVE]
"""A number of at least 0, or a schedule of such."""
ScheduledFraction = Annotated[float | Schedule, _SCHEDULE, _FRACTION]
"""A number in [0, 1], or a schedule of such."""
ScheduledProbability = Annotated[float | Schedule, _SCHEDULE, _PROBABILITY]
"""A number in [0, 1), or a schedule of such."""
ScheduledNumber = Annotated[float | Schedule, _SCHEDULE, _NUMBER]
"""Any finite number, or a schedule of such."""


@dataclass(frozen=True)
class ByName:
    """A whole number of at least `low`, or such numbers by pattern of name: {"q_proj|k_proj": 64, ".*": 128}."""

    low: int

    def __call__(self, value: Any) -> Any:
        """Return `value` if each number in it is whole and large enough."""
        by_name = isinstance(value, dict) and value and all(isinstance(pattern, str) for pattern in value)
        for number in value.values() if by_name else [value]:
            if isinstance(number, bool) or not isinstance(number, int) or number < self.low:
                says = f"a whole number of at least {self.low}, or such numbers by pattern of name"
                raise PydanticCustomError("range", "must be {range}", {"range": says})
        for pattern in value if by_name else []:
            try:
                re.compile(pattern)
            except re.error as problem:
                says = "have regular expressions for names ({problem})"
                raise PydanticCustomError("range", f"must {says}", {"problem": str(problem)}) from None
        return value


SizeByName = Annotated[int | dict[str, int], PlainValidator(ByName(0))]
"""A whole number of at least 0, or such numbers by pattern of name."""
CountByName = Annotated[int | dict[str, int], PlainValidator(ByName(1))]
"""A whole number of at least 1, or such numbers by pattern of name."""
