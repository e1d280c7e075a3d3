"""Claims of the gradients that act on low-rank factors, and of gradient masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.claims.initialize import TURNED, digits, lora, lora_alone, pretrained
from plait.method import Ask, Method, Now, method


@claim(
    "lora-pro",
    says="After 10 steps the change that the gradients make in the weights is nearer to the full gradient, by 0.1.",
    baseline="LoRA",
    figure="cosine with the full gradient, mean over layers",
    better="higher",
    margin=0.1,
    seeds=24,
    first_seed=1000,
)
def nearer_to_the_full_gradient(seed: int) -> tuple[float, float]:
    """The same trained adapters, with adjusted and with plain gradients of their factors."""
    from plait.gradient.low_rank import closest
    from plait.parametrize.base import attached
    from plait.parametrize.low_rank import LowRank

    model = TURNED.adapted(seed, [lora()], 1e-2, steps=10)
    for _, layer, _ in attached(model, LowRank):
        layer.weight.requires_grad_(True)
    x, y = digits(False, True)
    F.cross_entropy(model(x), y).backward()
    ours: list[float] = []
    theirs: list[float] = []
    for _, layer, low in attached(model, LowRank):
        full: Tensor = layer.weight.grad.double().flatten()  # type: ignore[union-attr, operator]
        assert low.A.grad is not None
        assert low.B.grad is not None
        A, B, grad_A, grad_B = (t.detach().double() for t in (low.A, low.B, low.A.grad, low.B.grad))
        for cosines, (a, b) in ((ours, closest(A, B, grad_A, grad_B, low.scale)), (theirs, (grad_A, grad_B))):
            cosines.append(float(F.cosine_similarity((B @ a + b @ A).flatten(), full, dim=0)))
    return sum(ours) / len(ours), sum(theirs) / len(theirs)


def descended(seed: int, *methods: Method) -> float:
    """Return the held-out loss after 40 steps of plain descent with LoRA, at the best of 6 rates."""
    from plait import train
    from plait.errors import NonFinite
    from plait.step.momentum import SGD

    losses = []
    for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1):
        model = pretrained(seed)
        every = [lora(), *methods, SGD(lr=rate, momentum=0.0)]
        try:
            train(model, digits(False, True), methods=every, steps=40, seed=seed)
        except NonFinite:
            continue
        losses.append(TURNED.loss(model))
    return min(losses)


@claim(
    "lora-pro",
    says="Its form with Adam's moments ends at a lower held-out loss than LoRA under AdamW, each at its best rate.",
    baseline="LoRA under AdamW",
    figure="held-out cross entropy after 40 steps",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def trains_better_with_adam(seed: int) -> tuple[float, float]:
    """LoRA-Pro with adam=True against LoRA, rank 2, transposed digits."""
    from plait.gradient.low_rank import LoRAPro

    return descended(seed, LoRAPro(adam=True)), lora_alone(TURNED, seed)


@claim(
    "lora-pro",
    says="Under plain descent it ends at a lower held-out loss than LoRA, each at its best rate.",
    baseline="LoRA under the same step",
    figure="held-out cross entropy after 40 steps",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def trains_better_with_plain_descent(seed: int) -> tuple[float, float]:
    """LoRA-Pro against LoRA, rank 2, transposed digits."""
    from plait.gradient.low_rank import LoRAPro

    return descended(seed, LoRAPro()), descended(seed)


@method
class RandomMask(Method):
    """g_ij <- g_ij with probability `keep`, else 0, drawn anew at each step: the baseline of gradient masks."""

    keep: float = 0.5

    def gradient(self, ask: Ask) -> Ask:
        """Mask the gradients at random; one call."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            value = ask(model, now)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    kept = torch.rand(parameter.shape, generator=now.generator) < self.keep
                    parameter.grad.mul_(kept)
            return value

        return asked


def full_training(seed: int, *methods: Method) -> float:
    """Return the held-out loss on transposed digits after 30 steps of descent on all weights, at the best rate."""
    from plait import train
    from plait.errors import NonFinite
    from plait.step.momentum import SGD

    losses = []
    for rate in (0.01, 0.03, 0.1, 0.3, 1.0):
        model = pretrained(seed)
        try:
            train(model, digits(False, True), methods=[*methods, SGD(lr=rate, momentum=0.0)], steps=30, seed=seed)
        except NonFinite:
            continue
        losses.append(TURNED.loss(model))
    return min(losses)


@claim(
    "gmt",
    says="Updating the 20 % of entries with the largest gradients leaves a lower loss than a random 20 %.",
    baseline="a random mask of the same density",
    figure="held-out cross entropy",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def beats_a_random_mask(seed: int) -> tuple[float, float]:
    """Fine-tuning of all weights, plain descent, 30 steps, each at its best of 5 rates."""
    from plait.gradient.mask import GradientMaskTuning

    return full_training(seed, GradientMaskTuning(keep=0.2)), full_training(seed, RandomMask(keep=0.2))


@claim(
    "gmt",
    says="Updating the 60 % of entries with the largest gradients leaves a lower loss than updating all.",
    baseline="plain fine-tuning",
    figure="held-out cross entropy",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def beats_plain_training(seed: int) -> tuple[float, float]:
    """Fine-tuning of all weights, plain descent, 30 steps, each at its best of 5 rates."""
    from plait.gradient.mask import GradientMaskTuning

    return full_training(seed, GradientMaskTuning(keep=0.6)), full_training(seed)


@claim(
    "gmt",
    says="One step on the 20 % of entries with the largest gradients lowers the loss more than on a random 20 %.",
    baseline="a random mask of the same density, the same rate",
    figure="training cross entropy after one step of descent at rate 0.01",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def one_step(seed: int) -> tuple[float, float]:
    """A step on all transposed digits from the network that knows upright ones."""
    from plait import train
    from plait.gradient.mask import GradientMaskTuning
    from plait.step.momentum import SGD

    x, y = digits(False, True)

    def after(mask: Method) -> float:
        model = pretrained(seed)
        train(model, (x, y), methods=[mask, SGD(lr=0.01, momentum=0.0)], steps=1, batch_size=len(y), seed=seed)
        with torch.no_grad():
            return float(F.cross_entropy(model(x), y))

    return after(GradientMaskTuning(keep=0.2)), after(RandomMask(keep=0.2))
