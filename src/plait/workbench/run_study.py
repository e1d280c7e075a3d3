"""Run a study: sizes, then the search for learning rates, then every comparison; restartable at any point.

OUT/sizes.json                    the size of each method, by track and task
OUT/search/                       the runs of the search
OUT/runs/                         the runs of the comparisons, which share those of equal recipes
OUT/TRACK-TASK/                   a comparison: results.json, report.html
OUT/study.json                    all of it in one file: what the study says, the rates, the tables, the versions
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plait.errors import BadInput
from plait.recipe import Recipe
from plait.workbench.compare import Bars, compare, machine
from plait.workbench.local import check_workers, run_all
from plait.workbench.run import versions
from plait.workbench.store import Job, digest
from plait.workbench.study import Study
from plait.workbench.tracks import sizes
from plait.workbench.writing import Values, write_json


def run_study(
    study: Study,
    out: str | Path | None = None,
    *,
    engine: str = "local",
    workers: int = 1,
    quiet: bool = False,
    command: str | None = None,
) -> Values:
    """Run what is not yet done of a study, and return all its results, which also lie in OUT/study.json.

    Raises BadInput for a study that cannot be run, KeyboardInterrupt when Ctrl-C was pressed; the same call goes on.
    """
    check_workers(workers)
    place = Path(out) if out is not None else Path("runs") / study.study
    place.mkdir(parents=True, exist_ok=True)
    sized = {
        (track, task): _sizes(study, track, task, place / "sizes.json")
        for track, tasks in study.tracks.items()
        for task in tasks
    }
    first = next(iter(study.tracks))
    found = search(study, sized.get((first, study.search.task), {}), place / "search", workers, quiet)
    tables = {}
    for (track, task), given in sized.items():
        recipes = [
            study.recipe(name, task, given[name]["size"], found[name]["factor"])
            for name in _order(study)
            if found[name]["factor"] is not None and given[name]["amount"] is not None
        ]
        results = compare(
            recipes,
            seeds=study.seeds,
            out=place / f"{track}-{task}",
            runs=place / "runs",
            engine=engine,
            workers=workers,
            quiet=quiet,
            command=command,
        )
        tables[f"{track}, {task}"] = _table(results, given)
        write_json(place / "study.json", _whole(study, found, tables, workers))
    return _whole(study, found, tables, workers) | {"files": {"results": str(place / "study.json")}}


def _order(study: Study) -> list[str]:
    """Return the methods, the reference first: it is what a comparison holds the others against."""
    return [study.reference, *(name for name in study.methods if name != study.reference)]


def _sizes(study: Study, track: str, task: str, path: Path) -> dict[str, Values]:
    """Return the sizes of a track, read from the file where an earlier call left them for the same recipes."""
    kept: Values = json.loads(path.read_text()) if path.exists() else {}
    mark = [digest(study.recipe(name, task)) for name in _order(study)]
    held = kept.get(f"{track}, {task}")
    if held is None or held["mark"] != mark:
        held = kept[f"{track}, {task}"] = {"mark": mark, "sizes": sizes(study, track, task)}
        write_json(path, kept)
    found: dict[str, Values] = held["sizes"]
    return found


# -- the search ----------------------------------------------------------------------------------------------------
def search(
    study: Study, sized: Mapping[str, Values], place: Path, workers: int = 1, quiet: bool = False
) -> dict[str, Values]:
    """Return, by method, the factor of its rate with the lowest validation loss, and what each trial gave."""
    size = {name: sized.get(name, {}).get("size") for name in _order(study)}
    trials = {
        name: {factor: _trial(study, name, size[name], factor, place) for factor in study.search.factors}
        for name in size
    }
    todo = [job for jobs in trials.values() for job in jobs.values()]
    with Bars(todo, quiet) as bars:
        run_all(bars.left(), bars, workers)
    return {name: _best(study, name, jobs) for name, jobs in trials.items()}


def _trial(study: Study, name: str, size: int | None, factor: float, place: Path) -> Job:
    made: Recipe = study.recipe(name, study.search.task, size, factor).seeded(study.search.seed)
    recipe = replace(made, folded=False)  # a trial is judged by its validation loss alone
    return Job(recipe, place / f"{name}-{digest(recipe)}" / f"seed-{study.search.seed}")


def _best(study: Study, name: str, jobs: Mapping[float, Job]) -> Values:
    losses = {factor: _loss(job) for factor, job in jobs.items()}
    finite = {factor: loss for factor, loss in losses.items() if loss is not None}
    best = min(finite, key=lambda factor: finite[factor]) if finite else None
    rate = study.methods[name].rate
    return {
        "factor": best,
        "rate": None if best is None else rate * best,
        "at the edge": best in (min(losses), max(losses)) and len(losses) > 2,
        "trials": [{"rate": rate * factor, "validation loss": loss} for factor, loss in sorted(losses.items())],
        "error": next((told["error"] for job in jobs.values() if not finite and (told := job.failed())), None),
    }


def _loss(job: Job) -> float | None:
    """Return the validation loss at the end of a trial; None where it failed or was not finite."""
    done = job.finished()
    curve = [] if done is None else done.get("curve", [])
    loss = curve[-1]["loss"] if curve else None
    return loss if loss is not None and math.isfinite(loss) else None


# -- what is kept --------------------------------------------------------------------------------------------------
LEFT_OUT = ("yaml", "history", "validation", "measures", "recipe")
"""What of a comparison's rows stands in its own results.json only."""


def _table(results: Values, sized: Mapping[str, Values]) -> Values:
    found = results["analysis"]
    if found["metric"] is None:
        raise BadInput(
            f"no run of {results['title']} came to its end: see log.txt beside {results['files']['report']}."
        )
    rows = [
        {k: v for k, v in row.items() if k not in LEFT_OUT} | {"size": sized[row["name"]]} for row in found["recipes"]
    ]
    return {
        "title": results["title"],
        "facts": results["facts"],
        "made": results["made"],
        "metric": found["metric"],
        "rows": rows,
        "tied": found["summary"]["tied"],
        "warnings": _words(found["warnings"]),
    }  # fmt: skip


def _words(warnings: Sequence[Mapping[str, str]]) -> list[str]:
    return [warning["text"] for warning in warnings if warning["kind"] in ("failed", "seeds", "skipped")]


def _whole(study: Study, found: Mapping[str, Values], tables: Mapping[str, Values], workers: int) -> Values:
    return {
        "study": study.config(),
        "rates": dict(found),
        "tables": dict(tables),
        "versions": versions(),
        "machine": machine(workers),
    }


def summary(results: Mapping[str, Any]) -> list[list[str]]:
    """Return a line for each method: its quality in each table, marked where it cannot be told from the best."""
    tables: Mapping[str, Values] = results["tables"]
    lines = []
    for name, rate in results["rates"].items():
        cells = [name, "–" if rate["rate"] is None else f"{rate['rate']:.2g}"]
        for held in tables.values():
            row = next((r for r in held["rows"] if r["name"] == name), None)
            tied = " =" if name in held["tied"] else ""
            cells.append("–" if row is None else f"{row['quality']['mean']:.4g}{tied}")
        lines.append(cells)
    return lines
