"""Learngenes: a few layers' worth of weights, learned by a network that is made of them, that start networks of any
depth. In TLEG all layers lie on one line, in SWS the layers of a stage are one.

Without `source` both methods make the network at hand of genes for as long as it trains, and `finish` leaves the plain
network, which holds its genes: two of its layers tell a line, one of each stage a stage. With `source`, the file of
such a network, they start another, of another depth, that trains as usual.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.initialize.fresh import refuse_adapted
from plait.layers import matches, repeated_layers
from plait.method import Method, Now, method
from plait.tensors import State, read_state


def sequences(shapes: dict[str, Any], where: str = ".*") -> dict[str, tuple[list[str], list[str]]]:
    """Return the lists of layers that a network repeats: by name, their layers in order and a layer's weights.

    >>> shapes = {"in.weight": (4, 2), "layers.0.weight": (4, 4), "layers.1.weight": (4, 4), "out.weight": (2, 4)}
    >>> sequences(shapes)
    {'layers': (['layers.0', 'layers.1'], ['weight'])}
    """
    found: dict[str, list[str]] = defaultdict(list)
    repeated = repeated_layers(shapes)
    for layer in repeated:
        above, _, _ = layer.rpartition(".")
        if matches(where, above) or matches(where, layer):
            found[above].append(layer)
    ordered = {
        name: sorted(every, key=lambda layer: int(re.findall(r"\d+$", layer)[0])) for name, every in found.items()
    }
    return {
        name: (every, [weight.removeprefix(f"{every[0]}.") for weight in repeated[every[0]]])
        for name, every in ordered.items()
    }


def shapes_of(tensors: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of named tensors, but for those of adapters."""
    return {name: tuple(t.shape) for name, t in tensors if ".plait." not in name}


def line_through(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, A) of the line B + (l / L) A nearest to values [L, ...], l = 0 .. L-1; B alone where L is 1."""
    wide, count = values.double(), len(values)
    place = torch.arange(count, dtype=torch.float64, device=values.device) / count
    apart = place - place.mean()
    slope = torch.tensordot(apart, wide, 1) / apart.square().sum().clamp_min(1e-12)
    return wide.mean(0) - place.mean() * slope, slope


class Line(nn.Module):
    """A weight of each layer of a list: B + (l / L) A for the layer l = 0 .. L-1."""

    def __init__(self, base: Tensor, slope: Tensor, trained: bool) -> None:
        super().__init__()
        self.base = nn.Parameter(base.detach().clone(), requires_grad=trained)
        self.slope = nn.Parameter(slope.detach().clone(), requires_grad=trained)

    def at(self, place: float) -> Tensor:
        """Return the weight of the layer at l / L."""
        return torch.add(self.base, self.slope, alpha=place)


def _reader(leaf: str) -> property:
    def read(module: nn.Module) -> Tensor:
        line, place = module.__dict__["on_lines"][leaf]
        weight: Tensor = line.at(place)
        return weight

    return property(read)


def lay_on_lines(module: nn.Module, lines: dict[str, tuple[Line, float]]) -> None:
    """Have a module read its own parameters from lines: its class becomes one that computes them at every reading."""
    kind = type(module)
    for leaf in lines:
        del module._parameters[leaf]
    module.__dict__["on_lines"] = lines  # not registered: the lines belong to the model
    module.__class__ = type(kind.__name__, (kind,), {leaf: _reader(leaf) for leaf in lines})


@torch.no_grad()
def take_from_lines(module: nn.Module) -> None:
    """Give a module parameters of its own again, with the values that it reads."""
    lines = module.__dict__.pop("on_lines")
    module.__class__ = type(module).__mro__[1]
    for leaf, (line, place) in lines.items():
        module.register_parameter(leaf, nn.Parameter(line.at(place).clone(), requires_grad=line.base.requires_grad))


@method
class Learngene(Method):
    """A network made of genes, or one that is started from them. where: lists of layers, or layers in them."""

    source: str = ""

    def lists(self, model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
        """Return the lists of layers of a model; refuse one without any."""
        found = sequences(shapes_of(model.named_parameters(remove_duplicate=False)), self.where)
        if not found:
            raise BadInput(
                f"{type(self).__name__} finds no list of layers that are alike in {type(model).__name__}: use it on a "
                "network that repeats a block, or change where."
            )
        return found

    def read(self, model: nn.Module) -> tuple[State, dict[str, list[State]]]:
        """Return the source's weights, and those of the layers of each of the model's lists there."""
        state, found = read_state(self.source), dict[str, list[State]]()
        theirs, own = sequences(shapes_of(state.items()), self.where), dict(model.named_parameters())
        for name, (layers, weights) in self.lists(model).items():
            every, _ = theirs.get(name, ([], []))
            for weight in weights:
                there = state.get(f"{every[0]}.{weight}") if every else None
                here = own[f"{layers[0]}.{weight}"]
                if there is None or there.shape != here.shape:
                    lacks = "none" if there is None else f"one of shape {tuple(there.shape)}"
                    raise BadInput(
                        f"{type(self).__name__}: '{name}' has a weight '{weight}' of shape {tuple(here.shape)}, and "
                        f"{self.source} has {lacks} that repeats: give a source with the same layers."
                    )
            found[name] = [{weight: state[f"{layer}.{weight}"] for weight in weights} for layer in every]
        return state, found

    def expanded(self, name: str, genes: list[State], count: int) -> list[State]:
        """Return the weights of `count` layers of the list `name` from those of the source's layers."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Start the layers from the source's genes; all else of the same name and shape, as it is there."""
        if not self.source:
            return
        state, found = self.read(model)
        own = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
        lists = self.lists(model)
        repeated = tuple(f"{layer}." for layers, _ in lists.values() for layer in layers)
        made = {
            name: state[name]
            for name, value in own.items()
            if name in state and state[name].shape == value.shape and not name.startswith(repeated)
        }
        for name, (layers, weights) in lists.items():
            for layer, values in zip(layers, self.expanded(name, found[name], len(layers)), strict=True):
                made |= {f"{layer}.{weight}": values[weight] for weight in weights}
        refuse_adapted(self, model, map(own.__getitem__, made))
        for name, value in made.items():
            own[name].copy_(value)

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a source that does not fit, and what would write to the weights of layers that have none."""
        self.lists(model)
        if self.source:
            self.read(model)
            return
        title = type(self).__name__
        for m in methods:
            writes = type(m).__module__.startswith("plait.constrain.")
            if m is not self and (type(m).parametrize is not Method.parametrize or writes):
                raise BadInput(
                    f"{title} without a source makes the layers' weights from genes, and {type(m).__name__} acts on "
                    f"weights of their own: train the genes first, then give {title} their network as source."
                )


@paper("xia2024transformer", key="tleg")
@method
class TLEG(Learngene):
    """theta_l = B + (l - 1) / L * A,  l = 1 .. L: every weight of the layers (matrices, biases, norms) lies on a line.

    Without `source` the genes A and B are what is trained, shared by all layers; B begins as the first layer, A as
    another draw of the same kind (the last layer) for matrices and as zero for vectors. The paper trains this auxiliary
    network on a teacher's soft outputs: give them as targets, rows of probabilities. `finish` leaves a plain network of
    L layers.

    With `source`, a file or folder of such a network, a network of L' layers starts at B + (l - 1) / L' * A, and is
    trained without the restriction. Other weights of the same name and shape (embeddings, last norm, head) are taken
    over. Of a network that was trained freely the line nearest to its layers is taken (least squares).

    fit: without a source, begin at the line nearest to the layers as they are, for a network that is trained already.
    where: lists of layers, as in "encoder.layer"; unless given, every list whose members are alike. Raises BadInput for
    networks without such a list, beside adapters and constraints while the genes are trained, and for weights that an
    adapter or a start before it was made of.

    >>> from plait import train
    >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    >>> x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    >>> model = train(model, (x, -x), methods=[TLEG()], steps=2).model
    >>> torch.allclose(model[2].weight - model[1].weight, model[1].weight - model[0].weight, atol=1e-6)
    True
    """

    fit: bool = False

    def expanded(self, name: str, genes: list[State], count: int) -> list[State]:
        """Return B + (l / L') A."""
        lines = {weight: line_through(torch.stack([gene[weight] for gene in genes])) for weight in genes[0]}
        return [{w: base + place / count * slope for w, (base, slope) in lines.items()} for place in range(count)]

    def begun(self, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return where B and A begin, of a weight's values in all layers."""
        if self.fit:
            base, slope = line_through(torch.stack(values))
            return base.to(values[0].dtype), slope.to(values[0].dtype)
        return values[0], values[-1] if values[0].dim() > 1 else torch.zeros_like(values[0])

    @torch.no_grad()
    def parametrize(self, model: nn.Module) -> None:
        """Replace the layers' weights by lines."""
        if self.source:
            return
        for layers, weights in self.lists(model).values():
            own = dict(model.named_parameters(remove_duplicate=False))
            inner: dict[str, dict[str, Line]] = defaultdict(dict)
            for weight in weights:
                values = [own[f"{layer}.{weight}"] for layer in layers]
                module, _, leaf = weight.rpartition(".")
                trained = any(v.requires_grad for v in values)
                inner[module][leaf] = Line(*self.begun([v.detach() for v in values]), trained)
            for place, layer in enumerate(layers):
                for module, lines in inner.items():
                    at = model.get_submodule(f"{layer}.{module}" if module else layer)
                    lay_on_lines(at, {leaf: (line, place / len(layers)) for leaf, line in lines.items()})
                    if place == 0:
                        at.learngene = nn.ModuleDict(lines)

    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Give every layer its own weights."""
        for module in [part for part in model.modules() if "on_lines" in part.__dict__]:
            take_from_lines(module)
            module._modules.pop("learngene", None)
        return model


def stages_of(layers: list[State]) -> list[int]:
    """Return the number of layers in each stage: neighbours that are equal in every weight are one stage."""
    sizes = [1]
    for before, after in itertools.pairwise(layers):
        if all(torch.equal(before[name], after[name]) for name in before):
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes


@paper("xia2024exploring", key="learngene-sws")
@method
class SWS(Learngene):
    """theta_l = G_s(l),  s(l) the stage of layer l: the layers of a stage share one set of weights.

    Without `source` the network at hand is trained so, in stages of `stages` layers (the authors: 3, 3, 4, 3, 3), each
    begun as its first layer; the paper distils it from a teacher: give its soft outputs as targets, rows of
    probabilities. `finish` leaves a plain network, whose layers are equal within a stage.

    With `source`, a file or folder of such a network of K stages, each layer of a network of another depth L' starts as
    its stage's gene, and trains freely. `stages` says how many layers each stage gets; unless given, L' / K each, and
    one more for the first L' mod K (12 layers from 5 stages: 3, 3, 2, 2, 2, as in the authors' example). Other weights
    of the same name and shape (embeddings, last norm, head) are taken over. where: as for TLEG. Raises BadInput where
    the stages do not add up to the layers, or are more than they are.

    >>> from plait import train
    >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    >>> x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    >>> model = train(model, (x, -x), methods=[SWS(stages=(1, 2))], steps=2).model
    >>> torch.equal(model[1].weight, model[2].weight), torch.equal(model[0].weight, model[1].weight)
    (True, False)
    """

    stages: tuple[Count, ...] = ()

    def sizes(self, name: str, count: int, genes: int) -> list[int]:
        """Return the number of layers in each stage of a list of `count` layers."""
        if self.stages:
            if sum(self.stages) != count or (genes and len(self.stages) != genes):
                given = f"{count} layers for {genes} stages" if genes else f"{count} layers"
                raise BadInput(
                    f"SWS.stages are {list(self.stages)}, and '{name}' has {given}: give one number for each stage, "
                    "with that sum."
                )
            return list(self.stages)
        if not genes:
            raise BadInput(f"SWS needs stages, the numbers of layers that share weights, which add up to {count}.")
        if genes > count:
            raise BadInput(f"SWS: {self.source} has {genes} stages, and '{name}' {count} layers: use as many or more.")
        return [count // genes + (stage < count % genes) for stage in range(genes)]

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse stages that do not fit."""
        super().check(model, methods)
        genes = self.read(model)[1] if self.source else {}
        for name, (layers, _) in self.lists(model).items():
            self.sizes(name, len(layers), len(stages_of(genes[name])) if self.source else 0)

    def expanded(self, name: str, genes: list[State], count: int) -> list[State]:
        """Return each stage's gene as often as the stage has layers."""
        sizes = stages_of(genes)
        firsts = [genes[sum(sizes[:stage])] for stage in range(len(sizes))]
        wanted = self.sizes(name, count, len(sizes))
        return [first for first, size in zip(firsts, wanted, strict=True) for _ in range(size)]

    def members(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """Yield the weights of all layers but the first of each stage: the module, the name in it, the first one's."""
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, (layers, weights) in self.lists(model).items():
            stage = [s for s, size in enumerate(self.sizes(name, len(layers), 0)) for _ in range(size)]
            for layer, number in zip(layers, stage, strict=True):
                first = layers[stage.index(number)]
                for weight in weights if layer != first else ():
                    inner, _, leaf = weight.rpartition(".")
                    yield model.get_submodule(f"{layer}.{inner}" if inner else layer), leaf, own[f"{first}.{weight}"]

    def parametrize(self, model: nn.Module) -> None:
        """Let the layers of each stage share the first one's weights."""
        if not self.source:
            for module, leaf, shared in list(self.members(model)):
                module._parameters[leaf] = shared

    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Give every layer weights of its own."""
        if not self.source:
            for module, leaf, shared in list(self.members(model)):
                module._parameters[leaf] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        return model
