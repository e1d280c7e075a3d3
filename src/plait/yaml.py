"""YAML of values only: numbers, text, lists and mappings. Tags, references and keys that stand twice are refused."""

from __future__ import annotations

import re
from typing import Any

import yaml

from plait.errors import BadInput

DEEPEST = 20
"""How deeply values may be nested: a recipe needs 6."""


class _Values(yaml.SafeLoader):
    """The safe loader, which also reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and leaves dates as text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_EXPONENT: Any = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
_Values.add_implicit_resolver(*_EXPONENT)


def _refuse_surprises(text: str, title: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise BadInput(f"{title}: values are nested more than {DEEPEST} deep; write them flat.")
        line = getattr(event.start_mark, "line", 0) + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise BadInput(f"{title}, line {line}: references (& and *) are refused; write the value out.")
        if tag := getattr(event, "tag", None):
            raise BadInput(f"{title}, line {line}: tags such as {tag!r} are refused; write plain values.")


def _refuse_twice(node: yaml.Node | None, title: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise BadInput(f"{title}, line {key.start_mark.line + 1}: a key is a list or mapping; write a name.")
            if key.value in seen:
                raise BadInput(f"{title}, line {key.start_mark.line + 1}: '{key.value}' stands twice; remove one.")
            seen.add(str(key.value))
            _refuse_twice(value, title)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_twice(value, title)


def load(text: str, title: str) -> Any:
    """Return the values that a YAML text holds; raise BadInput, with the line, for what is none.

    >>> load("lr: 1e-3", "the recipe")
    {'lr': 0.001}
    """
    try:
        _refuse_surprises(text, title)
        loader = _Values(text)
        try:
            node = loader.get_single_node()
            _refuse_twice(node, title)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as problem:
        if isinstance(problem, BadInput):
            raise
        mark = getattr(problem, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise BadInput(f"{title}{where}: this is not YAML ({getattr(problem, 'problem', problem)}).") from None


class _Flat(yaml.SafeDumper):
    """Dumps without references to what stands twice, and quotes the text that `load` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out."""
        return True


_Flat.add_implicit_resolver(*_EXPONENT)


def dump(values: Any) -> str:
    """Return the YAML of plain values; the innermost mappings on one line."""
    text: str = yaml.dump(values, Dumper=_Flat, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
    return text.rstrip("\n")
