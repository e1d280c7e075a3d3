"""The figures of one recipe: the parts of its objective, and what its measures saw, as numbers and as curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from plait.workbench.figures import axis, figure, mean_curve
from plait.workbench.writing import Values

LOGARITHMIC: Values = {"type": "log", "exponentformat": "power"}


def panels(rows: Sequence[Values]) -> list[list[Values]]:
    """Return, for each recipe, the figures of its objective's parts and of what its methods measured."""
    return [[f for f in (_parts(n, r), *_measures(n, r)) if f is not None] for n, r in enumerate(rows)]


def _parts(number: int, r: Values) -> Values | None:
    names = list(dict.fromkeys(k for run in r["history"] for p in run for k in p if k not in ("step", "objective")))
    if len(names) < 2:
        return None
    traces = []
    for line, name in enumerate(names):
        steps, mean, *_ = mean_curve(r["history"], name)
        if steps:
            trace = {"type": "scatter", "mode": "lines", "name": name, "x": steps, "y": mean, "meta": {"series": line}}
            traces.append(trace)
    return figure(
        f"parts-{number}",
        "Parts of the objective",
        "Mean of the seeds, smoothed.",
        traces,
        height=300,
        xaxis=axis("step"),
        yaxis=axis("value"),
    )


def _measures(number: int, r: Values) -> list[Values]:
    made = []
    methods = list(dict.fromkeys(name for run in r["measures"] for name in run))
    for place, name in enumerate(methods):
        runs = [run[name] for run in r["measures"] if run.get(name)]
        if not runs:
            continue
        made.append(_numbers(f"measure-{number}-{place}", name, runs))
        drawn = [key for key, value in runs[0][-1].items() if _is_curve(value)]
        made += [_curves(f"measure-{number}-{place}-{key}", name, key, runs) for key in drawn]
    return [drawn for drawn in made if drawn["traces"]]


def _is_curve(value: Any) -> bool:
    """Say whether a measure's figure is a curve, as plait.measure.base.curve makes it."""
    return isinstance(value, Mapping) and "x" in value and "lines" in value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _numbers(place: str, name: str, runs: Sequence[Sequence[Values]]) -> Values:
    """Return the numbers of a measure over the steps, on a logarithmic scale where they span orders of magnitude."""
    finite = [[{k: v for k, v in point.items() if _finite(v)} for point in run] for run in runs]
    keys = dict.fromkeys(k for run in finite for point in run for k in point if k != "step")
    traces: list[Values] = []
    for line, key in enumerate(list(keys)[:8]):
        steps, mean, *_ = mean_curve(finite, key)
        if steps:
            shape: Values = {"type": "scatter", "mode": "lines+markers", "name": key, "meta": {"series": line}}
            traces.append({**shape, "x": steps, "y": mean})
    drawn = [v for trace in traces for v in trace["y"]]
    wide = bool(drawn) and min(drawn) > 0 and max(drawn) > 100 * min(drawn)
    upward = axis("value", **(LOGARITHMIC if wide else {}))
    return figure(place, name, "Mean of the seeds.", traces, height=300, xaxis=axis("step"), yaxis=upward)


def _curves(place: str, name: str, key: str, runs: Sequence[Sequence[Values]]) -> Values:
    """Return a measure's curve as each seed's run left it."""
    traces: list[Values] = []
    for seed, run in enumerate(runs):
        held: Any = run[-1].get(key)
        if not _is_curve(held):
            continue
        for line, (label, values) in enumerate(held["lines"].items()):
            trace: Values = {"type": "scatter", "mode": "lines" if len(values) > 20 else "lines+markers", "name": label}
            shown = {"x": held["x"], "y": values, "meta": {"series": line}, "legendgroup": label}
            traces.append({**trace, **shown, "showlegend": seed == 0, "opacity": 1.0 if len(runs) == 1 else 0.6})
    last: Any = runs[0][-1]
    log, step = last[key]["log"], last.get("step")
    axes = {
        f"{along}axis": axis(last[key][title], **(LOGARITHMIC if along in log else {}))
        for along, title in (("x", "across"), ("y", "along"))
    }
    caption = f"After step {step}" + ("; each line is one seed." if len(runs) > 1 else ".")
    return figure(place.replace(" ", "-"), f"{name}: {key}", caption, traces, height=300, **axes)
