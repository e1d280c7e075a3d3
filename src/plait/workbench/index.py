"""What `plait list` shows: every entry of the catalogue as plain values, kept in a cache so that torch is not imported.

It lies in plait's cache folder, under a fingerprint of plait's files and of the evidence.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import plait
from plait.cache import cache_folder

if TYPE_CHECKING:
    from plait.catalogue import Entry

SOURCE = Path(plait.__file__).parent


def _beside(place: str) -> Path:
    """Return where a file or folder lies: in the checkout, or inside the package when installed."""
    checkout = SOURCE.parent.parent
    return checkout / place if (checkout / "pyproject.toml").exists() else SOURCE / Path(place).name


def evidence_folder() -> Path:
    """Return where the verdicts on claims lie."""
    return _beside("evidence")


def needs() -> dict[str, dict[str, int]]:
    """Return, by a method's key, what it is tried for and how many are to be tried before it, as the table of the page
    "How to choose" has it.
    """
    found: dict[str, dict[str, int]] = {}
    for line in _beside("docs/choose.md").read_text(encoding="utf-8").splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("| ") and len(cells) > 1:
            for place, key in enumerate(re.findall(r"`([\w-]+)`", cells[1])):
                found.setdefault(key, {}).update(dict.fromkeys(cells[0].split("; "), place))
    return found


def fingerprint() -> str:
    """Return a digest of the paths, sizes and times of plait's files and of the evidence."""
    files = [*SOURCE.rglob("*.py"), SOURCE / "references.bib", _beside("docs/choose.md")]
    files += evidence_folder().glob("*.json")
    marks = [f"{path} {(stat := path.stat()).st_mtime_ns} {stat.st_size}" for path in sorted(files)]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:24]


def read() -> list[dict[str, Any]]:
    """Return the entries, from the cache where it is fresh."""
    mark, kept = fingerprint(), cache_folder() / "index.json"
    try:
        held = json.loads(kept.read_text(encoding="utf-8"))
        if held["fingerprint"] == mark:
            entries: list[dict[str, Any]] = held["entries"]
            return entries
    except (OSError, ValueError, KeyError):
        pass
    entries = describe_all()
    _keep(kept, {"fingerprint": mark, "entries": entries})
    return entries


def _keep(path: Path, values: Any) -> None:
    """Write a cache file; a folder that cannot be written only costs time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


# -- describing ----------------------------------------------------------------------------------------------------
def describe_all() -> list[dict[str, Any]]:
    """Return every entry of the catalogue as plain values, by importing it."""
    from plait import catalogue
    from plait.claims.base import load as load_claims

    entries, claims, references, tried = catalogue.load(), load_claims(), read_references(), needs()
    return [
        describe(entry, claims.get(entry.key, {}), references) | {"needs": tried.get(entry.key, {})}
        for entry in entries.values()
    ]


def describe(entry: Entry, claims: dict[str, Any], references: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return one entry: what it is, where it comes from, what can be set, and how its claims came out."""
    import inspect

    file = Path(inspect.getsourcefile(entry.make) or "").resolve()
    line = inspect.getsourcelines(entry.make)[1]
    shown = file.relative_to(SOURCE.parent.parent) if file.is_relative_to(SOURCE.parent.parent) else file
    return {
        "key": entry.key,
        "name": entry.name,
        "kind": entry.kind,
        "theme": entry.theme,
        "places": entry.places,
        "reference": cite(references.get(entry.bibkey), entry.bibkey),
        "fields": fields_of(entry),
        "claims": claims_of(entry.key, claims),
        "doc": inspect.getdoc(entry.make) or "",
        "file": f"{shown}:{line}",
    }


def claims_of(key: str, claims: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a method's claims, each with its last verdict, or None where it was not run."""
    path = evidence_folder() / f"{key}.json"
    try:
        found = {claim["name"]: claim for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]}
    except (OSError, ValueError, KeyError):
        found = {}
    return [
        {
            "name": name,
            "says": claim.says,
            "figure": claim.figure,
            "baseline": claim.baseline,
            "verdict": found.get(name, {}).get("verdict"),
            **{part: found[name][part] for part in ("improvement", "interval", "seeds") if part in found.get(name, {})},
        }
        for name, claim in claims.items()
    ]


def fields_of(entry: Entry) -> list[dict[str, Any]]:
    """Return what can be set, with its type, range and default."""
    import dataclasses
    import inspect

    hints = get_type_hints(entry.make, include_extras=True)
    if dataclasses.is_dataclass(entry.make):
        given = {f.name: f.default for f in dataclasses.fields(entry.make)}
        given = {name: inspect.Parameter.empty if d is dataclasses.MISSING else d for name, d in given.items()}
    else:
        given = {name: p.default for name, p in inspect.signature(entry.make).parameters.items()}
    return [
        {
            "name": name,
            "type": type_name(hints.get(name, Any)),
            "default": None if default is inspect.Parameter.empty else plain(default),
            "required": default is inspect.Parameter.empty,
        }
        for name, default in given.items()
    ]


def plain(value: Any) -> Any:
    """Return a default as JSON can hold it."""
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def type_name(hint: Any) -> str:
    """Return a type and its range in words.

    >>> from plait.fields import Count, ScheduledFraction
    >>> type_name(Count), type_name(ScheduledFraction), type_name(Literal["a", "b"])
    ('int, at least 1', 'float or schedule, in [0, 1]', 'one of a, b')
    """
    from typing import Annotated

    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        rules = [str(extra.func) for extra in extras if type(getattr(extra, "func", None)).__name__ == "Range"]
        return ", ".join([type_name(inner), *rules])
    if get_origin(hint) is Literal:
        return f"one of {', '.join(str(value) for value in get_args(hint))}"
    if isinstance(hint, type) and not get_args(hint):
        return "schedule" if hint.__name__ == "Schedule" else "none" if hint is type(None) else hint.__name__
    parts = get_args(hint)
    if parts and (get_origin(hint) is None or "Union" in str(get_origin(hint))):
        return " or ".join(type_name(part) for part in parts)
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


# -- references ----------------------------------------------------------------------------------------------------
def read_references() -> dict[str, dict[str, str]]:
    """Return references.bib: key -> field -> value."""
    from bibtexparser.entrypoint import parse_string

    library = parse_string((SOURCE / "references.bib").read_text(encoding="utf-8"))

    def clean(text: str) -> str:
        return " ".join(text.replace("{", "").replace("}", "").split())

    return {entry.key: {f.key.lower(): clean(str(f.value)) for f in entry.fields} for entry in library.entries}


def cite(reference: dict[str, str] | None, key: str) -> str:
    """Return a reference as one line.

    >>> cite({"author": "Hu, Edward J. and Shen, Yelong and Wallis, Phillip", "title": "LoRA", "year": "2022"}, "hu")
    'Hu et al. (2022). LoRA.'
    """
    if reference is None:
        return key
    families = [author.split(",")[0].strip() for author in reference.get("author", "").split(" and ")]
    who = f"{families[0]} et al." if len(families) > 2 else " and ".join(families)
    where = f" {reference['url']}" if "url" in reference else ""
    return f"{who} ({reference.get('year', 'n.d.')}). {reference.get('title', key)}.{where}"
