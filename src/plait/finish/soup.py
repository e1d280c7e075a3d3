"""Model soups: the average of several fine-tuned models' weights costs no more to run than one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plait.batch import Batch, weighted_sum
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Positive
from plait.finish.base import matching, weighted
from plait.method import Method, Now, method
from plait.tensors import State, files_of, read_state


def uniform_soup(states: list[State]) -> State:
    """(1/k) sum_i theta_i.

    >>> uniform_soup([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
    {'w': tensor([2.])}
    """
    return weighted(states, [1.0] * len(states))


def greedy_soup(states: list[State], evaluate: Callable[[State], float]) -> tuple[State, list[int]]:
    """Add models from the best to the worst, keeping each whose average is not worse; `evaluate` gives a loss.

    Returns the soup and the positions of what is in it. Never worse than the best member on what `evaluate` measures.

    >>> states = [{"w": torch.tensor([v])} for v in (0.0, 1.0, 5.0)]
    >>> greedy_soup(states, lambda s: abs(float(s["w"]) - 0.5))[1]
    [0, 1]
    """
    losses = [evaluate(state) for state in states]
    order = sorted(range(len(states)), key=lambda i: losses[i])
    chosen, best, soup = [order[0]], losses[order[0]], states[order[0]]
    for i in order[1:]:
        candidate = uniform_soup([states[j] for j in [*chosen, i]])
        loss = evaluate(candidate)
        if loss <= best:
            chosen, best, soup = [*chosen, i], loss, candidate
    return soup, sorted(chosen)


def learned_soup(
    states: list[State], misfit: Callable[[State], Tensor], steps: int = 50, lr: float = 0.1
) -> tuple[State, Tensor]:
    """theta = sum_i alpha_i theta_i with alpha = softmax(a), a trained by AdamW on a differentiable misfit.

    Returns the soup and alpha [k]. The published version adds a temperature of the logits, which does not change which
    class is largest and is left to calibration.
    """
    mixing = torch.zeros(len(states), requires_grad=True)
    rule = torch.optim.AdamW([mixing], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        rule.zero_grad()
        shares = mixing.softmax(0)
        misfit(weighted(states, list(shares))).backward()
        rule.step()
    alpha = mixing.detach().softmax(0)
    return weighted(states, [float(a) for a in alpha]), alpha


@paper("wortsman2022soups", key="model-soups")
@method
class ModelSoup(Method):
    """theta = sum over the soup of theta_i / k: this run's model and those of `members`, averaged.

    kind: "uniform" takes all; "greedy" adds from the best to the worst while the validation loss does not rise;
    "learned" trains the shares on the validation loss, `steps` steps at `lr`. members: safetensors files, or folders of
    models or runs (whose newest checkpoint is taken), of the same architecture, usually fine-tuned from the same
    pretrained model with other hyperparameters.

    Raises BadInput if there are no members, if one is not there, or has another architecture.

    >>> ModelSoup(members=("runs/a", "runs/b"))
    ModelSoup(members=('runs/a', 'runs/b'))
    """

    kind: Literal["uniform", "greedy", "learned"] = "greedy"
    members: tuple[str, ...] = ()
    steps: Count = 50
    lr: Positive = 0.1

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a soup of one, and members that are not there."""
        if not self.members:
            raise BadInput("ModelSoup has no members: name the other models' files in members.")
        for path in self.members:
            files_of(path)

    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Return the model with the soup's weights."""
        own = {name: t.detach().clone() for name, t in model.state_dict().items()}
        states = [own, *(matching(model, read_state(path), path) for path in self.members)]
        if self.kind == "uniform":
            soup = uniform_soup(states)
        elif self.kind == "greedy":
            soup, _ = greedy_soup(states, lambda state: now.evaluate(_with(model, state)))
        else:
            batches = list(now.calibration(4))
            soup, _ = learned_soup(states, lambda state: _misfit(model, state, batches, now), self.steps, self.lr)
        return _with(model, soup)


def _with(model: nn.Module, state: State) -> nn.Module:
    model.load_state_dict(state)
    return model


def _misfit(model: nn.Module, state: State, batches: list[Batch], now: Now) -> Tensor:
    model.eval()
    called = _Called(model, state)
    losses = [weighted_sum(now.misfit(now.call(called, b.inputs), b.target, now), b.weight) / b.mass() for b in batches]
    return torch.stack(losses).mean()


class _Called(nn.Module):
    """A model that is called with other weights, through which gradients flow."""

    def __init__(self, model: nn.Module, state: State) -> None:
        super().__init__()
        self.held = (model, state)

    def forward(self, *inputs: object, **named: object) -> object:
        """Call the model with those weights."""
        model, state = self.held
        return functional_call(model, state, inputs, named)
