"""Training on fewer examples: those that a score, taken early in training, says are worth keeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional as F

from plait.batch import IGNORE, Batch, tree_map
from plait.catalogue import paper
from plait.data.base import Data, of_all_processes, sweep
from plait.errors import BadInput
from plait.fields import Probability, Range, Size
from plait.layers import evaluating
from plait.math.logits import dense, statistics, wide
from plait.method import Method, Now, method

Call = Callable[[nn.Module, Any], Any]
Kept = Annotated[float, AfterValidator(Range(0, 1, closed="(]"))]


def _counted_mean(values: Tensor, target: Tensor) -> Tensor:
    """Return the mean of values [n] or [n, tokens] over the targets of each example that count."""
    counts = (target != IGNORE).to(values.dtype)
    if values.dim() == 1:
        return values * counts
    mean: Tensor = (values * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp_min(1)
    return mean


def el2n(output: Any, target: Tensor) -> Tensor:
    """||softmax(output) - onehot(target)||_2 of each example [n]; for real targets ||output - target||_2.

    output [n, ..., classes], target [n, ...]; over tokens it is the mean of those that count.

    >>> el2n(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([0.7071])
    """
    logits = wide(dense(output))
    if target.is_floating_point():
        residual: Tensor = logits.reshape(target.shape) - target
        lengths: Tensor = residual.reshape(len(target), -1).norm(dim=1)
        return lengths
    error = F.softmax(logits, -1)
    error.scatter_add_(-1, target.clamp_min(0).unsqueeze(-1), -torch.ones_like(error[..., :1]))
    return _counted_mean(error.norm(dim=-1), target)


def _loss(output: Any, target: Tensor) -> Tensor:
    if target.is_floating_point():
        return (wide(dense(output)).reshape(target.shape) - target).square().sum()
    return _counted_mean(statistics(dense(output), target).cross_entropy, target).sum()


class _Called(nn.Module):
    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Any, target: Tensor) -> Tensor:
        return _loss(self.call(self.model, inputs), target)


def grand(model: nn.Module, batch: Batch, call: Call) -> Tensor:
    """||gradient of loss(x_i) in all trained parameters||_2 of each example [n], exact, from one gradient an example.

    loss is the cross entropy (over tokens, the mean of those that count), or the squared error for real targets.
    Sixteen examples are differentiated at a time where torch.func can see through the model, one where it cannot.
    """
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    called = _Called(model, call)

    def loss(parameters: dict[str, Tensor], inputs: Any, target: Tensor) -> Tensor:
        one = tree_map(lambda t: t.unsqueeze(0), inputs)
        made: Tensor = torch.func.functional_call(called, parameters, (one, target.unsqueeze(0)))
        return made

    def norm(parameters: dict[str, Tensor], inputs: Any, target: Tensor) -> Tensor:
        slopes = torch.func.grad(loss)(parameters, inputs, target)
        return torch.stack([s.float().square().sum() for s in slopes.values()]).sum().sqrt()

    detached = {name: p.detach() for name, p in trained.items()}
    try:
        many: Tensor = torch.func.vmap(norm, in_dims=(None, 0, 0), chunk_size=16)(detached, batch.inputs, batch.target)
        return many
    except RuntimeError:  # an operation of the model has no batching rule
        norms = []
        for row in range(len(batch)):
            one = batch.take(slice(row, row + 1))
            slopes = torch.autograd.grad(called(one.inputs, one.target), list(trained.values()), allow_unused=True)
            norms.append(torch.stack([s.float().square().sum() for s in slopes if s is not None]).sum().sqrt())
        return torch.stack(norms)


@paper("paul2021deep", key="el2n-grand")
@method
class DataDiet(Data):
    """keep {i : score_i among the highest}, score_i = ||softmax(z_i) - onehot_i|| (EL2N) or ||d loss_i / d w|| (GraNd).

    After `epoch` epochs the whole training set is scored at the weights of that moment, and from then on only the
    hardest `keep` of it is visited; ties go to the lower position. The paper averages the scores of ten runs; this
    takes one, of the run under way, so training goes on from it instead of starting anew. EL2N needs a few epochs;
    GraNd is the exact gradient in all trained parameters, and costs one gradient for each example.

    keep: in (0, 1], 1 is identity. skip_hardest: in [0, 1), a part with the highest scores to leave out too, for labels
    that are wrong. epoch: when to score, 0 before the first step; a run that ends before is refused. score: "el2n" or
    "grand". Raises BadInput for a run that ends before it scores, and where keep + skip_hardest is above 1.

    >>> now = Now(epoch=1)
    >>> diet = DataDiet(keep=0.5)
    >>> now.of(diet)["kept"] = diet.chosen(torch.tensor([0.1, 0.9, 0.5, 0.2]))
    >>> diet.examples(torch.tensor([3, 2, 1, 0]), now)
    tensor([2, 1])
    """

    idle: ClassVar[dict[str, float]] = {"keep": 1}
    keep: Kept = 0.7
    skip_hardest: Probability = 0.0
    epoch: Size = 1
    score: Literal["el2n", "grand"] = "el2n"

    def chosen(self, scores: Tensor) -> Tensor:
        """Return which examples are kept [n], from their scores [n]."""
        count = len(scores)
        hardest_first = torch.argsort(scores, descending=True, stable=True)
        first = round(self.skip_hardest * count)
        kept = torch.zeros(count, dtype=torch.bool)
        kept[hardest_first[first : first + round(self.keep * count)]] = True
        return kept

    def scores(self, now: Now, count: int) -> Tensor:
        """Return the score of each of `count` training examples at the model's present weights."""
        found = torch.full((count,), -torch.inf)
        with evaluating(now.model):
            for batch in sweep(now):
                if self.score == "grand":
                    scored = grand(now.model, batch, now.call)
                else:
                    with torch.no_grad():
                        scored = el2n(now.call(now.model, batch.inputs), batch.target)
                found[batch.index.cpu()] = scored.float().cpu()
        return of_all_processes(found)

    def examples(self, order: Tensor, now: Now) -> Tensor:
        """Leave out what was not kept; score the set when it is time."""
        if now.steps_per_epoch and now.steps <= self.epoch * now.steps_per_epoch:
            raise BadInput(
                f"DataDiet scores after {self.epoch * now.steps_per_epoch} steps (epoch={self.epoch}), which a run of "
                f"{now.steps} steps does not reach: train for more steps, or lower its epoch."
            )
        if now.epoch < self.epoch or self.keep == 1:
            return order
        memory = now.of(self)
        if "kept" not in memory:
            memory["kept"] = self.chosen(self.scores(now, int(order.max()) + 1))
        return order[memory["kept"][order]]

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse to leave out more than there is."""
        if self.keep + self.skip_hardest > 1:
            raise BadInput(
                f"DataDiet's keep, skip_hardest are {self.keep} and {self.skip_hardest}: their sum must be at most 1."
            )
