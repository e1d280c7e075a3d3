"""Files that are there whole or not at all: written beside their place, then renamed; a full disk is one sentence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.errors import BadInput

Values = dict[str, Any]
"""What a file of JSON holds: figures, words, and lists and dicts of them, by name."""


def write_text(path: Path, text: str) -> None:
    """Write a text atomically: a reader never sees half a file, and one that finds no room leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as problem:
        reason = os.strerror(problem.errno) if problem.errno else str(problem)
        raise BadInput(
            f"{path} could not be written: {reason}. Free some room, or give another folder, and run the same command "
            "again."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(plain(values), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Return values as JSON has them: NaN and infinity, which it lacks, become null."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
