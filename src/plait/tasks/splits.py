"""Splitting examples into training, validation and test sets: seeded, and stratified where there are classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from plait.errors import BadInput
from plait.tasks.base import Options
from plait.tasks.reading import Table, column, only, read

NAMES = ("train", "validation", "test")


def share(value: Any, option: str, count: int, least: int) -> int:
    """Return how many of `count` examples a share is: at least `least`."""
    if not isinstance(value, float) or not 0 < value < 0.5:
        raise BadInput(f"{option} must be a share between 0 and 0.5, or a data set of its own, not {value!r}.")
    return max(round(value * count), least)


def is_share(value: Any) -> bool:
    """Say whether a validation= or test= is a number, and not data."""
    return isinstance(value, int | float)


def halves(count: int, taken: int, groups: np.ndarray[Any, Any] | None, seed: int) -> tuple[Any, Any]:
    """Return positions (rest, taken): seeded, with the classes of `groups` in proportion, each in ascending order."""
    from sklearn.model_selection import train_test_split

    rest, held = train_test_split(np.arange(count), test_size=taken, random_state=seed, stratify=groups)
    return np.sort(rest), np.sort(held)


def _classes(table: Table, label: str | None) -> np.ndarray[Any, Any] | None:
    return None if label is None else np.asarray([_name(value) for value in column(table, label, "label")])


def limit(table: Table, rows: int | None, label: str | None, seed: int) -> Table:
    """Return `rows` of a table's examples, seeded and in proportion to the classes; all of them for None."""
    if rows is None or rows >= len(table):
        return table
    groups = _classes(table, label)
    if groups is not None:
        names, counts = np.unique(groups, return_counts=True)
        if rows < len(names) or counts.min() < 2 or len(table) - rows < len(names):
            groups = None
    kept = table.iloc[halves(len(table), rows, groups, seed)[1]]
    kept.attrs = dict(table.attrs)
    return kept


def three(options: Options, label: str | None = None) -> tuple[Table, Table, Table]:
    """Return the training, validation and test tables that were asked for; `label` is the column to stratify by."""
    tables = dict(read(options.data, options.encoding))
    for part in ("validation", "test"):
        given = getattr(options, part)
        if not is_share(given):
            tables[part] = only(read(given, options.encoding), part)
    train = tables.pop("all", None)
    train = tables.pop("train", None) if train is None else train
    if train is None:
        raise BadInput("the data has no split to train on: give one called train.")
    source = train.attrs["source"]
    train = limit(train, options.rows, label, options.split_seed)
    found = {part: limit(table, options.rows, label, options.split_seed) for part, table in tables.items()}
    whole = len(train)
    for part in ("test", "validation"):
        if part not in found:
            groups = _classes(train, label)
            taken = _room(train, groups, getattr(options, part), part, whole, source)
            try:
                rest, held = halves(len(train), taken, groups, options.split_seed)
            except ValueError:
                raise BadInput(
                    f"{source} has too few rows of some class to split: give more, or validation= and test= of "
                    f"their own."
                ) from None
            found[part], train = _rows(train, held), _rows(train, rest)
    return train, found["validation"], found["test"]


def _rows(table: Table, positions: Any) -> Table:
    chosen = table.iloc[positions]  # whose index still tells the rows of the whole table
    chosen.attrs = dict(table.attrs)
    return chosen


def _room(table: Table, groups: Any, value: Any, part: str, whole: int, source: str) -> int:
    names, counts = np.unique(groups, return_counts=True) if groups is not None else (np.empty(0), np.empty(0))
    if len(names) and counts.min() < 2:
        name, count = names[counts.argmin()], int(counts.min())
        raise BadInput(
            f"{source} has only {count} row left of the class '{name}' for {part}: give at least three of each class, "
            f"or validation= and test= of their own."
        )
    taken = share(value, part, whole, max(len(names), 1))
    if len(table) - taken < max(len(names), 1):
        raise BadInput(
            f"{source} has {whole} rows, too few to split into training, validation and test sets: give more, or "
            f"validation= and test= of their own."
        )
    return taken


def _plain(value: Any) -> Any:
    """Return a label as Python's own value, whole numbers as int: tables hold 1 and 1.0 for the same class."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name(value: Any) -> str:
    """Return the class that a label names: its text, so that 1 and "1" are one class, and True is another."""
    return str(_plain(value))


def classes_of(train: list[Any], others: dict[str, list[Any]], source: str) -> tuple[list[str], dict[str, list[int]]]:
    """Return the classes of the training labels in order (numbers by size), and every set's labels as class numbers.

    Raises BadInput for a label that training never shows, or when there is only one class.
    """
    odd = next((value for value in sum(others.values(), train) if isinstance(value, list | dict)), None)
    if odd is not None:
        raise BadInput(f"{source} has the label {odd!r}: a label is one text or number.")
    values = [_plain(value) for value in train]
    numbers = all(isinstance(value, int | float) for value in values)
    size = {str(value): float(value) if numbers else 0.0 for value in values}
    names = sorted(size, key=lambda name: (size[name], name))
    if numbers and any(isinstance(value, float) for value in values):
        raise BadInput(f"{source} has labels that are not whole numbers: use the task regression.")
    if len(names) < 2:
        raise BadInput(
            f"{source} has only the class '{names[0]}' in the {len(values)} rows to train on: a classifier needs two "
            "or more."
        )
    place = {name: i for i, name in enumerate(names)}
    coded: dict[str, list[int]] = {"train": [place[_name(value)] for value in train]}
    for part, labels in others.items():
        unseen = [value for value in labels if _name(value) not in place]
        if unseen:
            raise BadInput(
                f"the {part} set has the label '{unseen[0]}', which the training set never shows: add such rows to "
                f"training, or remove them."
            )
        coded[part] = [place[_name(value)] for value in labels]
    return names, coded
