"""Claims of freezing: what lower layers have learned serves other labels of the same images, on the digits of
`plait.claims.parametrize`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from plait.claims.base import claim
from plait.claims.parametrize import FULL_RATES, accuracy, digits, fit, pick, pretrained
from plait.method import Method
from plait.parametrize.freeze import Freeze
from plait.step.adam import AdamW
from plait.train import train

RATES = (*FULL_RATES, 1e-2)
LOWER = Freeze(where="0|2")


def other_task(seed: int) -> nn.Module:
    """Return the network trained on upright digits with a new last layer."""
    model = copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed)
    nn.init.kaiming_uniform_(model.get_parameter("4.weight"), a=5**0.5)
    nn.init.zeros_(model.get_parameter("4.bias"))
    return model


def relabelled(seed: int, methods: Callable[[], Sequence[Method]], count: int) -> float:
    """Return the accuracy on held-out digits whose labels are permuted, after 100 steps on `count` of them, at the best
    of four learning rates.
    """
    images, labels = digits()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(797, generator=draw) + 1000
    x, y = images[order], torch.randperm(10, generator=draw)[labels[order]]

    def candidate(rate: float) -> nn.Module:
        return fit(other_task(seed), (x[:count], y[:count]), methods(), 100, rate, seed)

    best = pick([functools.partial(candidate, rate) for rate in RATES], (x[400:500], y[400:500]))
    return accuracy(best, (x[500:], y[500:]))


@claim(
    "freeze",
    says="with 40 examples of new labels, training the last layer on frozen lower ones beats fine-tuning all of them",
    baseline="fine-tuning all layers from the same start, its learning rate chosen from the same four",
    figure="accuracy on held-out digits under the new labels",
    better="higher",
    seeds=24,
    first_seed=1000,
)
def frozen_layers_serve_few_new_labels(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 40 digits whose labels are permuted."""
    return relabelled(seed, lambda: [LOWER], 40), relabelled(seed, list, 40)


def held_beside_the_weights(methods: Sequence[Method]) -> float:
    """Return the bytes of the gradients and of AdamW's states after a step."""
    images, labels = digits()
    run = train(other_task(0), (images[:64], labels[:64]), methods=[*methods, AdamW(lr=1e-3)], steps=1)
    rule = run.now.optimizer
    states = [] if rule is None else [t for held in rule.state.values() for t in held.values()]
    tensors = [*(p.grad for p in run.model.parameters()), *states]
    return float(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)))


@claim(
    "freeze",
    says="with the lower two of three layers frozen, gradients and states take less than a tenth of the memory",
    baseline="a tenth of what they take when all layers are trained",
    figure="bytes of gradients and of AdamW's states",
    better="lower",
)
def holds_less_beside_the_weights(seed: int) -> tuple[float, float]:
    """Count the bytes after a step; the weights themselves stay."""
    return held_beside_the_weights([LOWER]), held_beside_the_weights([]) / 10
