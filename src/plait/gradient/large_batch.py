"""A small batch's recipe for a large batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from plait.catalogue import paper
from plait.data.example_noise import MultiplicativeNoise
from plait.errors import BadInput
from plait.forward.ghost_norm import GhostBatchNorm
from plait.gradient.clip import Clip
from plait.method import Method
from plait.schedule import Schedule, from_config
from plait.step.momentum import SGD

VALUES = ("start", "end", "peak", "first", "then")
"""Fields of schedules that are values of the number itself, and no places in the run."""


def scaled(rate: float | Schedule, factor: float) -> float | Schedule:
    """Return a number, or all values of a schedule, times a factor.

    >>> from plait.schedule import Cosine
    >>> scaled(Cosine(peak=0.1, warmup=0.2), 2.0)
    Cosine(peak=0.2, end=0.0, warmup=0.2, cycles=1, growth=1.0)
    """
    if not isinstance(rate, Schedule):
        return rate * factor
    return replace(rate, **{name: value * factor for name, value in vars(rate).items() if name in VALUES})


@paper("hoffer2017train", key="large-batch", kind="ground", places=["data", "forward", "loss", "gradient", "step"])
def LargeBatch(
    batch_size: int,
    small: int = 128,
    lr: Any = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    noise: Literal["rate", "examples", "none"] = "rate",
    clip: float | None = 5.0,
    ghost: bool = True,
) -> list[Method]:
    """lr sqrt(batch_size / small), ghost batches of `small` examples in batch norm, clipped gradients: what makes a run
    with batches of `batch_size` move its weights as one with batches of `small` does, for which `lr` is good.

    Adapting the regime is no method: plait counts steps, so a run with as many `steps` as the small batch had trains
    batch_size / small times the epochs, which is what the paper asks for, and its schedules stretch with it. With steps
    divided by that ratio the epochs are kept, which costs generalization; ghost batches win a part of it back.

    Returns [GhostBatchNorm, MultiplicativeNoise, Clip, SGD], without what is switched off. noise: "rate" scales the
    learning rate; "examples" keeps it and multiplies examples' gradients by noise of variance batch_size / small - 1.
    clip: the largest norm of the gradient, 5 in the authors' code, or None. ghost: False for a model without batch
    norm. lr: a number or a schedule. Raises BadInput for sizes that are no whole numbers of at least 1, a batch_size
    that is not above small, another `noise`, and numbers that these methods refuse.

    >>> LargeBatch(batch_size=512, small=128, lr=0.1)
    [GhostBatchNorm(size=128), Clip(norm=5.0), SGD(lr=0.2)]
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not isinstance(small, int) or small < 1:
        raise BadInput(f"LargeBatch: batch_size and small must be whole numbers, not {batch_size!r} and {small!r}.")
    if batch_size <= small:
        raise BadInput(f"LargeBatch: batch_size must be greater than small, not {batch_size} against {small}.")
    if noise not in ("rate", "examples", "none"):
        raise BadInput(f"LargeBatch: noise must be 'rate', 'examples' or 'none', not {noise!r}.")
    rate, ratio = from_config(lr) if isinstance(lr, dict) else lr, batch_size / small
    made: list[Method] = [GhostBatchNorm(size=small)] if ghost else []
    made += [MultiplicativeNoise(ratio=ratio)] if noise == "examples" else []
    made += [Clip(norm=clip)] if clip is not None else []
    rate = scaled(rate, ratio**0.5) if noise == "rate" else rate
    return [*made, SGD(lr=rate, momentum=momentum, weight_decay=weight_decay)]
