"""The figures of a comparison as plotly's JSON. Colours are left to the page, which knows whether it is light or dark:
a trace names its recipe by number (`meta.recipe`) and takes that recipe's colour and symbol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from plait.workbench.wording import Metric
from plait.workbench.writing import Values

POINTS = 160
"""How many points a curve is drawn with, at most."""
PARTS = ("weights", "gradients", "optimizer", "activations", "other")


def figures(found: Mapping[str, Any]) -> list[Values]:
    """Return the figures of an analysed comparison: {id, title, caption, traces, layout}, each with a trace or more."""
    metric = Metric(found["metric"]["name"], found["metric"]["better"])
    rows = found["recipes"]
    made = [
        quality(metric, rows),
        differences(metric, rows),
        curves(rows, "validation", "loss", "Loss on held-out examples while training"),
        curves(rows, "history", "objective", "Objective while training"),
        trade_off(metric, rows, "memory"),
        trade_off(metric, rows, "time"),
        memory(rows),
    ]
    return [f for f in made if f is not None and f["traces"]]


def _scale(metric: Metric, values: Sequence[float]) -> list[float]:
    return [100 * v for v in values] if metric.percent else list(values)


def _unit(metric: Metric) -> str:
    arrow = "higher is better" if metric.higher else "lower is better"
    return f"{metric.name}{' in %' if metric.percent else ''} ({arrow})"


def figure(name: str, title: str, caption: str, traces: list[Values], height: int = 340, **layout: Any) -> Values:
    """Return a figure: what the page says of it, plotly's traces and layout."""
    return {"id": name, "title": title, "caption": caption, "traces": traces, "layout": {"height": height, **layout}}


def axis(title: str, **more: Any) -> Values:
    """Return an axis with its title."""
    return {"title": {"text": title, "standoff": 12}, "automargin": True, **more}


def _names(rows: Sequence[Values]) -> Values:
    """Return an axis that holds one line for each recipe, the first on top."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(rows))),
        "ticktext": [r["name"] for r in rows],
        "range": [len(rows) - 0.4, -0.6],
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
    }


def quality(metric: Metric, rows: Sequence[Values]) -> Values:
    """Return the figure of each seed, the mean and its interval, one line a recipe."""
    traces: list[Values] = []
    for number, r in enumerate(rows):
        q = r["quality"]
        values = _scale(metric, q["values"])
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": r["name"],
                "x": values,
                "y": [number + 0.16] * len(values),
                "meta": {"recipe": number, "faint": True},
                "hovertemplate": "seed %{customdata}: %{x:.4g}<extra></extra>",
                "customdata": r["seeds"],
                "marker": {"size": 7},
            }
        )
        mean = _scale(metric, [q["mean"]])[0]
        half = None if q["low"] is None else mean - _scale(metric, [q["low"]])[0]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": r["name"],
                "x": [mean],
                "y": [number - 0.08],
                "meta": {"recipe": number},
                "marker": {"size": 12},
                "hovertemplate": "mean %{x:.4g}<extra></extra>",
                **(
                    {"error_x": {"type": "data", "array": [half], "thickness": 2, "width": 6}}
                    if half is not None
                    else {}
                ),
            }
        )
    return figure(
        "quality",
        f"How good is each recipe? {metric.name.capitalize()} on the test set",
        "Large mark: mean of the seeds, with its 95 % interval. Small marks: the seeds. Intervals of two recipes may "
        "overlap although their difference is clear, because the seeds are paired: judge by the next figure.",
        traces,
        height=110 + 62 * len(rows),
        xaxis=axis(_unit(metric), range=_room([v for r in rows for v in _scale(metric, r["quality"]["values"])])),
        yaxis=_names(rows),
        showlegend=False,
    )


def _room(values: Sequence[float]) -> list[float]:
    """Return a range that holds the values; an interval of two seeds may run far out of it, and is cut."""
    low, high = min(values), max(values)
    room = max(high - low, abs(high) * 0.02, 1e-9)
    return [low - 0.6 * room, high + 0.6 * room]


def differences(metric: Metric, rows: Sequence[Values]) -> Values | None:
    """Return the paired differences against the first recipe, with their intervals."""
    kept = [(n, r) for n, r in enumerate(rows) if r["difference"] is not None]
    if not kept:
        return None
    traces = []
    for line, (number, r) in enumerate(kept):
        d = r["difference"]["interval"]
        mean = _scale(metric, [d["mean"]])[0]
        low, high = (None if d[k] is None else _scale(metric, [d[k]])[0] for k in ("low", "high"))
        trace: Values = {
            "type": "scatter",
            "mode": "markers",
            "name": r["name"],
            "x": [mean],
            "y": [line],
            "meta": {"recipe": number, "hollow": r["difference"]["verdict"] != "clear"},
            "marker": {"size": 13},
            "hovertemplate": "%{x:.3g}<extra></extra>",
        }
        if low is not None and high is not None:
            trace["error_x"] = {
                "type": "data",
                "symmetric": False,
                "array": [high - mean],
                "arrayminus": [mean - low],
                "thickness": 2,
                "width": 6,
            }
        traces.append(trace)
    bounds = [
        b for _, r in kept for b in (r["difference"]["interval"][k] for k in ("low", "high", "mean")) if b is not None
    ]
    reach = 1.15 * max(abs(b) for b in _scale(metric, [*bounds, 1e-6]))
    unit = "points" if metric.percent else metric.name
    return figure(
        "differences",
        f"Is it better than {rows[0]['name']}, or is it luck?",
        f"Mean paired difference to {rows[0]['name']} on the same seeds, with its 95 % interval. A hollow mark, or an "
        "interval that holds zero, is within noise.",
        traces,
        height=110 + 52 * len(kept),
        xaxis=axis(f"difference in {unit} ({'right' if metric.higher else 'left'} is better)", range=[-reach, reach]),
        yaxis=_names([r for _, r in kept]),
        showlegend=False,
        shapes=[
            {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1.5, "dash": "dot"}}
        ],
    )


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and its `width - 1` predecessors.

    >>> smooth([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    return [fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def mean_curve(
    runs: Sequence[Sequence[Mapping[str, Any]]], part: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return steps, mean, lowest and highest over the seeds, smoothed where there are many points."""
    series = [[(int(p["step"]), float(p[part])) for p in run if p.get(part) is not None] for run in runs]
    series = [s for s in series if s]
    if not series:
        return [], [], [], []
    length = min(len(s) for s in series)
    width = max(1, length // 25)
    smoothed = [smooth([v for _, v in s[:length]], width) for s in series]
    every = max(1, -(-length // POINTS))
    kept = sorted({*range(0, length, every), length - 1})
    at = [[s[i] for s in smoothed] for i in kept]
    return [series[0][i][0] for i in kept], [fmean(a) for a in at], [min(a) for a in at], [max(a) for a in at]


def curves(rows: Sequence[Values], source: str, part: str, title: str) -> Values | None:
    """Return a curve for each recipe: the mean over seeds, with a band from the lowest to the highest seed."""
    traces: list[Values] = []
    for number, r in enumerate(rows):
        steps, mean, low, high = mean_curve(r[source], part)
        if not steps:
            continue
        if len(r[source]) > 1:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": steps + steps[::-1],
                    "y": high + low[::-1],
                    "fill": "toself",
                    "line": {"width": 0},
                    "hoverinfo": "skip",
                    "showlegend": False,
                    "meta": {"recipe": number, "band": True},
                    "legendgroup": r["name"],
                }
            )
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(steps) < 20 else "lines",
                "name": r["name"],
                "x": steps,
                "y": mean,
                "meta": {"recipe": number, "line": True},
                "legendgroup": r["name"],
                "hovertemplate": "step %{x}: %{y:.4g}<extra>" + r["name"] + "</extra>",
            }
        )
    caption = "Line: mean of the seeds; band: from the lowest seed to the highest."
    if source == "history":
        caption += (
            " Smoothed over a twenty-fifth of the run. Recipes whose objective has other terms do not compare here."
        )
    return (
        figure(
            f"curve-{source}", title, caption, traces, height=360, xaxis=axis("step"), yaxis=axis(part), hovermode="x"
        )
        if traces
        else None
    )


def trade_off(metric: Metric, rows: Sequence[Values], cost: str) -> Values | None:
    """Return quality against a cost, with the Pareto front drawn through the recipes that no other beats in both."""
    points = []
    for number, r in enumerate(rows):
        value = r["memory"].get("peak") if cost == "memory" else r["seconds_per_step"]
        if value:
            points.append((number, r, value / 1e6 if cost == "memory" else 1e3 * value))
    if len(points) < 2:
        return None
    front = sorted((v, _scale(metric, [r["quality"]["mean"]])[0]) for _, r, v in points if r.get(f"pareto_{cost}"))
    traces: list[Values] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [x for x, _ in front],
            "y": [y for _, y in front],
            "line": {"shape": "hv", "dash": "dot", "width": 2},
            "meta": {"front": True},
            "hoverinfo": "skip",
        }
    ]
    traces += [
        {
            "type": "scatter",
            "mode": "markers",
            "name": r["name"],
            "x": [v],
            "y": _scale(metric, [r["quality"]["mean"]]),
            "marker": {"size": 14},
            "meta": {"recipe": number, "hollow": not r.get(f"pareto_{cost}")},
            "hovertemplate": f"{r['name']}: %{{x:.4g}}, %{{y:.4g}}<extra></extra>",
        }
        for number, r, v in points
    ]
    name = "peak memory in MB" if cost == "memory" else "milliseconds per step"
    goal = "upper left" if metric.higher else "lower left"
    return figure(
        f"front-{cost}",
        "What does quality cost in memory?" if cost == "memory" else "What does quality cost in time?",
        f"Best is the {goal}. Filled marks are on the Pareto front: no other recipe is at least as good and cheaper. "
        "The front is drawn through means; noise is in the table.",
        traces,
        height=380,
        xaxis=axis(f"{name} (lower is better)", range=_room([v for *_, v in points])),
        yaxis=axis(_unit(metric), range=_room(_scale(metric, [r["quality"]["mean"] for _, r, _ in points]))),
    )


def memory(rows: Sequence[Values]) -> Values | None:
    """Return what the memory of each recipe is made of, as stacked bars."""
    parts = []
    for r in rows:
        m = {name: value or 0.0 for name, value in r["memory"].items()}
        counted = sum(m.get(p, 0.0) for p in PARTS[1:4])
        parts.append({**m, "other": max(0.0, m.get("above", 0.0) - counted)})
    kept = [name for name in PARTS if any(p.get(name) for p in parts)]
    if not kept:
        return None
    says = {"other": "passing room", "activations": "activations", "optimizer": "optimizer state"}
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": says.get(name, name),
            "x": [p.get(name, 0.0) / 1e6 for p in parts],
            "y": list(range(len(rows))),
            "meta": {"part": PARTS.index(name)},
            "width": 0.56,
            "hovertemplate": "%{x:.4g} MB<extra>" + says.get(name, name) + "</extra>",
        }
        for name in kept
    ]
    return figure(
        "memory",
        "What is the memory spent on?",
        "Counted in bytes while the run went: weights, gradients, the optimizer's state, and the activations that the "
        "forward pass keeps for the backward pass. Passing room is the rest of the measured peak above the loaded "
        "model.",
        traces,
        height=150 + 50 * len(rows),
        barmode="stack",
        xaxis=axis("MB"),
        yaxis=_names(rows),
        legend={"traceorder": "normal"},
    )


__all__ = ["axis", "figure", "figures", "mean_curve", "smooth"]
