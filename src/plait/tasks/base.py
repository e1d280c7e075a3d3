"""A task: the model, the splits, how the model is called, and how well it does; everything a run needs but methods."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from plait.batch import Batch
from plait.errors import BadInput, did_you_mean
from plait.method import Misfit, Predictor

TASKS = {
    "text-classification": "plait.tasks.text",
    "causal-language-modelling": "plait.tasks.language",
    "image-classification": "plait.tasks.images",
    "classification": "plait.tasks.tabular",
    "regression": "plait.tasks.tabular",
}
"""The tasks by name, and the module whose `build` makes each."""
TEXTS, TABLES = ("text-classification", "causal-language-modelling"), ("classification", "regression")
READ_BY = {
    **{"length": TEXTS, "text": TEXTS, "tokenizer": TEXTS, "features": TABLES, "size": ("image-classification",)},
    **{"prompt": ("causal-language-modelling",), "response": ("causal-language-modelling",)},
    "label": ("text-classification", "image-classification", *TABLES),
}
"""The options that only some tasks read, and which do."""


class Data(Protocol):
    """What a model is trained or judged on: a length, and the batch at some positions."""

    def __len__(self) -> int: ...

    def batch(self, positions: Tensor) -> Batch:
        """Return the examples at those positions."""
        ...


class Metrics(Protocol):
    """metrics(model, data, predictor=None) -> figures by name, always with "loss"; nothing about the run changes."""

    def __call__(self, model: nn.Module, data: Data, predictor: Predictor | None = None) -> dict[str, float]:
        """Return how well the model does on a set."""
        ...


@dataclass(frozen=True)
class Task:
    """Everything a run needs beside its methods."""

    name: str
    model: nn.Module
    """Ready to train; the head that the task made anew is marked with `plait.parametrize.freeze.mark_fresh`."""
    train: Data
    validation: Data
    test: Data
    other: Data | None
    """A second domain, on which forgetting is measured."""
    call: Callable[[nn.Module, Any], Any]
    """call(model, inputs) -> output."""
    loss: Misfit
    metrics: Metrics
    quality: str
    """The headline among the metrics."""
    better: Literal["higher", "lower"]
    save: Callable[[str | Path], None] | None = None
    """save(folder) writes what belongs beside the model: the tokenizer, the classes, the standardization."""
    classes: tuple[str, ...] = ()
    tokenizer: Any = None
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know about the data, in words."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `load_task` was asked for, as the builders of tasks read it."""

    task: str
    model: Any
    data: Any
    seed: int = 0
    split: int | None = None
    length: int = 128
    rows: int | None = None
    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    response: str = "response"
    features: tuple[str, ...] | None = None
    size: int | None = None
    validation: Any = 0.15
    test: Any = 0.15
    other: Any = None
    tokenizer: Any = None
    encoding: str = "utf-8"

    @property
    def split_seed(self) -> int:
        """The seed of the splits."""
        return self.seed if self.split is None else self.split


def load_task(
    task: str | None,
    model: str | Path | nn.Module,
    data: Any,
    *,
    seed: int = 0,
    length: int = 128,
    rows: int | None = None,
    text: str = "text",
    label: str = "label",
    other: Any = None,
    **options: Any,
) -> Task:
    """Return a task, ready to train: load the model and the data, split, encode.

    task: a name in TASKS, or None to tell it from the data. model: a name (`plait.models.NAMED`), a folder or hub name
    of a transformers model, or any module. data: the name of a packaged set (`plait.tasks.packaged.SETS`), a csv, tsv,
    jsonl, parquet or txt file, a folder of texts or images (one folder a class), a `datasets` object, a DataFrame, a
    list of dicts, or a dict of such with the keys train, validation and test.

    seed: of fresh weights, and of the splits where split= gives no seed of their own. length: tokens of an example, at
    most. rows: use only that many examples. text, label, prompt, response: names of columns. other: data of a second
    domain, for forgetting.
    Further options: validation and test (a share of the data, or data of their own), features (the columns of a table
    to use), size (side of images, in pixels), tokenizer (for a model given as a module), encoding (of text files),
    split (a seed: equal splits whatever the run's own seed).

    >>> load_task("classification", "mlp", "wine").quality
    'accuracy'
    """
    known = inspect.signature(Options).parameters
    for name in options:
        if name not in known:
            raise BadInput(f"a task has no option '{name}'{did_you_mean(name, known)}.")
    for name, count in (("length", length), ("rows", rows)):
        if count is not None and (not isinstance(count, int) or count < 2):
            raise BadInput(f"{name} must be a whole number of 2 or more, not {count!r}.")
    if task is not None and task not in TASKS:
        raise BadInput(f"there is no task '{task}': give one of {', '.join(TASKS)}.")
    if options.get("features") is not None:
        options["features"] = tuple(options["features"])
    given = Options(
        task=task or "", model=model, data=data, seed=seed, length=length, rows=rows, text=text, label=str(label),
        other=other, **options,
    )  # fmt: skip
    if task is None:
        from plait.tasks.guess import guess
        from plait.tasks.packaged import SETS
        from plait.tasks.reading import read

        if not (isinstance(data, str) and data in SETS):
            given = replace(given, data=read(data, given.encoding))
        given = replace(given, task=(task := guess(given)))
    for name, readers in READ_BY.items():
        value = getattr(given, name)
        if value != known[name].default and task not in readers:
            raise BadInput(f"{task} has no use for {name}={value!r}, which is for {' and '.join(readers)}: remove it.")
    made: Task = importlib.import_module(TASKS[task]).build(given)
    return made


def forgetting(task: Task, before: float, model: nn.Module | None = None) -> dict[str, float]:
    """Return the loss on the task's second domain before and after training, and the rise: {before, after, forgetting}.

    `before` is `task.metrics(task.model, task.other)["loss"]`, taken before training; `model` is what training left.
    """
    if task.other is None:
        raise BadInput("forgetting needs a second domain: give the task other=, a data set of the old domain.")
    after = task.metrics(task.model if model is None else model, task.other)["loss"]
    return {"before": before, "after": after, "forgetting": after - before}
