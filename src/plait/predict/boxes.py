"""Knowing which questions lie beyond the data of a fine-tuning: boxes around what a LoRA layer made of that data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, NonNegative, ScheduledNonNegative, Size
from plait.layers import CONVOLUTIONS, evaluating, hooked, matches
from plait.method import Method, Now, Predictor, method
from plait.parametrize.base import Adapter, stack

PARAPHRASE = "paraphrase_"
"""What the names of inputs begin with that are a paraphrase of the example, for the penalty."""


def clusters(points: Tensor, count: int, generator: torch.Generator, rounds: int = 50) -> Tensor:
    """Return the cluster of each point [n] by k-means, started by k-means++: points [n, d] -> [n], below `count`."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < min(count, len(points)):
        nearest = torch.cdist(points, centres).amin(1).square()
        if not nearest.any():
            break  # fewer different points than clusters
        centres = torch.cat([centres, points[torch.multinomial(nearest.cpu(), 1, generator=generator)]])
    chosen = torch.cdist(points, centres).argmin(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, chosen, points)
        sizes = torch.bincount(chosen, minlength=len(centres)).unsqueeze(1)
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
        before, chosen = chosen, torch.cdist(points, centres).argmin(1)
        if torch.equal(before, chosen):
            break
    return chosen


def boxes(points: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (low, high, deviation) [k, d] of each cluster that has points; one point has the deviation of all."""
    found = []
    for number in sorted(set(chosen.tolist())):
        own = points[chosen == number]
        found.append((own.amin(0), own.amax(0), (own if len(own) > 1 else points).std(0, correction=0)))
    low, high, deviation = (torch.stack(parts) for parts in zip(*found, strict=True))
    return low, high, deviation


def margin(points: Tensor, low: Tensor, high: Tensor, deviation: Tensor) -> Tensor:
    """Return by how many deviations the nearest box must grow on all sides to hold each point [n, d] -> [n]; 0 inside.

    >>> low, high = torch.zeros(1, 2), torch.ones(1, 2)
    >>> margin(torch.tensor([[0.5, 0.5], [0.5, 2.0]]), low, high, torch.full((1, 2), 0.5))
    tensor([0., 2.])
    """
    beyond = torch.maximum(low - points.unsqueeze(1), points.unsqueeze(1) - high).clamp_min(0)
    tiny = torch.finfo(points.dtype).tiny
    return torch.where(beyond > 0, beyond / deviation.clamp_min(tiny), 0.0).amax(-1).amin(-1)


@paper("wu2025lorabam", key="lora-bam")
@method
class LoRABAM(Method):
    """x is out of distribution if its features f(x) lie outside all boxes k of the training data's:
    f_j(x) < low_kj - enlargement sigma_kj or f_j(x) > high_kj + enlargement sigma_kj for some j, for every k.

    f(x): the outputs of the last `layers` adapted layers that `where` matches, averaged over the positions of x, side
    by side. The features of the training data are clustered (k-means); low, high and sigma are each cluster's smallest
    and largest values and deviation. `margins` gives the enlargement at which x would be inside, a score for any
    threshold. In a recipe, the boxes are made after training, and `predict` moves what is outside to the uniform
    distribution by a factor of 1 - 1e-3: the predicted class stays, its confidence ranks below all others.

    strength: of the paper's regularization, strength * mean |f(x) - f(x')|^2 / size over the examples of a batch that
    bring a paraphrase x' along, in inputs named `paraphrase_input_ids` and so on; it takes two more forward passes. The
    abstract alone was at hand: k-means, the layers' outputs as features (the inner A h of `rank` numbers tells far
    less) and this form of the penalty are chosen here.

    clusters, layers, batches (of training data; 0 is all): at least 1. enlargement: at least 0. Raises BadInput without
    adapters, and where strength is given and no example has a paraphrase.

    >>> from plait import LoRA, train
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> monitor = LoRABAM(clusters=2)
    >>> run = train(nn.Sequential(nn.Linear(4, 2)), (x, (x[:, 0] > 0).long()), methods=[LoRA(rank=2), monitor], steps=5)
    >>> monitor.outside(run.model, torch.tensor([[0.0] * 4, [9.0] * 4]), run.now).tolist()
    [False, True]
    """

    clusters: Count = 8
    enlargement: NonNegative = 1.0
    layers: Count = 1
    batches: Size = 0
    strength: ScheduledNonNegative = 0.0
    reads: ClassVar[str] = PARAPHRASE
    idle: ClassVar[dict[str, float]] = {}

    # -- features --------------------------------------------------------------------------------------------------
    def monitored(self, model: nn.Module) -> list[str]:
        """Return the names of the monitored layers."""
        found = [name for name, layer in model.named_modules() if stack(layer) and matches(self.where, name)]
        if not found:
            raise BadInput(f"LoRABAM(where={self.where!r}) finds no adapter to watch: put LoRA before it, Fold after.")
        return found[-self.layers :]

    def features(self, model: nn.Module, inputs: Any, now: Now, names: Sequence[str]) -> Tensor:
        """Return f(x) [n, size] of a batch, given the names of the monitored layers; the model runs once."""
        held: dict[str, Tensor] = {}
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        with _watched(model, names, held):
            now.call(model, inputs)
        return torch.cat([_averaged(held[name], mask) for name in names], -1).float()

    # -- the boxes -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def fit(self, model: nn.Module, now: Now) -> dict[str, Tensor]:
        """Make the boxes of the training data; return them, and the monitored layers as keys."""
        memory = now.of(self)
        names = self.monitored(model)
        count = self.batches or now.steps_per_epoch or 1
        with evaluating(model):
            seen = [self.features(model, batch.inputs, now, names) for batch in now.calibration(count)]
        points = torch.cat(seen)
        chosen = clusters(points.cpu(), self.clusters, torch.Generator().manual_seed(0)).to(points.device)
        low, high, deviation = boxes(points, chosen)
        memory.clear()
        memory |= {"low": low, "high": high, "deviation": deviation}
        memory |= {f"layer/{name}": torch.tensor(number) for number, name in enumerate(names)}
        return memory

    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Make the boxes and leave them with the model, beside its weights."""
        model.__dict__["_plait_boxes"] = dict(self.fit(model, now))  # no part of its state dict
        return model

    def margins(self, model: nn.Module, inputs: Any, now: Now) -> Tensor:
        """Return by how many deviations the nearest box must grow to hold each example: [n], 0 inside."""
        memory: dict[str, Tensor] = model.__dict__.get("_plait_boxes") or now.of(self) or self.fit(model, now)
        layers = sorted((key for key in memory if key.startswith("layer/")), key=lambda key: int(memory[key]))
        names = [key.removeprefix("layer/") for key in layers]
        with torch.no_grad(), evaluating(model):
            points = self.features(model, inputs, now, names)
        return margin(points, *(memory[side].to(points.device) for side in ("low", "high", "deviation")))

    def outside(self, model: nn.Module, inputs: Any, now: Now) -> Tensor:
        """Return which examples lie outside all boxes, enlarged: [n]."""
        return self.margins(model, inputs, now) > self.enlargement

    def predict(self, predictor: Predictor) -> Predictor:
        """Return the predictor that is nearly uniform where the input lies outside all boxes."""

        def monitored(model: nn.Module, inputs: Any, now: Now) -> Tensor:
            given = predictor(model, inputs, now)
            outside = self.outside(model, inputs, now).view(-1, *(1,) * (given.dim() - 1))
            return torch.where(outside, 1e-3 * given + (1 - 1e-3) / given.shape[-1], given)

        return monitored

    # -- the penalty -----------------------------------------------------------------------------------------------
    def forward(self, model: nn.Module, now: Now) -> None:
        """Keep paraphrases from a model that is not called by plait, as in transformers' Trainer."""

        def without(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return given, {key: value for key, value in named.items() if not key.startswith(PARAPHRASE)}

        if self.strength:
            model.register_forward_pre_hook(without, with_kwargs=True)

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return strength * mean |f(x) - f(x')|^2 / size over a batch's examples x and their paraphrases x'."""
        strength, inputs = now.at(self.strength), now.batch.inputs
        if not strength:
            return 0.0
        named = inputs if isinstance(inputs, dict) else {}
        other = {key.removeprefix(PARAPHRASE): v for key, v in named.items() if key.startswith(PARAPHRASE)}
        if not other:
            raise BadInput(
                f"LoRABAM.strength is {self.strength} but no example brings a paraphrase along: give inputs named "
                f"'{PARAPHRASE}input_ids' and so on, or leave strength at 0."
            )
        names = self.monitored(model)
        own = {key: value for key, value in named.items() if not key.startswith(PARAPHRASE)}
        ours, theirs = (self.features(model, side, now, names) for side in (own, other))
        return strength * (ours - theirs).square().mean()

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a recipe in which no adapter stands before it."""
        mine = methods.index(self)
        if not any(isinstance(m, Adapter) for m in methods[:mine]):
            self.monitored(model)


def _averaged(inner: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over all positions between the first dimension and the last; those a mask leaves out not."""
    if inner.dim() == 2:
        return inner
    flat = inner.flatten(1, -2)
    if mask is None or mask.shape != flat.shape[:2]:
        return flat.mean(1)
    counts = mask.to(flat.dtype).unsqueeze(-1)
    return (counts * flat).sum(1) / counts.sum(1).clamp_min(1)


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], held: dict[str, Tensor]) -> Iterator[None]:
    """Note the layers' outputs, [n, ..., out], as the model runs."""

    def note(layer: nn.Module, _: Any, output: Tensor, name: str) -> None:
        held[name] = output.movedim(1, -1) if isinstance(layer, CONVOLUTIONS) else output

    with hooked(model.get_submodule(name).register_forward_hook(partial(note, name=name)) for name in names):
        yield
