"""Compare recipes: the same splits and seeds, each run in a process of its own; then the figures, the words, the page.

A comparison that was stopped or killed goes on where it was: finished runs are kept, a run under way resumes from its
checkpoint.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from plait.errors import BadInput
from plait.recipe import Recipe
from plait.workbench.analysis import analyse, regroup
from plait.workbench.local import check_workers, run_all, threads
from plait.workbench.sources import changed, refuse_mixed
from plait.workbench.store import Job, jobs
from plait.workbench.writing import Values, write_json


def compare(
    recipes: Sequence[Recipe],
    *,
    seeds: int = 5,
    out: str | Path | None = None,
    runs: str | Path | None = None,
    engine: str = "local",
    workers: int = 1,
    quiet: bool = False,
    command: str | None = None,
) -> Values:
    """Run every recipe with every seed and return the results, which are also written to OUT with the page.

    runs: the folder of the runs [OUT/runs]; comparisons that share it share the runs of equal recipes. workers: how
    many runs at a time share the cores; their times are then not those of a run that has the machine to itself.
    command: what was typed, for the report.

    Raises BadInput for recipes that cannot be compared, KeyboardInterrupt when Ctrl-C was pressed; what was finished
    then stays, and the same call goes on.
    """
    check(recipes, seeds)
    if engine not in ("local", "ray"):
        raise BadInput(f"engine must be local or ray, not '{engine}'.")
    check_workers(workers)
    place = Path(out) if out is not None else Path("runs") / "-vs-".join(r.name for r in recipes)[:100]
    todo = jobs(list(recipes), seeds, Path(runs) if runs is not None else place / "runs")
    refuse_mixed(
        recipes[0].data, [done for job in todo if (done := job.finished()) is not None], todo[0].folder.parents[1]
    )
    check_on_models([r for r in recipes if any(job.recipe.name == r.name and job.finished() is None for job in todo)])
    with Bars(todo, quiet) as bars:
        left = bars.left()
        if engine == "ray":
            from plait.workbench.ray import run_all as run_on_ray

            run_on_ray(left, bars)
        else:
            run_all(left, bars, workers)
    return collect(recipes, todo, place, workers, command)


def check(recipes: Sequence[Recipe], seeds: int) -> None:
    """Refuse recipes that cannot stand in one table."""
    if not recipes:
        raise BadInput("there is nothing to compare: give two recipes or more.")
    if seeds < 1:
        raise BadInput(f"seeds must be at least 1, not {seeds}.")
    names = [r.name for r in recipes]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise BadInput(
            f"two recipes are called '{twice}': give each a name of its own, in its file or by its file's name."
        )
    first = recipes[0]
    for other in recipes[1:]:
        for part in ("data", "task", "seed"):
            mine, theirs = getattr(first, part), getattr(other, part)
            if mine != theirs:
                raise BadInput(
                    f"{first.name} and {other.name} differ in '{part}' ({_short(mine)}; {_short(theirs)}): recipes are "
                    "compared on the same data and seeds, so make these equal."
                )
    if first.train.device is not None and "cuda" in first.train.device and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        raise BadInput("the recipes ask for a GPU, but CUDA_VISIBLE_DEVICES hides all of them: unset it.")


def check_on_models(recipes: Sequence[Recipe]) -> None:
    """Refuse, before the first run, recipes whose methods cannot work on their model.

    A model is loaded once for recipes that stand one after the other with the same model, data and task.
    """
    from plait.workbench.run import load

    models: dict[str, Any] = {}
    for recipe in recipes:
        key = repr((recipe.model, recipe.data, recipe.task))
        if key not in models:
            models = {key: load(recipe).model}
        try:
            recipe.check(models[key])
        except BadInput as problem:
            raise BadInput(f"{recipe.name}: {problem}") from None


def _short(value: Any) -> str:
    held = {k: v for k, v in asdict(value).items() if v is not None} if is_dataclass(value) else value  # type: ignore[arg-type]
    return str(held)


# -- results -------------------------------------------------------------------------------------------------------
def collect(
    recipes: Sequence[Recipe], todo: Sequence[Job], place: Path, workers: int = 1, command: str | None = None
) -> Values:
    """Gather what the runs left, analyse it, and write results.json and report.html."""
    from plait.workbench.report import describe_methods, write_report

    runs = [found for job in todo if (found := _result(job)) is not None]
    groups = regroup([(r.name, r.config(), str(r)) for r in recipes], runs)
    seeds = sorted({job.recipe.seed for job in todo})
    first = recipes[0]
    found = analyse(groups, seeds)
    found["warnings"] = [*changed(runs), *found["warnings"]]
    versions: Values = next((run["versions"] for run in runs if "versions" in run), {})
    tasks = {run["task"] for run in runs if "task" in run}
    notes = list(dict.fromkeys(note for run in runs for note in run.get("notes", [])))
    results: Values = {
        "title": f"{len(recipes)} recipe{'s' if len(recipes) != 1 else ''} on {Path(first.data.source).name}",
        "facts": [
            *dict.fromkeys(Path(r.model).name for r in recipes),
            *sorted(tasks),
            f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}",
            *dict.fromkeys(f"{r.train.steps} steps of {r.train.batch_size} examples" for r in recipes),
        ],
        "made": {
            "Seeds": ", ".join(map(str, seeds)),
            "Data": _data(first, runs),
            **({"Notes": "; ".join(notes)} if notes else {}),
            "Versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
            "Machine": machine(workers),
            "Command": command or f"compare([{', '.join(r.name for r in recipes)}], seeds={len(seeds)}) from Python",
        },
        "versions": versions,
        "methods": {r.name: describe_methods(r.config()) for r in recipes},
        "analysis": found,
        "runs": runs,
        "files": {"results": str(place / "results.json"), "report": str(place / "report.html")},
    }
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "results.json", results)
    write_report(results, place / "report.html")
    return results


def _result(job: Job) -> Values | None:
    done = job.finished()
    if done is not None:
        return done | {"name": job.recipe.name}
    failed = job.failed()
    return None if failed is None else {"name": job.recipe.name, "seed": job.recipe.seed, **failed}


def _data(recipe: Recipe, runs: Sequence[Values]) -> str:
    tests = [run["test"] for run in runs if "test" in run]
    if not tests:
        return recipe.data.source
    same = len({t["digest"] for t in tests}) == 1
    how = "the same split for all seeds" if same else "a split of its own for each seed, the same for all recipes"
    how = "not the same for all runs" if changed(runs) else how
    return (
        f"{recipe.data.source}: {tests[0]['trained on']} examples to train on, {tests[0]['examples']} to test on; {how}"
    )


def machine(workers: int = 1) -> str:
    """Return what the times were taken on, and how many runs were there at a time."""
    import torch

    cores = os.cpu_count() or 1
    each = torch.get_num_threads() if workers == 1 else threads(workers)
    shared = f"{each} of {cores} cores" + (f" for each of {workers} runs at a time" if workers > 1 else "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.system()} {platform.machine()}, {shared}{gpu}"


# -- progress ------------------------------------------------------------------------------------------------------
class Bars:
    """Progress of all runs: a bar for the whole and one for each run under way; plain lines without a terminal."""

    def __init__(self, todo: Sequence[Job], quiet: bool) -> None:
        self.todo, self.quiet, self._lock = list(todo), quiet, threading.Lock()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        if not self.quiet and console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[says]}"), console=console,
            )  # fmt: skip
            self._bars.start()
            self._tasks["all"] = self._bars.add_task("runs", total=len(self.todo), says="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def left(self) -> list[Job]:
        """Return the runs that are not finished, each ready to be run; show the others as kept."""
        left = []
        for job in self.todo:
            if job.finished() is None:
                job.ready()
                left.append(job)
            else:
                self.done(job, "kept")
        return left

    def step(self, job: Job, told: Values) -> None:
        """Show how far a run is."""
        if self._bars is None:
            return
        with self._lock:
            if job.title not in self._tasks:
                self._tasks[job.title] = self._bars.add_task(job.title, total=told["steps"], says="")
            says = "" if told.get("objective") is None else f"objective {told['objective']:.4g}"
            self._bars.update(self._tasks[job.title], completed=told["step"], says=says)

    def done(self, job: Job, how: str) -> None:
        """Show that a run came to its end."""
        with self._lock:
            if self._bars is not None:
                if job.title in self._tasks:
                    self._bars.remove_task(self._tasks.pop(job.title))
                self._bars.advance(self._tasks["all"])
            elif not self.quiet:
                print(f"{job.title}: {how}", file=sys.stderr)


def lines(results: Values) -> Iterator[str]:
    """Yield what the terminal shows below the table: the summary and the warnings."""
    summary = results["analysis"]["summary"]
    if summary:
        yield summary["headline"]
        yield from (f"  {reason}" for reason in summary["why"])
    yield from (f"! {warning['text']}" for warning in results["analysis"]["warnings"])
