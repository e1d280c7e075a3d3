"""Tables: rows of numbers and words in, a class or a number out; standardized by the statistics of the training set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plait.engine import Pairs, call_model
from plait.errors import BadInput
from plait.loss.base import cross_entropy, squared_error
from plait.models.small import mlp
from plait.parametrize.freeze import mark_fresh
from plait.tasks import metrics
from plait.tasks.base import Metrics, Options, Task
from plait.tasks.reading import Table, column, only, read, require_column
from plait.tasks.splits import NAMES, classes_of, three


def flattened(table: Table) -> Table:
    """Return a table whose column of images, if it has one, is a column for each pixel."""
    import pandas as pd

    if "image" not in table.columns or isinstance(table["image"].iloc[0], str | dict):
        return table
    pixels = np.stack([np.asarray(image).ravel() for image in table["image"]])
    made = pd.DataFrame(pixels, columns=[f"pixel{i}" for i in range(pixels.shape[1])])
    for name in table.columns.drop("image"):
        made[name] = table[name].to_numpy()
    made.attrs = dict(table.attrs)
    return made


GAPS = ("", "na", "n/a", "nan", "null", "none", "?")
"""How people write that a cell of a column of numbers has no value, in small letters."""


def with_gaps(parts: dict[str, Table], names: list[str]) -> tuple[dict[str, Table], list[str]]:
    """Return the tables with the words of GAPS as gaps in columns that hold numbers beside them, and notes that say so.

    A column that holds another word in any part stays as it is.
    """
    made, notes = dict(parts), []
    for name in names:
        columns = {part: table[name] for part, table in parts.items() if name in table.columns}
        if "train" not in columns or all(column.dtype.kind in "iufb" for column in columns.values()):
            continue
        read_as = {part: _as_numbers(column) for part, column in columns.items()}
        written = sorted(set().union(*(words for _, words, _ in read_as.values())))
        if not written or not all(whole for _, _, whole in read_as.values()) or not read_as["train"][0].notna().any():
            continue
        for part, (numbers, _, _) in read_as.items():
            made[part] = made[part].assign(**{name: numbers})
        source = parts["train"].attrs["source"]
        quoted = " and ".join(f"'{word}'" for word in written)
        notes.append(f"the column '{name}' of {source} holds numbers and {quoted}, which is read as a gap")
    return made, notes


def _as_numbers(column: Any) -> tuple[Any, set[str], bool]:
    """Return (a column as numbers, the words for a gap that it holds, whether it holds nothing else)."""
    import pandas as pd

    values, held = column.tolist(), (str, float, int, np.number)
    words = [value.strip() if isinstance(value, str) else None for value in values]
    gaps = np.array([word is not None and word.casefold() in GAPS for word in words])
    plain = [None if gap or not isinstance(value, held) else value for gap, value in zip(gaps, values, strict=True)]
    numbers = pd.to_numeric(pd.Series(plain, index=column.index, dtype=object), errors="coerce").astype("float64")
    found = {str(word) for gap, word in zip(gaps, words, strict=True) if gap}
    return numbers, found, bool((numbers.notna() | gaps | column.isna()).all())


class Encoder:
    """Turns columns into numbers: numeric ones standardized (gaps take the mean), the others one-hot."""

    def __init__(self, table: Table, names: list[str]) -> None:
        from sklearn.compose import ColumnTransformer
        from sklearn.impute import SimpleImputer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        source = table.attrs["source"]
        for name in names:
            require_column(table, name, "features")
            if names.count(name) > 1:
                raise BadInput(f"features has '{name}' {names.count(name)} times: name each column once.")
        self.names = names
        numbers = [name for name in names if table[name].dtype.kind in "iufb"]
        self.numeric = [name for name in numbers if np.isfinite(table[name].astype("float64")).any()]
        self.words = [name for name in names if name not in numbers]
        for name in self.words:
            if table[name].map(lambda value: isinstance(value, list | dict | np.ndarray)).any():
                raise BadInput(f"the column '{name}' of {source} holds lists: leave it out with features=.")
        if not self.numeric and not self.words:
            raise BadInput(f"{source} has no column to learn from beside the label: give features=.")
        scaled = make_pipeline(SimpleImputer(), StandardScaler())
        words = OneHotEncoder(handle_unknown="ignore", sparse_output=False, max_categories=100)
        self.made = ColumnTransformer([("numeric", scaled, self.numeric), ("words", words, self.words)])
        self.made.fit(self._plain(table))

    def _plain(self, table: Table) -> Table:
        for name in self.numeric + self.words:
            if name not in table.columns:
                raise BadInput(f"{table.attrs['source']} lacks the column '{name}' that the training set has: add it.")
        plain = table[self.numeric + self.words].copy()
        for name in self.numeric:
            try:
                plain[name] = plain[name].astype("float64").replace([np.inf, -np.inf], np.nan)
            except ValueError as problem:
                raise BadInput(f"the column '{name}' of {table.attrs['source']} holds no number: {problem}.") from None
        for name in self.words:
            plain[name] = plain[name].map(str)
        return plain

    def __call__(self, table: Table) -> Tensor:
        """Return the columns as numbers [n, inputs]."""
        return torch.from_numpy(np.asarray(self.made.transform(self._plain(table)), dtype="float32"))

    def describe(self) -> dict[str, Any]:
        """Return what was learnt from the training set, for a file of JSON; it tells every input of the model in order.

        numeric: [mean, scale] by column, an input each; a gap takes the mean. words: the words by column, an input
        each, 1 where a row holds that word; infrequent: words of a column that share one more input, after its others.
        """
        fitted, kept = self.made.named_transformers_, dict[str, Any]()
        if self.numeric:
            scaler = fitted["numeric"][-1]
            pairs = zip(scaler.mean_.tolist(), scaler.scale_.tolist(), strict=True)
            kept["numeric"] = dict(zip(self.numeric, pairs, strict=True))
        if self.words:
            encoder = fitted["words"]
            rare = [{} if few is None else dict.fromkeys(few.tolist()) for few in encoder.infrequent_categories_]
            known = zip(self.words, encoder.categories_, rare, strict=True)
            kept["words"] = {name: [word for word in words if word not in few] for name, words, few in known}
            kept["infrequent"] = {name: list(few) for name, few in zip(self.words, rare, strict=True) if few}
        return kept


def _numbers(table: Table, label: str) -> Tensor:
    values = column(table, label, "label")
    try:
        made = torch.tensor([float(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError) as problem:
        raise BadInput(f"the column '{label}' of {table.attrs['source']} must hold numbers: {problem}.") from None
    if not bool(torch.isfinite(made).all()):
        raise BadInput(f"the column '{label}' of {table.attrs['source']} holds an infinite number: remove that row.")
    return made


def build(options: Options) -> Task:
    """Return the task of either kind; a regression's target is standardized, its metrics are in its own units."""
    classify = options.task == "classification"
    parts: dict[str, Table] = dict(zip(NAMES, three(options, options.label if classify else None), strict=True))
    if options.other is not None:
        parts["other"] = only(read(options.other, options.encoding), "other")
    parts = {part: flattened(table) for part, table in parts.items()}
    train = parts["train"]
    classes: list[str] = []
    kept: dict[str, Any] = {}
    measured: Metrics
    if classify:
        labels = {part: column(table, options.label, "label") for part, table in parts.items()}
        classes, coded = classes_of(labels.pop("train"), labels, train.attrs["source"])
        targets = {part: torch.tensor(values) for part, values in coded.items()}
        kept["classes"] = classes
        measured = metrics.classification(call_model, cross_entropy, len(classes), size=256)
    else:
        values = {part: _numbers(table, options.label) for part, table in parts.items()}
        centre, scale = float(values["train"].mean()), float(values["train"].std(correction=0)) or 1.0
        targets = {part: ((value - centre) / scale).float() for part, value in values.items()}
        kept["target"] = [centre, scale]
        measured = metrics.regression(call_model, squared_error, centre, scale)
    names = list(options.features) if options.features else [str(c) for c in train.columns if c != options.label]
    if options.label in names:
        raise BadInput(f"features names the label '{options.label}', which would be told to the model: leave it out.")
    parts, notes = with_gaps(parts, names)
    encoder = Encoder(parts["train"], names)
    sets = {part: Pairs(encoder(table), targets[part]) for part, table in parts.items()}
    kept |= encoder.describe()

    def save(folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "preprocessing.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")

    return Task(
        name=options.task,
        model=_model(options, sets["train"].inputs.shape[1], len(classes) or 1),
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        other=sets.get("other"),
        call=call_model,
        loss=cross_entropy if classify else squared_error,
        metrics=measured,
        quality="accuracy" if classify else "rmse",
        better="higher" if classify else "lower",
        save=save,
        classes=tuple(classes),
        notes=tuple(notes),
    )


def _model(options: Options, inputs: int, outputs: int) -> nn.Module:
    if isinstance(options.model, nn.Module):
        return options.model
    if str(options.model) != "mlp":
        raise BadInput(f"the model '{options.model}' does not read tables: use mlp, or a module of your own.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = mlp(inputs, outputs)
    return mark_fresh(model, str(len(model) - 1))
