"""Where training starts: methods that set what an adapter put there, from the weight, from data, or from gradients.

Every start leaves a record in the adapter (`start_left`, a digest of the weight under it), so that no start throws away
what another, or training after it, has made. One that moves part of a weight into its adapter leaves the residual as
the own, frozen weight of the layer, and what it took in the record too (`start_A`, `start_B`): from that the untouched
weight can be had back (`untouched_weight`), and `to_plain_lora` turns the model into one with plain adapters on the
untouched base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.layers import is_linear_map, matches, matrix, own_weight, unmatrix, weight_identity
from plait.math.packed import Packed, numbers, quantized_elsewhere, unrounded
from plait.method import Method, Now, method
from plait.parametrize.base import Parametrization, Parametrize, attached, refuse_made, replace, set_weight, stack
from plait.parametrize.low_rank import LowRank
from plait.parametrize.origin import drop_record, record_left, started
from plait.parametrize.refusals import require_finite
from plait.parametrize.singular import SingularTriplets
from plait.sharding import gather

Found = tuple[str, nn.Module, Parametrization]
"""An adapter, and the layer that it is on with its name."""

SHARE = 0.09
"""The part of the model's size that a start may take at once, beside one layer's gradient: a tenth, less what a batch's
own activations are likely to take of it.
"""


@method
class Start(Method):
    """A method that starts the adapters of one kind, layer by layer. `moves` says whether it takes part of the weight
    into the adapter: then a weight that two layers share is refused.
    """

    starts: ClassVar[type[Parametrization]] = LowRank
    moves: ClassVar[bool] = False

    def found(self, model: nn.Module) -> list[Found]:
        """Return the adapters that this method starts, or say what is missing."""
        every = list(attached(model, self.starts))
        chosen = [(name, layer, low) for name, layer, low in every if matches(self.where, name)]
        title = type(self).__name__
        if not chosen:
            kind = self.starts.made_by or self.starts.__name__
            if every:
                raise BadInput(f"{title}(where={self.where!r}) matches none of the {kind} adapters; drop where.")
            raise BadInput(
                f"{title} starts {kind} adapters, but the model has none: put a method that adds them before it."
            )
        refuse_begun(title, chosen)
        if self.moves:
            users = sharers(model)
            for name, layer, _ in chosen:
                refuse_made(f"the weight of '{name}'", layer)
                if any(part.replaces for part in stack(layer)):
                    raise BadInput(
                        f"{title} would move part of the weight of '{name}', but that is not in use: drop {title}."
                    )
                others = [other for other in users[weight_identity(layer)] if other != name]
                if others:
                    raise BadInput(
                        f"{title} would move part of the weight that '{name}' shares with '{others[0]}': leave one of "
                        f"them out of the adapters with where."
                    )
        return chosen

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a recipe in which nothing before it adds the adapters that it starts, or that starts them twice."""
        title, before = type(self).__name__, methods[: methods.index(self)]
        adding = [m for m in before if isinstance(m, Parametrize)]
        if not adding:
            if late := [type(m).__name__ for m in methods if isinstance(m, Parametrize)]:
                raise BadInput(f"{title} starts the adapters that {late[0]} adds: put {title} after {late[0]}.")
            self.found(model)
        refuse_begun(title, [f for f in attached(model, self.starts) if matches(self.where, f[0])])
        adapted = {name for m in adding for name, _ in m.targets(model)}
        adapted |= {name for name, _, _ in attached(model, self.starts)}
        for other in before:
            if not (isinstance(other, Start) and other.starts is self.starts):
                continue
            if any(matches(self.where, name) and matches(other.where, name) for name in adapted):
                raise BadInput(
                    f"{type(other).__name__} and {title} start the same adapters: keep one, or part them by where."
                )

    def start(self, weight: Tensor, adapter: Parametrization) -> None:
        """Set the adapter, and the weight [out, in] in place if the start moves part of it."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Start each adapter in turn."""
        for name, layer, adapter in self.found(model):
            with weight_matrix(layer) as weight:
                require_finite(weight, f"{type(self).__name__} found a number in the weight of '{name}'")
                self.start(weight, adapter)
            record_left(layer, adapter)


def refuse_begun(title: str, chosen: Sequence[Found]) -> None:
    """Refuse adapters that a start or training made what they are: another start would throw that away."""
    for name, _, adapter in chosen:
        if started(adapter) or adapter.learned():
            lost = "the part of the weight that it holds" if adapter.taken() is not None else "what it has learned"
            raise BadInput(
                f"{title} would start the adapter of '{name}' a second time, and {lost} would be lost: drop {title} to "
                "train on, or fold the model first."
            )


def low_rank(adapter: Parametrization) -> LowRank:
    """Return an adapter that is known to be LoRA's, with its type; refuse another."""
    if not isinstance(adapter, LowRank):
        kind = adapter.made_by or type(adapter).__name__
        raise BadInput(f"this start sets LoRA's factors, and the adapter is of {kind}: give it one of LoRA.")
    return adapter


def sharers(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the layers that use each weight, by the weight's identity."""
    users: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if is_linear_map(layer):
            users.setdefault(weight_identity(layer), []).append(name)
    return users


def refuse_sharers(method: Start, model: nn.Module, chosen: list[Found]) -> None:
    """Refuse layers that share a weight: it has one gradient for all of them."""
    users = sharers(model)
    for name, layer, _ in chosen:
        others = [other for other in users[weight_identity(layer)] if other != name]
        if others:
            raise BadInput(
                f"{type(method).__name__} needs the gradient of '{name}' alone, but '{others[0]}' shares its weight: "
                f"leave it out of the adapters with where."
            )


def refuse_stacked(method: Start, chosen: list[Found]) -> None:
    """Refuse two adapters of one kind on a layer: what is seen there once would start both of them alike."""
    names = [name for name, _, _ in chosen]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise BadInput(f"{type(method).__name__} would start two adapters of '{twice}' alike: keep one of them there.")


def model_bytes(model: nn.Module) -> int:
    """Return the size of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def groups(
    chosen: Sequence[Found],
    held: Callable[[Found], int],
    room: float,
    left: Callable[[Found], int] = lambda found: 0,
    least: float = 0,
) -> Iterator[list[Found]]:
    """Yield runs of adapters, in order, that together hold at most `room` bytes (or one adapter, if it holds more).

    held(adapter) is what it takes while its group is worked on, left(adapter) what it leaves in that room until all
    groups are done; a group may take `least` in any case.
    """
    group: list[Found] = []
    taken, before = 0, 0
    for found in chosen:
        size = held(found)
        if group and taken + size > max(room - before, least):
            yield group
            before += sum(left(earlier) for earlier in group)
            group, taken = [], 0
        group.append(found)
        taken += size
    yield group


@contextmanager
def weight_matrix(layer: nn.Module) -> Iterator[Tensor]:
    """Give a layer's weight as a matrix [out, in]; what is changed in it is changed in the layer.

    Of a quantized weight it is what that was before, if this is held; a changed one is quantized anew.
    """
    held = own_weight(layer)
    if isinstance(held, Packed) or quantized_elsewhere(held):
        before = matrix(layer, numbers(unrounded(held)))
        yield (after := before.clone())
        if not torch.equal(before, after):
            set_weight(layer, after)
        return
    weight = held.data
    flat = matrix(layer, weight)
    yield flat
    if flat.data_ptr() != weight.data_ptr():  # a convolution in channels-last memory cannot be seen as a matrix
        weight.copy_(unmatrix(layer, flat, weight))


def move(weight: Tensor, adapter: LowRank, a: Tensor, b: Tensor) -> None:
    """Set the adapter's factors and take scale * B A out of the weight [out, in], in place."""
    adapter.set(a, b)
    if weight.dtype == torch.float32 and adapter.A.dtype == torch.float32:
        weight.addmm_(adapter.B.data, adapter.A.data, alpha=-adapter.scale)
    else:
        update = adapter.B.data.float() @ adapter.A.data.float()
        weight.copy_(weight.float() - adapter.scale * update)
    adapter.record_start()


@torch.no_grad()
def to_plain_lora(model: nn.Module) -> nn.Module:
    """Give each layer its untouched weight back, and its adapter the factors that make up for it, at twice the rank.

    The function stays the same, up to rounding; the base is as it was before any start, the adapters are plain LoRA.
    """
    adapters: list[tuple[str, nn.Module, LowRank | SingularTriplets]] = [*attached(model, LowRank)]
    adapters += attached(model, SingularTriplets)
    for _, layer, adapter in adapters:
        taken = adapter.taken()
        if taken is None:
            drop_record(adapter)
            continue
        with weight_matrix(layer) as weight:
            weight.copy_(weight + taken)
            plain = adapter if isinstance(adapter, LowRank) else LowRank(weight, rank=0, scale=1.0)
        plain.set(*adapter.plain())
        if isinstance(adapter, LowRank):
            drop_record(adapter)
        else:
            replace(layer, adapter, "lora", plain)
    return model


@contextmanager
def undisturbed(model: nn.Module, now: Now) -> Iterator[None]:
    """Run the model in evaluation mode; modes, gradients, what is trained, random states and `now` are put back."""
    modes = {name: layer.training for name, layer in model.named_modules()}
    trained = {name: (p, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    batch, output, parts, objective = now.batch, now.output, now.parts, now.objective
    drawn = now.generator.get_state()
    try:
        with torch.random.fork_rng():
            model.eval()
            for parameter, _, _ in trained.values():
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
    finally:
        for name, layer in model.named_modules():
            layer.training = modes[name]
        for parameter, requires_grad, grad in trained.values():
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        now.batch, now.output, now.parts, now.objective = batch, output, parts, objective
        now.generator.set_state(drawn)


def gathered(rows: Tensor) -> Tensor:
    """Return the rows [n, in] of all processes, in the order of the processes; the numbers of rows may differ."""
    counts = [int(count) for count in gather(torch.tensor([len(rows)], device=rows.device))]
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), rows.shape[1])])
    return torch.cat([part[:count] for part, count in zip(gather(padded), counts, strict=True)])


def everywhere(here: bool, device: torch.device) -> bool:
    """Say whether something is true in all processes."""
    return all(bool(there) for there in gather(torch.tensor([here], device=device)))
