"""How figures are written for a reader: percent and points, bytes, seconds, and a verdict in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plait.workbench.statistics import FEWEST_SEEDS, Difference, Interval, seeds_needed

FRACTIONS = ("accuracy", "f1", "precision", "recall", "auroc")
"""Metrics that are shown in percent, and whose differences are points."""


@dataclass(frozen=True)
class Metric:
    """What quality is: its name, whether more is better, and how it is written."""

    name: str
    better: str

    @property
    def percent(self) -> bool:
        """Whether it is a fraction, shown in percent."""
        return any(word in self.name.lower() for word in FRACTIONS)

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return self.better == "higher"

    def show(self, value: float | None) -> str:
        """Return a figure as it is read: "83.1 %", "2.415"."""
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"

    def gap(self, value: float, signed: bool = False) -> str:
        """Return a difference as it is read: "0.4 points", "0.012"."""
        sign = ("+" if value > 0 else "−" if value < 0 else "±") if signed else ""
        size = abs(value)
        return (
            f"{sign}{100 * size:.2g} points"
            if self.percent and size < 0.0995
            else (f"{sign}{100 * size:.1f} points" if self.percent else f"{sign}{size:.3g}")
        )


def megabytes(value: float | None) -> str:
    """Return bytes as they are read.

    >>> megabytes(1.5e9), megabytes(2.5e6), megabytes(None)
    ('1.50 GB', '2.5 MB', '–')
    """
    if value is None:
        return "–"
    return (
        f"{value / 1e9:.2f} GB"
        if value >= 1e9
        else (f"{value / 1e6:.0f} MB" if value >= 1e7 else f"{value / 1e6:.1f} MB")
    )


def seconds(value: float | None) -> str:
    """Return seconds as they are read."""
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else (f"{1e3 * value:.0f} ms" if value >= 0.01 else f"{1e3 * value:.2g} ms")


def together(names: Sequence[str]) -> str:
    """Return names as they are read.

    >>> together(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def count_of(seeds: int) -> str:
    """Return a number of seeds in words.

    >>> count_of(1), count_of(2)
    ('one seed', '2 seeds')
    """
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _runs_to(metric: Metric, interval: Interval) -> str:
    low, high = interval.low or 0.0, interval.high or 0.0
    return f"{metric.gap(low, signed=True)} to {metric.gap(high, signed=True)}"


def judgement(metric: Metric, d: Difference, pairs: Sequence[float]) -> str:
    """Return what one paired difference says, as a sentence."""
    size = metric.gap(d.interval.mean)
    if d.verdict == "unknown":
        return (
            f"The difference between {d.first} and {d.other} ({size}) stands on {count_of(d.interval.count)}, which "
            f"cannot tell it from noise: run at least {FEWEST_SEEDS} seeds before you believe it."
        )
    lead = d.other if d.better else d.first
    if d.verdict == "clear":
        return (
            f"{lead} is better than {d.first if d.better else d.other} by {size}, beyond noise (95 % interval "
            f"{_runs_to(metric, d.interval)}, {d.interval.count} seeds)."
        )
    if d.verdict == "suggestive":
        return (
            f"The difference between {d.first} and {d.other} ({size}) is clear by itself, but not when the number of "
            f"comparisons on this page is allowed for (Holm's p = {d.adjusted:.2g}): confirm it with more seeds."
        )
    if not any(pairs):
        return (
            f"{d.first} and {d.other} gave the same {metric.name} with each of {d.interval.count} seeds: that is "
            "within noise, and more test examples may tell them apart."
        )
    needed = seeds_needed(pairs)
    cure = f" About {needed} seeds would show a difference of this size." if needed and needed > len(pairs) else ""
    return (
        f"The difference between {d.first} and {d.other} ({size}) is within noise: the 95 % interval runs from "
        f"{_runs_to(metric, d.interval)} over {d.interval.count} seeds.{cure}"
    )
