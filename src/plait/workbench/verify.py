"""Run claims and write how they came out to evidence/KEY.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plait.errors import BadInput

if TYPE_CHECKING:
    from plait.claims.base import Claim, Verdict


def claims_of(names: Sequence[str]) -> dict[str, list[Claim]]:
    """Return the claims of the methods of those keys or names; of all methods that have any when none is named."""
    from plait.catalogue import find
    from plait.claims.base import load

    claims = load()
    keys = [find(name).key for name in names] or sorted(claims)
    bare = [key for key in keys if not claims.get(key)]
    if bare:
        raise BadInput(f"'{bare[0]}' has no claim to verify: write one with @claim(\"{bare[0]}\") in plait/claims/.")
    return {key: list(claims[key].values()) for key in dict.fromkeys(keys)}


def run(
    key: str, claims: Sequence[Claim], folder: Path, seeds: int | None = None, first_seed: int | None = None
) -> Iterator[Verdict]:
    """Yield the verdict on each claim of a method, then write them to `folder`."""
    from plait.claims.base import evidence, verify
    from plait.workbench.run import versions
    from plait.workbench.writing import write_json

    verdicts = []
    for claim in claims:
        first = claim.first_seed if first_seed is None else first_seed
        verdicts.append(verify(replace(claim, seeds=seeds or claim.seeds, first_seed=first)))
        yield verdicts[-1]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{key}.json", evidence(verdicts, versions()))
