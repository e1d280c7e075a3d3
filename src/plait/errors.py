"""What a user did that cannot work, in one sentence that names the cure."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class BadInput(ValueError):
    """One sentence: what, which value, what is allowed, the cure."""


class NonFinite(ArithmeticError):
    """The objective, a gradient, or what a start decomposes is NaN or infinite: where, and the last good checkpoint."""


class Interrupted(Exception):
    """Ctrl-C was pressed: the run stopped after a step, and what it left."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a clause that offers the nearest known name, or the known names when there are few.

    >>> did_you_mean("pisa", ["pissa", "eva"])
    " (did you mean 'pissa'?)"
    """
    names = sorted(set(known))
    near = get_close_matches(name, names, n=1, cutoff=0.6) or get_close_matches(
        name.lower().replace("_", "-"), names, n=1, cutoff=0.6
    )
    folded = {known.lower(): known for known in names}
    near = near or [folded[found] for found in get_close_matches(name.lower(), folded, n=1, cutoff=0.6)]
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (known: {', '.join(names)})" if 0 < len(names) <= 12 else ""
