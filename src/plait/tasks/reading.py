"""Reading what a user has (files, folders, `datasets` objects, tables) as a table of examples; clear complaints."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.errors import BadInput, did_you_mean

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
OTHER_IMAGES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw")
"""Kinds of images that are not read; beside others that are, a warning counts them."""
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
PARTS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
PARTS |= {"dev": "validation", "test": "test"}
"""What a file or folder of a split may be called, and the split it is."""

Table = Any
"""A pandas DataFrame: one row an example. `attrs["source"]` says where it came from, for complaints."""


class Tables(dict[str, Table]):
    """Tables by split, already read."""


def read(source: Any, encoding: str = "utf-8") -> Tables:
    """Return the tables of a source by split: {"all": table}, or some of train, validation and test.

    Texts stand in the column "text", images (paths, bytes, arrays or PIL images) in "image", the folder that names
    their class in "label". Raises BadInput for what cannot be read: which file, which line, and the cure.
    """
    return source if isinstance(source, Tables) else Tables(_read(source, encoding))


def _read(source: Any, encoding: str) -> dict[str, Table]:
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        return {"all": _named(source.reset_index(drop=True), "the DataFrame")}
    if type(source).__module__.split(".")[0] == "datasets":
        return _from_datasets(source)
    if isinstance(source, Mapping):
        return _from_mapping(source, encoding)
    if isinstance(source, list | tuple):
        if source and not all(isinstance(row, Mapping) for row in source):
            raise BadInput(
                "data given as a list must hold one dict for each example, such as {'text': ..., 'label': ...}."
            )
        return {"all": _named(pd.DataFrame(list(source)), "the list of examples")}
    if not isinstance(source, str | Path):
        raise BadInput(
            "data must be a name, a path, a datasets object, a DataFrame or a list of dicts, not "
            f"{type(source).__name__}."
        )
    from plait.tasks.packaged import SETS, load

    if str(source) in SETS:
        return {"all": _named(load(str(source)), f"the set '{source}'")}
    path = Path(source).expanduser()
    if not path.exists():
        raise BadInput(
            f"there is no file or folder '{source}', and no packaged set of that name{did_you_mean(str(source), SETS)}."
        )
    return read_folder(path, encoding) if path.is_dir() else {"all": read_file(path, encoding)}


def _named(table: Table, source: str) -> Table:
    if len(table) == 0:
        raise BadInput(f"{source} holds no example: give at least one.")
    table.columns = table.columns.map(str)
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise BadInput(f"{source} has more than one column '{twice}': give each a name of its own.")
    table.attrs["source"] = source
    return table


def _from_mapping(source: Mapping[str, Any], encoding: str) -> dict[str, Table]:
    import pandas as pd

    unknown = [key for key in source if key not in PARTS]
    if unknown and any(key in PARTS for key in source):
        raise BadInput(
            f"data has no split '{unknown[0]}'{did_you_mean(str(unknown[0]), ['train', 'validation', 'test'])}."
        )
    if unknown or not source:
        try:
            return {"all": _named(pd.DataFrame(dict(source)), "the dict of columns")}
        except ValueError:
            raise BadInput(
                "data given as a dict must hold columns of equal length, or the keys train, validation, test."
            ) from None
    return {PARTS[key]: only(read(part, encoding), f"data['{key}']") for key, part in source.items()}


def _from_datasets(source: Any) -> dict[str, Table]:
    if hasattr(source, "keys"):
        return {PARTS[key]: only(_from_datasets(part), key) for key, part in source.items() if key in PARTS} or {
            "all": only(_from_datasets(next(iter(source.values()))), "the datasets object")
        }
    if not hasattr(source, "to_pandas"):
        raise BadInput(
            f"data must be a datasets.Dataset or DatasetDict, not {type(source).__name__}: load it without streaming."
        )
    table = source.to_pandas()
    for name, kind in source.features.items():
        if type(kind).__name__ == "ClassLabel":
            table[name] = [kind.names[i] if i >= 0 else None for i in table[name]]
    return {"all": _named(table, "the datasets object")}


def only(tables: dict[str, Table], what: str) -> Table:
    """Return the one table of a source that must not have splits of its own."""
    if set(tables) != {"all"}:
        raise BadInput(f"{what} has splits of its own ({', '.join(tables)}): give one file or one split of it.")
    return tables["all"]


def decoded(path: Path, encoding: str) -> str:
    """Return a file's text; BadInput names the file and the line of the first byte that is not in the encoding."""
    raw = path.read_bytes()
    try:
        return raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        line = raw[: problem.start].count(b"\n") + 1
        raise BadInput(
            f"{path} is not {encoding.upper()} at line {line} (byte 0x{raw[problem.start]:02x}): save it as UTF-8, or "
            f"give its encoding, as in encoding='latin-1'."
        ) from None
    except LookupError:
        raise BadInput(
            f"there is no encoding '{encoding}': give one that Python knows, such as utf-8 or latin-1."
        ) from None


def read_file(path: Path, encoding: str = "utf-8") -> Table:
    """Return the table in a csv, tsv, jsonl, json, parquet or txt file; a txt file is one example, its whole text."""
    import pandas as pd

    kind = path.suffix.lower()
    if kind not in TABLES:
        raise BadInput(
            f"{path} is of a kind that plait does not read ('{kind}'): give {', '.join(TABLES)}, or a folder."
        )
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty: give at least one example.")
    if kind == ".parquet":
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as problem:
            reason = str(problem).splitlines()[0]
            raise BadInput(f"{path} is not a parquet file that can be read: {reason}") from None
        return _named(table, str(path))
    text = decoded(path, encoding)
    if kind == ".txt":
        return _named(pd.DataFrame({"text": [text] if text.strip() else []}), str(path))
    if kind == ".jsonl":
        return _named(pd.DataFrame(_json_lines(path, text)), str(path))
    try:
        table = (
            pd.DataFrame(json.loads(text)) if kind == ".json" else _comma_table(text, "\t" if kind == ".tsv" else ",")
        )
    except (ValueError, TypeError, AttributeError) as problem:  # pandas' ParserError and json's error are ValueErrors
        reason = str(problem).strip().splitlines()[0]
        raise BadInput(f"{path} is not a table that can be read as {kind[1:]}: {reason}") from None
    return _named(table, str(path))


def _comma_table(text: str, separator: str) -> Table:
    import pandas as pd

    # Only these mean "no value": a text or a label may well be "null", "None" or "NA".
    missing = ["", "nan", "NaN"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            table = pd.read_csv(
                io.StringIO(text), sep=separator, keep_default_na=False, na_values=missing, index_col=False
            )
        except pd.errors.ParserWarning:
            raise ValueError("its rows have more fields than its header: name every column there") from None
    # pandas gives a second column 'label' the name 'label.1', by which a model would be told the label.
    names = pd.read_csv(io.StringIO(text), sep=separator, header=None, nrows=1, dtype=str).iloc[0]
    table.columns = [own if isinstance(own, str) else made for own, made in zip(names, table.columns, strict=True)]
    return table


def _json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise BadInput(
                f"{path} is not JSON at line {number} ({problem.msg}): give one object on each line."
            ) from None
        if not isinstance(row, dict):
            raise BadInput(f'{path} holds no object at line {number}: give one such as {{"text": ...}} on each line.')
        rows.append(row)
    return rows


def read_folder(path: Path, encoding: str = "utf-8") -> dict[str, Table]:
    """Return the tables of a folder: its splits (train.csv, or train/), else its texts or images, a folder a class."""
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    parts = {PARTS[entry.stem.lower()]: entry for entry in entries if entry.stem.lower() in PARTS}
    if "train" in parts:
        return {
            part: only(read_folder(entry, encoding), str(entry)) if entry.is_dir() else read_file(entry, encoding)
            for part, entry in parts.items()
        }
    files = sorted(
        f for f in path.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts)
    )
    images = [f for f in files if f.suffix.lower() in IMAGES]
    texts = [f for f in files if f.suffix.lower() == ".txt"]
    if images and texts:
        raise BadInput(f"{path} holds both images and texts: give a folder of one kind.")
    if images:
        _warn_of_others(path, files)
        return {"all": _folder_table(path, images, "image", [str(f) for f in images])}
    if texts:
        return {"all": _folder_table(path, texts, "text", [decoded(f, encoding) for f in texts])}
    raise BadInput(
        f"{path} holds no .txt and no image: give a folder of one kind, or train.csv, validation.csv, test.csv in it."
    )


def _warn_of_others(path: Path, files: list[Path]) -> None:
    other = [f for f in files if f.suffix.lower() in OTHER_IMAGES]
    if other:
        warnings.warn(
            f"{path} holds images of kinds that are not read and left out ({len(other)}, '{other[0].name}' first): "
            "save them as PNG or JPEG.",
            stacklevel=2,
        )


def _folder_table(root: Path, files: list[Path], name: str, values: list[str]) -> Table:
    import pandas as pd

    columns: dict[str, list[str]] = {name: values}
    classes = [f.parent.relative_to(root).parts[:1] for f in files]
    if all(classes):
        columns["label"] = [c[0] for c in classes]
    table = _named(pd.DataFrame(columns), str(root))
    if any(classes) and not all(classes):
        table.attrs["stray"] = str(files[[bool(c) for c in classes].index(False)])
        if name == "image":
            refuse_stray(table, "image")
    return table


def refuse_stray(table: Table, what: str, cure: str = "") -> None:
    """Raise BadInput for a table of a folder in which a file lies beside the folders of classes."""
    if "stray" in table.attrs:
        raise BadInput(
            f"{table.attrs['stray']} lies in no folder of a class: put each {what} in a folder named after its class"
            f"{cure}."
        )


def require_column(table: Table, name: str, option: str) -> None:
    """Raise BadInput for a column that is not there, with the nearest one that is, or what kept it from being there.

    option: by which a user names the column; "" where none does.
    """
    if name not in table.columns:
        if option == "label":
            refuse_stray(table, "text")
        near = did_you_mean(name, [str(c) for c in table.columns])
        source = table.attrs.get("source", "the data")
        cure = f"name the one to use with {option}=" if option else f"call the one to use '{name}'"
        raise BadInput(f"{source} has no column '{name}'{near}: {cure}.")


def require_named(table: Table, options: Any, *columns: str) -> None:
    """Raise BadInput for a column that options name otherwise than by default and that is not there."""
    for option in columns:
        if (name := getattr(options, option)) != option:
            require_column(table, name, option)


def rows_of(table: Table) -> list[int]:
    """Return the numbers, from 1, that a table's rows have in the whole table that they were taken from."""
    return [int(place) + 1 for place in table.index]


def column(table: Table, name: str, option: str) -> list[Any]:
    """Return a column without gaps; BadInput offers the nearest column, or names the first row that has no value."""
    require_column(table, name, option)
    missing = table[name].isna()
    if missing.any():
        row = rows_of(table)[int(missing.to_numpy().argmax())]
        raise BadInput(f"{table.attrs['source']} has no {name} in row {row}: fill it in, or remove the row.")
    values: list[Any] = table[name].tolist()
    return values


def texts(table: Table, name: str, option: str) -> list[str]:
    """Return a column of texts, numbers as they are written; BadInput names the first row that holds something else."""
    import numpy as np

    values = column(table, name, option)
    for row, value in zip(rows_of(table), values, strict=True):
        if isinstance(value, bytes | list | dict | np.ndarray):
            raise BadInput(
                f"{table.attrs['source']} has the {name} {str(value)[:40]!r} in row {row}, which is no text "
                f"({type(value).__name__}): write it out, or remove the row."
            )
    return [str(value) for value in values]
