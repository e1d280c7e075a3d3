"""Several adapters on one base: named, switched, mixed in one batch, removed, and swapped without compiling again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from plait.errors import BadInput, did_you_mean
from plait.layers import unwrapped
from plait.parametrize.bank import NONE, Bank, Choice, Copies, copies_of, drop_copies, keep_copies, routed_layers
from plait.parametrize.base import attach, detach, stack
from plait.parametrize.origin import origin_of, record_origin, refuse_another_base
from plait.parametrize.picked import Picks
from plait.parametrize.update import Update, cut_off, update_of


class Adapters:
    """Adapters of one base, by name; the base's own weights and its state dict stay as they are.

    An adapter comes from a folder of PEFT's files, or from a model that was trained from this base by any methods. It
    is kept as the low-rank updates of the untouched weights (whatever its start did), with the layers that it brings
    along whole. The base alone is used until `switch` or `mixed` chooses.

    model: the base, without adapters of its own. room, rank: how many adapters, of which rank, there is room for from
    the beginning; more room is made when it is needed, which makes compiled code compile once more. Raises BadInput for
    an adapter of another model or another base, and for an update that is of no low rank, unless `rank` cuts it off.

    >>> import copy
    >>> from plait import LoRA
    >>> base = nn.Sequential(nn.Linear(4, 3))
    >>> trained = copy.deepcopy(base)
    >>> LoRA(rank=2).parametrize(trained)
    >>> _ = nn.init.ones_(trained[0].plait.lora.B)
    >>> adapters = Adapters(base)
    >>> adapters.add("mine", trained)
    0.0
    >>> x = torch.randn(2, 4)
    >>> with adapters.mixed(["mine", None]):
    ...     y = base(x)
    >>> torch.allclose(y[0], trained(x)[0]), torch.equal(y[1], base(x)[1])
    (True, True)
    """

    def __init__(self, model: nn.Module, room: int = 4, rank: int = 8) -> None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"Adapters takes the base, a torch.nn.Module, not {model!r}.")
        self.model = unwrapped(model)
        if not (_whole(room) and _whole(rank)):
            raise BadInput(f"Adapters(room={room}, rank={rank}) has room for nothing: give at least 1 of each.")
        held = next((name for name, m in self.model.named_modules() if stack(m) or copies_of(m) is not None), None)
        if held is not None:
            raise BadInput(f"'{held}' has an adapter of its own: fold it, or give the base, and add the model to that.")
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._choice, self._places, self._rank = Choice(device, routed_layers(self.model)), room + 1, rank
        self._place: dict[str, int] = {}
        record_origin(self.model)
        self._origin = origin_of(self.model)

    # -- what there is -------------------------------------------------------------------------------------------------
    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order in which they were added."""
        return list(self._place)

    @property
    def active(self) -> str | None:
        """The adapter that all rows use; None: the base alone."""
        place = int(self._choice.one)
        return next((name for name, at in self._place.items() if at == place), None)

    def _at(self, name: str | None) -> int:
        if name is None:
            return NONE
        if not isinstance(name, str):
            raise BadInput(f"{name!r} is no name of an adapter: give one, or None for the base alone.")
        if name not in self._place:
            raise BadInput(f"there is no adapter '{name}'{did_you_mean(name, self._place) or ': add it first'}.")
        return self._place[name]

    def _named(self, name: str | None, done: str) -> int:
        if name is None:
            raise BadInput(f"None stands for the base alone, which cannot be {done}: name an adapter.")
        return self._at(name)

    # -- choosing ------------------------------------------------------------------------------------------------------
    def switch(self, name: str | None) -> None:
        """Use an adapter for all rows from now on; None: the base alone."""
        place = self._at(name)
        self._refuse_folded()
        self._choice.one.fill_(place)

    @contextmanager
    def mixed(self, names: Sequence[str | None], *, flat: bool = False) -> Iterator[None]:
        """Use an adapter of its own for each row of the batches in this block; None: the base alone.

        Rows run along the first dimension everywhere in the model; where a layer sees k times as many (beams), each
        name stands for k rows in turn. flat: whether that holds for layers that see vectors [n, in] too, more than
        there are names (flattened tokens). It does not where experts see some of the tokens: they are refused, be it
        by their names or because an index picked their rows, which is not seen in compiled code.
        """
        backwards = next((n for n, m in self.model.named_modules() if getattr(m, "batch_first", True) is False), None)
        if backwards is not None:
            raise BadInput(f"rows cannot be mixed: '{backwards}' has the batch second; build it with batch_first=True.")
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise BadInput(f"`mixed` got {names!r}: give a list of names, one for each row of the batch.")
        self._refuse_folded()
        before = self._choice.rows, self._choice.flat
        places = [self._at(name) for name in names]
        self._choice.flat = flat or len(set(places)) == 1
        self._choice.rows = torch.tensor(places, device=self._choice.one.device)
        try:
            with nullcontext() if self._choice.flat else Picks(self.model):
                yield
        finally:
            self._choice.rows, self._choice.flat = before

    # -- adding and removing -------------------------------------------------------------------------------------------
    def add(
        self, name: str, source: str | Path | nn.Module, *, rank: int | None = None, any_base: bool = False
    ) -> float:
        """Add an adapter from a folder of PEFT's files, or from a model trained from this base; it is not switched to.

        rank: where to cut off what is of a higher rank. any_base: whether it may have been made for other weights of
        the same shapes. Returns the relative error of what was cut off, 0 where nothing was.
        """
        if not (isinstance(name, str) and name):
            raise BadInput(f"{name!r} is no name of an adapter: give it a text.")
        if name in self._place:
            raise BadInput(f"there is an adapter '{name}' already: swap it, or choose another name.")
        update = self._read(source, rank, any_base)
        taken = set(self._place.values())
        place = next(place for place in range(1, len(taken) + 2) if place not in taken)
        self._put(place, update)
        self._place[name] = place
        return update.error

    def swap(
        self, name: str, source: str | Path | nn.Module, *, rank: int | None = None, any_base: bool = False
    ) -> float:
        """Put another adapter in the place of one, in the same tensors: compiled code runs on as it is, if the layers
        are those of the adapters that were there and the rank is not above theirs (or above `rank` of this object).

        A batch that is under way must end first. Arguments, and what is returned, as those of `add`.
        """
        place = self._named(name, "swapped")
        update = self._read(source, rank, any_base)
        self._put(place, update)
        return update.error

    def remove(self, name: str) -> None:
        """Remove an adapter; the base alone is used if it was the active one. After the last, the model is plain."""
        place = self._named(name, "removed")
        if self.active == name:
            self.switch(None)
        del self._place[name]
        for _, layer, held in self._held():
            held.clear(place)
            if not self._place:
                detach(layer) if isinstance(held, Bank) else drop_copies(layer)

    def save(self, name: str, folder: str | Path, base_model: str | None = None) -> Path:
        """Write an adapter as PEFT's files for the untouched base; return the folder."""
        from plait.integrations.peft import write_update

        place, update = self._named(name, "saved"), Update(origin=self._origin)
        for layer_name, _, held in self._held():
            if isinstance(held, Copies):
                update.whole |= {f"{layer_name}.{key}": t for key, t in held.tensors(place).items()}
            elif (factors := held.factors(place)) is not None:
                update.factors[layer_name] = factors
        update.origin = {key: value for key, value in self._origin.items() if key not in update.whole}
        return write_update(update, self.model, folder, base_model)

    # -- the tables ----------------------------------------------------------------------------------------------------
    def _held(self) -> list[tuple[str, nn.Module, Bank | Copies]]:
        found: list[tuple[str, nn.Module, Bank | Copies]] = []
        for name, layer in self.model.named_modules():
            found += [(name, layer, part) for part in stack(layer) if isinstance(part, Bank)]
            if (copies := copies_of(layer)) is not None:
                found.append((name, layer, copies))
        return found

    def _refuse_folded(self) -> None:
        if self._place and not self._held():
            raise BadInput("the base was folded, and the adapters are no longer on it: make a new Adapters of a base.")

    def _read(self, source: str | Path | nn.Module, rank: int | None, any_base: bool) -> Update:
        """Return an adapter's update after everything about it was checked."""
        from plait.integrations.peft import read_update

        if not isinstance(source, str | Path | nn.Module):
            raise BadInput(f"an adapter comes from a folder or from a trained model, not from {source!r}.")
        if rank is not None and not _whole(rank):
            raise BadInput(f"rank is {rank!r}: give a whole number of at least 1.")
        self._refuse_folded()
        if isinstance(source, nn.Module):
            source = unwrapped(source)
            if not any_base and (origin := getattr(source, "_plait_origin", None)):
                refuse_another_base(self.model, origin, "the adapter of the model", _trained(source))
            transplanted = any_base and any(stack(layer) for layer in source.modules())
            update = update_of(source, None if transplanted else self.model, rank)
        else:
            update = read_update(self.model, source, any_base=any_base)
            update = update if rank is None else cut_off(update, self.model, rank)
        for name, factors in update.factors.items():
            if factors.magnitude is not None:
                raise BadInput(f"the adapter of '{name}' is DoRA, which is no low-rank update: give a rank.")
        if not update.factors and not update.whole:
            raise BadInput("the model is the base: there is no adapter in it.")
        return update

    @torch.no_grad()
    def _put(self, place: int, update: Update) -> None:
        rank = max([self._rank, *(factors.rank for factors in update.factors.values())])
        places = max(self._places, place + 1)
        if places > self._places:
            places = 2 * places - 1  # twice the room
        self._attach(update, places, rank)
        for name, _, held in self._held():
            if isinstance(held, Copies):
                held.grow(places)
                tensors = {key: update.whole[f"{name}.{key}"] for key in held.keys if f"{name}.{key}" in update.whole}
                held.put(place, tensors) if tensors else held.clear(place)
                continue
            held.grow(places, max(rank, held.get_buffer("A").shape[1]))
            factors = update.factors.get(name)
            held.clear(place) if factors is None else held.put(place, factors)
        self._places, self._rank = places, rank

    def _attach(self, update: Update, places: int, rank: int) -> None:
        """Put tables on the layers that have none yet; all or none."""
        parts = dict(self.model.named_modules())
        owners = {name.rpartition(".")[0] for name in update.whole}
        both = owners & set(update.factors) | {n for n in owners if stack(parts[n])}
        both |= {n for n in update.factors if copies_of(parts[n]) is not None}
        if both:
            name = sorted(both)[0]
            raise BadInput(f"one adapter brings '{name}' whole, another adapts it: they cannot stand on one base.")
        for name in update.factors:
            if not stack(parts[name]):
                attach(parts[name], "adapters", Bank(name, parts[name], self._choice, places, rank))
        for name in sorted(owners):
            if copies_of(parts[name]) is None:
                keep_copies(name, parts[name], self._choice, places)


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _trained(model: nn.Module) -> set[str]:
    """Return the names of what may differ from the base because it was trained."""
    return {name for name, p in model.named_parameters() if p.requires_grad}
