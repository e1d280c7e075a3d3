"""One page that says which recipe to use and why: self-contained HTML, nothing loaded from the network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from plait.workbench.figures import figures
from plait.workbench.panels import panels
from plait.workbench.wording import Metric, megabytes, seconds
from plait.workbench.writing import Values, write_text

COLUMNS = (
    *("recipe", "quality", "against the first", "time per step", "peak memory", "above the model"),
    *("trained parameters", "forgetting", "calibration error"),
)
JUDGED = {"clear": "clear", "suggestive": "not yet clear", "noise": "within noise", "unknown": "too few seeds"}


def write_report(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a comparison's results, as `compare` returns and `results.json` holds them."""
    path = Path(path)
    write_text(path, render(results))
    return path


def render(results: Mapping[str, Any]) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    found = results["analysis"]
    metric = Metric(found["metric"]["name"], found["metric"]["better"]) if found["metric"] else None
    rows = found["recipes"]
    drawn = figures(found) if metric else []
    inner = panels(rows)
    by_id = {f["id"]: f for f in drawn}
    page = Environment(
        loader=PackageLoader("plait.workbench", "templates"), autoescape=True, undefined=StrictUndefined
    ).get_template("report.html.j2")
    # A "<" could end the script that holds the JSON; its escape is the same text to JSON.
    data = json.dumps([{k: f[k] for k in ("id", "traces", "layout")} for f in [*drawn, *chain(*inner)]])
    return page.render(
        title=results["title"],
        facts=results["facts"],
        summary=found["summary"],
        tiles=tiles(metric, found) if metric else [],
        warnings=found["warnings"],
        seeds=found["seeds"],
        columns=[metric.name if c == "quality" and metric else c for c in columns(rows)],
        about=" ".join(says for name, says in ABOUT.items() if name in columns(rows)),
        rows=[table_row(metric, r, found) for r in rows] if metric else [],
        groups=_grouped(by_id),
        panels=[
            {
                "name": r["name"],
                "yaml": r["yaml"],
                "figures": inner[n],
                "methods": results["methods"].get(r["name"], []),
            }
            for n, r in enumerate(rows)
        ],
        made=[(k, v) for k, v in results["made"].items()],
        version=results["versions"].get("plait", ""),
        plotly=Markup(get_plotlyjs()),
        figures=Markup(data.replace("<", "\\u003c")),
    )


def _grouped(by_id: Mapping[str, Values]) -> list[Values]:
    layout = (
        ("Quality", True, ("quality", "differences")),
        ("What it costs", True, ("front-memory", "front-time", "memory")),
        ("Learning curves", True, ("curve-validation", "curve-history")),
    )
    made = []
    for title, two, names in layout:
        held = [by_id[name] for name in names if name in by_id]
        if held:
            made.append({"title": title, "two": two and len(held) > 1, "figures": held})
    return made


ABOUT = {
    "above the model": "Above the model is the peak less the memory of the process that has loaded the model.",
    "forgetting": "Forgetting is the rise of the loss on the second domain: lower is better, and below zero it fell.",
    "calibration error": "Calibration error is how far the stated confidence lies from the accuracy: lower is better.",
}
"""What the columns mean whose names do not say it."""


def columns(rows: Sequence[Values]) -> list[str]:
    """Return the columns of the table: those that no recipe has a figure for are left out."""
    absent = {
        "forgetting": all(r["forgetting"] is None for r in rows),
        "calibration error": all(r["calibration"] is None for r in rows),
        "against the first": all(r["difference"] is None for r in rows),
    }
    return [c for c in COLUMNS if not absent.get(c)]


def table_row(metric: Metric, r: Values, found: Mapping[str, Any]) -> Values:
    """Return a recipe's line of the table."""
    q, d, kept = r["quality"], r["difference"], columns(found["recipes"])
    cells = [
        {"label": metric.name, "value": metric.show(q["mean"]), "small": between(metric, q)},
        {"label": "against the first", **against(metric, d)},
        {"label": "time per step", "value": seconds(r["seconds_per_step"])},
        {"label": "peak memory", "value": megabytes(r["memory"].get("peak"))},
        {"label": "above the model", "value": megabytes(r["memory"].get("above"))},
        {
            "label": "trained parameters",
            "value": count(r["trainable"]),
            "small": share(r["trainable"], r["parameters"]),
        },
        {"label": "forgetting", "value": plus_minus(r["forgetting"], signed=True)},
        {"label": "calibration error", "value": plus_minus(r["calibration"])},
    ]
    used = found["summary"] is not None and found["summary"]["use"] == r["name"]
    filled = [
        {"value": "–", "small": "", "badge": "", **c} for c in cells if c["label"] in kept or c["label"] == metric.name
    ]
    return {"name": r["name"], "used": used, "cells": filled}


def terminal_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and lines of the same table for a terminal."""
    found = results["analysis"]
    if found["metric"] is None:
        return ["recipe"], []
    metric = Metric(found["metric"]["name"], found["metric"]["better"])
    heads = [metric.name if c == "quality" else c for c in columns(found["recipes"])]
    lines = []
    for r in found["recipes"]:
        cells = table_row(metric, r, found)["cells"]
        lines.append([r["name"], *(f"{c['value']} ({c['small']})" if c["small"] else c["value"] for c in cells)])
    return heads, lines


def between(metric: Metric, q: Mapping[str, Any]) -> str:
    """Return an interval as it is read."""
    if q["low"] is None:
        return "one seed"
    low, high = q["low"], q["high"]
    if metric.percent:
        return f"{100 * max(low, 0):.1f} to {100 * min(high, 1):.1f}"
    return f"{low:.4g} to {high:.4g}"


def against(metric: Metric, d: Mapping[str, Any] | None) -> Values:
    """Return the cell of a paired difference: its size, its interval, its verdict in words."""
    if d is None:
        return {"value": "the first"}
    i, verdict = d["interval"], d["verdict"]
    badge = "worse" if verdict == "clear" and not d["better"] else verdict
    word = ("better" if d["better"] else "worse") if verdict == "clear" else JUDGED[verdict]
    p = "" if d["p"] is None or d["verdict"] == "unknown" else f", p = {d['p']:.2g}"
    return {"value": word, "badge": badge, "small": f"{metric.gap(i['mean'], signed=True)}{p}"}


def plus_minus(interval: Mapping[str, Any] | None, signed: bool = False) -> str:
    """Return a mean and half its interval."""
    if interval is None:
        return "–"
    mean = f"{interval['mean']:+.3f}" if signed else f"{interval['mean']:.3f}"
    return (mean if interval["low"] is None else f"{mean} ± {interval['high'] - interval['mean']:.2g}").replace(
        "-", "−"
    )


def count(value: float | None) -> str:
    """Return a number of parameters.

    >>> count(1234567), count(890), count(None)
    ('1.23 M', '890', '–')
    """
    if value is None:
        return "–"
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return str(int(value))


def share(part: float | None, whole: float | None) -> str:
    """Return a part of the model in percent."""
    return "" if not part or not whole else f"{100 * part / whole:.3g} % of the model"


def tiles(metric: Metric, found: Mapping[str, Any]) -> list[Values]:
    """Return the four figures of the recipe to use, each beside the first recipe's."""
    rows = {r["name"]: r for r in found["recipes"]}
    used, first = rows[found["summary"]["use"]], rows[found["first"]]
    same = used is first

    def against_first(mine: float | None, theirs: float | None, show: str) -> str:
        if same or mine is None or not theirs:
            return f"{used['name']}"
        change = mine / theirs - 1
        return f"{first['name']}: {show}" + (
            f" ({100 * change:+.0f} %)".replace("-", "−") if abs(change) >= 0.005 else ""
        )

    def tile(name: str, figure: str, note: str) -> Values:
        return {"name": name, "figure": figure, "note": note}

    q = metric.show(first["quality"]["mean"])
    memory, memory_first = used["memory"].get("peak"), first["memory"].get("peak")
    step, step_first = used["seconds_per_step"], first["seconds_per_step"]
    return [
        tile(
            f"{metric.name} of {used['name']}",
            metric.show(used["quality"]["mean"]),
            used["name"] if same else f"{first['name']}: {q}",
        ),
        tile("its peak memory", megabytes(memory), against_first(memory, memory_first, megabytes(memory_first))),
        tile("its time per step", seconds(step), against_first(step, step_first, seconds(step_first))),
        tile(
            "its trained parameters",
            count(used["trainable"]),
            share(used["trainable"], used["parameters"]) or used["name"],
        ),
    ]


def describe_methods(recipe: Mapping[str, Any]) -> list[Values]:
    """Return what the page says of each method of a recipe: name, places, equation, reference, what was set."""
    from plait.workbench import find, index

    entries = index.read()
    made = []
    for line in recipe.get("methods", []):
        key, given = (line, {}) if isinstance(line, str) else next(iter(line.items()))
        entry = find.named(key, entries)
        reference, _, link = entry["reference"].rpartition(" ")
        linked = link.startswith("http")
        made.append(
            {
                "name": entry["name"],
                "places": entry["places"],
                "equation": " ".join(entry["doc"].split("\n\n")[0].split()),
                "given": ", ".join(f"{k} = {v}" for k, v in (given or {}).items()),
                "reference": reference if linked else entry["reference"],
                "link": link if linked else "",
            }
        )
    return made
