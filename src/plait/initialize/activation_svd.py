"""Starts from the inputs that the layers see: hooks stream them over calibration batches, and no batch is kept."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Fraction, Range
from plait.initialize.base import Found, Start, everywhere, gathered, low_rank, refuse_stacked, undisturbed
from plait.layers import is_transformers_conv1d
from plait.math.svd import RowSVD
from plait.method import Now, method
from plait.parametrize.low_rank import LowRank
from plait.parametrize.origin import record_left
from plait.parametrize.refusals import require_finite
from plait.passes import ShortPasses


def input_rows(layer: nn.Module, inputs: Tensor, keep: Tensor | None) -> Tensor:
    """Return the vectors that a layer's matrix [out, in] is applied to, as rows [n, in].

    keep: the mask [examples, tokens] of tokens that count; used where it fits the inputs [examples, tokens, in].
    """
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        image, sizes = inputs, [layer.kernel_size, layer.dilation, layer.padding, layer.stride]
        if isinstance(layer, nn.Conv1d):  # an image of one row
            image = inputs.unsqueeze(-2)
            sizes = [(first, *size) for first, size in zip((1, 1, 0, 1), sizes, strict=True)]
        columns = F.unfold(image, *sizes)  # type: ignore[arg-type]
        return columns.transpose(1, 2).flatten(0, 1)
    if keep is not None and inputs.shape[:-1] == keep.shape:
        return inputs[keep.bool()]
    return inputs.flatten(0, -2)


def _patches(layer: nn.Module) -> tuple[Any, ...]:
    """Return what beside the inputs decides what `input_rows` are: how a convolution cuts them into patches."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return ()
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation


@dataclass(frozen=True)
class Read:
    """What a layer read last, how, and its decomposition before and after that."""

    by: str
    given: Tensor
    how: tuple[Any, ...]
    before: RowSVD | None
    after: RowSVD


@method
class ActivationStart(Start):
    """A start from the layers' inputs: the singular value decomposition of all rows seen in up to `batches` batches.

    A pass holds one batch's rows of one layer at a time and [width, in] numbers for each layer, or for each group of
    layers with the same input (queries, keys and values).
    """

    batches: Count = 16

    def width(self, adapter: LowRank) -> int:
        """Return how many singular vectors of a layer's input are needed."""
        return adapter.rank

    def settled(self, before: Tensor, after: Tensor) -> bool:
        """Say whether a layer's vectors moved so little in the last batch that no more batches are needed."""
        return False

    def found(self, model: nn.Module) -> list[Found]:
        """Return the adapters, or name the first layer whose inputs are not vectors."""
        chosen = super().found(model)
        refuse_stacked(self, chosen)
        for name, layer, _ in chosen:
            plain = isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1 and isinstance(layer.padding, tuple)
            if not (isinstance(layer, nn.Linear) or is_transformers_conv1d(layer) or plain):
                raise BadInput(
                    f"{type(self).__name__} is defined for Linear and ungrouped Conv1d and Conv2d layers, not for the "
                    f"{type(layer).__name__} '{name}': leave it out with where."
                )
        return chosen

    @torch.no_grad()
    def inputs_svd(self, model: nn.Module, now: Now) -> dict[str, RowSVD]:
        """Return the decomposition of each layer's inputs, by the layer's name.

        Layers that have read one input at each pass so far, and do so again, have one decomposition; where they part,
        each goes on from it alone. No pass goes further than to the last layer that is not settled.
        """
        chosen = self.found(model)
        seen: dict[str, RowSVD] = {}
        fresh: dict[str, bool] = {}
        last: Read | None = None
        keep: Tensor | None = None
        passes = ShortPasses()

        def watch(layer: nn.Module, inputs: tuple[Tensor, ...], *, name: str, rank: int) -> None:
            nonlocal last
            if not fresh.get(name, True):
                return
            given, before = inputs[0], seen.get(name)
            how = given._version, _patches(layer)  # the version: what was changed in place is another input
            if (
                last is not None
                and (last.by != name and before is last.before and rank <= last.after.rank)
                and everywhere(given is last.given and how == last.how, given.device)
            ):
                seen[name], fresh[name] = last.after, fresh[last.by]
                return
            svd = before or RowSVD(rank)
            after = copy.copy(svd)  # another layer may go on from the same one
            after.add(gathered(input_rows(layer, given.detach(), keep)))
            compared = after.count > svd.count and after.vectors.shape == svd.vectors.shape
            fresh[name] = not (compared and self.settled(svd.vectors, after.vectors))
            seen[name], last = after, Read(name, given, how, before, after)

        with undisturbed(model, now), ExitStack() as hooks:
            for name, layer, adapter in chosen:
                hook = partial(watch, name=name, rank=self.width(adapter))  # type: ignore[arg-type]
                hooks.enter_context(layer.register_forward_pre_hook(hook))
                hooks.enter_context(layer.register_forward_pre_hook(lambda *given, name=name: passes.reach(name)))
            for batch in now.calibration(self.batches):
                mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
                keep = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
                now.batch = batch
                with passes.to([name for name, _, _ in chosen if fresh.get(name, True)]):
                    now.call(model, batch.inputs)
                last = None
                if not any(fresh.get(name, True) for name, _, _ in chosen):
                    break
        every = {name: seen.get(name) for name, _, _ in chosen}
        for name, svd in every.items():
            if svd is None or not svd.count or float(svd.total) == 0:
                raise BadInput(f"{type(self).__name__} saw no varying input of '{name}': leave it out with where.")
            require_finite(svd.total, f"{type(self).__name__} saw an input of '{name}'")
        return every  # type: ignore[return-value]


@paper("paischer2024eva", key="eva")
@method
class EVA(ActivationStart):
    """A = V_r^T, B = 0, where X - mean(X) = U S V^T and X [n, in] are the layer's inputs; the ranks r of all layers are
    chosen anew, under their old sum, as the largest of all explained variances S_j^2 / sum_i S_i^2 of all layers.

    The decomposition is incremental over batches (Ross et al., 2008) and ends for each layer once its vectors settle.
    The scale of B A stays as it is. A layer may end up with rank 0. Explained variance is a part of the layer's total
    variance, as in the authors' code in peft.

    rho: how much a rank may grow, to rho times the old one; 1 keeps all ranks. tau: a layer is settled once the cosine
    of each vector with the one before the last batch is at least tau; 1 uses all batches. batches: at most so many.

    Raises BadInput for a layer that is no linear map of vectors, and for too few inputs for the ranks.

    >>> from plait import LoRA, Batch
    >>> model = nn.Sequential(nn.Linear(3, 3, bias=False))
    >>> LoRA(rank=1).parametrize(model)
    >>> now = Now()
    >>> now.calibration = lambda count: iter([Batch.of(torch.tensor([[0.0, 5, 1], [0, -5, 1]]), torch.zeros(2))])
    >>> EVA(rho=1.0).initialize(model, now)
    >>> model[0].plait.lora.A.tolist()
    [[0.0, 1.0, 0.0]]
    """

    rho: Annotated[float, AfterValidator(Range(1))] = 2.0
    tau: Fraction = 0.99

    def width(self, adapter: LowRank) -> int:
        """Return the largest rank that the layer may get."""
        full = min(adapter.A.shape[1], adapter.B.shape[0])
        return max(adapter.rank, min(round(adapter.rank * self.rho), full))

    def settled(self, before: Tensor, after: Tensor) -> bool:
        """Say whether every vector has a cosine of at least tau with the one before it, up to sign."""
        return self.tau < 1 and bool(((before * after).sum(1).abs() >= self.tau).all())

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Give each adapter its new rank and the vectors that explain most of its layer's input."""
        chosen, every = self.found(model), self.inputs_svd(model, now)
        budget = sum(adapter.rank for _, _, adapter in chosen)  # type: ignore[misc]
        ranks = self.ranks({name: every[name].explained()[: self.width(a)] for name, _, a in chosen}, budget)  # type: ignore[arg-type]
        for name, layer, adapter in chosen:
            low = low_rank(adapter)
            vectors, wanted = every[name].vectors, ranks[name] if self.rho > 1 else low.rank
            if len(vectors) < wanted or sum(ranks.values()) < budget:
                raise BadInput(
                    f"EVA saw only {every[name].count} inputs of '{name}', too few for its rank: raise batches, "
                    f"or lower the adapters' rank."
                )
            low.set(vectors[:wanted], low.B.new_zeros(low.B.shape[0], wanted))
            record_left(layer, low)

    def ranks(self, explained: dict[str, Tensor], budget: int) -> dict[str, int]:
        """Return how many of the `budget` largest explained variances each layer has; the earlier layer wins a tie."""
        owner = torch.cat([torch.full((len(v),), i) for i, v in enumerate(explained.values())])
        order = torch.cat([v.cpu() for v in explained.values()]).argsort(descending=True, stable=True)
        counts = torch.bincount(owner[order[:budget]], minlength=len(explained))
        return dict(zip(explained, counts.tolist(), strict=True))
