"""One run in a process of its own, so that its memory is its own: `python -m plait.workbench.worker RECIPE FOLDER`.

Standard output carries one JSON line now and then: the step, the steps, the objective. The figures go to FOLDER.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from plait.errors import BadInput, Interrupted, NonFinite

if TYPE_CHECKING:
    from plait.method import Now


def die_with_parent() -> None:
    """Ask the system to end this process when the one that started it ends, however that happens (Linux only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(recipe: str, folder: str) -> int:
    """Run a recipe; return the exit code of `plait run`."""
    from plait.recipe import Recipe
    from plait.workbench.run import run_recipe

    die_with_parent()
    said = 0.0

    def watch(now: Now) -> None:
        nonlocal said
        if time.monotonic() - said > 0.2 or now.step == now.steps:
            said = time.monotonic()
            objective = None if now.objective is None else float(now.objective)
            print(json.dumps({"step": now.step, "steps": now.steps, "objective": objective}), flush=True)

    try:
        made = Recipe.read(recipe)
        run_recipe(made, folder, quiet=True, watch=watch)
    except (KeyboardInterrupt, Interrupted):
        return 130
    except (BadInput, NonFinite, MemoryError) as problem:
        _fail(folder, str(problem) or type(problem).__name__)
        print(problem, file=sys.stderr)
        return 2 if isinstance(problem, BadInput) else 1
    except Exception as problem:
        _fail(folder, f"{type(problem).__name__}: {problem}")
        raise
    return 0


def _fail(folder: str, error: str) -> None:
    """Leave the reason; where there is no room for it, the process that started this one says so."""
    from plait.workbench.writing import write_json

    with suppress(BadInput):
        write_json(Path(folder) / "failed.json", {"error": error})


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
