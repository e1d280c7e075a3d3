"""Telling the task from the data, when the user does not say."""

from __future__ import annotations

from torch import nn

from plait.errors import BadInput
from plait.tasks.base import Options
from plait.tasks.packaged import SETS
from plait.tasks.reading import read, refuse_stray, require_named


def guess(options: Options) -> str:
    """Return the task that a model and a data set are for."""
    model, text, label = options.model, options.text, options.label
    if isinstance(options.data, str) and options.data in SETS:
        return SETS[options.data].task
    tables = read(options.data, options.encoding)
    table = tables.get("train", next(iter(tables.values())))
    require_named(table, options, "text", "label", "prompt", "response")
    columns = set(table.columns)
    if "image" in columns:
        return "image-classification"
    if text in columns and label in columns and not str(model).startswith("smollm2"):
        return "text-classification"
    if not str(model).startswith("smollm2"):
        refuse_stray(table, "text", ", or give the task, such as causal-language-modelling")
    if {options.prompt, options.response} <= columns or "messages" in columns or text in columns:
        return "causal-language-modelling"
    if label in columns:
        numbers = table[label].dtype.kind == "f" or (table[label].dtype.kind in "iu" and table[label].nunique() > 20)
        return "regression" if numbers else "classification"
    name = type(model).__name__ if isinstance(model, nn.Module) else model
    raise BadInput(
        f"the data has the columns {', '.join(map(str, table.columns))}, which do not tell what {name} is for: give "
        f"the task."
    )
