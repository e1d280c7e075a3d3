"""A recipe: the model, the data, how long, and the list of methods.

A recipe is a value. `str(recipe)` is YAML that reads back equal. What a recipe names is looked up in the catalogue and
nowhere else: reading one that somebody else wrote runs none of their code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from plait.check import check
from plait.errors import BadInput, did_you_mean
from plait.schedule import SCHEDULES, Schedule
from plait.section import FLAG, TEXT, TEXTS, Section, given_values, one_of, section, whole

if TYPE_CHECKING:
    from torch import nn

    from plait.method import Method


_SHARE: Any = {
    "rule": (
        "a share between 0 and 0.5, or a source of data",
        lambda v: (isinstance(v, str) and bool(v)) or (isinstance(v, float) and 0 < v < 0.5),
    )
}


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    """What is learned from: the name of a packaged set, or the path of a file or folder.

    rows: how many examples are used. length: tokens of an example, at most. text, label, prompt, response, features:
    columns. other: a second set of the same kind, on which forgetting is measured. validation, test: a share of the
    data, or a source of their own. split: the seed of the splits, where they should not change with the run's own.
    size: side of images, in pixels. encoding: of text files.
    """

    path: ClassVar[str] = "data."
    source: str = field(default="", metadata=TEXT)
    rows: int | None = field(default=None, metadata=whole(2))
    length: int | None = field(default=None, metadata=whole(2))
    text: str | None = field(default=None, metadata=TEXT)
    label: str | None = field(default=None, metadata=TEXT)
    prompt: str | None = field(default=None, metadata=TEXT)
    response: str | None = field(default=None, metadata=TEXT)
    features: list[str] | None = field(default=None, metadata=TEXTS)
    other: str | None = field(default=None, metadata=TEXT)
    validation: float | str | None = field(default=None, metadata=_SHARE)
    test: float | str | None = field(default=None, metadata=_SHARE)
    split: int | None = field(default=None, metadata=whole(0, 2**32 - 1))
    size: int | None = field(default=None, metadata=whole(1))
    encoding: str | None = field(default=None, metadata=TEXT)


@dataclass(frozen=True, kw_only=True)
class Train(Section):
    """How the run goes: the options of `plait.train`."""

    path: ClassVar[str] = "train."
    steps: int = field(default=100, metadata=whole(1))
    batch_size: int = field(default=32, metadata=whole(1))
    accumulate: int = field(default=1, metadata=whole(1))
    precision: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata=one_of("float32", "bfloat16", "float16")
    )
    device: str | None = field(default=None, metadata=TEXT)
    sharding: str = field(default="none", metadata=one_of("none", "fsdp"))
    compile: bool = field(default=False, metadata=FLAG)
    save_every: int = field(default=0, metadata=whole(0))
    measure_every: int = field(default=0, metadata=whole(0))
    nonfinite: Literal["stop", "skip"] = field(default="stop", metadata=one_of("stop", "skip"))


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """A run, as a value: equal recipes give equal weights on the same machine.

    methods: entries of the catalogue, in the order in which they act; in Python also methods themselves.
    task: "causal-language-modelling", "text-classification", ...; told from the data where it is not given. folded:
    measure the trained model once more with its adapters folded in, and with its weights then rounded to 4 bits.
    validate_every: how many steps lie between two points of the validation curve; 0 takes eight at most.

    >>> print(Recipe(model="minilm", data="tweets", methods=["lora", {"adamw": {"lr": 0.002}}]))
    name: recipe
    model: minilm
    data: tweets
    methods:
    - lora
    - adamw: {lr: 0.002}
    """

    name: str = field(default="recipe", metadata=TEXT)
    model: str = field(default="", metadata=TEXT)
    data: Data = field(default_factory=Data)
    task: str | None = field(default=None, metadata=TEXT)
    seed: int = field(default=0, metadata=whole(0, 2**32 - 1))
    folded: bool = field(default=False, metadata=FLAG)
    validate_every: int = field(default=0, metadata=whole(0))
    train: Train = field(default_factory=Train)
    methods: Sequence[Any] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        data = {"source": self.data} if isinstance(self.data, str) else self.data
        for name, kind, given in (("data", Data, data), ("train", Train, self.train)):
            object.__setattr__(self, name, section(kind, given, name))
        if not self.model:
            raise BadInput("the recipe names no model: add a line such as 'model: minilm'.")
        if not self.data.source:
            raise BadInput("the recipe names no data: add a line such as 'data: tweets'.")
        if "/" in self.name or self.name.startswith(".") or not self.name.isprintable():
            raise BadInput(f"name must be usable as the name of a folder, not {self.name!r}.")
        if isinstance(self.methods, str | Mapping) or not isinstance(self.methods, Iterable):
            raise BadInput("methods must be a list, with one method a line: '- lora: {rank: 8}'.")
        object.__setattr__(self, "methods", tuple(_entry(given) for given in self.methods))
        self.build()

    def __hash__(self) -> int:
        return hash(str(self))

    def build(self) -> list[Method]:
        """Return the methods, each function of the catalogue expanded to the methods that it returns."""
        made: list[Method] = []
        for entry in self.methods:
            ((key, given),) = entry.items()
            built = make(key, given)
            made.extend(built if isinstance(built, list) else [built])
        return made

    def check(self, model: nn.Module) -> None:
        """Refuse, before any training, what cannot work on this model."""
        check(self.build(), model)

    # -- YAML ------------------------------------------------------------------------------------------------------
    @classmethod
    def read(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe from a YAML file; `overrides` are "path=value", as in "methods.lora.rank=4"."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BadInput(f"there is no recipe '{path}': give the path of a YAML file.") from None
        except (OSError, UnicodeDecodeError) as problem:
            raise BadInput(f"the recipe '{path}' cannot be read ({problem}): give a YAML file in UTF-8.") from None
        return cls.parse(text, overrides, str(path))

    @classmethod
    def parse(cls, text: str, overrides: Iterable[str] = (), title: str = "the recipe") -> Recipe:
        """Return the recipe that a YAML text holds."""
        from plait.yaml import load

        config = load(text, title)
        if not isinstance(config, dict):
            given = repr(config) if len(repr(config)) <= 80 else f"{repr(config)[:77]}..."
            raise BadInput(f"{title} must be a mapping of lines such as 'model: minilm', not {given}.")
        if "study" in config:
            raise BadInput(f"{title} is a study of many methods: run it with `plait compare {title}`.")
        if title != "the recipe":
            config.setdefault("name", Path(title).stem)
        for override in overrides:
            config = override_with(config, override)
        made: Recipe = section(cls, config, "")
        return made

    def config(self) -> dict[str, Any]:
        """Return the recipe as plain values, without what is left at its default."""
        config: dict[str, Any] = {"name": self.name, "model": self.model}
        data = given_values(self.data)
        config["data"] = self.data.source if len(data) == 1 else data
        config |= {"task": self.task} if self.task else {}
        config |= {"seed": self.seed} if self.seed else {}
        config |= {"folded": True} if self.folded else {}
        config |= {"validate_every": self.validate_every} if self.validate_every else {}
        config |= {"train": train} if (train := given_values(self.train)) else {}
        entries = [(key, given) for entry in self.methods for key, given in entry.items()]
        return config | {"methods": [{key: dict(given)} if given else key for key, given in entries]}

    def __str__(self) -> str:
        from plait.yaml import dump

        return dump(self.config())

    def write(self, path: str | Path) -> None:
        """Write the recipe as YAML."""
        Path(path).write_text(f"{self}\n", encoding="utf-8")

    def with_(self, *overrides: str) -> Recipe:
        """Return the recipe with some values changed: `recipe.with_("train.steps=50", "methods.lora.rank=4")`."""
        return self.parse(str(self), overrides)

    def seeded(self, seed: int) -> Recipe:
        """Return the same recipe with another seed."""
        return replace(self, seed=seed)


# -- methods by name -----------------------------------------------------------------------------------------------
def _entry(given: Any) -> dict[str, dict[str, Any]]:
    """Return one line of `methods` as {key: {field: value}}, with the key of the catalogue and plain values."""
    from plait.catalogue import find
    from plait.method import Method

    if isinstance(given, Method):
        changed = {f.name: getattr(given, f.name) for f in fields(given)}
        changed = {f.name: changed[f.name] for f in fields(given) if changed[f.name] != f.default}
        return {find(type(given).__name__).key: {name: _plain(value) for name, value in changed.items()}}
    if isinstance(given, type) and issubclass(given, Method):
        raise BadInput(f"{given.__name__} is a class: write {given.__name__}().")
    line = {given: {}} if isinstance(given, str) else given
    if not isinstance(line, Mapping) or len(line) != 1 or not isinstance(next(iter(line)), str):
        raise BadInput(f"a method is written as '- lora' or '- lora: {{rank: 8}}', not {given!r}.")
    ((name, values),) = line.items()
    if not isinstance(values, Mapping | None):
        raise BadInput(f"the fields of '{name}' are written as '- {name}: {{field: value}}', not {values!r}.")
    return {find(name).key: {str(key): _plain(value) for key, value in (values or {}).items()}}


def _plain(value: Any) -> Any:
    """Return a field's value as YAML writes it: a schedule as {name: {field: number}}."""
    if isinstance(value, Schedule):
        name = next(name for name, kind in SCHEDULES.items() if kind is type(value))
        return {name: {f.name: v for f in fields(value) if (v := getattr(value, f.name)) != f.default}}
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def make(name: str, given: Mapping[str, Any]) -> Method | list[Method]:
    """Return the method of that key or Python name; for a paper that acts in several places, a list of methods."""
    from plait.catalogue import find
    from plait.method import Method

    entry = find(name)
    if isinstance(entry.make, type) and issubclass(entry.make, Method):
        made: Method = entry.make(**given)
        return made
    signature = inspect.signature(entry.make)
    if not str(signature.return_annotation).startswith("list[") or "Method" not in str(signature.return_annotation):
        raise BadInput(f"'{name}' is a {entry.kind}, which a recipe cannot hold: use {entry.name} from Python.")
    for key in given:
        if key not in signature.parameters:
            raise BadInput(f"{entry.name} has no field '{key}'{did_you_mean(key, signature.parameters)}.")
    for key, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and key not in given:
            raise BadInput(f"{entry.name} needs its field '{key}'.")
    try:
        several: list[Method] = entry.make(**given)  # type: ignore[assignment]
        return several
    except TypeError as problem:
        raise BadInput(f"{entry.name} cannot be made of {dict(given)!r}: {problem}.") from None


def override_with(config: dict[str, Any], override: str) -> dict[str, Any]:
    """Return the config with "path=value" applied; a method is found by its name or its number in the list.

    >>> override_with({"methods": [{"lora": {"rank": 8}}]}, "methods.lora.rank=4")
    {'methods': [{'lora': {'rank': 4}}]}
    """
    from plait.yaml import load

    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise BadInput(f"--set takes path=value, as in train.steps=50, not '{override}'.")
    steps = path.strip().split(".")
    return dict(_override(config, steps, load(text, f"--set {path}") if text else "", path, ""))


def _override(config: Any, steps: list[str], value: Any, path: str, at: str) -> Any:
    if not steps:
        return value
    step, *rest = steps
    if at == "" and step == "data" and rest and isinstance(config.get("data"), str):
        config = {**config, "data": {"source": config["data"]}}
    if at == "methods" and not isinstance(config, Mapping):
        if not isinstance(config, list | tuple) or not all(line for line in config):
            raise BadInput(f"--set {path}: methods is {config!r}, no list of methods: write them in the recipe.")
        if odd := next((line for line in config if not isinstance(line, Mapping | str)), None):
            raise BadInput(f"--set {path}: the method {odd!r} is written as {{name: {{field: value}}}} in the recipe.")
        lines = [line if isinstance(line, Mapping) else {line: {}} for line in config]
        names = [str(next(iter(line))) for line in lines]
        place = _place(step, names)
        if place is None:
            raise BadInput(f"--set {path}: the recipe has no method '{step}'{did_you_mean(step, names)}.")
        changed = {names[place]: _override(lines[place][names[place]] or {}, rest, value, path, names[place])}
        return [changed if i == place else line for i, line in enumerate(config)]
    if not isinstance(config, Mapping | None):
        raise BadInput(f"--set {path}: '{at}' is {config!r}, which has nothing inside.")
    inner = (config or {}).get(step)
    return {**(config or {}), step: _override(inner, rest, value, path, step if not at else f"{at}.{step}")}


def _place(step: str, names: list[str]) -> int | None:
    """Return the number in the list of the method that is written so: by number, key or Python name."""
    from plait.catalogue import find

    if step.isdigit():
        return int(step) if int(step) < len(names) else None
    if step in names:
        return names.index(step)
    try:
        keys = [find(name).key for name in names]
        return keys.index(find(step).key)
    except ValueError:  # no such entry, or not in this list
        return None


__all__ = ["Data", "Recipe", "Train", "check", "make", "override_with"]
