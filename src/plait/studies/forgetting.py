"""What fine-tuning learns of a new domain and forgets of the old one, with low-rank adapters and without."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.engine import Engine, as_data, default_loss
from plait.errors import BadInput
from plait.method import Method, Misfit, Now
from plait.parametrize.low_rank import LoRA
from plait.step.adam import AdamW
from plait.train import train


@dataclass(frozen=True)
class Outcome:
    """One fine-tuning run: which, at which learning rate, and the losses after it (infinite if it diverged)."""

    kind: str
    """"LoRA" or "full"."""
    learning_rate: float
    trained: int
    """The number of trained parameters."""
    target: float
    """Loss on the target domain's held-out examples: lower means that more was learned."""
    source: float
    """Loss on the source domain."""
    forgotten: float
    """By how much the source loss rose."""


@dataclass(frozen=True)
class LearningForgetting:
    """The trade-off: the losses before fine-tuning, and every run."""

    target_before: float
    source_before: float
    runs: tuple[Outcome, ...]

    def best(self, kind: str) -> Outcome:
        """Return the run of a kind ("LoRA", "full") that learned the target best, as one would pick a learning rate."""
        return min((run for run in self.runs if run.kind == kind), key=lambda run: run.target)

    @property
    def learns_less(self) -> bool:
        """Whether the best LoRA run learns less of the target than the best full one."""
        return self.best("LoRA").target > self.best("full").target

    @property
    def forgets_less(self) -> bool:
        """Whether the best LoRA run forgets less of the source than the best full one."""
        return self.best("LoRA").forgotten < self.best("full").forgotten

    def frontier(self, kind: str) -> list[Outcome]:
        """Return the runs of a kind that no other of that kind beats in both losses, from the least forgotten on."""
        front: list[Outcome] = []
        for run in sorted((r for r in self.runs if r.kind == kind), key=lambda r: (r.forgotten, r.target)):
            if not front or run.target < front[-1].target:
                front.append(run)
        return front

    def forgotten_at(self, kind: str, target: float) -> float:
        """Return what a kind forgets where it has learned the target to a loss: straight lines join its frontier.

        Infinite where it never learns as much; from the untouched model on, which has forgotten nothing.
        """
        target_now, forgotten_now = self.target_before, 0.0
        for run in self.frontier(kind):
            if run.target <= target:
                if run.target >= target_now:
                    return run.forgotten
                part = (target_now - target) / (target_now - run.target)
                return forgotten_now + max(part, 0.0) * (run.forgotten - forgotten_now)
            if run.target < target_now:
                target_now, forgotten_now = run.target, run.forgotten
        return math.inf


def _digits(seed: int) -> tuple[nn.Module, Any, Any, Any]:
    """Return a perceptron trained on digits, and as the target domain the same digits with their pixels permuted."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(seed)
    inputs, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order, pixels = torch.randperm(len(labels), generator=generator), torch.randperm(64, generator=generator)
    x, y = (inputs / 16).float()[order], labels[order].long()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    pretraining: list[Method] = [AdamW(lr=3e-3, weight_decay=0.0)]
    train(model, (x[:700], y[:700]), methods=pretraining, steps=300, seed=seed)
    permuted = x[:, pixels]
    return model, (permuted[700:1400], y[700:1400]), (permuted[1400:], y[1400:]), (x[1400:], y[1400:])


@paper("biderman2024lora", key="lora-forgets", kind="study", theme="study")
def lora_forgets(
    model: nn.Module | None = None,
    target: Any = None,
    target_test: Any = None,
    source_test: Any = None,
    *,
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    rank: int = 4,
    where: str = ".*",
    steps: int = 150,
    batch_size: int = 32,
    seed: int = 0,
    loss: Misfit | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> LearningForgetting:
    """Learned = loss_target after, forgotten = loss_source after - before, of W + (alpha / rank) B A with alpha =
    2 rank and of a free W, each fine-tuned on the target domain at every learning rate.

    The study of "LoRA Learns Less and Forgets Less": at its best learning rate LoRA reaches a worse target loss than
    full fine-tuning and a better source loss; whether it forgets less than full fine-tuning does where both have
    learned as much is a question of its own, which `forgotten_at` answers. What is found holds for the model, the
    domains, the rank and the rates given.

    Without arguments: a perceptron that was trained on scikit-learn's digits, fine-tuned on the same digits with
    permuted pixels (a few seconds). There LoRA learns less, but on average does not forget less: a perceptron that must
    unlearn its pixels is not the language model of the paper. model, target, target_test, source_test: a pretrained
    model, which is copied for each run and left as it was, and data as `plait.train` takes it. where: the layers that
    LoRA adapts; full fine-tuning trains all that is trainable. loss, call: as in `plait.train`. All runs see the same
    batches. A run that diverges counts with infinite losses. Raises BadInput if only some of model and data are given.

    >>> found = lora_forgets(learning_rates=[3e-3], steps=30)
    >>> [(run.kind, run.trained) for run in found.runs]
    [('LoRA', 1320), ('full', 8970)]
    >>> found.best("full").target < found.target_before
    True
    """
    given = (model, target, target_test, source_test)
    if any(part is None for part in given) and not all(part is None for part in given):
        raise BadInput("give model, target, target_test and source_test together, or none of them for the small study.")
    if not learning_rates or min(learning_rates) <= 0:
        raise BadInput(f"learning_rates must be one or more numbers greater than 0, not {learning_rates!r}.")
    if model is None:
        model, target, target_test, source_test = _digits(seed)
    tests = as_data(target_test, "target"), as_data(source_test, "source")

    def losses(candidate: nn.Module) -> tuple[float, float]:
        engine = Engine(seed=seed, call=call)
        engine.place(candidate)

        def on(data: Any) -> float:
            return engine.evaluate(candidate, data, loss or default_loss(data), Now(model=candidate), batch_size)

        return on(tests[0]), on(tests[1])

    target_before, source_before = losses(copy.deepcopy(model))
    runs = []
    for kind in ("LoRA", "full"):
        for rate in learning_rates:
            methods: list[Method] = [AdamW(lr=rate, weight_decay=0.0)]
            if kind == "LoRA":
                methods.insert(0, LoRA(rank=rank, alpha=2.0 * rank, where=where))
            tuned = _tuned(copy.deepcopy(model), target, loss, methods, steps, batch_size, seed, call)
            after = (math.inf, math.inf) if tuned is None else losses(tuned)
            after = after if all(map(math.isfinite, after)) else (math.inf, math.inf)
            trained = 0 if tuned is None else sum(p.numel() for p in tuned.parameters() if p.requires_grad)
            runs.append(Outcome(kind, rate, trained, after[0], after[1], after[1] - source_before))
    return LearningForgetting(target_before, source_before, tuple(runs))


def _tuned(
    model: nn.Module,
    data: Any,
    loss: Misfit | None,
    methods: list[Method],
    steps: int,
    batch_size: int,
    seed: int,
    call: Callable[[nn.Module, Any], Tensor] | None,
) -> nn.Module | None:
    """Return the model after training, None if it diverged."""
    from plait.errors import NonFinite

    torch.manual_seed(seed)
    try:
        return train(model, data, loss, methods, steps=steps, batch_size=batch_size, seed=seed, call=call).model
    except NonFinite:
        return None
