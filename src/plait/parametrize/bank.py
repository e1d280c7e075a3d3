"""Several low-rank updates on one untouched weight, of which each row of a batch uses its own, or all rows one.

Which one it is stands in a tensor, and so do the updates: nothing that a compiler looks at changes when they do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.errors import BadInput
from plait.layers import CONVOLUTIONS, is_transformers_conv1d, matrix_shape, own_weight
from plait.parametrize.base import Parametrization, be_called, be_read, stack
from plait.parametrize.low_rank import adapter_dtype, low_rank_branch, without_padding
from plait.parametrize.picked import picked, shared
from plait.parametrize.update import Factors

NONE = 0
"""The place in every table that stands for the base alone."""


class Choice:
    """The place in the tables of the update that all rows use, `one` [1], or that each row uses, `rows` [n] or None.

    routed: the layers that may see some of the tokens. flat: whether the vectors [n, in] that a layer sees are those of
    all rows in turn for certain.
    """

    def __init__(self, device: torch.device, routed: frozenset[str] = frozenset()) -> None:
        self.one = torch.full((1,), NONE, device=device)
        self.rows: Tensor | None = None
        self.routed, self.flat = routed, False

    def rows_of(self, layer: nn.Module, inputs: Tensor, name: str) -> Tensor:
        """Return the place for each row of a layer's inputs: those of the batch, each once or `k` times over, as beams
        are. Of vectors [n, in] more than the batch has, picked out of others, or an expert's, nobody knows which rows
        they are of.
        """
        assert self.rows is not None
        batch, count = len(self.rows), len(inputs)
        vectors = inputs.dim() <= (1 if isinstance(layer, nn.Embedding) else 2)
        if vectors and count and not self.flat and (count != batch or name in self.routed or picked(inputs)):
            raise BadInput(
                f"'{name}' sees {count} vectors, which need not be the {batch} rows in turn (experts see some of the "
                "tokens): switch instead, or give `mixed` flat=True if no layer picks among them."
            )
        if shared(inputs) and not self.flat:
            raise BadInput(
                f"'{name}' sees what all rows share, such as positions, of which none has its own: switch instead, or "
                "leave it out of the adapters."
            )
        if count % batch:
            raise BadInput(
                f"'{name}' sees {count} rows where adapters were named for {batch}: name one for each row of the batch."
            )
        return self.rows.unsqueeze(1).expand(batch, count // batch).reshape(-1)


def routed_layers(model: nn.Module) -> frozenset[str]:
    """Return the names of layers that may see some of the tokens: what is called an expert, and what is in a list of as
    many as a matrix has rows or columns, which may be a router's.

    >>> experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    >>> model = nn.ModuleDict({"gate": nn.Linear(4, 2), "mlps": experts, "expert": nn.Linear(4, 4)})
    >>> sorted(routed_layers(model))
    ['expert', 'mlps.0', 'mlps.1']
    """
    sizes = {size for p in model.parameters() if p.dim() == 2 for size in p.shape}
    parts = dict(model.named_modules())
    lists = [n for n, m in parts.items() if isinstance(m, nn.ModuleList | nn.ModuleDict) and len(m) > 1 and n]
    members = tuple(f"{name}." for name in lists if len(parts[name]) in sizes)
    return frozenset(name for name in parts if "expert" in name or name.startswith(members))


class Bank(Parametrization):
    """W -> W + B[c] A[c],  A: [places, rank, in], B: [places, out, rank], c the choice; b -> b + shift[c]."""

    made_by = "Adapters"

    def __init__(self, name: str, layer: nn.Module, choice: Choice, places: int, rank: int) -> None:
        super().__init__()
        self.name, self.choice, self.ranks = name, choice, [0] * places
        out, into = matrix_shape(layer)
        weight = own_weight(layer)
        kind, device = adapter_dtype(weight), weight.device
        self.register_buffer("A", torch.zeros(places, rank, into, dtype=kind, device=device), persistent=False)
        self.register_buffer("B", torch.zeros(places, out, rank, dtype=kind, device=device), persistent=False)
        self.shifts: Tensor | None
        self.register_buffer("shifts", None, persistent=False)

    def put(self, place: int, factors: Factors) -> None:
        """Write an update into its place, in the tensors that are there; its scale joins B."""
        a, b, rank = self.get_buffer("A")[place], self.get_buffer("B")[place], factors.rank
        self.ranks[place] = rank
        a.zero_()[:rank] = factors.a
        b.zero_()[:, :rank] = factors.scale * factors.b
        if factors.shift is not None:
            if self.shifts is None:
                self.shifts = b.new_zeros(len(self.ranks), len(b))
            self.shifts[place] = factors.shift
        elif self.shifts is not None:
            self.shifts[place] = 0

    def clear(self, place: int) -> None:
        """Empty a place."""
        a, b = self.get_buffer("A"), self.get_buffer("B")
        self.put(place, Factors(a.new_zeros(0, a.shape[2]), b.new_zeros(b.shape[1], 0)))

    def grow(self, places: int, rank: int) -> None:
        """Make room for more updates, or larger ones; compiled code sees that."""
        a, b = self.get_buffer("A"), self.get_buffer("B")
        more, wider = places - len(a), rank - a.shape[1]
        if more <= 0 and wider <= 0:
            return  # the tensors stay the same ones
        self.A, self.B = F.pad(a, (0, 0, 0, wider, 0, more)), F.pad(b, (0, wider, 0, 0, 0, more))
        self.ranks += [0] * more
        if self.shifts is not None:
            self.shifts = F.pad(self.shifts, (0, 0, 0, more))

    def factors(self, place: int) -> Factors | None:
        """Return the update in a place; None if there is none."""
        rank, shift = self.ranks[place], None if self.shifts is None else self.shifts[place]
        if not rank and (shift is None or not shift.any()):
            return None
        a, b = self.get_buffer("A")[place, :rank], self.get_buffer("B")[place, :, :rank]
        return Factors(a, b, shift=shift if shift is not None and shift.any() else None)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return the factors (A, B) of the update that all rows use."""
        self.chosen()
        place = int(self.choice.one)
        rank = self.ranks[place]
        return self.get_buffer("A")[place, :rank], self.get_buffer("B")[place, :, :rank]

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the update that all rows use."""
        if self.choice.rows is not None:
            raise BadInput(f"each row has its own update of '{self.name}': leave `mixed` before weights are asked for.")
        a, b = self.get_buffer("A"), self.get_buffer("B")
        one = self.choice.one.to(a.device)
        return a.index_select(0, one)[0], b.index_select(0, one)[0]

    def dense(self, weight: Tensor) -> Tensor:
        """Return W + B[c] A[c], rounded once to the precision of W."""
        a, b = self.chosen()
        return torch.addmm(weight.to(a.dtype), b, a).to(weight.dtype)

    def shift(self) -> Tensor | None:
        """Return shift[c]."""
        return None if self.shifts is None else self.shifts.index_select(0, self.choice.one.to(self.shifts.device))[0]

    def fast(self, layer: nn.Module, inputs: Tensor, below: Callable[[], Tensor]) -> Tensor | None:
        """Return W x + B[c] (A[c] x) + shift[c], each row with the c of its own where rows are mixed."""
        if self.choice.rows is None:
            branch = low_rank_branch(layer, inputs, *self.chosen(), 1.0)
            if branch is None:
                return None  # a convolution in groups, which the dense weight serves
            output = below()
            moved = output + branch.to(output.dtype)
            shift = self.shift()
            return moved if shift is None else moved + _over(layer, shift.to(moved.dtype))
        rows = self.choice.rows_of(layer, inputs, self.name).to(inputs.device)
        output = below()
        moved = output + self._branches(layer, inputs, rows).to(output.dtype)
        return moved if self.shifts is None else moved + _over_rows(layer, self.shifts[rows].to(moved.dtype), moved)

    def _branches(self, layer: nn.Module, inputs: Tensor, rows: Tensor) -> Tensor:
        """Return B[c] (A[c] x) with c = rows[i] for the i-th row of the inputs."""
        a, b = self.get_buffer("A"), self.get_buffer("B")
        if isinstance(layer, nn.Embedding):
            table = a.transpose(1, 2).flatten(0, 1)  # [places * vocabulary, rank]
            ones = (1,) * (inputs.dim() - 1)
            inner = F.embedding(inputs + rows.view(-1, *ones) * a.shape[2], table)
            made = torch.bmm(inner.flatten(1, -2) if ones else inner.unsqueeze(1), b[rows].transpose(1, 2))
            return without_padding(layer, inputs, made.view(*inputs.shape, b.shape[1]))
        if isinstance(layer, CONVOLUTIONS):
            if layer.groups != 1:
                raise BadInput(f"rows cannot be mixed in '{self.name}', a convolution in groups: switch instead.")
            narrow = a.to(inputs.dtype).reshape(-1, layer.in_channels, *layer.kernel_size)
            every = layer._conv_forward(inputs, narrow, None)  # with all updates' A: channels are places * rank
            every = every.reshape(len(rows), *a.shape[:2], *every.shape[2:])
            inner = every[torch.arange(len(rows), device=rows.device), rows]
            made = torch.bmm(b.to(inputs.dtype)[rows], inner.flatten(2))
            return made.view(*made.shape[:2], *inner.shape[2:])
        assert isinstance(layer, nn.Linear) or is_transformers_conv1d(layer)
        flat = inputs.flatten(1, -2) if inputs.dim() > 2 else inputs.unsqueeze(1)
        inner = torch.bmm(flat, a.to(flat.dtype)[rows].transpose(1, 2))
        made = torch.bmm(inner, b.to(inner.dtype)[rows].transpose(1, 2))
        return made.view(*inputs.shape[:-1], made.shape[-1])


def _over(layer: nn.Module, shift: Tensor) -> Tensor:
    """Return a vector [out] so that it joins a layer's outputs."""
    return shift.view(-1, *(1,) * len(layer.kernel_size)) if isinstance(layer, CONVOLUTIONS) else shift


def _over_rows(layer: nn.Module, shifts: Tensor, like: Tensor) -> Tensor:
    """Return vectors [n, out] so that each joins one row of a layer's outputs."""
    ones = (1,) * (like.dim() - 2)
    return shifts.view(*shifts.shape, *ones) if isinstance(layer, CONVOLUTIONS) else shifts.view(len(shifts), *ones, -1)


class Copies(nn.Module):
    """The parameters of a layer that some adapters bring along whole, one row of a table for each of them: theta[c].

    The layer's own parameters are row 0 and stay where they are; the layer looks as before from outside.
    """

    def __init__(self, name: str, layer: nn.Module, choice: Choice, places: int) -> None:
        super().__init__()
        self.name, self.choice, self.keys = name, choice, list(layer.state_dict())
        self.register_buffer("row_of", torch.zeros(places, dtype=torch.long), persistent=False)
        for number, tensor in enumerate(layer.state_dict().values()):
            self.register_buffer(f"table{number}", tensor.detach().clone().unsqueeze(0), persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """Return the table of each parameter and buffer, by its name."""
        return {key: self.get_buffer(f"table{number}") for number, key in enumerate(self.keys)}

    def put(self, place: int, tensors: dict[str, Tensor]) -> None:
        """Write an adapter's parameters into its row, or into a new one if it has none."""
        rows = self.get_buffer("row_of")
        row = int(rows[place])
        for number, key in enumerate(self.keys):
            table = self.get_buffer(f"table{number}")
            value = tensors.get(key, table[0]).to(table)
            if row:
                table[row] = value
            else:
                setattr(self, f"table{number}", torch.cat([table, value.unsqueeze(0)]))
        rows[place] = row or len(self.get_buffer("table0")) - 1

    def clear(self, place: int) -> None:
        """Take an adapter's row away."""
        rows = self.get_buffer("row_of")
        row = int(rows[place])
        if not row:
            return
        for number in range(len(self.keys)):
            table = self.get_buffer(f"table{number}")
            setattr(self, f"table{number}", torch.cat([table[:row], table[row + 1 :]]))
        rows[place] = 0
        rows[rows > row] -= 1

    def grow(self, places: int) -> None:
        """Make room for more adapters."""
        rows = self.get_buffer("row_of")
        if places > len(rows):
            self.row_of = F.pad(rows, (0, places - len(rows)))

    def tensors(self, place: int) -> dict[str, Tensor]:
        """Return what an adapter brought along; empty if nothing."""
        row = int(self.get_buffer("row_of")[place])
        return {key: table[row] for key, table in self.tables().items()} if row else {}

    def run(self, plain: nn.Module, inputs: Tensor, *rest: Any, **named: Any) -> Any:
        """Return the layer's output with the chosen parameters."""
        plain.training = self.training
        tables, row_of = self.tables(), self.get_buffer("row_of")
        if self.choice.rows is None:
            row = row_of[self.choice.one.to(row_of.device)]
            chosen = {key: table.index_select(0, row.to(table.device))[0] for key, table in tables.items()}
            return torch.func.functional_call(plain, chosen, (inputs, *rest), named)
        if rest or named:
            raise BadInput(f"rows cannot be mixed in '{self.name}', which takes more than one input: switch instead.")
        rows = row_of[self.choice.rows_of(plain, inputs, self.name).to(row_of.device)].to(inputs.device)
        chosen = {key: table[rows] for key, table in tables.items()}

        def one(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(plain, parameters, (row.unsqueeze(0),))
            return output.squeeze(0)

        return torch.vmap(one, randomness="different")(chosen, inputs)


def keep_copies(name: str, layer: nn.Module, choice: Choice, places: int) -> Copies:
    """Let a layer run with the parameters of the chosen adapter."""
    if stack(layer):
        raise BadInput(f"one adapter brings '{name}' whole, another adapts it: they cannot stand on one base.")
    copies, plain = Copies(name, layer, choice, places), copy.copy(layer)
    copies.train(layer.training)
    layer.plait_copies = copies  # its buffers are not persistent: the state dict stays that of the base
    layer.forward = partial(copies.run, plain)
    be_called(layer)
    return copies


def copies_of(layer: nn.Module) -> Copies | None:
    """Return the copies of a layer's parameters, if there are any."""
    held = layer._modules.get("plait_copies")
    return held if isinstance(held, Copies) else None


def drop_copies(layer: nn.Module) -> None:
    """Undo `keep_copies`."""
    del layer.plait_copies, layer.__dict__["forward"]
    be_read(layer)


@torch.no_grad()
def settle_copies(model: nn.Module) -> None:
    """Write the parameters of the adapter that all rows use into the layers that it brings along, for good."""
    for layer in list(model.modules()):
        if (copies := copies_of(layer)) is None:
            continue
        if copies.choice.rows is not None:
            raise BadInput(f"each row has its own '{copies.name}': leave `mixed` before the model is folded.")
        chosen = copies.tensors(int(copies.choice.one))
        drop_copies(layer)
        for key, own in layer.state_dict().items():
            own.copy_(chosen.get(key, own))
