"""The gradient of every example alone, and the Jacobian of its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from plait.batch import tree_map
from plait.math.logits import dense
from plait.math.svd import wide


def per_example_gradients(
    model: nn.Module, batch: Any, now: Any, parameters: Sequence[nn.Parameter] | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield, for each example of a batch, the gradient of its mean misfit with respect to each trained parameter, or to
    each of `parameters`.

    One backward pass an example: it works for every model and adapter, and costs what that many small passes cost.
    Weights of examples do not count. Parameters that the misfit does not reach get zeros. `.grad` is left alone;
    `now.batch` is each example in turn, and in the end what it was.
    """
    parameters = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    held, share, now.share = now.batch, now.share, 1.0
    for row in range(len(batch)):
        one = now.batch = replace(batch.take(slice(row, row + 1)), weight=torch.ones_like(batch.weight[:1]))
        misfit = now.misfit(now.call(model, one.inputs), one.target, now).sum() / one.mass().clamp_min(1)
        found = torch.autograd.grad(misfit, parameters, allow_unused=True)
        yield tuple(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
    now.batch, now.share = held, share


class _Called(nn.Module):
    """A model, called as the task calls it."""

    def __init__(self, model: nn.Module, now: Any) -> None:
        super().__init__()
        self.model, self.now = model, now

    def forward(self, inputs: Any) -> Tensor:
        output: Tensor = dense(self.now.call(self.model, inputs))
        return output


def per_example_jacobians(
    model: nn.Module, parameters: dict[str, nn.Parameter], batch: Any, now: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the derivatives of each example's outputs with respect to each parameter, and the outputs [n, ...].

    A derivative is [n c, size of the parameter], c the outputs of an example; a parameter may have several names in the
    model. One forward pass, and c backward passes, over all examples at once, where torch.func can follow the model
    (it cannot where values decide what is run, as in transformers' masks); else as many for each example. Each example
    is alone in the model, so nothing in it may mix them, and has its own dropout. `.grad` is left alone.

    >>> from types import SimpleNamespace
    >>> from plait.batch import Batch
    >>> batch = Batch.of(torch.eye(2), torch.zeros(2))
    >>> layer, now = nn.Linear(2, 1), SimpleNamespace(call=lambda model, inputs: model(inputs))
    >>> found, outputs = per_example_jacobians(layer, dict(layer.named_parameters()), batch, now)
    >>> found["weight"], outputs.shape
    (tensor([[1., 0.],
            [0., 1.]]), torch.Size([2, 1]))
    """
    called = _Called(model, now)

    def outputs(values: dict[str, Tensor], one: Any) -> tuple[Tensor, Tensor]:
        alone = tree_map(lambda t: t.unsqueeze(0), one)
        output = functional_call(called, {f"model.{name}": value for name, value in values.items()}, (alone,))[0]
        return output.flatten(), output

    values = {name: p.detach() for name, p in parameters.items()}
    each = vmap(jacrev(outputs, has_aux=True), in_dims=(None, 0), randomness="different")
    try:
        jacobians, seen = each(values, batch.inputs)
    except RuntimeError:  # what is wrong with the model itself is raised again below
        jacobians, seen = _one_by_one(called, parameters, batch)
    return {name: wide(j.reshape(seen.numel(), values[name].numel())) for name, j in jacobians.items()}, seen


@torch.enable_grad()
def _one_by_one(called: nn.Module, parameters: dict[str, nn.Parameter], batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    seen: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for row in range(len(batch)):
        output = called(batch.take(slice(row, row + 1)).inputs)[0]
        seen.append(output.detach())
        for one in output.flatten():
            found = torch.autograd.grad(one, list(parameters.values()), retain_graph=True, allow_unused=True)
            for (name, p), gradient in zip(parameters.items(), found, strict=True):
                rows[name].append(torch.zeros_like(p) if gradient is None else gradient)
    return {name: torch.stack(held) for name, held in rows.items()}, torch.stack(seen)
