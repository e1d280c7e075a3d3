"""Update rules compiled for CUDA by Triton, from the same text as the CPU's kernels: one launch steps all tensors.

A launch takes a table with one line for each piece of a tensor, and a table of numbers (the rate, what depends on
scalars only, random keys): nothing that changes from step to step is an argument, so no number recompiles anything.
A rule that asks something of whole tensors or of rows takes three launches: sums by piece, what each tensor or row is
answered, in a fixed order, and the step; sums are float64, since squares leave float32. With TRITON_INTERPRET=1 and
"cpu" added to `DEVICES` the same text runs on a CPU, which is how it is tested.
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

from plait.math.kernel_source import Elementwise, Layout, direction, normed, of_whole
from plait.math.kernels import load, unusable
from plait.math.storage import BLOCK, scramble
from plait.math.update_rule import UpdateRule

DEVICES = {"cuda"}
"""Kinds of device whose tensors are stepped by Triton."""
PIECE = 4096
"""Elements that one program of a launch steps."""
PIECE_OF_ROW = 1024
"""The same where no piece may reach into another row."""
FIRST_ADDRESS = 6
"""A line is (row of numbers, end, width, index of the first element, begin, number of its answer, addresses...); begin
and end in elements, or in blocks where states have 8 bits.
"""

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


{of_whole}


@triton.jit
def run(table, numbers, answers, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, DIVISOR: tl.constexpr):
    line = table + tl.program_id(0) * COLUMNS
{load}
{call}
    step = {step}
{store}
'''

OF_WHOLE = """
{functions}


@triton.jit
def norms(table, numbers, sums, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, DIVISOR: tl.constexpr):
    line = table + tl.program_id(0) * COLUMNS
{load}
    into = sums + 4 * tl.program_id(0)
{sums}


@triton.jit
def added(sums, at, inside, count):
    # Four sums over `count` lines, the first of which are `at`.
    a, b = tl.zeros(at.shape, tl.float64), tl.zeros(at.shape, tl.float64)
    c, d = tl.zeros(at.shape, tl.float64), tl.zeros(at.shape, tl.float64)
    for line in range(0, count):
        place = sums + 4 * (at + line)
        a += tl.load(place, mask=inside, other=0.0)
        b += tl.load(place + 1, mask=inside, other=0.0)
        c += tl.load(place + 2, mask=inside, other=0.0)
        d += tl.load(place + 3, mask=inside, other=0.0)
    return a, b, c, d


@triton.jit
def answer(spans, numbers, sums, answers, NUMBERS: tl.constexpr):
    span = spans + tl.program_id(0) * 6
    row, first, rows, width = tl.load(span), tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    lines, into = tl.load(span + 4), answers + tl.load(span + 5)
{numbers}
{answer}
"""

SUMS = {
    "trust": """
{call}
weight, way = where(inside, weight, 0.0).to(tl.float64), where(inside, way, 0.0).to(tl.float64)
tl.store(into, tl.sum(weight * weight))
tl.store(into + 1, 0.0)
tl.store(into + 2, tl.sum(way * way))
tl.store(into + 3, 0.0)
""",
    "radial": """
{call}
weight, way = where(inside, weight, 0.0).to(tl.float64), where(inside, way, 0.0).to(tl.float64)
gradient = where(inside, gradient, 0.0).to(tl.float64)
tl.store(into, tl.sum(weight * weight))
tl.store(into + 1, tl.sum(weight * way))
tl.store(into + 2, tl.sum(weight * gradient))
tl.store(into + 3, tl.sum(gradient * gradient))
""",
    "normed": """
part = where(inside, normed({elements}), 0.0).to(tl.float64)
tl.store(into, tl.sum(part * part))
tl.store(into + 1, 0.0)
tl.store(into + 2, 0.0)
tl.store(into + 3, 0.0)
""",
}

ANSWER = {
    "trust": """
weight_square, direction_square = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
for start in range(0, lines, 1024):
    at = start + tl.arange(0, 1024)
    a, b, c, d = added(sums, first + at, at < lines, 1)
    weight_square += tl.sum(a)
    direction_square += tl.sum(c)
tl.store(into, trust(sqrt(weight_square), sqrt(direction_square){trust}))
""",
    "normed": """
total = tl.full((), 0, tl.float64)
for start in range(0, lines, 1024):
    at = start + tl.arange(0, 1024)
    a, b, c, d = added(sums, first + at, at < lines, 1)
    total += tl.sum(a)
tl.store(into, sqrt(total))
""",
    "radial": """
failed = 0
weight_square, along = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
inner, gradient_square = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
for start in range(0, rows, 1024):
    at = start + tl.arange(0, 1024)
    a, b, c, d = added(sums, first + at * lines, at < rows, lines)
    passed = perpendicular(c, sqrt(a), sqrt(d), width.to(tl.float64){perpendicular})
    failed += tl.sum(where(passed, 0, 1))
    weight_square += tl.sum(a)
    along += tl.sum(b)
    inner += tl.sum(c)
    gradient_square += tl.sum(d)
count = (rows * width).to(tl.float64)
passed = perpendicular(inner, sqrt(weight_square), sqrt(gradient_square), count{perpendicular})
as_whole = where(passed, radial(along, sqrt(weight_square){radial}), 0.0)
for start in range(0, rows, 1024):
    at = start + tl.arange(0, 1024)
    a, b, c, d = added(sums, first + at * lines, at < rows, lines)
    tl.store(into + at, where(failed == 0, radial(b, sqrt(a){radial}), as_whole), mask=at < rows)
""",
}

OF_TENSOR = "tl.load(answers + tl.load(line + 5))"
"""What a tensor or row was answered."""

# A direction may be so short that the ratio is beyond float32.
STEP = {
    "trust": f"minimum(rate * {OF_TENSOR}, 3.4e38).to(tl.float32)",
    "radial": f"rate\n    way += {OF_TENSOR}.to(tl.float32) * weight",
}

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
in_tensor = number < tl.load(line + 1)
inside = (lane < width) & in_tensor
"""

KINDS = {"float32": "float32", "bfloat16": "uint16", "8bit": "uint8"}


def _asks(rule: UpdateRule) -> str:
    """Return what a rule asks of whole tensors, "trust" or "normed", or of rows, "radial"; empty if nothing."""
    return next((asked for asked in SUMS if getattr(rule, asked) is not None), "")


def _piece(rule: UpdateRule) -> int:
    return PIECE_OF_ROW if _asks(rule) == "radial" else PIECE


def _load_text(rule: UpdateRule, layout: Layout, constants: Iterable[str]) -> str:
    """The text that reads a piece of a tensor."""
    lines = ["row = numbers + tl.load(line) * NUMBERS", "rate, scale = tl.load(row), tl.load(row + 1)"]
    lines += [f"{name} = tl.load(row + {2 + n})" for n, name in enumerate(constants)]
    lines += (IN_ROWS if layout.states == "8bit" else FLAT).format(piece=_piece(rule)).strip().splitlines()
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
    lines += [f"{name} = ({expression}).to(tl.float32)" for name, expression in step.of_norm.items()]
    names = ", ".join(f"new_{name}" for name in rule.states)
    called = f"direction({_elements(rule, [*step.constants, *step.of_norm])})"
    return "\n".join([*lines, f"way, {names} = {called}" if names else f"way = {called}[0]"])


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
    load_text, call_text = _load_text(rule, layout, constants), _call_text(rule, step)
    asked = {called: of_whole(rule, called) for called in rule.of_whole}
    names = list(dict.fromkeys(name for _, scalars in asked.values() for name in scalars))
    places = [f"{n} = tl.load(numbers + row * NUMBERS + {2 + len(constants) + i})" for i, n in enumerate(names)]
    whole, asks = "", _asks(rule)
    if asks:
        texts = [text for text, _ in asked.values()]
        sums = SUMS[asks].format(call=call_text, elements=_elements(rule, inner.constants))
        given = {called: "".join(f", {name}" for name in scalars) for called, (_, scalars) in asked.items()}
        whole = OF_WHOLE.format(
            functions="\n\n\n".join(f"@triton.jit\n{text}" for text in (inner.text, *texts) if text),
            load=load_text,
            sums=textwrap.indent(sums.strip(), " " * 4),
            numbers=textwrap.indent("\n".join(places), " " * 4),
            answer=textwrap.indent(ANSWER[asks].format(**given).strip(), " " * 4),
        )
    return TEXT.format(
        name=name,
        scalars=", ".join(rule.scalars),
        expressions=", ".join([*constants.values(), *names]),
        direction=step.text,
        of_whole=whole,
        load=load_text,
        call=textwrap.indent(call_text, " " * 4),
        step=STEP.get(asks, "rate"),
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
            self.tables[key] = (items, *_tables(items, self.rule, self.layout, numbers.device))
        _, table, spans = self.tables[key]
        given = {"COLUMNS": table.shape[1], "NUMBERS": numbers.shape[1], "DIVISOR": 16 if aligned else 1}
        answers = torch.empty(len(table), dtype=torch.float64, device=numbers.device)
        if self.rule.whole:
            sums = torch.empty(len(table), 4, dtype=torch.float64, device=numbers.device)
            self.module.norms[(len(table),)](table, numbers, sums, **given)
            self.module.answer[(len(items),)](spans, numbers, sums, answers, NUMBERS=numbers.shape[1])
        self.module.run[(len(table),)](table, numbers, answers, **given)

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


def _tables(
    items: list[tuple[int, ...]], rule: UpdateRule, layout: Layout, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the lines of all pieces; and of each tensor (row of numbers, first line, rows, width, lines of a row,
    number of its first answer), all of it one row where nothing is asked of rows.
    """
    held = numpy.array(items, dtype=numpy.int64)
    row, count, width = held[:, 0], held[:, 1], held[:, 2]
    rounded = layout.states == "8bit"
    step = _piece(rule) // BLOCK if rounded else _piece(rule)
    length = -(-width // BLOCK) if rounded else width
    rows = count // width
    if _asks(rule) != "radial":
        rows, length = numpy.ones_like(rows), rows * length
    lines = -(-length // step)
    pieces = rows * lines
    first, first_answer = numpy.cumsum(pieces) - pieces, numpy.cumsum(rows) - rows
    number = numpy.repeat(numpy.arange(len(items)), pieces)
    in_row, piece = numpy.divmod(numpy.arange(len(number)) - first[number], lines[number])
    begin = in_row * length[number] + piece * step
    columns = [row[number], (in_row + 1) * length[number], width[number], held[number, 3], begin]
    table = numpy.column_stack([*columns, first_answer[number] + in_row, held[number, 4:]])
    spans = numpy.stack([row, first, rows, width, lines, first_answer], axis=1)
    return torch.from_numpy(table).to(device), torch.from_numpy(spans).to(device)


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
