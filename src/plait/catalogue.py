"""Every method that plait knows, entered once by `@paper` where it is written."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from plait.errors import BadInput, did_you_mean
from plait.method import Method, places

T = TypeVar("T", bound=Callable[..., Any])

FOLDERS = (
    *("data", "parametrize", "initialize", "forward", "loss", "penalty", "gradient", "step", "constrain"),
    *("finish", "predict", "measure", "loops", "models", "solve", "studies"),
)


THEMES = {
    **{"parametrize": "adapt", "forward": "arch", "step": "optim", "constrain": "optim", "finish": "merge"},
    **{"measure": "probe", "loops": "bilevel", "models": "arch", "solve": "estimate", "studies": "study"},
}
"""The theme of the entries in a folder, where it is not the folder's name and `@paper` gives no other."""


@dataclass(frozen=True)
class Entry:
    """A catalogue entry: a method class, or a function (a recipe of several methods, a loop, a solver, a study)."""

    key: str
    bibkey: str
    kind: str
    make: Callable[..., Any]
    given_theme: str = ""
    given_places: Sequence[str] = ()

    @property
    def theme(self) -> str:
        """What it is about, as the ledger of published systems groups them: "adapt", "loss", "transport", ..."""
        folder = self.make.__module__.split(".")[1]
        return self.given_theme or THEMES.get(folder, folder)

    @property
    def name(self) -> str:
        """The name in Python."""
        return self.make.__name__

    @property
    def places(self) -> list[str]:
        """The places at which it acts; for a function, those that `@paper` gives, or the folder that holds it."""
        if isinstance(self.make, type) and issubclass(self.make, Method):
            return places(self.make)
        return list(self.given_places) or [self.make.__module__.split(".")[1]]


_ENTRIES: dict[str, Entry] = {}


def paper(
    bibkey: str, *, key: str, kind: str = "part", theme: str = "", places: Sequence[str] = ()
) -> Callable[[T], T]:
    """Enter a method in the catalogue: `bibkey` stands in references.bib, `key` in the ledger of published systems.

    `kind` is "part" (a method of a step), "solver", "probe", "study", "model" or "ground" (a method that users expect
    and that other rows build on). `theme` is needed only where the folder does not tell it (see THEMES), `places` only
    for a function that returns methods of other places than its folder's.
    """

    def enter(made: T) -> T:
        name = made.__name__
        before = _ENTRIES.get(key)
        if before is not None and before.make.__qualname__ != name:
            raise BadInput(f"the key '{key}' of {name} is taken by {before.name}: give each entry its own key.")
        if isinstance(made, type):
            made.key = key  # type: ignore[attr-defined]
        _ENTRIES[key] = Entry(key, bibkey, kind, made, theme, places)
        return made

    return enter


def load() -> dict[str, Entry]:
    """Import every module that may hold entries and return the catalogue, by key."""
    for folder in FOLDERS:
        package = importlib.import_module(f"plait.{folder}")
        for module in pkgutil.walk_packages(package.__path__, f"plait.{folder}."):
            importlib.import_module(module.name)
    return dict(sorted(_ENTRIES.items()))


def find(name: str) -> Entry:
    """Return the entry of that key or Python name; raise BadInput with the nearest name otherwise."""
    entries = load()
    for entry in entries.values():
        if name in (entry.key, entry.name) or name.lower() in (entry.key, entry.name.lower()):
            return entry
    raise BadInput(f"there is no method '{name}'{did_you_mean(name, entries)}: `plait list` shows them all.")
