"""Quantizing after training: adapters are folded, the sum is rounded once, and each step is judged by the loss."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import nn

from plait.batch import weighted_sum
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Size
from plait.layers import evaluating, require_layers
from plait.math.packed import packed_layers, unpack
from plait.math.quantization import Form
from plait.method import Method, Now, method
from plait.parametrize.base import new_or_at_the_ends
from plait.parametrize.folding import fold
from plait.parametrize.quantized import Quantize, form_of, quantize


@paper("dettmers2023qlora", key="requantize", kind="ground")
@method
class Requantize(Method):
    """W <- quantize(W0 + update): adapters are folded into the weights W0 that they stand on, and the sum is rounded.

    What comes out holds codes; `fold` (and export) gives the numbers that they stand for. W0 on a quantized base are
    the dequantized numbers, whose rounding error the adapters were trained with: the sum carries it, and a second
    rounding adds its own; or, on the same grid, it takes an update that is small beside a step back to where it began.
    `originals` takes the unrounded weights that Quantize(keep="always") holds in their place: one rounding, but of a
    base that the adapters were not trained on. On a base that is not quantized the two are one.

    Returns, each time the run is measured: "loss trained", "loss folded" (into W0, not rounded), "loss quantized", on
    the validation set, or 4 training batches where there is none; of a model of words the perplexities, exp(loss).
    To judge and to round, the weights are made in floating-point numbers: the memory of the unquantized model.
    bits, format, group, double: as for Quantize. where: by default what Quantize takes. Raises BadInput for originals
    that are not held, and where LoftQ made the base, whose error the adapters hold.

    >>> layer = nn.Sequential(nn.Linear(8, 8, bias=False))
    >>> Requantize(bits=8).finish(layer, Now()).state_dict()["0.weight.codes"].dtype
    torch.int8
    """

    bits: Literal[8, 4] = 4
    format: Literal["nf4", "int"] | None = None
    group: Size | None = None
    double: bool = True
    originals: bool = False

    def __post_init__(self) -> None:
        if self.bits == 8 and self.format == "nf4":
            raise BadInput("Requantize.format 'nf4' has 4 bits: give bits=4, or format='int'.")

    @property
    def form(self) -> Form:
        """How the numbers are coded."""
        return form_of(self.bits, self.format, self.group, self.double)

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the layers to be quantized."""
        dropped = new_or_at_the_ends(model) if self.where == ".*" else set()
        found = [(name, layer) for name, layer in require_layers(self, model, self.where) if name not in dropped]
        if not found:
            raise BadInput(
                "Requantize finds only layers that are new with the task, or embeddings: name them in where."
            )
        return found

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse targets that match nothing, and originals that nobody holds."""
        self.targets(model)
        if not self.originals:
            return
        if not any(isinstance(m, Quantize) and m.keep == "always" for m in methods) and not _held(model):
            raise BadInput("Requantize.originals needs the unrounded weights: add Quantize(keep='always'), or drop it.")
        if any(type(m).__name__ == "LoftQ" for m in methods):
            raise BadInput(
                "LoftQ gives the adapters the rounding error of the base, which the unrounded weights do not have: set "
                "Requantize.originals to false, or drop LoftQ."
            )

    def folded(self, model: nn.Module) -> nn.Module:
        """Return the model with its adapters folded, in floating-point numbers."""
        return fold(unpack(model, originals=True) if self.originals else model)

    @torch.no_grad()
    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Return the model with codes in place of weights."""
        made = self.folded(model)
        quantize(self.targets(made), self.form)
        return made

    @torch.no_grad()
    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return the loss, or the perplexity, of the model as it is, folded, and quantized."""
        words = next(iter(now.calibration(1))).target
        of_words = words.dim() > 1 and not words.is_floating_point()
        figures = {"trained": judged(model, now)}
        made = self.folded(copy.deepcopy(model))
        figures["folded"] = judged(made, now)
        quantize(self.targets(made), self.form)
        figures["quantized"] = judged(made, now)
        return {
            f"{'perplexity' if of_words else 'loss'} {name}": math.exp(min(loss, 700.0)) if of_words else loss
            for name, loss in figures.items()
        }


def judged(model: nn.Module, now: Now) -> float:
    """Return the mean loss on the validation set, or on 4 batches of the training data where there is none."""
    try:
        return now.evaluate(model)
    except BadInput:
        total = mass = 0.0
        with evaluating(model):
            for batch in now.calibration(4):
                misfit = now.misfit(now.call(model, batch.inputs), batch.target, now)
                total, mass = total + float(weighted_sum(misfit, batch.weight)), mass + float(batch.mass())
        return total / max(mass, 1e-12)


def _held(model: nn.Module) -> bool:
    return any(weight.original is not None for _, _, weight in packed_layers(model))
