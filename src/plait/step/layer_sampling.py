"""Fine-tuning in rounds, each of which trains a part of the model: LISA draws layers, HFT half of every layer.

What a round leaves out is frozen in earnest: it asks for no gradient, holds none, and its running means are dropped,
so that the room is free; when its turn comes again, they begin anew. What lies outside the layers (embeddings, head,
last norm; tied weights) is always trained, and weights that were frozen before stay so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Size
from plait.layers import Layers, matches, repeated_layers
from plait.method import Method, Now, method
from plait.sharding import gather, is_sharded
from plait.step.adam import AdamW
from plait.step.base import RuleOptimizer


def named_layers(shapes: Mapping[str, Any], where: str) -> Layers:
    """Return the layers that `where` names, with their parameters: the outermost module of each that it matches."""
    found: Layers = defaultdict(list)
    for name in shapes:
        parts = name.split(".")
        ancestors = [".".join(parts[:end]) for end in range(1, len(parts))]
        if layer := next((a for a in ancestors if matches(where, a)), ""):
            found[layer].append(name)
    return dict(found)


@method
class Rounds(AdamW):
    """AdamW on a part of the weights that changes every `period` steps.

    where: names of the layers that take turns, as in "encoder.layer.[0-9]+"; unless given, those that a model repeats.
    """

    freezes = True

    def found(self, shapes: Mapping[str, Any]) -> Layers:
        """Return the layers that take turns among parameters of such names and shapes; refuse fewer than two."""
        layers = repeated_layers(shapes) if self.where == ".*" else named_layers(shapes, self.where)
        if len(layers) < 2:
            title = type(self).__name__
            given = "layers that repeat" if self.where == ".*" else f"two layers that where={self.where!r} names"
            raise BadInput(
                f"{title} finds no {given} and are trained: name at least two that take turns, as in "
                f"{title}(where='layers.[0-9]+'), or use AdamW."
            )
        return layers

    def frozen(self, layers: Layers, number: int, draw: torch.Generator, shapes: Mapping[str, Any]) -> set[str]:
        """Return the names of the parameters that round 0, 1, ... leaves out."""
        raise NotImplementedError

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a model without layers that could take turns, and weights that such layers share with others."""
        layers = self.found({name: p.shape for name, p in model.named_parameters()})
        of = {name: layer for layer, names in layers.items() for name in names}
        shared: dict[int, list[str]] = defaultdict(list)
        for name, p in model.named_parameters(remove_duplicate=False):
            shared[id(p)].append(name)
        for names in shared.values():
            if names[0] in of and any(not name.startswith(of[names[0]] + ".") for name in names):
                odd = next(name for name in names if not name.startswith(of[names[0]] + "."))
                raise BadInput(
                    f"{type(self).__name__} cannot freeze {of[names[0]]} alone, for it shares '{names[0]}' with "
                    f"'{odd}': name layers that share nothing with where."
                )

    def stepped(self, given: list[Any]) -> list[Any]:
        """Return all parameters, which must come with names."""
        for one in given:
            held = one["params"] if isinstance(one, dict) else [one]
            if isinstance(held, Tensor) or not all(isinstance(pair, tuple) for pair in held):
                raise BadInput(f"{type(self).__name__} needs names: give it model.named_parameters().")
        return given

    def optimizer(self, named_parameters: Any) -> RoundsOptimizer:
        """Return the optimizer over (name, parameter) pairs, or groups of such."""
        return RoundsOptimizer(self, self.stepped(list(named_parameters)))

    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Let all that took turns ask for gradients again."""
        if isinstance(now.optimizer, RoundsOptimizer):
            now.optimizer.thaw()
        return model


WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of so many bytes."""


def checksum(weights: Iterable[Tensor]) -> int:
    """Return the sum of the weights' bits read as whole numbers, which is the same in whatever order it is added up.

    >>> checksum([torch.tensor([1.0, 0.0]), torch.tensor(1.0)]) == 2 * 0x3F800000
    True
    """
    return sum(int(w.detach().view(WHOLE[w.element_size()]).sum()) for w in weights)


class RoundsOptimizer(RuleOptimizer):
    """Freezes what a round leaves out, and drops its gradients and states.

    Every parameter group holds the steps `taken` and the `seed` of the draws, from torch's seed and the weights at the
    start, one for all processes, so that a loaded state goes on with the round that it was saved in. A round begins
    right after the last step of the one before; in a loop that says when its steps begin (`turn`, as plait.train does)
    it begins there, so that what follows a step still sees what was stepped.
    """

    method: Rounds
    of_a_run = ("taken", "seed")
    told: bool = False
    """Whether the loop has said that the step under way began."""

    def __init__(self, rule: Rounds, parameters: Any) -> None:
        super().__init__(rule, parameters)
        named = [pair for g in self.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
        self.weights = {name: p for name, p in sorted(named) if p.requires_grad}  # draws follow names, not their order
        if any(map(is_sharded, self.weights.values())):
            raise BadInput(
                f"{type(rule).__name__} freezes whole weights as it goes, and these are sharded: use sharding='none'."
            )
        self.layers = rule.found({name: p.shape for name, p in self.weights.items()})
        device = next(iter(self.weights.values())).device
        # Runs one after another may have one seed, but each starts from other weights.
        number = torch.initial_seed() + checksum(self.weights.values())
        seed = torch.tensor(number % 2**53, device=device)  # a number that JSON keeps exactly
        for group in self.param_groups:
            group["taken"], group["seed"] = 0, int(gather(seed)[0])  # all processes draw as the first does
        self.begin()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group before the first round; refuse it later, for the draws are among all layers."""
        if hasattr(self, "layers"):
            title = type(self.method).__name__
            raise BadInput(f"{title} draws among the layers that it began with: make a new {title} of all parameters.")
        super().add_param_group(param_group)

    def number(self) -> int:
        """Return the number of the round that the next step belongs to."""
        group = self.param_groups[0]
        return int(group["taken"] // group["period"]) if group["period"] else 0

    def turn(self) -> None:
        """Say that a step begins: the next round does too, if it is due."""
        self.told = True
        if self.number() != self.begun:
            self.begin()

    def begin(self) -> None:
        """Freeze and thaw for the round under way."""
        group, number = self.param_groups[0], self.number()
        self.begun = number
        draw = torch.Generator().manual_seed((group["seed"] * 1_000_003 + number) % 2**63)
        shapes = {name: p.shape for name, p in self.weights.items()}
        left_out = self.method.frozen(self.layers, number, draw, shapes)
        for name, p in self.weights.items():
            p.requires_grad_(name not in left_out)
            if name in left_out:
                p.grad = None
                self.state.pop(p, None)

    def thaw(self) -> None:
        """Let all weights ask for gradients again."""
        for p in self.weights.values():
            p.requires_grad_(True)

    def advance(self) -> None:
        """Step what this round trains."""
        super().advance()
        for group in self.param_groups:
            group["taken"] += 1
        if not self.told and self.number() != self.begun:
            self.begin()
        self.told = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, and freeze what its round leaves out.

        torch.distributed.checkpoint asks for the states of what this optimizer trains before it loads, in a round of
        its own, and gives nothing for those that the saved one left out: refused, for others are lost with them.
        """
        if any(isinstance(value, dict) for state in state_dict["state"].values() for value in state.values()):
            raise BadInput(
                f"torch.distributed.checkpoint loses states of {type(self.method).__name__}, whose rounds train other "
                "weights each: save and load optimizer.state_dict() itself."
            )
        super().load_state_dict(state_dict)
        self.begin()


def drawn(names: Iterable[str], count: int, draw: torch.Generator) -> set[str]:
    """Return `count` of the names, each choice as likely."""
    every = list(names)
    return {every[i] for i in torch.randperm(len(every), generator=draw)[:count].tolist()}


@paper("pan2024lisa", key="lisa")
@method
class LISA(Rounds):
    """Every `period` steps, draw `layers` of the N middle layers at random; step them, the embeddings and the head by
    AdamW, and freeze the others.

    Pan et al.'s layerwise importance sampled AdamW: each middle layer is trained with probability layers / N, what lies
    outside of them always. Where the authors' code only stops asking for gradients, here the states of frozen layers
    are dropped as well, which is where the room is: a layer that is drawn after a pause begins with empty means.
    States are saved and loaded as the optimizer's own state_dict: torch.distributed.checkpoint's functions miss some.

    layers: how many are trained at a time (the paper's gamma). period: steps of a round (its K). Other fields as
    AdamW's. Raises BadInput if the model repeats no layer, if `layers` is all of them, or for parameters without names.

    >>> model = nn.Sequential(nn.Linear(2, 4), *(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 1))
    >>> rule = LISA(model.named_parameters(), layers=1)
    >>> [any(p.requires_grad for p in layer.parameters()) for layer in model].count(True)
    3
    """

    layers: Count = 2
    period: Count = 20

    def found(self, shapes: Mapping[str, Any]) -> Layers:
        """Return the middle layers; refuse a number of layers that leaves none out."""
        found = super().found(shapes)
        if self.layers >= len(found):
            raise BadInput(
                f"LISA(layers={self.layers}) would train all of the {len(found)} layers that take turns: use at most "
                f"{len(found) - 1}, or AdamW."
            )
        return found

    def frozen(self, layers: Layers, number: int, draw: torch.Generator, shapes: Mapping[str, Any]) -> set[str]:
        """Return the parameters of all middle layers but those that are drawn."""
        on = drawn(layers, self.layers, draw)
        return {name for layer, names in layers.items() if layer not in on for name in names}


def parts_of(layer: str, names: list[str], shapes: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return a layer's modules by kind ("attention", "feed-forward", "norm"), each with the names of its parameters.

    A bias goes with its matrix, an adapter with the layer that it sits on. A module without a matrix is a norm; one
    below something that is called attention, or attn, belongs to attention; all others are feed-forward.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for name in names:
        modules[name.split(".plait")[0] if ".plait" in name else name.rpartition(".")[0]].append(name)
    kinds: dict[str, dict[str, list[str]]] = {"attention": {}, "feed-forward": {}, "norm": {}}
    for module, own in modules.items():
        attends = re.search(r"att(e?n)", module.removeprefix(layer).lower())
        matrix = any(len(shapes[name]) > 1 for name in own)
        kinds["norm" if not matrix else "attention" if attends else "feed-forward"][module] = own
    return kinds


@paper("hui2024hft", key="hft")
@method
class HFT(Rounds):
    """Each round, freeze half of every layer, drawn at random: 2 of the 4 matrices of attention, 1 or 2 of the 3 of
    the feed-forward part, 1 of 2 norms; step the rest by AdamW.

    Hui et al.'s half fine-tuning: what is frozen keeps what the model knew. Of a kind of module of which a layer has
    an odd number 2 k + 1, a random half of the layers freezes k + 1 and the others k, so that half is frozen over all.
    Embeddings, head and last norm are always trained. The rule for attention and feed-forward parts follows a
    repository that restates the paper; that for norms, embeddings and head is from memory, as the paper could not be
    read for this.

    period: steps of a round; 0, the default, is one round for the whole run, as in the paper, where a round is a task
    or stage of fine-tuning: each of several runs one after another is a round of its own. Other fields as AdamW's.
    States are saved and loaded as the optimizer's own state_dict: torch.distributed.checkpoint's functions miss some.
    Raises BadInput if the model repeats no layer, and for parameters without names.

    >>> block = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("attn_q", "attn_o", "up", "down")})
    >>> model = nn.ModuleList([block, nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in block})])
    >>> rule = HFT(model.named_parameters())
    >>> [sum(p.requires_grad for p in layer.parameters()) for layer in model]
    [2, 2]
    """

    period: Size = 0

    def frozen(self, layers: Layers, number: int, draw: torch.Generator, shapes: Mapping[str, Any]) -> set[str]:
        """Return the parameters of half of the modules of each kind in each layer."""
        out: set[str] = set()
        kinds = {layer: parts_of(layer, names, shapes) for layer, names in layers.items()}
        for kind in ("attention", "feed-forward", "norm"):
            odd = [layer for layer in layers if len(kinds[layer][kind]) % 2]
            more = drawn(odd, len(odd) // 2, draw)
            for layer in layers:
                modules = kinds[layer][kind]
                for module in drawn(modules, len(modules) // 2 + (layer in more), draw):
                    out |= set(modules[module])
        return out
