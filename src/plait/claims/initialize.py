"""Claims of the starts: a network learns digits in full, then transposed ones through adapters, in few steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.method import Method

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The learning rates of which each side of a comparison gets its best."""


def digits(held_out: bool, turned: bool = False, classes: range = range(10)) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits of some classes, numbered from 0; every fourth is held out. Turned: transposed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    x = (x.transpose(1, 2) if turned else x).flatten(1)
    chosen = (y >= classes.start) & (y < classes.stop) & ((torch.arange(len(y)) % 4 == 0) == held_out)
    return x[chosen], y[chosen] - classes.start


@cache
def _pretrained(seed: int, classes: range) -> nn.Module:
    from plait import train
    from plait.step.adam import AdamW

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, len(classes)))
    train(model, digits(False, classes=classes), methods=[AdamW(lr=3e-3)], steps=200, seed=seed)
    return model


def pretrained(seed: int, classes: range = range(10)) -> nn.Module:
    """Return a network that knows upright digits of some classes."""
    return copy.deepcopy(_pretrained(seed, classes))


@dataclass(frozen=True)
class Task:
    """What the network knew, and what it adapts to."""

    before: range
    turned: bool
    after: range

    def adapted(self, seed: int, methods: Sequence[Method], rate: float, steps: int) -> nn.Module:
        """Return the network after some steps of AdamW on the new task."""
        from plait import train
        from plait.step.adam import AdamW

        model = pretrained(seed, self.before)
        data = digits(False, self.turned, self.after)
        train(model, data, methods=[*methods, AdamW(lr=rate)], steps=steps, seed=seed)
        return model

    def started(self, seed: int, methods: Sequence[Method]) -> nn.Module:
        """Return the network as its methods start it: after one step that is too short for float32."""
        model = self.adapted(seed, methods, 1e-30, steps=1)
        model.zero_grad()
        return model

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Return the mean cross entropy on the held-out part of the new task."""
        x, y = digits(True, self.turned, self.after)
        return float(F.cross_entropy(model.eval()(x), y))

    def best(self, seed: int, *methods: Method, steps: int = 40) -> float:
        """Return the held-out loss at the best of the learning rates."""
        return min(self.loss(self.adapted(seed, methods, rate, steps)) for rate in RATES)


TURNED = Task(range(10), True, range(10))
NEW_CLASSES = Task(range(5), False, range(5, 10))


def lora() -> Method:
    """Return the adapters that all starts are compared on."""
    from plait.parametrize.low_rank import LoRA

    return LoRA(rank=2, alpha=2.0)


@cache
def lora_alone(task: Task, seed: int) -> float:
    """Return the held-out loss of LoRA without a start, at the best of the learning rates."""
    return task.best(seed, lora())


@claim(
    "pissa",
    says="After 40 steps on transposed digits the held-out loss is lower than LoRA's, each at its best of 5 rates.",
    baseline="LoRA",
    figure="held-out cross entropy",
    better="lower",
    seeds=10,
    first_seed=100,
)
def converges_faster(seed: int) -> tuple[float, float]:
    """PiSSA against LoRA, rank 2."""
    from plait.initialize.weight_svd import PiSSA

    return TURNED.best(seed, lora(), PiSSA()), lora_alone(TURNED, seed)


@claim(
    "pissa",
    says="After 40 steps at one rate for both, 0.003, as the paper compares, the held-out loss is lower than LoRA's.",
    baseline="LoRA at the same rate",
    figure="held-out cross entropy",
    better="lower",
)
def converges_faster_at_the_same_rate(seed: int) -> tuple[float, float]:
    """PiSSA against LoRA, rank 2, transposed digits."""
    from plait.initialize.weight_svd import PiSSA

    ours, theirs = (TURNED.adapted(seed, methods, 3e-3, 40) for methods in ([lora(), PiSSA()], [lora()]))
    return TURNED.loss(ours), TURNED.loss(theirs)


@claim(
    "pissa",
    says="At the best of 5 rates each, the same on new classes: five digits that the network has never seen.",
    baseline="LoRA",
    figure="held-out cross entropy",
    better="lower",
    seeds=10,
    first_seed=100,
)
def converges_faster_on_new_classes(seed: int) -> tuple[float, float]:
    """PiSSA against LoRA, rank 2, the digits 5 to 9 after 0 to 4."""
    from plait.initialize.weight_svd import PiSSA

    return NEW_CLASSES.best(seed, lora(), PiSSA()), lora_alone(NEW_CLASSES, seed)


@claim(
    "eva",
    says="After 40 steps on transposed digits the held-out loss is lower than LoRA's, each at its best of 5 rates.",
    baseline="LoRA",
    figure="held-out cross entropy",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def adapts_better(seed: int) -> tuple[float, float]:
    """EVA against LoRA, rank 2 on average."""
    from plait.initialize.activation_svd import EVA

    return TURNED.best(seed, lora(), EVA()), lora_alone(TURNED, seed)


@claim(
    "eva",
    says="The gradient of B at the start is larger than with random directions of the same length.",
    baseline="LoRA with orthonormal random A",
    figure="norm of the gradient of all B",
    better="higher",
    seeds=24,
    first_seed=1000,
)
def first_gradient(seed: int) -> tuple[float, float]:
    """EVA's vectors against a random orthonormal A, rank 2 everywhere."""
    from plait.initialize.activation_svd import EVA
    from plait.parametrize.base import attached
    from plait.parametrize.low_rank import LowRank

    def norm(methods: list[Method]) -> float:
        model = TURNED.started(seed, methods)
        if len(methods) == 1:
            for _, _, adapter in attached(model, LowRank):
                nn.init.orthogonal_(adapter.A)
        x, y = digits(False, True)
        F.cross_entropy(model(x), y).backward()
        grads = [adapter.B.grad.flatten() for _, _, adapter in attached(model, LowRank) if adapter.B.grad is not None]
        return float(torch.cat(grads).norm())

    return norm([lora(), EVA(rho=1.0)]), norm([lora()])


def first_step_alignment(seed: int, start: list[Method]) -> float:
    """Return the cosine between the first small step's change of the weights and the full gradient on all data."""
    from plait.parametrize.base import attached, dense_weight
    from plait.parametrize.low_rank import LowRank

    x, y = digits(False, True)
    full = pretrained(seed)
    F.cross_entropy(full(x), y).backward()
    model = TURNED.started(seed, [lora(), *start])
    F.cross_entropy(model(x), y).backward()
    cosines = []
    for name, layer, adapter in attached(model, LowRank):
        before = dense_weight(layer).detach()
        with torch.no_grad():
            for factor in (adapter.A, adapter.B):
                if factor.grad is not None:
                    factor.sub_(1e-4 * factor.grad)
        gradient = full.get_submodule(name).weight.grad.flatten()  # type: ignore[union-attr, operator]
        change = (before - dense_weight(layer).detach()).flatten()
        cosines.append(float(F.cosine_similarity(change, gradient, dim=0)))
    return sum(cosines) / len(cosines)


@claim(
    "lora-ga",
    says="The first step changes the weights more nearly along the full gradient than LoRA's first step, by 0.2.",
    baseline="LoRA",
    figure="cosine with the full gradient, mean over layers",
    better="higher",
    margin=0.2,
)
def first_step(seed: int) -> tuple[float, float]:
    """LoRA-GA against LoRA, plain descent, rank 2."""
    from plait.initialize.gradient_svd import LoRAGA

    return first_step_alignment(seed, [LoRAGA(batches=8)]), first_step_alignment(seed, [])


@claim(
    "lora-ga",
    says="After 40 steps on transposed digits the held-out loss is lower than LoRA's, each at its best of 5 rates.",
    baseline="LoRA",
    figure="held-out cross entropy",
    better="lower",
    seeds=10,
)
def converges_like_full_training(seed: int) -> tuple[float, float]:
    """LoRA-GA against LoRA, rank 2."""
    from plait.initialize.gradient_svd import LoRAGA

    return TURNED.best(seed, lora(), LoRAGA()), lora_alone(TURNED, seed)


@claim(
    "lora-one",
    says="After 40 steps on transposed digits the held-out loss is lower than LoRA's, each at its best of 5 rates.",
    baseline="LoRA",
    figure="held-out cross entropy",
    better="lower",
    seeds=10,
    first_seed=100,
)
def one_step_helps(seed: int) -> tuple[float, float]:
    """LoRA-One against LoRA, rank 2."""
    from plait.initialize.gradient_svd import LoRAOne

    return TURNED.best(seed, lora(), LoRAOne()), lora_alone(TURNED, seed)


@claim(
    "lora-one",
    says="Before any step, the start alone has lowered the loss on the new task.",
    baseline="the pretrained network",
    figure="held-out cross entropy",
    better="lower",
)
def start_alone(seed: int) -> tuple[float, float]:
    """The start of LoRA-One, one step of the best gradient of rank 2, against the untouched network."""
    from plait.initialize.gradient_svd import LoRAOne

    started = TURNED.started(seed, [lora(), LoRAOne(gamma=16.0)])
    return TURNED.loss(started), TURNED.loss(pretrained(seed))


def recovery_error(seed: int, precondition: bool) -> float:
    """Return the relative error of an ill-conditioned change of rank 3, after 60 steps at the best of several rates."""
    from plait import train
    from plait.errors import NonFinite
    from plait.initialize.gradient_svd import LoRAOne
    from plait.parametrize.low_rank import LoRA
    from plait.step.momentum import SGD

    draw = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(16, 3, generator=draw)).Q for _ in range(2))
    change = u * torch.tensor([5.0, 1.0, 0.2]) @ v.T
    x = torch.randn(256, 16, generator=draw)
    errors = []
    for rate in (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5):
        torch.manual_seed(seed)
        layer = nn.Linear(16, 16, bias=False)
        model, target = nn.Sequential(layer), x @ (layer.weight.detach() + change).T
        start = LoRAOne(gamma=1.0, batches=1, precondition=precondition)
        methods = [LoRA(rank=3, alpha=3.0), start, SGD(lr=rate, momentum=0.0)]
        try:
            train(model, (x, target), methods=methods, steps=60, batch_size=256, seed=seed)
        except NonFinite:
            continue
        with torch.no_grad():
            errors.append(float((model(x) - target).norm() / (x @ change.T).norm()))
    return min(errors)


@claim(
    "lora-one",
    says="Its preconditioner recovers an ill-conditioned change of rank 3 better, with plain descent at best rates.",
    baseline="LoRA-One without its preconditioner",
    figure="relative error after 60 steps",
    better="lower",
    seeds=10,
    first_seed=200,
)
def preconditioner(seed: int) -> tuple[float, float]:
    """The change has singular values 5, 1 and 0.2."""
    return recovery_error(seed, True), recovery_error(seed, False)
