"""From the results of many runs to what can be said about them, in figures and in words.

Takes what each run wrote (`results.json` of `plait.workbench.run`) and returns plain values: the rows of the table, the
paired differences, the warnings, and which recipe to use and why. Both the terminal and the page are drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from statistics import fmean, median
from typing import Any

from plait.workbench.statistics import (
    FEWEST_SEEDS,
    Difference,
    allow_for_many,
    difference,
    pareto,
    t_interval,
)
from plait.workbench.wording import Metric, count_of, judgement, together
from plait.workbench.writing import Values

ALIKE = 0.05
"""Costs that differ by less than this part count as equal."""


@dataclass
class Group:
    """The runs of one recipe, in the order of the seeds."""

    name: str
    recipe: Values
    yaml: str
    runs: list[Values]
    failed: list[Values]

    def quality(self) -> list[float]:
        """Return the figure of each run."""
        return [float(run["metrics"]["after"]["test"][run["quality"]]) for run in self.runs]

    def figures(self, words: str) -> list[float]:
        """Return each run's figure on the test set whose name holds the words; [] where there is none."""
        found = [
            next((v for k, v in run["metrics"]["after"]["test"].items() if words in k.replace("_", " ").lower()), None)
            for run in self.runs
        ]
        return [float(v) for v in found if v is not None]


def _middle(values: Sequence[Any]) -> float | None:
    kept = [float(v) for v in values if v is not None]
    return median(kept) if kept else None


def _interval(values: Sequence[float]) -> Values | None:
    return None if not values else asdict(t_interval(values)) | {"values": list(values)}


def _told(difference: Difference) -> Values:
    """Return a difference as results.json holds it: without what only its judging needed."""
    held = asdict(difference)
    del held["drawn"]
    return held | {"pairs": list(difference.pairs)}


def compare_pair(metric: Metric, first: Group, other: Group) -> Difference | None:
    """Return the paired difference over the seeds that both finished."""
    mine, theirs = ({run["seed"]: run for run in group.runs} for group in (first, other))
    common = sorted(set(mine) & set(theirs))
    if not common:
        return None
    pick = [(mine[s], theirs[s]) for s in common]
    value = [[float(r["metrics"]["after"]["test"][metric.name]) for r in side] for side in zip(*pick, strict=True)]
    scores = [[r.get("scores") for r in side] for side in zip(*pick, strict=True)]
    runs = [run for pair in pick for run in pair]
    fixed = len({run.get("test", {}).get("digest") for run in runs}) == 1
    sizes = runs[0].get("test", {})
    return difference(
        (first.name, other.name),
        *value,
        higher_is_better=metric.higher,
        first_examples=scores[0] if fixed else (),
        other_examples=scores[1] if fixed else (),
        overlap=0.0 if fixed else sizes.get("examples", 0) / max(sizes.get("trained on", 1), 1),
    )


def row(metric: Metric, group: Group) -> Values:
    """Return the figures of one recipe."""
    memory = [run.get("memory", {}) for run in group.runs]
    forgetting = [run["forgetting"] for run in group.runs if run.get("forgetting") is not None]
    parts = {
        name: _middle([m.get(name) for m in memory])
        for name in ("loaded", "peak", "above", "weights", "gradients", "optimizer", "activations")
    }
    return {
        "name": group.name,
        "yaml": group.yaml,
        "recipe": group.recipe,
        "seeds": [run["seed"] for run in group.runs],
        "failed": group.failed,
        "quality": _interval(group.quality()),
        "calibration": _interval(group.figures("calibration")),
        "forgetting": _interval(forgetting),
        "folded": _folded(metric, group),
        "seconds_per_step": _middle([run["seconds"].get("step") for run in group.runs]),
        "seconds": _middle([run["seconds"].get("train") for run in group.runs]),
        "start": {
            "seconds": _middle([run["seconds"].get("start") for run in group.runs]),
            "bytes": _middle([m.get("start") for m in memory]),
        },
        "memory": parts,
        "trainable": _middle([run["parameters"]["trained"] for run in group.runs]),
        "parameters": _middle([run["parameters"]["model"] for run in group.runs]),
        "skipped": sum(len(run.get("skipped", [])) for run in group.runs),
        "history": [run["history"] for run in group.runs],
        "validation": [run.get("curve", []) for run in group.runs],
        "measures": [run.get("measures", {}) for run in group.runs],
    }


def _folded(metric: Metric, group: Group) -> Values:
    """Return the quality after folding, and after folding and rounding, where the runs measured it."""
    measured = [run["folded"] for run in group.runs if run.get("folded")]
    names = list(measured[0]) if measured else []
    found = {name: [run[name].get(metric.name) for run in measured] for name in names}
    return {name: _interval([float(v) for v in values if v is not None]) for name, values in found.items()}


def analyse(groups: Sequence[Group], seeds: Sequence[int]) -> Values:
    """Return everything that the table, the page and the terminal show."""
    done = [g for g in groups if g.runs]
    if not done:
        return {"recipes": [], "seeds": list(seeds), "warnings": failures(groups), "summary": None, "metric": None}
    metric = Metric(done[0].runs[0]["quality"], done[0].runs[0]["better"])
    rows = [row(metric, g) for g in done]
    found = [compare_pair(metric, done[0], g) for g in done[1:]]
    against = allow_for_many([d for d in found if d is not None])
    by_name = {d.other: d for d in against}
    quality = [fmean(g.quality()) for g in done]
    for cost, name in (("memory", "pareto_memory"), ("time", "pareto_time")):
        costs = [_cost(r, cost) for r in rows]
        if all(c is not None for c in costs):
            front = pareto(
                [(float(c or 0), q) for c, q in zip(costs, quality, strict=True)], higher_is_better=metric.higher
            )
            for r, on in zip(rows, front, strict=True):
                r[name] = on
    for r in rows:
        r["difference"] = _told(by_name[r["name"]]) if r["name"] in by_name else None
    summary = recommend(metric, done, rows, by_name)
    return {
        "metric": {"name": metric.name, "better": metric.better, "percent": metric.percent},
        "seeds": list(seeds),
        "first": done[0].name,
        "recipes": rows,
        "warnings": [*failures(groups), *warnings(metric, done, rows, against, seeds)],
        "summary": summary,
    }


def _cost(r: Mapping[str, Any], what: str) -> float | None:
    found = r["memory"].get("peak") if what == "memory" else r["seconds_per_step"]
    return None if found is None else float(found)


def failures(groups: Sequence[Group]) -> list[Values]:
    """Return a warning for each recipe with runs that failed."""
    return [
        {
            "kind": "failed",
            "text": f"{len(g.failed)} of {len(g.failed) + len(g.runs)} runs of {g.name} failed and are left out: "
            f"{g.failed[0].get('error', 'no reason was given')}",
        }
        for g in groups
        if g.failed
    ]


def warnings(
    metric: Metric, groups: Sequence[Group], rows: Sequence[Values], against: Sequence[Difference], seeds: Sequence[int]
) -> list[Values]:
    """Return what a reader must know before believing the table."""
    found: list[Values] = []

    def warn(kind: str, text: str) -> None:
        found.append({"kind": kind, "text": text})

    if len(seeds) < FEWEST_SEEDS:
        these = ", ".join(f"{d.other} ({metric.gap(d.interval.mean, signed=True)})" for d in against)
        whose = f", also those here against {groups[0].name}: {these}" if these else ""
        warn(
            "seeds",
            f"{_few(len(seeds))} cannot tell a difference from luck{whose}. Use --seeds 5 before you decide anything "
            "that matters.",
        )
    first = {run["seed"]: q for run, q in zip(groups[0].runs, groups[0].quality(), strict=True)}
    by_name = {g.name: g for g in groups}
    for d in against if len(seeds) >= FEWEST_SEEDS else []:
        other = by_name[d.other]
        pairs = [q - first[r["seed"]] for r, q in zip(other.runs, other.quality(), strict=True) if r["seed"] in first]
        if d.verdict != "clear":
            warn("noise", judgement(metric, d, pairs))
    for r in rows:
        values = r["quality"]["values"]
        if len(values) > 1 and max(values) == min(values):
            if metric.percent and values[0] == (1.0 if metric.higher else 0.0):
                warn("same", f"All seeds of {r['name']} are perfect: the task is too easy to tell recipes apart.")
            elif len({str(history) for history in r["history"]}) == 1:
                warn("same", f"All seeds of {r['name']} trained alike: the seed changes nothing here.")
        if r["skipped"]:
            warn("skipped", f"{r['name']} left out {r['skipped']} steps whose objective was not finite.")
    falling = [r["name"] for r in rows if _still_falling(r["history"])]
    if falling:
        whose = "every recipe" if len(falling) == len(rows) > 1 else together(falling)
        warn(
            "short",
            f"The objective of {whose} was still falling at the end: with more steps the order of the recipes may "
            "change.",
        )
    models = {str(r["recipe"].get("model")) for r in rows}
    if len(models) > 1:
        warn(
            "models",
            f"The recipes use different models ({', '.join(sorted(models))}): a difference may be the model's.",
        )
    return found


def _still_falling(histories: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Say whether the mean objective fell by more than a tenth from the third quarter of the run to the last."""
    drops = []
    for history in histories:
        values = [float(h["objective"]) for h in history if h.get("objective") is not None]
        quarter = len(values) // 4
        if quarter >= 5:
            third, last = fmean(values[-2 * quarter : -quarter]), fmean(values[-quarter:])
            drops.append((third - last) / abs(third) if third else 0.0)
    return bool(drops) and fmean(drops) > 0.1


def recommend(
    metric: Metric, groups: Sequence[Group], rows: Sequence[Values], by_name: Mapping[str, Difference]
) -> Values:
    """Return which recipe to use and why: the cheapest of those that cannot be told from the best."""
    means = {g.name: fmean(g.quality()) for g in groups}
    best = (max if metric.higher else min)(means, key=lambda name: means[name])
    leader = next(g for g in groups if g.name == best)
    pairs = {g.name: compare_pair(metric, leader, g) for g in groups if g is not leader}
    # Holm's correction keeps more recipes in play, not fewer: the safe side.
    tested = allow_for_many([d for d in pairs.values() if d is not None])
    worse = {d.other for d in tested if d.verdict == "clear"}
    costs = {r["name"]: (_cost(r, "memory") or inf, _cost(r, "time") or inf) for r in rows}
    rest = [name for name in means if name not in worse]
    least = min(costs[name][0] for name in rest)
    lean = [name for name in rest if costs[name][0] <= least * (1 + ALIKE)]
    quick = min(costs[name][1] for name in lean)
    lean = [name for name in lean if costs[name][1] <= quick * (1 + ALIKE)]
    chosen = best if best in lean else (max if metric.higher else min)(lean, key=lambda name: means[name])
    count = min(len(g.runs) for g in groups)
    least_of, trade = _thrift(chosen, rest, costs)
    why = _reasons(metric, chosen, best, rest, means, costs, tested, by_name, groups[0].name)
    headline = f"Use {chosen}."
    if count < FEWEST_SEEDS and len(means) > 1:
        headline = f"Undecided on {count_of(count)}: {best} leads with {metric.show(means[best])} {metric.name}."
        why = _meanwhile(count, best, chosen, groups[0].name, costs)
        chosen, trade = best, []
    elif len(rest) == len(means) > 1:
        headline = f"Use {chosen}: no recipe is better beyond noise, and it {least_of}."
    elif len(means) == 1:
        headline = f"{chosen} reached {metric.show(means[chosen])}."
        why = ["There is nothing to compare it with: give a second recipe that runs."]
    return {"headline": headline, "use": chosen, "best": best, "tied": rest, "why": [*why, *trade]}


def _few(seeds: int) -> str:
    return "One seed" if seeds == 1 else "Two seeds"


def _meanwhile(seeds: int, best: str, cheapest: str, first: str, costs: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return what can be said of the leader where there are too few seeds to tell a difference from luck."""
    why = [f"{_few(seeds)} cannot show which difference is luck: run --seeds 5. Until then {best} is the best guess."]
    if best != first:
        why.append(f"Against {first}: {_cheaper(costs[best], costs[first])}.")
    if cheapest != best:
        why.append(f"{cheapest} is the cheapest: {_cheaper(costs[cheapest], costs[best])} than {best}.")
    return why


def _thrift(chosen: str, rest: Sequence[str], costs: Mapping[str, tuple[float, float]]) -> tuple[str, list[str]]:
    """Return what a recipe costs least of, and a sentence that names a faster one, where there is one."""
    memory, time = costs[chosen]
    quick = min(rest, key=lambda name: costs[name][1])
    if isfinite(time) and time > costs[quick][1] * (1 + ALIKE):
        trade = f"{quick} is faster than {chosen}: {_cheaper(costs[quick], costs[chosen])}."
        return "needs the least memory", [trade]
    said = {(True, True): "costs least", (True, False): "needs the least memory", (False, True): "takes the least time"}
    return said.get((isfinite(memory), isfinite(time)), "has the best mean"), []


def _reasons(
    metric: Metric,
    chosen: str,
    best: str,
    rest: Sequence[str],
    means: Mapping[str, float],
    costs: Mapping[str, tuple[float, float]],
    tested: Sequence[Difference],
    by_name: Mapping[str, Difference],
    first: str,
) -> list[str]:
    why = [f"It reaches {metric.show(means[chosen])} {metric.name} ({metric.better} is better)."]
    to_best = next((d for d in tested if d.other == chosen), None)
    if chosen != best and to_best is not None:
        why.append(
            f"{best} has the best mean, {metric.show(means[best])}, but the difference of "
            f"{metric.gap(to_best.interval.mean)} is within noise, and {chosen} takes "
            f"{_cheaper(costs[chosen], costs[best])}."
        )
    elif len(rest) > 1:
        others = together([name for name in rest if name != chosen])
        why.append(f"It cannot be told from {others} by quality, and it {_thrift(chosen, rest, costs)[0]}.")
    beaten = [d for d in tested if d.verdict == "clear"]
    if chosen == best and beaten:
        says = " and ".join(f"{d.other} by {metric.gap(d.interval.mean)}" for d in beaten)
        why.append(f"It is better than {says}, beyond noise.")
    if chosen != first and first in costs:
        change = by_name.get(chosen)
        clear = f", {metric.gap(change.interval.mean, signed=True)}" if change and change.verdict == "clear" else ""
        why.append(f"Against {first}: {_cheaper(costs[chosen], costs[first])}{clear}.")
    return why


def _cheaper(mine: tuple[float, float], theirs: tuple[float, float]) -> str:
    said = []
    for name, a, b in (("peak memory", mine[0], theirs[0]), ("time per step", mine[1], theirs[1])):
        if isfinite(a) and isfinite(b) and b:
            change = a / b - 1
            said.append(
                f"the same {name}"
                if abs(change) < ALIKE
                else f"{100 * abs(change):.0f} % {'less' if change < 0 else 'more'} {name}"
            )
    return " and ".join(said) or "costs were not measured"


def regroup(recipes: Sequence[tuple[str, Values, str]], runs: Sequence[Values]) -> list[Group]:
    """Return the runs by recipe, in the recipes' order and each by seed; one without a finite quality has failed."""
    groups = []
    for name, config, yaml in recipes:
        mine = sorted((_judged(r) for r in runs if r["name"] == name), key=lambda r: r["seed"])
        done, failed = [r for r in mine if "error" not in r], [r for r in mine if "error" in r]
        groups.append(Group(name, config, yaml, done, failed))
    return groups


def _judged(run: Values) -> Values:
    """Return a run, or why it failed: JSON has no NaN and no infinity, so that such a figure is read back as null."""
    if "error" in run:
        return run
    found = run["metrics"]["after"]["test"].get(run["quality"])
    if found is not None and isfinite(found):
        return run
    error = f"its {run['quality']} on the test set is NaN or infinite; lower the learning rate."
    return {"name": run["name"], "seed": run["seed"], "error": error}


__all__ = ["Group", "Metric", "analyse", "regroup"]
