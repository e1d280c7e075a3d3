"""Penalties of how much the output changes: under small changes of the input, and from step to step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.batch import IGNORE, are_probabilities
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, NonNegative, Positive, ScheduledNonNegative, ScheduledProbability
from plait.layers import hooked, layers
from plait.method import Method, Now, method
from plait.passes import call_again, swapped
from plait.penalty.base import Penalty
from plait.schedule import Switch


def symmetric_kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(p|q) + KL(q|p) of the softmaxes of logits [..., classes] -> [...].

    >>> symmetric_kl(torch.zeros(2), torch.tensor([1.0, 1.0]))
    tensor(0.)
    """
    log_p, log_q = F.log_softmax(one.float(), -1), F.log_softmax(other.float(), -1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def divergence(one: Tensor, other: Tensor, target: Tensor) -> Tensor:
    """Return each example's divergence [n] of two outputs: symmetric KL for classes, squared error for real targets."""
    if target.is_floating_point() and not are_probabilities(target):
        return (one - other).float().square().flatten(1).sum(1) if one.dim() > 1 else (one - other).float().square()
    each = symmetric_kl(one, other)
    if each.dim() == 1:
        return each
    counts = (target != IGNORE).to(each.dtype) if target.shape == each.shape else torch.ones_like(each)
    return (each * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp_min(1)


class Noise:
    """Additive noise on some tensors of a forward pass, in the order in which they come: made at the first pass."""

    def __init__(self, size: float) -> None:
        self.size, self.tensors, self.seen = size, [], 0  # type: tuple[float, list[Tensor], int]

    def add(self, clean: Tensor) -> Tensor:
        """Return clean + noise; noise ~ size * N(0, 1) the first time."""
        if self.seen == len(self.tensors):
            self.tensors.append((self.size * torch.randn_like(clean.detach())).requires_grad_())
        self.seen += 1
        return clean + self.tensors[self.seen - 1]

    def ascend(self, gradients: tuple[Tensor, ...], step: float, radius: float) -> None:
        """Go up the gradient, scaled to a largest entry of `step` in each example, and back into the ball."""
        for i, gradient in enumerate(gradients):
            largest = gradient.abs().flatten(1).amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
            direction = gradient / largest.view(-1, *[1] * (gradient.dim() - 1))
            moved = (self.tensors[i].detach() + step * direction).clamp(-radius, radius)
            self.tensors[i] = moved.requires_grad_()


def perturbed_layers(model: nn.Module, where: str, inputs: Any) -> list[nn.Module] | None:
    """Return the layers whose output is perturbed, or None where it is the inputs themselves."""
    if where != ".*":
        return [layer for _, layer in layers(model, where, nn.Module)]
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return None
    find = getattr(model, "get_input_embeddings", None)
    table = find() if find is not None else next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise BadInput("SMART perturbs real inputs or embeddings, and found neither: name a layer in where.")
    return [table]


@contextlib.contextmanager
def noisy(targets: list[nn.Module], noise: Noise) -> Iterator[None]:
    """Add the noise to the outputs of layers during forward passes."""
    with hooked(t.register_forward_hook(lambda _, __, output: noise.add(output)) for t in targets):
        yield


@paper("jiang2020smart", key="smart")
@method
class SMART(Penalty):
    """strength * mean_i max_{|x' - x_i|_inf <= radius} l(f(x'), f(x_i))  +  proximal * mean_i l(f(x_i), f~(x_i)).

    l: symmetric KL of class probabilities, squared error for real targets. x: the inputs if they are a real tensor,
    else the output of the model's input embedding, or of the layers that `where` names. The maximum is sought by
    `ascents` steps x' <- project(x' + step * g / |g|_inf) per example, from x + noise * N(0, 1). The second term is the
    Bregman proximal point: f~ has weights theta~ <- decay * theta~ + (1 - decay) * theta, kept in memory, a copy
    of what is trained. Further forward passes: 1 + ascents, and 1 without gradient for f~; 1 backward for each ascent.

    The authors' code scales the ascended noise itself to a largest entry of 1 in each token and never projects it; here
    the published projection holds. Dropout is drawn anew in each pass; running statistics stay as they are.

    strength, proximal: 1 in the paper, at least 0. radius, noise: 1e-5 there, for embeddings. step: 1e-3 there.
    decay: in [0, 1), 0.99 for the first tenth of the run, 0.999 after. Raises BadInput where inputs are not real and
    there are no embeddings, for a `where` that names no layer that the model runs, and for an output that is not one
    tensor; in a run where strength and proximal are 0.

    >>> symmetric_kl(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])) > 0
    tensor(True)
    """

    idle: ClassVar[dict[str, float]] = {}  # strength 0 leaves the proximal part

    strength: ScheduledNonNegative = 1.0
    proximal: NonNegative = 1.0
    radius: Positive = 1e-5
    noise: Positive = 1e-5
    step: Positive = 1e-3
    ascents: Count = 1
    decay: ScheduledProbability = Switch(first=0.99, then=0.999, at_progress=0.1)

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return the sum of both terms, means over the batch; real `now.output` is the clean output."""
        if not isinstance(now.output, Tensor):
            raise BadInput("SMART needs a model whose output is one tensor: give plait.train a call that returns it.")
        strength, total = now.at(self.strength), torch.zeros((), device=now.output.device)
        if strength:
            total = total + strength * self.smoothness(model, now)
        if self.proximal:
            total = total + self.proximal * self.bregman(model, now)
        return total if strength or self.proximal else 0.0

    def smoothness(self, model: nn.Module, now: Now) -> Tensor:
        """Return mean_i l(f(x'_i), f(x_i)) at the neighbours x' that the ascent found."""
        clean, target, noise = now.output, now.batch.target, Noise(self.noise)
        run = self.perturbed(model, now, noise)
        for _ in range(self.ascents):
            value = divergence(run(), clean.detach(), target).sum()
            if not noise.tensors:
                raise BadInput(f"SMART(where={self.where!r}) perturbs nothing that the model runs: name another layer.")
            gradients = torch.autograd.grad(value, noise.tensors)
            noise.ascend(gradients, self.step, self.radius)
        for tensor in noise.tensors:
            tensor.requires_grad_(False)
        return divergence(run(), clean, target).mean()

    def perturbed(self, model: nn.Module, now: Now, noise: Noise) -> Callable[[], Tensor]:
        """Return a function that runs the model with the noise."""
        inputs = now.batch.inputs
        targets = perturbed_layers(model, self.where, inputs)

        def run() -> Tensor:
            noise.seen = 0
            if targets is None:
                perturbed: Tensor = call_again(model, noise.add(inputs), now)
                return perturbed
            with noisy(targets, noise):
                output: Tensor = call_again(model, inputs, now)
            return output

        return run

    def bregman(self, model: nn.Module, now: Now) -> Tensor:
        """Return mean_i l(f(x_i), f~(x_i)) with f~ at the averaged weights, which move once a step."""
        memory = now.of(self)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fresh = int(memory.get("step", torch.tensor(-1)))
        with torch.no_grad():
            for name, p in trained.items():
                if name not in memory:
                    memory[name] = p.detach().clone()
                elif fresh != now.step:
                    memory[name].lerp_(p.detach(), 1 - now.at(self.decay))
            memory["step"] = torch.tensor(now.step)
            with swapped(model, {name: memory[name] for name in trained}):
                averaged = call_again(model, now.batch.inputs, now)
        return divergence(now.output, averaged, now.batch.target).mean()

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse layers to perturb that do not exist, and both parts at 0."""
        if self.strength == 0 and self.proximal == 0:
            raise BadInput("SMART does nothing while strength and proximal are 0: change one, or drop SMART.")
        if self.where != ".*" and not list(layers(model, self.where, nn.Module)):
            raise BadInput(f"SMART(where={self.where!r}) matches no layer: name one whose output is to be perturbed.")
