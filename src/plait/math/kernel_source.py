"""The text of a CPU kernel, made from an update rule's own text: one pass over each weight, its gradient and states.

What depends on scalars only is computed once, in double precision, before the loop; the rest is the loop's body.
Weights and gradients are float32 or bfloat16; states are float32, bfloat16 or 8 bit, see `plait.math.storage`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from plait.math.update_rule import FUNCTIONS, NORM, UpdateRule

STASH = 2**22
"""For how many elements of a weight (or row) a rule that asks of all of it keeps the direction; for the others it finds
it twice."""
BLOCK, BLOCK_OF_WHOLE = 4096, 1024
"""Elements between two looks at where an array begins; in the second, the weight and its direction stay in the first
cache until they are added up.
"""
FIRST_ADDRESS = 4
"""An item is (row of scalars, count, width, index of the first element, addresses...)."""

HEADER = '''"""{name}, compiled from its update rule by plait; deleting this file is safe. Functions: {version}"""

from numba import carray, njit
from numpy import abs, empty, float32, float64, int32, int64, maximum, minimum, sign, sqrt

from plait.math.kernel_functions import (
    F0, HALF, HOW, LOW, ZERO, both, bytes_at, drawn, exp, float_block, floats_at, halves_at, hashed, narrowed, pack,
    reach, right, sums, unpack, widened, word_block, word_of,
)


@njit(**HOW)
def where(condition, yes, no):
    return yes if condition else no
'''

RUN = """
@njit("void(int64[:, ::1], float64[:, ::1])", nogil=True, cache=True, **HOW)
def run(items, scalars):
{scratch}
    for item in range(items.shape[0]):
        row, count, width, first = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        rate, scale, key = scalars[row, 0], float32(scalars[row, 1]), word_of(int64(scalars[row, 2]))
{numbers}
{body}
"""

ELEMENTWISE = """
        step = float32(rate)
{loop}
            for i in range(size):
                new = direction({elements})
                {moved}
{store}
{pack}
"""

NORM_LOOP = """
        total = 0.0
{loop}
            for i in range(size):
                part = float64(normed({elements}))
                total += part * part
        norm = sqrt(total)
{of_norm}
"""

# A span is what norms are taken of: a row or the weight. Of the elements before `asked` they are, and of those before
# `kept` the direction stays in the stash.
SPANS = """
{spans}
        for start in range(0, count, span):
            end = start + span
            asked = end if {question} else start
            kept = min(asked, start + len(stash) // width * width)
            weight_square, inner, direction_square = 0.0, 0.0, 0.0
{loop_kept}
                held, some, cross, other = stash[begin - start : begin - start + size], F0, F0, F0
                for i in range(size):
                    new = direction({elements})
                    held[i] = way = new[0]
{sum}
{store}
{pack}
{add}
{loop_asked}
                held, some, cross, other = scratch[:size], F0, F0, F0
                for i in range(size):
                    held[i] = way = direction({elements})[0]
{sum}
{add}
{answer}
{loop_stashed}
                held = stash[begin - start : begin - start + size]
                for i in range(size):
                    {moved_held}
{loop_rest}
                for i in range(size):
                    new = direction({elements})
                    {moved}
{store}
{pack}
"""

# In float64 this loop, unlike others, would be slower: it has roots and quotients too.
SUM = """
some += {weight} * {weight}
cross += {weight} * way
other += way * way
"""

ADD = """
some_square, product, other_square = sums(some, cross, other, weight, held)
weight_square += some_square
inner += product
direction_square += other_square
"""

WHOLE = """
        span = count
"""

TRUST = """
            # A direction may be so short that the ratio is beyond float32.
            step = float32(min(rate * trust(sqrt(weight_square), sqrt(direction_square){numbers}), 3.4e38))
"""

# Where not even zeros are perpendicular nothing is, and nothing need be read.
PERPENDICULAR = """
        step, span, total_inner, total_weight, total_gradient = float32(rate), count, 0.0, 0.0, 0.0
        turns = perpendicular(0.0, 0.0, 0.0, 1.0{numbers})
        by_rows = turns
        for start in range(0, count if turns else 0, width):
            end = start + width
            inner, weight_square, gradient_square = 0.0, 0.0, 0.0
{loop}
                for i in range(size):
                    w, g = float64({weight}), float64({gradient})
                    inner += w * g
                    weight_square += w * w
                    gradient_square += g * g
            by_rows = by_rows and perpendicular(
                inner, sqrt(weight_square), sqrt(gradient_square), float64(width){numbers}
            )
            total_inner += inner
            total_weight += weight_square
            total_gradient += gradient_square
        if by_rows:
            span = width
        elif turns:
            turns = perpendicular(total_inner, sqrt(total_weight), sqrt(total_gradient), float64(count){numbers})
"""

RADIAL = """
            turned = float32(radial(inner, sqrt(weight_square){numbers}) if turns else 0.0)
"""

# Blocks are arrays of their own, counted from 0: an index that may be negative would not be vectorized.
IN_BLOCKS = """
        for begin in range({start}, {end}, {block}):
            size = min({block}, {end} - begin)
{arrays}
"""

IN_ROWS = """
        across = (width + 255) // 256
        for number in range({start} // width * across, {end} // width * across):
            begin = number // across * width + number % across * 256
            size = min(256, (number // across + 1) * width - begin)
{arrays}
"""


class Hoist(ast.NodeTransformer):
    """Replace each largest expression that depends on scalars only, and on `through`, by a name, and remember it."""

    def __init__(self, scalars: Iterable[str], prefix: str, through: str = "") -> None:
        self.scalars, self.prefix, self.found = set(scalars), prefix, dict[str, str]()
        self.through = {through} if through else set[str]()

    def visit(self, node: ast.AST) -> Any:
        """Return the node, or the name that stands for it."""
        if isinstance(node, ast.expr) and not isinstance(node, ast.Tuple):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - set(FUNCTIONS)
            reads = isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
            known = self.through <= names <= self.scalars
            if reads and known and not (isinstance(node, ast.Name) and node.id in FUNCTIONS):
                return ast.Name(self.found.setdefault(ast.unparse(node), f"{self.prefix}{len(self.found)}"), ast.Load())
        return self.generic_visit(node)


def function(of: Callable[..., Any]) -> ast.FunctionDef:
    """Return the text of a rule's function without decorators, docstring and types."""
    found = ast.parse(textwrap.dedent(inspect.getsource(of))).body[0]
    assert isinstance(found, ast.FunctionDef)
    found.decorator_list, found.returns = [], None
    if ast.get_docstring(found):
        found.body = found.body[1:]
    for argument in [*found.args.args, *found.args.kwonlyargs]:
        argument.annotation = None
    return found


@dataclass(frozen=True)
class Elementwise:
    """The text of a function (weight, gradient, *states, *constants, *of_norm), and the expressions of the latter two
    by their names: constants depend on scalars only, `of_norm` on constants and the norm.
    """

    text: str = ""
    constants: dict[str, str] = field(default_factory=dict)
    of_norm: dict[str, str] = field(default_factory=dict)


def elementwise(of: Callable[..., Any], name: str, prefix: str) -> Elementwise:
    """Take what does not change from element to element out of a rule's function."""
    text = function(of)

    def taken_out(hoist: Hoist) -> dict[str, str]:
        text.body = [hoist.visit(statement) for statement in text.body]
        return {name: expression for expression, name in hoist.found.items()}

    constants = taken_out(Hoist((a.arg for a in text.args.kwonlyargs if a.arg != NORM), prefix))
    of_norm = taken_out(Hoist((*constants, NORM), "of_norm", through=NORM))
    text.args.args += [ast.arg(name) for name in (*constants, *of_norm)]
    text.args.kwonlyargs, text.args.kw_defaults, text.name = [], [], name
    return Elementwise(ast.unparse(ast.fix_missing_locations(text)), constants, of_norm)


def direction(rule: UpdateRule) -> Elementwise:
    """Return the text of a rule's direction."""
    return elementwise(rule.direction, "direction", "constant")


def normed(rule: UpdateRule) -> Elementwise:
    """Return the text of what a rule takes the norm of, empty where it takes none."""
    return Elementwise() if rule.normed is None else elementwise(rule.normed, "normed", "inner")


def of_whole(rule: UpdateRule, name: str) -> tuple[str, list[str]]:
    """Return the text of a function that is asked for a whole weight, with scalars by place, and the scalars' names."""
    text = function(rule.of_whole[name])
    names = [a.arg for a in text.args.kwonlyargs]
    text.args.args += text.args.kwonlyargs
    text.args.kwonlyargs, text.args.kw_defaults, text.name = [], [], name
    return ast.unparse(text), names


@dataclass(frozen=True)
class Layout:
    """How a kernel's arrays are stored: `weight` (and gradient) float32 or bfloat16, `states` one of storage.KINDS."""

    weight: str = "float32"
    states: str = "float32"

    def sizes(self, rule: UpdateRule) -> tuple[int, ...]:
        """Return the bytes per element at each address of an item; 0 for scales, which have 4 bytes per block."""
        weight = 2 if self.weight == "bfloat16" else 4
        state = {"float32": (4,), "bfloat16": (2,), "8bit": (1, 0)}[self.states]
        return (weight, weight, *(size for _ in rule.states for size in state))


@dataclass(frozen=True)
class Text:
    """The pieces of one kernel's text."""

    rule: UpdateRule
    layout: Layout

    def arrays(self) -> str:
        """What makes the arrays of one block."""
        lines, place = [], FIRST_ADDRESS
        reads = {"float32": ("floats_at", 4), "bfloat16": ("halves_at", 2), "8bit": ("bytes_at", 1)}
        kinds = [("weight", self.layout.weight), ("gradient", self.layout.weight)]
        for name, kind in kinds + [(state, self.layout.states) for state in self.rule.states]:
            at, size = reads[kind]
            held = f"{name}_codes" if kind == "8bit" else name
            lines.append(f"{held} = carray({at}(items[item, {place}] + {size} * begin), size)")
            place += 1
            if kind == "8bit":
                lines.append(f"{name}_scale = carray(floats_at(items[item, {place}] + 4 * number), 1)")
                lines.append(f"unpack({held}, {name}_scale[0], {name})")
                lines.append(f"{name}_most = {name}_least = ZERO")
                place += 1
        return textwrap.indent("\n".join(lines), " " * 12)

    def loop(self, start: str, end: str, count: int | None = None) -> str:
        """The head of the loop over the blocks of a range of elements, of `count` arrays."""
        form = IN_ROWS if self.layout.states == "8bit" else IN_BLOCKS
        arrays = "\n".join(self.arrays().splitlines()[:count])
        block = BLOCK_OF_WHOLE if self.rule.of_whole else BLOCK
        return form.format(start=start, end=end, arrays=arrays, block=block).strip("\n")

    def read(self, name: str) -> str:
        """An element as float32."""
        kind = self.layout.weight if name in ("weight", "gradient") else self.layout.states
        return f"widened({name}[i])" if kind == "bfloat16" else f"{name}[i]"

    def store(self) -> str:
        """What stores the new states of one element."""
        lines = []
        for n, name in enumerate(self.rule.states):
            value = f"new[{1 + n}]"
            if self.layout.states != "float32" and n % 2 == 0:
                random = "random" if self.layout.states == "bfloat16" else f"random{n // 2}[i]"
                lines.append(f"{random} = hashed(key{n // 2}, first + begin + i)")
            if self.layout.states == "bfloat16":
                value = f"drawn({value}, {'right(random, HALF)' if n % 2 else 'both(random, LOW)'})"
            lines.append(f"{name}[i] = {value}")
            if self.layout.states == "8bit":
                lines.append(f"{name}_most, {name}_least = reach({name}_most, {name}_least, {value})")
        return textwrap.indent("\n".join(lines), " " * 16)

    def pack(self) -> str:
        """What packs the new states of a block."""
        if self.layout.states != "8bit":
            return ""
        lines = []
        for n, name in enumerate(self.rule.states):
            which = "HALF" if n % 2 else "ZERO"
            reached = f"{name}_most, {name}_least"
            lines.append(f"{name}_scale[0] = pack({name}, {reached}, {name}_codes, random{n // 2}, {which})")
        return textwrap.indent("\n".join(lines), " " * 12)

    def moved(self, direction: str) -> str:
        """What moves one element of the weight."""
        weight = self.read("weight")
        if self.rule.radial is not None:
            direction = f"({direction} + turned * {weight})"
        value = f"{weight} - step * {direction}"
        return f"weight[i] = {f'narrowed({value})' if self.layout.weight == 'bfloat16' else value}"

    def norm(self, elements: str, of_norm: dict[str, str]) -> str:
        """What finds the norm that the direction reads, and what depends on it only."""
        if self.rule.normed is None:
            return ""
        lines = [f"{name} = float32({expression})" for name, expression in of_norm.items()]
        found = textwrap.indent("\n".join(lines), " " * 8)
        return NORM_LOOP.format(loop=self.loop("0", "count"), elements=elements, of_norm=found)

    def body(self, elements: str, norm: str) -> str:
        """What steps one weight; norm: what finds the norm that the direction reads."""
        common = {"elements": elements, "moved": self.moved("new[0]")}
        if not self.rule.of_whole:
            loop, store, pack = self.loop("0", "count"), self.store(), self.pack()
            return norm + ELEMENTWISE.format(loop=loop, store=store, pack=pack, **common)

        def deeper(text: str, by: int = 4) -> str:
            return textwrap.indent(text.strip("\n"), " " * by)

        return SPANS.format(
            spans=self.spans().strip("\n"),
            question="True" if self.rule.radial is None else "turns",
            loop_kept=deeper(self.loop("start", "kept")),
            loop_asked=deeper(self.loop("kept", "asked")),
            loop_stashed=deeper(self.loop("start", "kept", 1)),
            loop_rest=deeper(self.loop("kept", "end")),
            sum=deeper(SUM.format(weight=self.read("weight")), 20),
            add=deeper(ADD, 16),
            store=deeper(self.store()),
            pack=deeper(self.pack()),
            answer=self.answer().strip("\n"),
            moved_held=self.moved("held[i]"),
            **common,
        )

    def scalars(self, name: str) -> str:
        """The scalars that follow the numbers of a function that is asked for a whole weight."""
        return "".join(f", {scalar}" for scalar in of_whole(self.rule, name)[1])

    def spans(self) -> str:
        """What finds the spans of a weight."""
        if self.rule.perpendicular is None:
            return WHOLE
        return PERPENDICULAR.format(
            numbers=self.scalars("perpendicular"),
            loop=textwrap.indent(self.loop("start", "end", 2), " " * 4),
            weight=self.read("weight"),
            gradient=self.read("gradient"),
        )

    def answer(self) -> str:
        """What a span's norms say."""
        if self.rule.trust is not None:
            return TRUST.format(numbers=self.scalars("trust"))
        assert self.rule.radial is not None
        return RADIAL.format(numbers=self.scalars("radial"))


def source(rule: UpdateRule, name: str, layout: Layout, version: str = "") -> str:
    """Return the Python text of a rule's kernel; `version` says of which functions."""
    step, inner, text = direction(rule), normed(rule), Text(rule, layout)
    functions = [step.text, inner.text, *(of_whole(rule, asked)[0] for asked in rule.of_whole)]
    parts = [HEADER.format(name=name, version=version)]
    parts += [f"\n@njit(**HOW)\n{each}\n" for each in functions if each]
    reads = [text.read("weight"), f"scale * {text.read('gradient')}", *map(text.read, rule.states)]
    elements = ", ".join([*reads, *step.constants, *step.of_norm])
    numbers = [f"{s} = scalars[row, {3 + n}]" for n, s in enumerate(rule.scalars)]
    numbers += [f"{name} = float32({expression})" for name, expression in (step.constants | inner.constants).items()]
    pairs = range((len(rule.states) + 1) // 2)
    numbers += [f"key{n} = hashed(key, {n})" for n in pairs]
    scratch = []
    if layout.states == "8bit":
        scratch += [f"{state} = carray(float_block(), 256)" for state in rule.states]
        scratch += [f"random{n} = carray(word_block(), 256)" for n in pairs]
    if rule.of_whole:
        scratch += [f"stash = empty(min({STASH}, items[:, 1].max()), float32)"]
        scratch += [f"scratch = empty({BLOCK_OF_WHOLE}, float32)"]
    run = RUN.format(
        scratch=textwrap.indent("\n".join(scratch), " " * 4),
        numbers=textwrap.indent("\n".join(numbers), " " * 8),
        body=text.body(elements, text.norm(", ".join([*reads, *inner.constants]), step.of_norm)).strip("\n"),
    )
    return "\n".join([*parts, run])
