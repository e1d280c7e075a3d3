"""Which tensors hold rows that were picked out of others, as a router picks for each expert some of the tokens, and
which hold nothing of the batch, as positions do.

Of such a tensor nobody knows which rows of the batch its own belong to, though there be just as many of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plait.math.tracing import traced

MARK = "_plait_picked"
"""The attribute of a tensor whose rows were picked."""
SHARED = "_plait_shared"
"""The attribute of a tensor that is made of positions and of the model's own tensors alone."""
REPEATED = ("expand", "expand_as", "repeat", "repeat_interleave", "tile", "broadcast_to")
"""Functions that give each row of a batch its own of what all share."""
RETURNED = (
    *("setitem", "index_add", "index_copy", "index_put", "masked_scatter"),
    *("scatter", "scatter_add", "scatter_reduce", "select_scatter", "slice_scatter"),
)
"""Functions (without underscores) that write into places of a tensor, whose own rows stay where they are."""


PARTED = ("getitem", "narrow", "split", "split_with_sizes", "chunk", "tensor_split")
"""Functions that return some of a tensor's rows, by their places."""


CALLED = nn.Module._call_impl.__code__
"""What runs while a module is called."""


class Picks(TorchFunctionMode):
    """While it is entered, marks what a model makes of some of a matrix' rows, or of rows out of their turn.

    An index of each row in turn picks nothing, nor does one into a model's own parameters and buffers (tables of
    positions). Written back to their places, or of three dimensions, rows are those of the batch again. Code that is
    compiled, and what mixes rows by a product, goes unseen.

    >>> class Routed(nn.Module):
    ...     def forward(self, x, index):
    ...         return x[index].relu()
    >>> x, index = torch.randn(3, 2), torch.tensor([2, 0])
    >>> with Picks(model := Routed()):
    ...     y, z = model(x, index), model(x[index], torch.arange(2))
    >>> picked(y), picked(z), picked(x)
    (True, False, False)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tables = {id(t) for t in (*model.parameters(), *model.buffers())}
        self.parts = {id(part) for part in model.modules()}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and mark what it returns."""
        made = function(*args, **(kwargs or {}))
        every = [t for t in ((made,) if isinstance(made, Tensor) else _tensors((made,))) if id(t) not in self.tables]
        if not every or traced():
            return made
        name = getattr(function, "__name__", "").strip("_")
        common = self._is_shared(name, [*_tensors((*args, *(kwargs or {}).values()))])
        for tensor in every:
            if shared(tensor) != common:
                setattr(tensor, SHARED, common)
        if flat := [t for t in every if 0 < t.dim() < 3]:
            given = args[:1] if name in RETURNED else (*args, *(kwargs or {}).values())
            if any(map(picked, _tensors(given))) or (self._picks(name, args, kwargs or {}, flat) and self._inside()):
                for tensor in flat:
                    setattr(tensor, MARK, True)
        return made

    def _is_shared(self, name: str, given: list[Tensor]) -> bool:
        """Say whether a function returns what all rows share: positions, or what is made of them and of tables."""
        common = all(id(t) in self.tables or shared(t) for t in given) if given else name == "arange"
        return common and name not in REPEATED and self._inside()

    def _inside(self) -> bool:
        """Say whether the model itself is at work: what is picked before it is called is the batch."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code is CALLED and id(frame.f_locals.get("self")) in self.parts:
                return True
            frame = frame.f_back
        return False

    def _picks(self, name: str, args: Any, named: Any, made: list[Tensor]) -> bool:
        """Say whether a function picks rows, and not all of them in turn."""
        if not args or not isinstance(args[0], Tensor) or id(args[0]) in self.tables:
            return False
        rows: Tensor = args[0]
        if name == "masked_select":
            return True
        if name in PARTED and rows.dim() == 2 and any(t.dim() == 2 and len(t) < len(rows) for t in made):
            return True
        if name == "getitem":
            first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            return _out_of_turn(first, rows)
        if name in ("index_select", "gather", "take_along_dim"):
            given = {**dict(zip(("dim", "index"), args[1:], strict=False)), **named}
            return given.get("dim") in (0, -rows.dim()) and _out_of_turn(given.get("index"), rows)
        return False


def _out_of_turn(index: Any, rows: Tensor) -> bool:
    index = torch.tensor(index) if isinstance(index, list) else index
    if not isinstance(index, Tensor) or not index.dim():
        return False  # a slice or one place, not places
    if index.dtype == torch.bool:
        return not bool(index.all())
    turn = torch.arange(len(rows), device=index.device).view(-1, *(1,) * (index.dim() - 1))
    return len(index) != len(rows) or not bool((index == turn).all())


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def picked(tensor: Tensor) -> bool:
    """Say whether a tensor's rows were picked out of others."""
    marked: bool = getattr(tensor, MARK, False)
    return marked


def shared(tensor: Tensor) -> bool:
    """Say whether a tensor holds nothing of the batch."""
    marked: bool = getattr(tensor, SHARED, False)
    return marked
