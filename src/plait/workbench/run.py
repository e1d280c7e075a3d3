"""Run a recipe: load what it names, train, measure before and after, and write it all down in a folder.

A folder holds `recipe.yaml`, the checkpoints, `before.json` (the figures of the untrained model) and `results.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import BadInput, Interrupted
from plait.recipe import Recipe
from plait.workbench.progress import Progress, stoppable
from plait.workbench.sources import fingerprint, hold
from plait.workbench.writing import write_json, write_text

if TYPE_CHECKING:
    from torch import nn

    from plait.method import Method, Now
    from plait.tasks.base import Task
    from plait.train import Run
    from plait.workbench.memory import Gauge
    from plait.workbench.predicting import Figures

FREE = ("steps", "save_every", "measure_every", "device", "nonfinite")
"""Options of training that may change when a run goes on: they do not change the weights that it has, or, like the
steps, are the checkpoint's to judge."""
ASIDE = ("name", "validate_every")
"""What of a recipe has no part in its weights."""
COSTS = ("measured", "seconds", "memory", "parameters")
"""What a run that takes no step cannot measure."""


@dataclass
class Outcome:
    """What running a recipe gives: the task with its model, the run, and the figures that results.json holds."""

    task: Task
    run: Run
    results: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        """The finished model."""
        return self.run.model


def versions() -> dict[str, str]:
    """Return what the figures depend on."""
    import plait

    return {
        "plait": plait.__version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def load(recipe: Recipe) -> Task:
    """Return the task that a recipe names: its model, data, loss and metrics."""
    from plait.tasks.base import load_task

    data = {name: value for name, value in asdict(recipe.data).items() if value is not None}
    return load_task(recipe.task, recipe.model, data.pop("source"), seed=recipe.seed, **data)


def prepare(recipe: Recipe, folder: Path, data: str | None = None) -> None:
    """Take a folder for a recipe; refuse one that holds a run of another, or on data of another fingerprint."""
    held = folder / "recipe.yaml"
    if held.exists():
        mine, theirs = (_fixed(r.config()) for r in (recipe, Recipe.read(held)))
        odd = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if odd:
            raise BadInput(
                f"{folder} holds a run of another recipe (its {odd[0]}: {theirs.get(odd[0])}; this one's: "
                f"{mine.get(odd[0])}): give another --out, or delete that one to start anew."
            )
    folder.mkdir(parents=True, exist_ok=True)
    hold(recipe.data.source, data, folder)
    if not held.exists():
        write_text(held, f"{recipe}\n")


def _take_over(recipe: Recipe, folder: Path | None, now: Now) -> None:
    """Say in the folder what it holds from here on; the figures of fewer steps, if any, are not of it."""
    if folder is None or int(os.environ.get("RANK", 0)) > 0:
        return
    write_text(folder / "recipe.yaml", f"{recipe}\n")
    if now.step < now.steps:
        (folder / "results.json").unlink(missing_ok=True)


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    train = {key: value for key, value in config.pop("train", {}).items() if key not in FREE}
    return {key: value for key, value in config.items() if key not in ASIDE} | ({"train": train} if train else {})


def run_recipe(
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    quiet: bool = False,
    watch: Callable[[Now], None] | None = None,
    write: bool = True,
) -> Outcome:
    """Train what a recipe says, measure it, and write results.json into `folder`; go on from a checkpoint found there.

    watch: called after each step, beside the progress that is shown. write: whether results.json is written.

    Raises Interrupted, after a checkpoint, when Ctrl-C was pressed.
    """
    from plait.workbench.folded import folded_figures
    from plait.workbench.predicting import judged

    folder = None if folder is None else Path(folder)
    laps = Laps()
    data = fingerprint(recipe.data)
    task, methods = load(recipe), recipe.build()
    recipe.check(task.model)
    if folder is not None:
        prepare(recipe, folder, data)
    whole = sum(p.numel() for p in task.model.parameters())
    laps.end("load")
    before = _before(task, folder)
    laps.end("evaluate before")
    trained = _train(recipe, task, methods, folder, quiet or int(os.environ.get("RANK", 0)) > 0, watch)
    laps.end("train")
    run, gauge = trained.run, trained.gauge
    if run.stopped:
        raise Interrupted(
            f"stopped after step {run.now.step} of {recipe.train.steps}"
            + (f"; run it again to go on from the checkpoint in {folder}." if folder else ".")
        )
    after, each = judged(task, methods, run.model, run.now)
    laps.end("evaluate after")
    results = _describe(recipe, task) | {
        "data": data,
        "metrics": {"before": before, "after": after},
        "forgetting": _forgetting(before, after),
        "folded": folded_figures(task, run.model) if recipe.folded else None,
        "scores": each,
        **trained.figures(),
        **trained.costs(laps, whole),
        **_kept_costs(folder, gauge),
    }
    if write and folder is not None and int(os.environ.get("RANK", 0)) == 0:
        write_json(folder / "results.json", results)
    return Outcome(task, run, results)


class Laps:
    """A stopwatch: the seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end(self, name: str) -> None:
        """Take the seconds since the part before."""
        now = time.perf_counter()
        self.seconds[name], self._began = now - self._began, now


@dataclass
class Trained:
    """What training left, and what watched it."""

    run: Run
    gauge: Gauge
    curve: Curve
    parameters: int | None
    """How many parameters were trained at the first step that was seen."""

    def figures(self) -> dict[str, Any]:
        """Return what was seen while training."""
        return {
            "history": self.run.history,
            "curve": self.curve.points,
            "measures": self.run.measures,
            "skipped": self.run.skipped,
        }

    def costs(self, laps: Laps, whole: int) -> dict[str, Any]:
        """Return the time and memory of the steps that were seen, and which these are; whole: the model's parameters.

        A run that goes on from a checkpoint has not seen the steps before it.
        """
        end, seen = self.run.now.step, len(self.gauge.seconds)
        some = f"steps {end - seen} to {end - 1}, after a checkpoint" if seen else "no step: the run had taken them all"
        return {
            "measured": f"seconds and memory are of {f'all {end} steps' if seen == end else some}",
            "seconds": {**laps.seconds, "start": self.gauge.start_seconds, "step": self.gauge.seconds_per_step},
            "memory": self.gauge.memory.as_dict(),
            "parameters": {"model": whole, "trained": self.parameters},
        }


def _kept_costs(folder: Path | None, gauge: Gauge) -> dict[str, Any]:
    """Return what a finished run had cost, where none of its steps was taken again."""
    if folder is None or gauge.seconds:
        return {}
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: found[name] for name in COSTS if name in found}


def _describe(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Return what a run was asked for, as results.json says it."""
    from plait.workbench.scores import digest

    return {
        "name": recipe.name,
        "recipe": recipe.config(),
        "yaml": str(recipe),
        "seed": recipe.seed,
        "task": task.name,
        "notes": list(task.notes),
        "quality": task.quality,
        "better": task.better,
        "test": {"examples": len(task.test), "trained on": len(task.train), "digest": digest(task.test)},
        "versions": versions(),
    }


def _train(
    recipe: Recipe,
    task: Task,
    methods: Sequence[Method],
    folder: Path | None,
    quiet: bool,
    watch: Callable[[Now], None] | None,
) -> Trained:
    """Train, watched: progress, memory, the validation curve, and Ctrl-C."""
    import plait
    from plait.workbench.memory import Gauge, load_libraries

    load_libraries(methods)
    gauge, curve = Gauge(task.model), Curve(task, recipe.validate_every or ceil(recipe.train.steps / 8), folder)
    counted: list[int] = []
    with stoppable() as stop, Progress(recipe.name, recipe.train.steps, quiet) as progress, gauge:

        def on_step(now: Now) -> bool:
            gauge.on_step(now)
            if not counted:
                counted.append(sum(p.numel() for p in task.model.parameters() if p.requires_grad))
            progress.step(now)
            curve.step(now)
            if watch is not None:
                watch(now)
            return stop.asked

        def on_start(now: Now) -> None:
            gauge.on_start(now)
            _take_over(recipe, folder, now)

        options: dict[str, Any] = asdict(recipe.train)
        options["save_every"] = options["save_every"] or max(recipe.train.steps // 10, 1)
        options |= {"call": gauge.call(task.call), "validation": task.validation, "folder": folder}
        options |= {"seed": recipe.seed, "on_start": on_start, "on_step": on_step}
        run = plait.train(task.model, gauge.data(task.train), task.loss, methods, **options)
    return Trained(run, gauge, curve, counted[0] if counted else None)


class Curve:
    """The loss on some validation examples every so many steps, kept in the folder when the run goes on later."""

    examples = 128

    def __init__(self, task: Task, every: int, folder: Path | None) -> None:
        from plait.workbench.scores import Part

        self.task, self.every, self.part = task, every, Part(task.validation, self.examples)
        self.file = None if folder is None else folder / "curve.json"
        self.points: list[dict[str, float]] = []
        if self.file is not None and self.file.exists():
            self.points = json.loads(self.file.read_text())

    def step(self, now: Now) -> None:
        """Take a point where one is due; nothing about the run changes."""
        if now.step % self.every or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return
        loss = self.task.metrics(self.task.model, self.part)["loss"]
        self.points = [p for p in self.points if p["step"] < now.step] + [{"step": now.step, "loss": loss}]
        if self.file is not None:
            with contextlib.suppress(BadInput):  # a full disk is the checkpoint's to say: the run needs no curve
                write_json(self.file, self.points)


def _before(task: Task, folder: Path | None) -> Figures:
    """Return the figures of the untrained model; an earlier part of this run has left them in a file."""
    kept = None if folder is None else folder / "before.json"
    if kept is not None and kept.exists():
        try:
            found: Figures = json.loads(kept.read_text())
            return found
        except json.JSONDecodeError:
            kept.unlink()
    from plait.workbench.predicting import metrics

    figures = metrics(task, task.model)
    if kept is not None:
        write_json(kept, figures)
    return figures


def _forgetting(before: Figures, after: Figures) -> float | None:
    """Return by how much the loss on the other domain rose."""
    if "other" not in after or "loss" not in after["other"] or before["other"]["loss"] is None:
        return None  # a NaN of the untrained model is null in its file
    return after["other"]["loss"] - before["other"]["loss"]
