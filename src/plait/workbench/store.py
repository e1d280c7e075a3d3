"""Where the runs of a comparison lie, and which of them are done.

    OUT/results.json, OUT/report.html
    OUT/runs/NAME-DIGEST/seed-K/    one run: recipe.yaml, checkpoints, log.txt, results.json or failed.json

The digest is of the recipe without its seed: a recipe that was changed gets folders of its own; what was done stands.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """One run of a comparison: a recipe with its seed, and the folder that it fills."""

    recipe: Recipe
    folder: Path

    @property
    def title(self) -> str:
        """The name and the seed."""
        return f"{self.recipe.name}, seed {self.recipe.seed}"

    def finished(self) -> dict[str, Any] | None:
        """Return what the run left, if it came to its end."""
        return _read(self.folder / "results.json")

    def failed(self) -> dict[str, Any] | None:
        """Return why the run failed, if it did."""
        return _read(self.folder / "failed.json")

    def ready(self) -> None:
        """Make the folder, and forget an earlier failure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "failed.json").unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the checkpoints of a run that is done: its figures stay."""
        for step in self.folder.glob("step-*"):
            shutil.rmtree(step, ignore_errors=True)
        for frozen in self.folder.glob("frozen-*.safetensors"):
            frozen.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def digest(recipe: Recipe) -> str:
    """Return a fingerprint of a recipe, whatever its seed, and however often its curve is drawn a point of."""
    return hashlib.sha256(str(replace(recipe, seed=0, validate_every=0)).encode()).hexdigest()[:8]


def jobs(recipes: list[Recipe], seeds: int, runs: Path) -> list[Job]:
    """Return the runs of a comparison, seed by seed, so that a comparison cut short has whole pairs."""
    made = []
    for seed in range(seeds):
        for recipe in recipes:
            folder = runs / f"{recipe.name}-{digest(recipe)}" / f"seed-{recipe.seed + seed}"
            made.append(Job(recipe.seeded(recipe.seed + seed), folder))
    return made
