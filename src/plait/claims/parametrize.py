"""Claims of the adapters: a small net is trained on one set of handwritten digits and fine-tuned on few of another."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from plait.claims.base import claim
from plait.method import Method
from plait.parametrize.base import dense_weight
from plait.parametrize.compander import WeightCompander
from plait.parametrize.low_rank import DoRA, LoRA
from plait.parametrize.mixout import Mixout
from plait.parametrize.singular import SORSA
from plait.step.adam import AdamW
from plait.train import train

Pair = tuple[Tensor, Tensor]


@functools.cache
def digits() -> Pair:
    """Return scikit-learn's 8 x 8 digits, standardized, in a fixed random order."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images).float()[order] / 8 - 1, torch.from_numpy(labels)[order]


def rotated(images: Tensor) -> Tensor:
    """Return the images turned by a quarter: the second domain."""
    return images.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)


def network(seed: int, width: int = 64) -> nn.Module:
    """Return a small network that was made with a seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


@functools.cache
def pretrained(seed: int) -> nn.Module:
    """Return a network trained on upright digits."""
    images, labels = digits()
    return fit(network(seed), (images[:1000], labels[:1000]), [], 300, 3e-3, seed)


def fit(model: nn.Module, data: Pair, methods: Sequence[Method], steps: int, rate: float, seed: int) -> nn.Module:
    """Return the model trained with AdamW."""
    rule = AdamW(lr=rate, weight_decay=0.0)
    return train(model, data, methods=[*methods, rule], steps=steps, batch_size=32, seed=seed).model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    """Return the part of examples that are classified rightly."""
    return float((model(data[0]).argmax(1) == data[1]).double().mean())


@torch.no_grad()
def misfit(model: nn.Module, data: Pair) -> float:
    """Return the mean cross entropy."""
    return float(nn.functional.cross_entropy(model(data[0]), data[1]))


def pick(candidates: Sequence[Callable[[], nn.Module]], selected_by: Pair) -> nn.Module:
    """Return the model that is best on other data than is shown: each side of a comparison is searched alike."""
    models = [make() for make in candidates]
    return min(models, key=lambda model: misfit(model, selected_by))


def accuracy_on_both(models: Sequence[nn.Module], task: Task) -> float:
    """Return the mean accuracy on turned and upright digits of the model that is best for both on other digits."""
    images, labels = digits()
    chosen, held = (images[1000:1300], labels[1000:1300]), (images[1300:], labels[1300:])
    best = min(models, key=lambda model: misfit(model, task.choose) + misfit(model, chosen))
    return (accuracy(best, task.test) + accuracy(best, held)) / 2


def tuned(
    seed: int, methods: Callable[[], Sequence[Method]], task: Task, rates: Sequence[float], freeze: str = ""
) -> nn.Module:
    """Return the pretrained network fine-tuned on a task, at the best of some learning rates."""

    def candidate(rate: float) -> nn.Module:
        model = copy.deepcopy(pretrained(seed))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (freeze and name.startswith(tuple(freeze))))
        return fit(model, task.train, methods(), task.steps, rate, seed)

    return pick([functools.partial(candidate, rate) for rate in rates], task.choose)


class Task:
    """Examples to train on, to choose a learning rate by, and to test on, of digits that pretraining did not see."""

    def __init__(self, change: Callable[[Tensor], Tensor], count: int, steps: int, seed: int) -> None:
        images, labels = digits()
        order = torch.randperm(797, generator=torch.Generator().manual_seed(seed)) + 1000
        x, y = change(images[order]), labels[order]
        self.train, self.choose, self.test = (x[:count], y[:count]), (x[400:500], y[400:500]), (x[500:], y[500:])
        self.steps, self.seed = steps, seed


def beside(
    task: Task,
    ours: Callable[[], Sequence[Method]],
    theirs: Callable[[], Sequence[Method]],
    rates: Sequence[float],
    judge: Callable[[nn.Module, Pair], float] = accuracy,
    on: Literal["test", "train"] = "test",
) -> tuple[float, float]:
    """Return the figures of two sets of methods, each at the best of the same learning rates."""
    one, other = (tuned(task.seed, methods, task, rates) for methods in (ours, theirs))
    return judge(one, getattr(task, on)), judge(other, getattr(task, on))


ADAPTER_RATES, FULL_RATES = (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3)


@claim(
    "lora",
    says="LoRA of rank 4 on two layers adapts a network to turned digits better than training its last layer does",
    baseline="training the last layer (650 numbers, LoRA trains 1024; at equal numbers, rank 2, the two tie)",
    figure="accuracy on held-out turned digits",
    better="higher",
)
def adapts_better_than_the_last_layer(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 300 turned digits."""
    task = Task(rotated, 300, 100, seed)
    ours = tuned(seed, lambda: [LoRA(rank=4, where="0|2")], task, ADAPTER_RATES)
    theirs = tuned(seed, list, task, ADAPTER_RATES, freeze="02")
    return accuracy(ours, task.test), accuracy(theirs, task.test)


@claim(
    "dora",
    says="DoRA of rank 2 adapts a network to turned digits better than LoRA of rank 2",
    baseline="LoRA of the same rank",
    figure="accuracy on held-out turned digits",
    better="higher",
    seeds=24,
    first_seed=1000,
)
def adapts_better_than_lora(seed: int) -> tuple[float, float]:
    """Compare at 60 steps on 300 turned digits."""
    return beside(Task(rotated, 300, 60, seed), lambda: DoRA(rank=2), lambda: [LoRA(rank=2)], ADAPTER_RATES)


@claim(
    "sorsa",
    says="after 20 steps on turned digits SORSA of rank 4 fits them better than LoRA of rank 4",
    baseline="LoRA of the same rank, its learning rate chosen from the same three",
    figure="cross entropy on the digits that are trained on",
    better="lower",
    seeds=12,
    first_seed=100,
)
def fits_sooner_than_lora(seed: int) -> tuple[float, float]:
    """Compare at 20 steps on 300 turned digits."""
    return beside(
        Task(rotated, 300, 20, seed),
        lambda: [SORSA(rank=4)],
        lambda: [LoRA(rank=4)],
        ADAPTER_RATES,
        judge=misfit,
        on="train",
    )


@claim(
    "mixout",
    says="fine-tuned on 40 noisy digits with mixout (p = 0.7), a network errs less on more of them",
    baseline="plain fine-tuning, its learning rate chosen from the same two",
    figure="cross entropy on held-out noisy digits",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def generalizes_from_few_examples(seed: int) -> tuple[float, float]:
    """Compare at 100 steps on 40 digits with Gaussian noise."""
    return beside(Task(noisy, 40, 100, seed), lambda: [Mixout(p=0.7)], list, FULL_RATES[1:], judge=misfit)


def noisy(images: Tensor) -> Tensor:
    """Return the images with Gaussian noise: a domain near to the first."""
    return images + 0.7 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


@claim(
    "weight-compander",
    says="trained from scratch on 200 digits with weight compander, a network's weights are more alike in size",
    baseline="the same network and training without it",
    figure="mean over layers of mean |W| / max |W|",
    better="higher",
    seeds=24,
    first_seed=1000,
)
def evens_out_the_weights(seed: int) -> tuple[float, float]:
    """Compare after 200 steps at one learning rate."""
    task = Task(lambda images: images, 200, 200, seed)

    def evenness(methods: Sequence[Method]) -> float:
        model = fit(network(seed), task.train, methods, task.steps, 1e-3, seed)
        weights = [dense_weight(layer).detach().abs() for layer in model.modules() if isinstance(layer, nn.Linear)]
        return sum(float(w.mean() / w.max()) for w in weights) / len(weights)

    return evenness([WeightCompander()]), evenness([])


@claim(
    "weight-compander",
    says="trained from scratch on 200 digits with weight compander, a network errs less on the others",
    baseline="the same network and training without it",
    figure="accuracy on held-out digits",
    better="higher",
    seeds=24,
    first_seed=1000,
)
def generalizes_better_from_scratch(seed: int) -> tuple[float, float]:
    """Compare at 200 steps; each side has the better of two learning rates."""
    task = Task(lambda images: images, 200, 200, seed)

    def side(methods: Callable[[], Sequence[Method]]) -> nn.Module:
        def candidate(rate: float) -> nn.Module:
            return fit(network(seed), task.train, methods(), task.steps, rate, seed)

        return pick([functools.partial(candidate, rate) for rate in FULL_RATES[1:]], task.choose)

    return accuracy(side(lambda: [WeightCompander()]), task.test), accuracy(side(list), task.test)
