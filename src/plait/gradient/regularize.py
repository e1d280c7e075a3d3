"""Regularization by the gradient's own norm, without a second backward pass: finite differences, and flooding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.batch import Batch
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Number, Positive, ScheduledNonNegative
from plait.gradient.base import TINY, Gradient, Neighbourhood, along, norm
from plait.method import Ask, Now, method
from plait.sharding import gather

ENDS = {"forward": (1, 0), "backward": (0, -1), "centered": (1, -1)}
"""The two points of a difference quotient, in units of the step."""


@paper("karakida2023understanding", key="gradient-reg")
@method
class GradientRegularization(Gradient):
    """grad L(w) + strength * D,  D ~ grad |grad L(w)|^2 / 2, the gradient of L + strength / 2 |grad L|^2.

    With g = grad L(w) and e = `ascent`, D is the difference quotient
    forward (F)   (grad L(w + e g) - g) / e,
    backward (B)  (g - grad L(w - e g)) / e,
    centered (C)  (grad L(w + e g) - grad L(w - e g)) / (2 e).
    All three come to the Hessian times g as e -> 0; the paper finds that F with a large e generalizes best. The step
    along g is not normalized: with strength = ascent, F is SAM without its normalization, grad L(w + e g).

    strength: at least 0, or a schedule; 0 is the plain gradient. ascent: greater than 0. Where the weights are kept in
    bfloat16, e g must be large beside their rounding. 2 calls; 3 where centered. Equations and symbols are those of the
    published abstract and of the definitions as they are commonly quoted; the defaults are no figures of the paper.
    Raises BadInput for numbers outside these ranges, and in a run for a strength that stays 0.

    >>> GradientRegularization(difference="centered").calls
    3
    """

    strength: ScheduledNonNegative = 0.1
    ascent: Positive = 0.05
    difference: Literal["forward", "backward", "centered"] = "forward"

    @property
    def calls(self) -> int:  # type: ignore[override]
        """How often a step asks."""
        return 3 if self.difference == "centered" else 2

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle with the gradient of its own squared norm added."""

        def regularized(model: nn.Module, now: Now) -> Tensor:
            strength, near = now.at(self.strength), Neighbourhood(ask, model, now, self.parameters(model))
            if strength == 0:
                return near.value
            high, low = ENDS[self.difference]
            up, down = (
                near.at([end * self.ascent * g for g in near.here]) if end else near.here for end in (high, low)
            )
            scale = strength / (self.ascent * (high - low))
            near.leave([g + scale * (u - d) for g, u, d in zip(near.here, up, down, strict=True)])
            return near.value

        return regularized


@paper("ishida2020flooding", key="flooding", kind="ground")
@method
class Flooding(Gradient):
    """grad (|L - level| + level) = sign(L - level) grad L: descent above the flood level, ascent below it.

    Around the level, a step up and a step down of plain gradient descent with rate r move the weights by r^2 times a
    difference quotient of the gradient's squared norm over r: flooding is gradient regularization in disguise.

    level: any number; training stops to drown there. L is the objective of the whole batch, penalties included, and is
    returned as it is. One call. Raises BadInput for a level that is not finite, and in a run for a level of 0.

    >>> Flooding(level=0.1)
    Flooding(level=0.1)
    """

    level: Number = 0.05

    idle: ClassVar[dict[str, float]] = {"level": 0}

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle that turns round below the level."""

        def flooded(model: nn.Module, now: Now) -> Tensor:
            value = ask(model, now)
            if value < self.level:
                for _, gradient in self.gradients(model):
                    gradient.neg_()
            return value

        return flooded


def blocks(batch: Batch, size: int) -> Iterator[tuple[Batch, Tensor]]:
    """Yield a batch in blocks of about `size` examples over all processes, each with its share of the whole mass.

    >>> whole = Batch.of(torch.zeros(5, 2), torch.zeros(5))
    >>> [(len(block), round(float(share), 1)) for block, share in blocks(whole, 3)]
    [(3, 0.6), (2, 0.4)]
    """
    lengths = [int(n) for n in gather(torch.tensor(len(batch), device=batch.weight.device))]
    count = max(min(-(-sum(lengths) // size), *lengths), 1)  # alike on every process, since each block is asked by all
    mass = torch.stack(gather(batch.mass())).sum().clamp_min(torch.finfo(torch.float32).tiny)
    for rows in torch.arange(len(batch)).tensor_split(count):
        part = batch.take(slice(int(rows[0]), int(rows[-1]) + 1))
        yield part, torch.stack(gather(part.mass())).sum() / mass


@paper("geiping2022stochastic", key="full-batch")
@method
class FullBatch(Gradient):
    """mean_B [g_B + strength * (grad L_B(w + distance * g_B / |g_B|) - g_B) |g_B| / distance],  g_B = grad L_B(w).

    Gradient descent on the whole set, without stochasticity, with what small batches add made explicit: this is the
    gradient of mean_B [L_B + strength / 2 |grad L_B|^2] over fixed blocks B of the set, by a forward difference. SGD
    with rate r behaves as if it had strength r / 2 (its loss modified by r / 4 |grad L_B|^2). The authors' code
    multiplies the difference by rate / 4 * block_strength, 0.8 / 4 * 0.5 in their settings, which is the default here.
    The other half of their recipe is Clip(norm=0.25) after this, a long warmup, and many more steps.

    The whole set must be the batch: plait.train(..., batch_size=len(data), accumulate=n), where n keeps the
    micro-batches of a block as small as memory needs. Examples come in the order of the set, so that blocks are the
    same in each step. Raises BadInput at the first step where a batch is not the whole set.

    strength: at least 0, or a schedule. block: examples in a block, over all processes. distance: of the difference,
    greater than 0. 2 calls for each block.

    >>> from plait import train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 1), (x, x[:, 0]), methods=[FullBatch(block=8)], batch_size=32, accumulate=2, steps=20)
    >>> run.history[-1]["objective"] < run.history[0]["objective"]
    True
    """

    strength: ScheduledNonNegative = 0.1
    block: Count = 128
    distance: Positive = 0.01

    calls: ClassVar[int] = 2
    excludes: ClassVar[tuple[str, ...]] = ("AdaptiveBatchSize",)

    def examples(self, order: Tensor, now: Now) -> Tensor:
        """Take the examples in the order of the set."""
        return order.sort().values

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle that asks block by block."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            if now.steps_per_epoch > 1:
                raise BadInput(
                    "FullBatch needs the whole set in each batch: set batch_size to the number of examples, and "
                    "accumulate to as many micro-batches as memory needs."
                )
            whole, value, sums, parts = now.batch, torch.zeros(()), dict[nn.Parameter, Tensor](), dict[str, float]()
            for part, share in blocks(whole, self.block):
                now.batch = part
                value = value.to(share.device) + share * self.block_gradient(ask, model, now)
                for name, figure in now.parts.items():
                    parts[name] = parts.get(name, 0.0) + float(share) * figure
                for p in model.parameters():
                    if p.grad is not None:
                        weighed = p.grad * share.to(p.grad.dtype)
                        sums[p] = sums[p].add_(weighed) if p in sums else weighed
                    p.grad = None
            now.batch, now.parts = whole, parts
            for p, total in sums.items():
                p.grad = total
            return value

        return asked

    def block_gradient(self, ask: Ask, model: nn.Module, now: Now) -> Tensor:
        """Fill `.grad` with the regularized gradient of one block; return its objective."""
        strength, near = now.at(self.strength), Neighbourhood(ask, model, now, self.parameters(model))
        if strength > 0:
            there = near.at(along(near.here, self.distance))
            scale = strength * (norm(near.here) + TINY) / self.distance
            near.leave([g + scale * (t - g) for g, t in zip(near.here, there, strict=True)])
        return near.value
