"""Whether the data of a run are still what they were: a fingerprint of the files that a recipe names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import BadInput
from plait.recipe import Data
from plait.workbench.writing import write_json


def fingerprint(data: Data) -> str | None:
    """Return a fingerprint of the files and folders that hold the data; None where they are packaged, or not there.

    Of the contents and of the names inside a folder: the files may move together.
    """
    from plait.tasks.packaged import SETS

    named = [given for given in (data.source, data.other, data.validation, data.test) if isinstance(given, str)]
    roots = [Path(given) for given in named if given not in SETS]
    if not roots or not all(root.exists() for root in roots):
        return None
    mark = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
                with path.open("rb") as file:
                    held = hashlib.file_digest(file, "sha256").hexdigest()
                mark.update(f"{path.relative_to(root)} {held}\n".encode())
    return mark.hexdigest()[:16]


def hold(source: str, mark: str | None, folder: Path) -> None:
    """Keep the fingerprint of a run's data in its folder; refuse a run that began with other data."""
    kept = folder / "data.json"
    try:
        before = json.loads(kept.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError):
        before = None
    if mark is not None and before is not None and mark != before:
        raise BadInput(
            f"the data of the run in {folder} changed since it began ({source} holds other examples now): restore "
            "them, give another --out, or delete that folder to start anew."
        )
    if mark is not None and before is None:
        write_json(kept, {"fingerprint": mark})


def refuse_mixed(data: Data, runs: Sequence[Mapping[str, Any]], place: Path) -> None:
    """Refuse to go on with a comparison whose finished runs saw other data than those to come would."""
    mark = fingerprint(data)
    if mark is not None and any(run.get("data") not in (None, mark) for run in runs):
        raise BadInput(
            f"{data.source} changed since runs in {place} were finished: restore it, give another --out, or delete "
            "that folder to run all anew."
        )


def changed(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a warning if the runs of a comparison did not all see the same data."""
    if len({run.get("data") for run in runs} - {None}) <= 1:
        return []
    says = "The data changed while the runs were made: not all recipes and seeds saw the same. Run all of it anew."
    return [{"kind": "data", "text": says}]
