"""Which weights are trained, and how, chosen by how much a step on each of them would lower the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Fraction
from plait.initialize.base import SHARE, groups, model_bytes, sharers, undisturbed
from plait.layers import matches, matrix_shape, own_bias, own_weight, weight_identity
from plait.method import Method, Now, method
from plait.parametrize.allocated import Allocated
from plait.parametrize.base import Adapter, attached
from plait.sharding import averaged

Found = tuple[str, nn.Module, Allocated]
"""An adapter, and the layer that it is on with its name."""
WHOLE_BIAS = 0.2
"""The part of a bias whose entries must be sensitive for all of it to be trained, as in the authors' code."""


@dataclass
class Candidates:
    """The most sensitive entries of a weight or a bias: as many as it takes to train all of it by `structure` numbers.

    values: their sensitivities [n], falling; places: where they are [n]. full: how many make it structured, which may
    be more than it has.
    """

    layer: int
    name: str
    values: Tensor
    places: Tensor
    full: int
    structure: int


def allocation(found: list[Candidates], budget: int) -> list[int]:
    """Return how many entries of each are among the most sensitive, for the longest list that the budget pays for.

    An entry costs one number; the one with which a weight has `full` of them brings the weight's cost to `structure`.
    """
    prices = [torch.ones(len(each.values), dtype=torch.int64) for each in found]
    for price, each in zip(prices, found, strict=True):
        if len(price) >= each.full:
            price[each.full - 1] = each.structure - (each.full - 1)
    owner = torch.cat([torch.full((len(price),), number) for number, price in enumerate(prices)])
    order = torch.cat([each.values.cpu() for each in found]).argsort(descending=True, stable=True)
    taken = order[torch.cat(prices)[order].cumsum(0) <= budget]
    return torch.bincount(owner[taken], minlength=len(found)).tolist()


@paper("he2023spt", key="spt", theme="adapt")
@method
class SPT(Adapter):
    """s_n = sum over batches of g_n^2, g = dL/dw at the start, is in proportion to what a step on weight n alone takes
    from the loss. The tau largest s are sensitive: M_n = 1. A matrix W [out, in] with sum M >= threshold * rank * (in +
    out) becomes W + B A, A [rank, in] Gaussian and B [out, rank] zero at the start; any other one W + M * D, D trained
    where M is 1. tau is the largest that trains at most `share` of the adapted layers' numbers.

    A bias is trained where it is sensitive, or whole from a fifth on, as in the authors' code; norms stay as they are
    unless `train` names them. The paper's text could not be read: this follows its abstract and the authors' code, but
    for the model, which is in evaluation mode here while gradients are taken, and for tau, which is exact here and the
    nearest of 79 there. Their code sets threshold to 1 / 5 or 1 / 10. Only a matrix' most sensitive entries are held,
    and the sums of the layers that a tenth of the model's size has room for. Inside `plait.train` and the Trainer.

    share: in [0, 1], of at least one number. rank: as for LoRA. threshold: in (0, 1]; at 1 a low-rank update is never
    more than it replaces. batches: of calibration data. Raises BadInput where no gradient arrives. Where the new data
    are far from the old, what is sensitive lies in few rows: it fits sooner than random places and ends behind them.

    >>> from plait import train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 4, bias=False), (x, x[:, :4]), methods=[SPT(share=0.25, rank=1)], steps=2)
    >>> run.model.plait.spt.support.shape, run.model.plait.spt.low_rank()
    (torch.Size([8]), None)
    """

    share: Fraction = 0.005
    rank: Count = 8
    threshold: Fraction = 1.0
    batches: Count = 8

    def build(self, layer: nn.Module, weight: Tensor) -> Allocated:
        """Return an adapter that has no form yet."""
        return Allocated(weight)

    def numbers(self, model: nn.Module) -> int:
        """Return how many numbers may be trained."""
        sizes = [own_weight(layer).numel() + _bias_size(layer) for _, layer in self.targets(model)]
        return int(self.share * sum(sizes))

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a share of no number, and layers whose weight another layer has too."""
        if self.threshold == 0 or self.numbers(model) == 0:
            odd, value = ("threshold", self.threshold) if self.threshold == 0 else ("share", self.share)
            raise BadInput(f"SPT.{odd} is {value}, which leaves nothing to choose: give more.")
        users = sharers(model)
        for name, layer in self.targets(model):
            if others := [other for other in users[weight_identity(layer)] if other != name]:
                raise BadInput(
                    f"SPT would train the weight of '{name}', which '{others[0]}' shares, for the one alone: leave it "
                    "out of where."
                )

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Choose the form of every adapter."""
        if now.ask is None:
            raise BadInput("SPT needs gradients: use it inside plait.train, or set now.ask.")
        adapters: list[Found] = [found for found in attached(model, Allocated) if matches(self.where, found[0])]
        found: list[Candidates] = []
        number = {name: layer for layer, (name, _, _) in enumerate(adapters)}
        for group in groups(adapters, lambda each: 8 * _size(each[1]), SHARE * model_bytes(model)):
            found += self.sensitive(model, now, {number[name]: adapters[number[name]] for name, _, _ in group})
        counts = allocation(found, self.numbers(model))
        drawn = torch.Generator().manual_seed(now.generator.initial_seed() % 2**31)
        for each, count in zip(found, counts, strict=True):
            adapter = adapters[each.layer][2]
            structured, where = count >= each.full, each.places[:count].sort().values
            if each.name == "bias":
                everywhere = torch.arange(each.structure, device=where.device)
                adapter.allocate(None, None, everywhere if structured else where)
            elif structured:
                a = torch.randn(self.rank, adapter.into, generator=drawn) / math.sqrt(adapter.into)
                adapter.allocate(a, None, None)
            else:
                adapter.allocate(None, where, None)

    def sensitive(self, model: nn.Module, now: Now, group: dict[int, Found]) -> Iterator[Candidates]:
        """Yield the candidates of some layers, by number, of their weights and their biases."""
        sums: dict[tuple[int, str], Tensor] = {}
        steps: dict[tuple[int, str], Tensor] = {}

        def see(layer: int, name: str, gradient: Tensor) -> None:
            held = steps.get((layer, name))
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            steps[layer, name] = wide if held is None else held + wide

        with undisturbed(model, now), torch.enable_grad():
            try:
                for layer, (_, _, adapter) in group.items():
                    adapter.seen = partial(see, layer)
                for batch in now.calibration(self.batches):
                    now.batch = batch
                    try:
                        now.ask(model, now)
                    except RuntimeError as problem:
                        if "does not require grad" not in str(problem):
                            raise  # else nothing of the loss depends on these layers, which is said below
                    for key in sorted(steps):
                        square = averaged(steps.pop(key)).square()
                        sums[key] = sums[key].add_(square) if key in sums else square
            finally:
                for _, _, adapter in group.values():
                    adapter.seen = None
        for layer, (title, _, adapter) in group.items():
            if (layer, "weight") not in sums:
                raise BadInput(
                    f"SPT got no gradient for '{title}': nothing of the loss depends on it; leave it out of where."
                )
            low_rank = self.rank * (adapter.out + adapter.into)
            yield candidates(layer, "weight", sums[layer, "weight"], math.ceil(self.threshold * low_rank), low_rank)
            if (layer, "bias") in sums:
                yield candidates(layer, "bias", sums[layer, "bias"], math.ceil(WHOLE_BIAS * adapter.out), adapter.out)


def candidates(layer: int, name: str, sensitivity: Tensor, full: int, structure: int) -> Candidates:
    """Return the entries that may be chosen one by one, and the one that makes the whole structured."""
    flat = sensitivity.reshape(-1)
    values, places = flat.topk(min(full, len(flat)))
    return Candidates(layer, name, values, places, full, structure)


def _bias_size(layer: nn.Module) -> int:
    bias = own_bias(layer)
    return 0 if bias is None else int(bias.numel())


def _size(layer: nn.Module) -> int:
    out, into = matrix_shape(layer)
    return out * into
