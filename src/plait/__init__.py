"""plait interlaces training methods: each acts at its place in the step, and they combine freely."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.batch import Batch
    from plait.errors import BadInput, NonFinite
    from plait.method import Method, Now, method
    from plait.recipe import Recipe
    from plait.schedule import Cosine, Linear, Schedule, Switch, Tuned, WarmupStableDecay
    from plait.train import train

__version__ = "0.1.0"
__all__ = [
    "BadInput",
    "Batch",
    "Cosine",
    "Linear",
    "Method",
    "NonFinite",
    "Now",
    "Recipe",
    "Schedule",
    "Switch",
    "Tuned",
    "WarmupStableDecay",
    "method",
    "train",
]

_HOME = {
    **dict.fromkeys(("Method", "Now"), "method"),
    **dict.fromkeys(("Cosine", "Linear", "Schedule", "Switch", "Tuned", "WarmupStableDecay"), "schedule"),
    **dict.fromkeys(("BadInput", "NonFinite"), "errors"),
    **{"Batch": "batch", "Recipe": "recipe"},
}
"""Where each public name is written. Nothing is imported before it is used: the command line starts without torch."""


def _function(name: str) -> Any:
    """Return a property that is the function of that name in the submodule of that name, and that stays it when Python
    sets the attribute to the submodule, as it does after every import of one.
    """

    def read(_: ModuleType) -> Any:
        return getattr(import_module(f"plait.{name}"), name)

    return property(read, lambda _, submodule: None)


class _Package(ModuleType):
    """The package: `plait.train(model, data, ...)` and `@plait.method` are functions, in submodules of their names."""

    train = _function("train")
    method = _function("method")


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Find `plait.NAME` when it is first used: a public name, or a method of the catalogue."""
    if name in _HOME:
        return getattr(import_module(f"plait.{_HOME[name]}"), name)
    if name.startswith("__") or find_spec(f"plait.{name}"):
        raise AttributeError(name)
    from plait.catalogue import load
    from plait.errors import did_you_mean

    names = {entry.name: entry.make for entry in load().values()}
    if name not in names:
        raise AttributeError(f"plait has no '{name}'{did_you_mean(name, [*names, *__all__])}")
    return names[name]


def __dir__() -> list[str]:
    from plait.catalogue import load

    return sorted([*__all__, *(entry.name for entry in load().values())])
