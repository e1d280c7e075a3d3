"""A study: many methods on several tasks, each with as many learning rates tried as the others, in one file.

    study: adapters
    reference: lora                       # the method that the others are held against
    seeds: 3
    search: {task: tweets, factors: [0.3, 1, 3]}
    tracks: {parameters: [tweets, bible], memory: [tweets]}
    tasks:
      tweets:
        model: minilm
        data: {source: tweets, rows: 1200, split: 0}
        train: {steps: 60, batch_size: 16}
        values: {size: 8, rate: 1, where: query|value}
    values: {step: {adamw: {lr: $rate}}}  # for all tasks
    methods:
      lora: {rate: 2e-3, methods: [{lora: {rank: $size, where: $where}}, $step]}

Where a method's lines hold `$name`, the value of that name stands in the run: the task's, or one for all tasks. Two
are the study's own: `$rate` is the method's rate, times the factor that served it best on the search's validation set,
times the task's `rate`; `$size` is the task's for the reference, and for the others what the track asks for
(`plait.workbench.tracks`).

Each track on each task is a comparison of its own (`plait.workbench.compare`): its runs, its seeds, its report.
A file with a line `extends: other.yaml` holds only what is different from the study beside it: another size, say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import BadInput, did_you_mean
from plait.recipe import Recipe, override_with
from plait.section import TEXT, Section, given_values, section, whole
from plait.workbench.writing import Values

TRACKS = ("parameters", "memory")


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _factors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_positive, value)) and len({*value}) == len(value)


_POSITIVE: Any = {"rule": ("a number above 0", _positive)}
_MAPPING: Any = {"rule": ("a mapping of names", _mapping)}
_FACTORS: Any = {"rule": ("a list of different numbers above 0", _factors)}


@dataclass(frozen=True, kw_only=True)
class Search(Section):
    """Which learning rates are tried, on which task, with which seed. Each method gets the same number of trials."""

    path = "search."
    task: str = field(default="", metadata=TEXT)
    factors: list[float] = field(default_factory=lambda: [1.0], metadata=_FACTORS)
    seed: int = field(default=1000, metadata=whole(0, 2**32 - 1))


@dataclass(frozen=True, kw_only=True)
class Entry(Section):
    """A method of a study, or several that act together: its rate before any factor, and its lines of a recipe."""

    path = "methods."
    rate: float = field(default=1e-3, metadata=_POSITIVE)
    methods: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Study(Section):
    """What the file says. Made by `Study.read`; a wrong value is told in one sentence before anything runs."""

    study: str = field(default="study", metadata=TEXT)
    reference: str = field(default="", metadata=TEXT)
    seeds: int = field(default=3, metadata=whole(1))
    search: Search = field(default_factory=Search)
    tracks: Mapping[str, list[str]] = field(default_factory=dict, metadata=_MAPPING)
    tasks: Mapping[str, Values] = field(default_factory=dict, metadata=_MAPPING)
    values: Mapping[str, Any] = field(default_factory=dict, metadata=_MAPPING)
    methods: Mapping[str, Entry] = field(default_factory=dict, metadata=_MAPPING)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "search", section(Search, self.search, "search"))
        made = {name: section(Entry, given, f"methods.{name}") for name, given in self.methods.items()}
        object.__setattr__(self, "methods", made)
        _known("reference", self.reference, self.methods)
        _known("search.task", self.search.task, self.tasks)
        for task, options in self.tasks.items():
            if not isinstance(options, Mapping):
                raise BadInput(f"tasks.{task} must be a mapping of options, not {options!r}.")
            values = options.get("values", {})
            if not isinstance(values, Mapping):
                raise BadInput(f"tasks.{task}.values must be a mapping of names, not {values!r}.")
            if not _positive(rate := {**self.values, **values}.get("rate", 1.0)):
                raise BadInput(f"tasks.{task}.values.rate must be a number above 0, not {rate!r}.")
        for track, tasks in self.tracks.items():
            _known("tracks", track, TRACKS)
            if not (isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)):
                raise BadInput(f"tracks.{track} must be a list of tasks, not {tasks!r}.")
            for task in tasks:
                _known(f"tracks.{track}", task, self.tasks)
        for task in self.tasks:
            for name in self.methods:
                self.recipe(name, task)

    @classmethod
    def read(cls, path: str | Path, overrides: Iterable[str] = ()) -> Study:
        """Read a study from a YAML file; `overrides` are "path=value", as in "tasks.tweets.train.steps=5"."""
        config = _extended(Path(path))
        for override in overrides:
            config = override_with(config, override)
        made: Study = section(cls, config, "the study")
        return made

    def recipe(self, name: str, task: str, size: int | None = None, factor: float = 1.0) -> Recipe:
        """Return the recipe of a method on a task, with that size and that factor of its learning rate."""
        entry, given = self.methods[name], dict(self.tasks[task])
        values = {"size": 8, "rate": 1.0, **self.values, **given.pop("values", {})}
        values |= {"rate": entry.rate * factor * values["rate"], "size": size or values["size"]}
        try:
            lines = _filled(entry.methods, values)
            made: Recipe = section(Recipe, {**given, "name": name, "methods": lines}, "")
            return made
        except BadInput as problem:
            raise BadInput(f"{name} on {task}: {problem}") from None

    def sized(self, name: str, task: str) -> bool:
        """Say whether a method has a size that a track can choose."""
        return self.recipe(name, task, 1) != self.recipe(name, task, 2)

    def config(self) -> Values:
        """Return the study as plain values."""
        return {
            **{name: getattr(self, name) for name in ("study", "reference", "seeds")},
            "search": asdict(self.search),
            **{name: dict(getattr(self, name)) for name in ("tracks", "values", "tasks")},
            "methods": {name: given_values(entry) for name, entry in self.methods.items()},
        }


def _extended(path: Path, read: tuple[Path, ...] = ()) -> Any:
    """Return the values of a file, over those of the file that it extends, if it does."""
    from plait.yaml import load

    config = load(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(config, Mapping) or "extends" not in config:
        return config
    base = path.parent / str(config["extends"])
    if not base.is_file() or base in (*read, path):
        raise BadInput(f"{path} extends '{config['extends']}', which is no other study beside it: name one that is.")
    return _over(_extended(base, (*read, path)), {key: value for key, value in config.items() if key != "extends"})


def _over(base: Any, changes: Any) -> Any:
    """Return values with those of a second study put over them, mapping by mapping."""
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**base, **{key: _over(base.get(key), value) for key, value in changes.items()}}


def is_study(path: str | Path) -> bool:
    """Say whether a file holds a study and not a recipe."""
    try:
        return any(line.startswith("study:") for line in Path(path).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return False


def _known(what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise BadInput(f"{what}: there is no '{name}'{did_you_mean(str(name), list(names))}.")


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    """Return lines of a recipe with each `$name` replaced by its value."""
    if isinstance(value, str) and value.startswith("$"):
        if value[1:] not in values:
            raise BadInput(f"there is no value '{value[1:]}' for {value}{did_you_mean(value[1:], list(values))}.")
        return _filled(values[value[1:]], {name: held for name, held in values.items() if name != value[1:]})
    if isinstance(value, Mapping):
        return {key: _filled(v, values) for key, v in value.items()}
    return [_filled(v, values) for v in value] if isinstance(value, list) else value
