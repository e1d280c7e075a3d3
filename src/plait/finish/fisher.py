"""Fisher merging: each weight is averaged with the certainty that each model's data gave it."""

from __future__ import annotations

import torch
from torch import nn

from plait.batch import IGNORE, Batch
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, NonNegative
from plait.finish.base import matching, weighted
from plait.method import Method, Now, method
from plait.tensors import State, files_of, read_state


def fisher_diagonal(model: nn.Module, batches: list[Batch], now: Now | None = None) -> State:
    """F_j = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta_j)^2, over the classes exactly, example by example.

    Returns a tensor of each trained or frozen parameter's shape, by name; buffers get none. The model is put in
    evaluation mode for it. For token outputs [n, tokens, classes] one label is drawn a token from `now.generator`.

    >>> layer = nn.Linear(1, 2, bias=False)
    >>> F = fisher_diagonal(layer, [Batch.of(torch.ones(4, 1), torch.zeros(4, dtype=torch.long))])
    >>> F["weight"].shape
    torch.Size([2, 1])
    """
    now = now or Now()
    training, needed = model.training, {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval().requires_grad_(True)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    count = 0
    try:
        for batch in batches:
            for row in range(len(batch)):
                one = batch.take(slice(row, row + 1))
                _add_example(model, one, totals, now)
                count += 1
    finally:
        model.train(training)
        for name, p in model.named_parameters():
            p.requires_grad_(needed[name])
    if not count:
        raise BadInput("the Fisher information needs at least one example.")
    return {name: total / count for name, total in totals.items()}


def _add_example(model: nn.Module, one: Batch, totals: State, now: Now) -> None:
    parameters = dict(model.named_parameters())
    logs = now.call(model, one.inputs).float().log_softmax(-1)
    if logs.dim() == 2:
        terms = [(float(logs[0, c].detach().exp()), logs[0, c]) for c in range(logs.shape[-1])]
    else:
        drawn = torch.multinomial(logs[0].detach().exp(), 1, generator=now.generator)
        counted = (one.target[0] != IGNORE).unsqueeze(-1)
        terms = [(1.0, (logs[0].gather(-1, drawn) * counted).sum())]
    for probability, term in terms:
        gradients = torch.autograd.grad(term, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(parameters.items(), gradients, strict=True):
            if gradient is not None:
                totals[name] += probability * gradient.float().square()


def fisher_merge(states: list[State], fishers: list[State], shares: list[float] | None = None) -> State:
    """theta_j = sum_i share_i F_ij theta_ij / sum_i share_i F_ij; a weight no model is certain of is averaged plainly.

    >>> a, b = {"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}
    >>> fisher_merge([a, b], [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 0.0])}])["w"]
    tensor([0.7500, 0.5000])
    """
    shares = shares or [1.0] * len(states)
    certain: list[State] = []
    for fisher, share in zip(fishers, shares, strict=True):
        certain.append({name: share * fisher[name].float() for name in fisher})
    for name, first in states[0].items():
        for fisher, share in zip(certain, shares, strict=True):
            fisher.setdefault(name, torch.full_like(first, share, dtype=torch.float32))
        nobody = torch.stack([fisher[name] for fisher in certain]).sum(0) == 0
        for fisher, share in zip(certain, shares, strict=True):
            fisher[name] = torch.where(nobody, torch.full_like(fisher[name], share), fisher[name])
    return weighted(states, certain)


@paper("matena2022fisher", key="fisher-merge")
@method
class FisherMerge(Method):
    """theta_j = sum_i share_i F_ij theta_ij / sum_i share_i F_ij, F_i the diagonal Fisher information of model i.

    This run's model is merged with those of `members` (safetensors files, or folders of models or runs, of the same
    architecture; of a run the newest checkpoint is taken). Its own Fisher information comes from `batches` batches of
    the training data. A member's is read from `fishers`, files that `write_tensors(path, fisher_diagonal(model,
    batches))` wrote on the member's own data; without them it is taken on this run's data too. share: the weight of
    each member, 1 for this run's model.

    Raises BadInput if there are no members, as many fishers as members are not given, one of either is not there, or an
    architecture differs.

    >>> FisherMerge(members=("runs/a",), share=0.5)
    FisherMerge(members=('runs/a',), share=0.5)
    """

    members: tuple[str, ...] = ()
    fishers: tuple[str, ...] = ()
    share: NonNegative = 1.0
    batches: Count = 4

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a merge with nothing, and files that are not there."""
        if not self.members:
            raise BadInput("FisherMerge has no members: name the other models' files in members.")
        if self.fishers and len(self.fishers) != len(self.members):
            raise BadInput(
                f"FisherMerge has {len(self.members)} members and {len(self.fishers)} fishers: give one file for each "
                "member, or none."
            )
        for path in self.members + self.fishers:
            files_of(path)

    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Return the model with the merged weights."""
        batches = list(now.calibration(self.batches))
        states: list[State] = [{name: t.detach().clone() for name, t in model.state_dict().items()}]
        fishers = [fisher_diagonal(model, batches, now)]
        for number, path in enumerate(self.members):
            state = matching(model, read_state(path), path)
            states.append(state)
            if self.fishers:
                fishers.append(read_state(self.fishers[number]))
            else:
                model.load_state_dict(state)
                fishers.append(fisher_diagonal(model, batches, now))
        model.load_state_dict(fisher_merge(states, fishers, [1.0] + [self.share] * len(self.members)))
        return model
