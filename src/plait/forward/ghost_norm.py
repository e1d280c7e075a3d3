"""Normalization over parts of a batch, so that a large batch is as noisy to the network as small ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count
from plait.forward.base import Forward
from plait.layers import require_layers
from plait.method import Method, Now, method


def ghosts(inputs: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return a batch [n, ...] as ghost batches of at least `size` examples; a remainder is spread over them.

    >>> [len(part) for part in ghosts(torch.zeros(14, 2), 4)]
    [5, 5, 4]
    """
    return torch.tensor_split(inputs, max(len(inputs) // size, 1))


def ghost_forward(layer: _BatchNorm, size: int, active: Callable[[nn.Module], bool], inputs: Tensor) -> Tensor:
    """Return what a batch norm gives when each ghost batch passes it by itself, one after the other."""
    if not active(layer) or len(inputs) < 2 * size:
        output: Tensor = type(layer).forward(layer, inputs)
        return output
    layer._check_input_dim(inputs)
    if size == 1 and inputs.numel() == inputs.shape[0] * inputs.shape[1]:
        raise BadInput(
            "GhostBatchNorm(size=1) has a single value of each channel to normalize, for the inputs of "
            f"{type(layer).__name__}({layer.num_features}) have no further dimensions: use a size of at least 2."
        )
    tracks = layer.track_running_stats and layer.running_mean is not None
    mean, variance = (layer.running_mean, layer.running_var) if tracks else (None, None)
    parts = []
    for part in ghosts(inputs, size):
        momentum = layer.momentum
        if tracks and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            momentum = 1.0 / float(layer.num_batches_tracked) if momentum is None else momentum
        parts.append(F.batch_norm(part, mean, variance, layer.weight, layer.bias, True, momentum or 0.0, layer.eps))
    return torch.cat(parts)


@paper("hoffer2017train", key="ghost-bn", theme="gradient")
@method
class GhostBatchNorm(Forward):
    """y = gamma (x - mu_l) / sigma_l + beta, with mu_l and sigma_l of the ghost batch l of `size` examples around x;
    mu_run <- (1 - eta)^K mu_run + sum_{l=1}^K eta (1 - eta)^(K - l) mu_l, and sigma_run^2 alike, for K ghost batches.

    Batch norm, in training, over parts of the batch: a large batch gives activations as noisy as small batches do, and
    closes part of the gap in generalization. Each part updates the running statistics in turn, with the layer's own
    momentum eta, as in the authors' code, with weights that sum to 1 (the published line for mu_run, from memory, has
    the size of a ghost batch, not their number, for the power of its first term). At test time, and in later runs,
    the layer is what it was.

    A batch of n has n // size parts, as equal as can be: none is smaller than `size`, and a batch of less than
    2 size is one part. Micro-batches that are multiples of `size` give exactly the whole batch's outputs. On several
    processes each has parts of its own; SyncBatchNorm is not synchronized over them in training.

    size: 128 in the paper's experiments. where: the batch norms, of any number of dimensions. Raises BadInput where no
    batch norm matches, and for a size of 1 where inputs have no positions beside their channels.

    >>> model = nn.Sequential(nn.BatchNorm1d(1, affine=False))
    >>> GhostBatchNorm(size=2).forward(model, Now())
    >>> model(torch.tensor([[0.0], [2.0], [10.0], [30.0]])).round(decimals=3).flatten()
    tensor([-1.,  1., -1.,  1.])
    """

    size: Count = 32

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a model without batch norm."""
        require_layers(self, model, self.where, _BatchNorm)

    def forward(self, model: nn.Module, now: Now) -> None:
        """Let each batch norm take ghost batches."""

        def active(layer: nn.Module) -> bool:
            return self.active(layer, now)

        for _, layer in require_layers(self, model, self.where, _BatchNorm):
            # A partial of a plain function, with the layer in it, is copied along with the model.
            layer.forward = partial(ghost_forward, layer, self.size, active)  # type: ignore[arg-type]
