"""Update rules compiled for CUDA by Triton, from the same text as the CPU's kernels: one launch steps all tensors.

A launch takes a table with one line for each piece of a tensor, and a table of numbers (the rate, what depends on
scalars only, random keys): nothing that changes from step to step is an argument, so no number recompiles anything.
A rule that looks at whole tensors takes three launches: sums of squares by piece, a ratio or a norm for each tensor in
a fixed order, and the step. With TRITON_INTERPRET=1 and "cpu" added to `DEVICES` the same text runs on a CPU, which is
how it is tested.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

from plait.math.kernel_source import Elementwise, Layout, direction, normed, trust
from plait.math.kernels import load, unusable
from plait.math.storage import BLOCK, scramble
from plait.math.update_rule import UpdateRule

DEVICES = {"cuda"}
"""Kinds of device whose tensors are stepped by Triton."""
PIECE = 4096
"""Elements that one program of a launch steps."""
FIRST_ADDRESS = 6
"""A line is (row of numbers, count, width, index of the first element, begin, number of the tensor, addresses...)."""

TEXT = '''"""{name}, compiled from its update rule by plait; deleting this file is safe."""

import triton
import triton.language as tl

from plait.math.triton_functions import (
    abs, decode, drawn, encode, exp, hashed, maximum, minimum, narrowed, sign, sqrt, where, widened,
)


def constants({scalars}):
    """Return what depends on scalars only, in double precision."""
    from builtins import abs, max as maximum, min as minimum
    from math import copysign, exp, sqrt

    sign = lambda x: copysign(1.0, x) if x else x
    where = lambda condition, yes, no: yes if condition else no
    return [{expressions}]


@triton.jit
{direction}


{whole}


@triton.jit
def run(table, numbers, ratios, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, DIVISOR: tl.constexpr):
    line = table + tl.program_id(0) * COLUMNS
{load}
{call}
    step = rate{ratio}
{store}
'''

TRUST = """
@triton.jit
{trust}


@triton.jit
def norms(table, numbers, sums, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, DIVISOR: tl.constexpr):
    line = table + tl.program_id(0) * COLUMNS
{load}
{call}
    tl.store(sums + 2 * tl.program_id(0), tl.sum(where(inside, weight * weight, 0.0)))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(where(inside, way * way, 0.0)))


@triton.jit
def ratio(spans, numbers, sums, ratios, NUMBERS: tl.constexpr):
    span = spans + tl.program_id(0) * 3
    row, first, count = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    weight_norm, direction_norm = 0.0, 0.0
    for start in range(0, count, 1024):
        at = start + tl.arange(0, 1024)
        weight_norm += tl.sum(tl.load(sums + 2 * (first + at), mask=at < count, other=0.0))
        direction_norm += tl.sum(tl.load(sums + 2 * (first + at) + 1, mask=at < count, other=0.0))
{numbers}
    tl.store(ratios + tl.program_id(0), trust(sqrt(weight_norm), sqrt(direction_norm){arguments}))
"""

NORM = """
@triton.jit
{normed}


@triton.jit
def norms(table, numbers, sums, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, DIVISOR: tl.constexpr):
    line = table + tl.program_id(0) * COLUMNS
{load}
    part = normed({elements})
    tl.store(sums + tl.program_id(0), tl.sum(where(inside, part * part, 0.0)))


@triton.jit
def ratio(spans, numbers, sums, ratios, NUMBERS: tl.constexpr):
    span = spans + tl.program_id(0) * 3
    first, count = tl.load(span + 1), tl.load(span + 2)
    total = 0.0
    for start in range(0, count, 1024):
        at = start + tl.arange(0, 1024)
        total += tl.sum(tl.load(sums + first + at, mask=at < count, other=0.0))
    tl.store(ratios + tl.program_id(0), sqrt(total))
"""

OF_TENSOR = "tl.load(ratios + tl.load(line + 5))"
"""What the second launch found for the tensor of a line."""

FLAT = """
at = tl.multiple_of(tl.load(line + 4), DIVISOR) + tl.arange(0, {piece})
inside = at < tl.multiple_of(tl.load(line + 1), DIVISOR)
"""

IN_ROWS = """
width = tl.multiple_of(tl.load(line + 2), DIVISOR)
across = (width + 255) // 256
number = tl.load(line + 4) + tl.arange(0, {piece} // 256)[:, None]
lane = number % across * 256 + tl.arange(0, 256)[None, :]
at = number // across * width + lane
in_tensor = number < tl.load(line + 1) // width * across
inside = (lane < width) & in_tensor
"""

KINDS = {"float32": "float32", "bfloat16": "uint16", "8bit": "uint8"}


def _load_text(rule: UpdateRule, layout: Layout, constants: list[str]) -> str:
    """The text that reads a piece of a tensor."""
    lines = ["row = numbers + tl.load(line) * NUMBERS", "rate, scale = tl.load(row), tl.load(row + 1)"]
    lines += [f"{name} = tl.load(row + {2 + n})" for n, name in enumerate(constants)]
    lines += (IN_ROWS if layout.states == "8bit" else FLAT).format(piece=PIECE).strip().splitlines()
    place = FIRST_ADDRESS
    kinds = [("weight", layout.weight), ("gradient", layout.weight), *((name, layout.states) for name in rule.states)]
    for name, kind in kinds:
        address = f"tl.load(line + {place}).to(tl.pointer_type(tl.{KINDS[kind]}))"
        lines.append(f"{name}_at = tl.multiple_of({address}, DIVISOR) + at")
        place += 1
        read = f"tl.load({name}_at, mask=inside, other=0)"
        if kind == "8bit":
            lines.append(f"{name}_scale_at = tl.load(line + {place}).to(tl.pointer_type(tl.float32)) + number")
            place += 1
            read = f"decode({read}, tl.load({name}_scale_at, mask=in_tensor, other=0.0))"
        lines.append(f"{name} = {f'widened({read})' if kind == 'bfloat16' else read}")
    return textwrap.indent("\n".join(lines), " " * 4)


def _elements(rule: UpdateRule, constants: Iterable[str]) -> str:
    """What a function of elements is called with."""
    return ", ".join(["weight", "scale * gradient", *rule.states, *constants])


def _call_text(rule: UpdateRule, step: Elementwise) -> str:
    """The text that finds the direction and the new states."""
    lines = [f"norm = {OF_TENSOR}"] if rule.normed else []
    lines += [f"{name} = {expression}" for name, expression in step.of_norm.items()]
    names = ", ".join(f"new_{name}" for name in rule.states)
    called = f"direction({_elements(rule, [*step.constants, *step.of_norm])})"
    lines.append(f"way, {names} = {called}" if names else f"way = {called}[0]")
    return textwrap.indent("\n".join(lines), " " * 4)


def _store_text(rule: UpdateRule, layout: Layout, keys: int) -> str:
    """The text that writes a piece of a tensor and its states."""
    moved = "weight - step * way"
    lines = [f"tl.store(weight_at, {f'narrowed({moved})' if layout.weight == 'bfloat16' else moved}, mask=inside)"]
    for n, name in enumerate(rule.states):
        if layout.states == "float32":
            lines.append(f"tl.store({name}_at, new_{name}, mask=inside)")
            continue
        if n % 2 == 0:
            key = f"tl.load(row + {keys + n // 2}).to(tl.uint32, bitcast=True)"
            lines.append(f"random = hashed({key}, tl.load(line + 3) + at)")
        bits = "random >> 16" if n % 2 else "random & 0xFFFF"
        if layout.states == "bfloat16":
            lines.append(f"tl.store({name}_at, drawn(new_{name}, {bits}), mask=inside)")
            continue
        lines.append(f"{name}_code, {name}_scale = encode(new_{name}, inside, {bits})")
        lines.append(f"tl.store({name}_at, {name}_code, mask=inside)")
        lines.append(f"tl.store({name}_scale_at, {name}_scale, mask=in_tensor)")
    return textwrap.indent("\n".join(lines), " " * 4)


def source(rule: UpdateRule, name: str, layout: Layout) -> str:
    """Return the Python text of a rule's kernels. A row of numbers: rate, sign, constants, scalars of trust, keys."""
    step, inner = direction(rule), normed(rule)
    constants = step.constants | inner.constants
    load_text, call_text = _load_text(rule, layout, list(constants)), _call_text(rule, step)
    written, names = ("", list[str]()) if rule.trust is None else trust(rule)
    places = [f"{n} = tl.load(numbers + row * NUMBERS + {2 + len(constants) + i})" for i, n in enumerate(names)]
    whole = ""
    if rule.normed:
        whole = NORM.format(normed=inner.text, load=load_text, elements=_elements(rule, inner.constants))
    elif rule.trust:
        whole = TRUST.format(
            trust=written,
            load=load_text,
            call=call_text,
            numbers=textwrap.indent("\n".join(places), " " * 4),
            arguments="".join(f", {n}" for n in names),
        )
    return TEXT.format(
        name=name,
        scalars=", ".join(rule.scalars),
        expressions=", ".join([*constants.values(), *names]),
        direction=step.text,
        whole=whole,
        load=load_text,
        call=call_text,
        ratio=f" * {OF_TENSOR}" if rule.trust else "",
        store=_store_text(rule, layout, 2 + len(constants) + len(names)),
    )


@dataclass
class TritonKernel:
    """A rule's kernels for one layout, and the tables of the last launch on each device."""

    rule: UpdateRule
    layout: Layout
    module: ModuleType
    tables: dict[tuple[torch.device, bool], tuple[Any, Tensor, Tensor]] = field(default_factory=dict)

    def launch(self, items: list[tuple[int, ...]], scalars: list[tuple[float, ...]], device: torch.device) -> None:
        """Step all tensors; items and scalars as `plait.math.kernels.launch` takes them."""
        numbers = torch.from_numpy(self._numbers(scalars)).to(device)
        for aligned in (True, False):
            chosen = [item for item in items if _is_aligned(item) == aligned]
            if chosen:
                self._launch(chosen, numbers, aligned)

    def _launch(self, items: list[tuple[int, ...]], numbers: Tensor, aligned: bool) -> None:
        key = (numbers.device, aligned)
        if key not in self.tables or self.tables[key][0] != items:
            self.tables[key] = (items, *_tables(items, self.layout, numbers.device))
        _, table, spans = self.tables[key]
        given = {"COLUMNS": table.shape[1], "NUMBERS": numbers.shape[1], "DIVISOR": 16 if aligned else 1}
        ratios = torch.empty(len(items), device=numbers.device)
        if self.rule.whole:
            sums = torch.empty(len(table), 2, device=numbers.device)
            self.module.norms[(len(table),)](table, numbers, sums, **given)
            self.module.ratio[(len(items),)](spans, numbers, sums, ratios, NUMBERS=numbers.shape[1])
        self.module.run[(len(table),)](table, numbers, ratios, **given)

    def _numbers(self, scalars: Sequence[tuple[float, ...]]) -> numpy.ndarray:
        rows = []
        for rate, ascend, key, *rest in scalars:
            keys = [scramble(int(key) + n & 0xFFFFFFFF) for n in range((len(self.rule.states) + 1) // 2)]
            row = numpy.array([rate, ascend, *self.module.constants(*rest)], dtype=numpy.float32)
            rows.append(numpy.concatenate([row, numpy.array(keys, dtype=numpy.uint32).view(numpy.float32)]))
        return numpy.stack(rows)


def _is_aligned(item: tuple[int, ...]) -> bool:
    """Say whether a tensor can be read 16 bytes at a time."""
    _, count, width, first, *addresses = item
    lengths = (count, first) if width == 1 else (width, first)
    return all(n % 16 == 0 for n in (*lengths, *addresses))


def _tables(items: list[tuple[int, ...]], layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the lines of all pieces, and (row, first line, lines) of each tensor."""
    held = numpy.array(items, dtype=numpy.int64)
    row, count, width = held[:, 0], held[:, 1], held[:, 2]
    rounded = layout.states == "8bit"
    step = PIECE // BLOCK if rounded else PIECE
    units = count // width * -(-width // BLOCK) if rounded else count
    pieces = -(-units // step)
    first = numpy.cumsum(pieces) - pieces
    number = numpy.repeat(numpy.arange(len(items)), pieces)
    begin = (numpy.arange(len(number)) - first[number]) * step
    lines = numpy.concatenate([held[number, :4], begin[:, None], number[:, None], held[number, 4:]], axis=1)
    spans = numpy.stack([row, first, pieces], axis=1)
    return torch.from_numpy(lines).to(device), torch.from_numpy(spans).to(device)


_MADE: dict[tuple[UpdateRule, Layout], TritonKernel | None] = {}


def triton_kernel(rule: UpdateRule, name: str, layout: Layout) -> TritonKernel | None:
    """Return a rule's Triton kernels; None, with one notice, where Triton cannot be used."""
    if (rule, layout) not in _MADE:
        missing = unusable("triton")
        if missing and None not in _MADE.values():
            warnings.warn(
                f"{missing}: optimizers run as plain torch loops on this device; pip install triton.", stacklevel=2
            )
        made = None if missing else load(source(rule, name, layout), f"{name}_triton")
        _MADE[rule, layout] = None if made is None else TritonKernel(rule, layout, made)
    return _MADE[rule, layout]
