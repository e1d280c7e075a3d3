"""What is left of a model's quality when its adapters are folded into the weights, and when those are then rounded."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

from plait.errors import BadInput
from plait.finish.quantize import Requantize
from plait.math.packed import packed_layers
from plait.method import Now
from plait.parametrize.folding import fold

if TYPE_CHECKING:
    from torch import nn

    from plait.tasks.base import Task
    from plait.workbench.predicting import Figures


def folded_figures(task: Task, model: nn.Module, bits: Literal[8, 4] = 4) -> Figures:
    """Return the figures on the test set of the folded model, and of the folded one with its weights in so many bits.

    The weights are rounded once, in groups, as `plait.finish.quantize.Requantize` does; the model itself stays.
    Empty for what cannot be folded, such as soft prompts.
    """
    try:
        plain = fold(copy.deepcopy(model))
    except BadInput:
        return {}
    found = {"folded": task.metrics(plain, task.test)}
    if not any(True for _ in packed_layers(plain)):
        plain = Requantize(bits=bits).finish(plain, Now())
    return found | {f"folded, {bits} bits": task.metrics(plain, task.test)}
