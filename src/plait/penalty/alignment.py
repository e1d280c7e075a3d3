"""Penalties that split an update by what the present behaviour depends on, and hold the two parts differently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.batch import IGNORE, Batch
from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, Fraction, NonNegative, ScheduledNonNegative
from plait.layers import evaluating, hooked, layers, matrix, own_bias, own_weight, require_layers, weight_identity
from plait.math.logits import dense
from plait.method import Method, Now, method
from plait.parametrize.base import dense_weight, run, stack, untouched_weight
from plait.penalty.base import Penalty
from plait.sharding import averaged, full
from plait.tensors import read_tensors, write_tensors

Split = tuple[Tensor, Tensor]
"""The directions U [out, m] that behaviour depends on most, orthonormal, and the Fisher information [m] along them."""


def drawn_misfit(output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """Return - log p(y|x) summed over predictions that count, y drawn from the model's own p: the softmax of logits, or
    N(f, 1) for real targets. The mean of its squared gradient is the Fisher information.
    """
    rows = target.sum(-1) if target.is_floating_point() and target.dim() > 1 else None
    probabilities = rows is not None and torch.allclose(rows.float(), torch.ones_like(rows).float(), atol=1e-2)
    if target.is_floating_point() and not probabilities:
        noise = torch.randn(output.shape, generator=generator, device=generator.device).to(output)
        return (output.float() * noise).sum()
    log_p = output.float().log_softmax(-1).reshape(-1, output.shape[-1])
    labels = torch.multinomial(log_p.detach().exp().to(generator.device), 1, generator=generator).to(log_p.device)
    if not target.is_floating_point() and target.numel() == len(log_p):
        labels = torch.where(target.reshape(-1, 1) == IGNORE, -1, labels)
    chosen = log_p.gather(1, labels.clamp_min(0))
    return -(chosen * (labels >= 0)).sum()


def targets(model: nn.Module, where: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) of the layers whose weight training moves; one that several layers share comes once."""
    seen = set[tuple[int, ...]]()
    for name, layer in layers(model, where):
        use = (weight_identity(layer), *map(id, stack(layer)))
        moves = layer.weight.requires_grad or any(p.requires_grad for part in stack(layer) for p in part.parameters())
        if moves and use not in seen:
            seen.add(use)
            yield name, layer


@torch.enable_grad()
def weight_gradient(layer: nn.Module, inputs: Tensor, grad_output: Tensor) -> Tensor:
    """Return the gradient [out, in] in the weight that a layer uses, however it comes about, from that in its output.

    >>> weight_gradient(nn.Linear(2, 1), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
    tensor([[3., 6.]])
    """
    weight = own_weight(layer)
    bias = own_bias(layer)
    free = torch.zeros(weight.shape, device=weight.device, requires_grad=True)
    given = inputs.float() if inputs.is_floating_point() else inputs
    output = run(layer, given, free, None if bias is None else torch.zeros_like(bias, dtype=torch.float32))
    (found,) = torch.autograd.grad(output, free, grad_output.float())
    return matrix(layer, found.to_dense() if found.is_sparse else found)


def output_fisher(
    model: nn.Module, batches: Sequence[Batch], now: Now, where: str = ".*", count: int = 64
) -> dict[str, Tensor]:
    """Return F_l = (1 / n) sum_i G_i G_i^T [out, out] by layer, G_i the gradient of - log p(y_i|x_i), y_i ~ p(.|x_i),
    in the weight [out, in] that the layer uses, over the first `count` examples. One backward pass an example; the
    model is in evaluation mode and nothing of it changes. Only layers that are called are in it.
    """
    chosen, sums = dict(targets(model, where)), dict[str, Tensor]()
    if not chosen:
        return sums
    seen: list[tuple[str, Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str) -> Tensor:
        added = torch.zeros_like(output, requires_grad=True)
        seen.append((name, inputs[0].detach(), added))
        return output + added

    hooks = (layer.register_forward_hook(partial(keep, name=name)) for name, layer in chosen.items())
    examples = [batch.take(slice(i, i + 1)) for batch in batches for i in range(len(batch))][:count]
    with hooked(hooks), evaluating(model), torch.enable_grad():
        for one in examples:
            seen.clear()
            misfit = drawn_misfit(dense(now.call(model, one.inputs)), one.target, now.generator)
            slopes = torch.autograd.grad(misfit, [added for _, _, added in seen], materialize_grads=True)
            whole: dict[str, Tensor] = {}
            for (name, inputs, _), slope in zip(seen, slopes, strict=True):
                gradient = weight_gradient(chosen[name], inputs, slope)
                whole[name] = whole[name] + gradient if name in whole else gradient
            for name, gradient in whole.items():
                square = gradient @ gradient.T
                sums[name] = sums[name] + square if name in sums else square
    return {name: total / len(examples) for name, total in sums.items()}


def leading(fisher: Tensor, top: int) -> Split:
    """Return the `top` eigenvectors of F [out, out] of the largest eigenvalues, and these; fewer where out is less.

    >>> leading(torch.diag(torch.tensor([1.0, 3.0])), 1)[1]
    tensor([3.])
    """
    values, vectors = torch.linalg.eigh(fisher.double())
    values, vectors = values.flip(0)[:top], vectors.flip(1)[:, :top]
    return vectors.float().contiguous(), values.clamp_min(0).float()


def record_alignment(
    model: nn.Module, data: Any, file: str | Path, *, where: str = ".*", count: int = 256, top: int = 64, now: Now
) -> None:
    """Write the directions that a model's behaviour on some data depends on, for AlignGuard(file=...).

    data: batches of the data whose treatment is to be kept, such as refusals of harmful requests; labels do not
    matter, they are drawn from the model. top: an upper bound of AlignGuard's. now: `Now()`, or one with a call.
    """
    tensors: dict[str, Tensor] = {}
    for name, fisher in output_fisher(model, list(data), now, where, count).items():
        tensors[f"directions/{name}"], tensors[f"values/{name}"] = leading(fisher, top)
    write_tensors(Path(file), tensors)


def parts(update: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return (D_A, D_T) = (U U^T D, D - U U^T D): what of the update behaviour depends on, and the rest."""
    critical = directions @ (directions.T @ update)
    return critical, update - critical


def overlap(critical: Tensor, rest: Tensor, weight: Tensor, steepness: float, threshold: float) -> Tensor:
    """Return sum_ij eta_ij |A_ij T_ij|, eta = 1 + steepness * sigmoid(|W_ij| - threshold), W the updated weight."""
    eta = 1 + steepness * torch.sigmoid(weight.detach().abs() - threshold)
    return (eta * (critical * rest).abs()).sum()


def row_overlap(critical: Tensor, rest: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """Return |A T^T|_F^2 / (|A|^2 |T|^2 + least^2), in [0, 1]: 0 where no row of A has anything of a row of T.

    >>> row_overlap(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 0.0)
    tensor(1.)
    """
    sizes = critical.square().sum() * rest.square().sum() + least**2
    return (critical @ rest.T).square().sum() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)


@paper("das2025alignguard", key="alignguard")
@method
class AlignGuard(Penalty):
    """strength * sum_k lambda_k |u_k^T D|^2 + task * |D_T|^2 + collision * (blend * E_RM + (1 - blend) * E_geo), summed
    over layers, with D = W - W_0 [out, in] the update of a layer, D_A = U U^T D and D_T = D - D_A, where u_k, lambda_k
    are the `top` eigenvectors and eigenvalues of the Fisher information F = E G G^T of the layer's outputs.

    E_RM = sum_ij (1 + steepness * sigmoid(|W_ij| - threshold)) |D_A,ij D_T,ij|: both parts should not move the same
    coordinates, least of all large weights. E_geo = |D_A D_T^T|^2 / (|D_A|^2 |D_T|^2): nor read the same inputs.

    F is measured before training at W_0, with labels drawn from the model, on `count` training examples, or on the
    data whose treatment is to be kept: `record_alignment` writes a file of it. Only the abstract of the paper could be
    read, and the repository of that name holds another method (silhouettes and null spaces): the two overlaps and the
    split are as they are remembered, but for E_geo, which is remembered as <D_A, D_T>^2 / (|D_A|^2 |D_T|^2), and that
    is 0 for every D, for D_A and D_T are orthogonal; here the rows are compared. It counts only once the parts have
    grown to a hundredth of the weight, below which its gradient would have no bound. The defaults are ours.

    Works on adapters (W is the weight that they make, W_0 the one before them) and on weights themselves, of which a
    copy is kept. strength, task, collision: at least 0. blend: in [0, 1]. Raises BadInput where nothing is trained, and
    for a file that names none of the layers.

    >>> from plait import LoRA, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 4), (x, (x[:, 0] > 0).long()), methods=[LoRA(rank=2), AlignGuard(top=2)], steps=3)
    >>> run.history[-1]["AlignGuard"] > 0
    True
    """

    strength: ScheduledNonNegative = 1.0
    task: ScheduledNonNegative = 0.01
    collision: ScheduledNonNegative = 0.01
    blend: Fraction = 0.5
    steepness: NonNegative = 1.0
    threshold: NonNegative = 0.5
    top: Count = 8
    count: Count = 64
    file: str = ""

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse targets that match nothing, and a file that is not there."""
        require_layers(self, model, self.where)
        if self.file and not Path(self.file).is_file():
            raise BadInput(f"there is no file {self.file}: plait.penalty.alignment.record_alignment writes it.")

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Find the directions of each layer, and remember the weights that are trained themselves."""
        held = now.of(self)
        held.clear()
        for name, layer in targets(model, self.where):
            if layer.weight.requires_grad:
                held[f"start/{name}"] = matrix(layer, dense_weight(layer).detach()).clone()
        for name, (directions, values) in self.directions(model, now).items():
            held[f"directions/{name}"], held[f"values/{name}"] = directions, values
        if not any(key.startswith("directions/") for key in held):
            what = f"{self.file} names none of the layers that are trained" if self.file else "nothing is trained"
            raise BadInput(f"AlignGuard(where={self.where!r}): {what}; change where, or drop it.")

    def directions(self, model: nn.Module, now: Now) -> dict[str, Split]:
        """Return the directions of each layer, from the file or from training examples."""
        if not self.file:
            count = min(self.count, now.examples or self.count)
            batches: list[Batch] = []
            for batch in now.calibration(count):
                batches.append(batch)
                if sum(map(len, batches)) >= count:
                    break
            found = output_fisher(model, batches, now, self.where, count)
            return {name: leading(averaged(fisher), self.top) for name, fisher in found.items()}
        read = read_tensors(Path(self.file))
        return {
            name: (self.fitting(read[f"directions/{name}"], name, layer), read[f"values/{name}"][: self.top])
            for name, layer in targets(model, self.where)
            if f"directions/{name}" in read
        }

    def fitting(self, directions: Tensor, name: str, layer: nn.Module) -> Tensor:
        """Return the first directions of a file, or refuse those of another model."""
        weight = own_weight(layer)
        out = len(matrix(layer, weight))
        if len(directions) != out:
            raise BadInput(f"'{name}' has {out} outputs, and {len(directions)} in {self.file}: it is of another model.")
        return directions[:, : self.top].to(weight.device)

    def update(self, name: str, layer: nn.Module, now: Now) -> tuple[Tensor, Tensor]:
        """Return (D, W): the update of a layer's weight and the weight [out, in] that it uses, in float32."""
        start = now.of(self).get(f"start/{name}")
        before = matrix(layer, untouched_weight(layer).detach()) if start is None else start
        weight = full(matrix(layer, dense_weight(layer)).float())
        return weight - full(before.float()), weight

    def value(self, update: Tensor, weight: Tensor, split: Split, strengths: tuple[float, float, float]) -> Tensor:
        """Return the penalty of one layer."""
        directions, values = split
        along = directions.T @ update
        critical, rest = parts(update, directions)
        total = strengths[0] * (values[:, None] * along.square()).sum() + strengths[1] * rest.square().sum()
        if strengths[2]:
            least = 1e-4 * (weight - update).detach().square().sum()
            shared = self.blend * overlap(critical, rest, weight, self.steepness, self.threshold)
            # |D_A D_T^T| = |U^T D D_T^T| for orthonormal U, whose product is smaller.
            total = total + strengths[2] * (shared + (1 - self.blend) * row_overlap(along, rest, least))
        return total

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return the sum over layers."""
        strengths = now.at(self.strength), now.at(self.task), now.at(self.collision)
        if not any(strengths):
            return 0.0
        held, total = now.of(self), torch.zeros(())
        if not held and now.ask is not None:
            return 0.0  # a start before this one asks for a gradient
        if not held:
            self.initialize(model, now)
        for name, layer in targets(model, self.where):
            if f"directions/{name}" in held:
                update, weight = self.update(name, layer, now)
                split = held[f"directions/{name}"], held[f"values/{name}"].to(update.device)
                total = total.to(update.device) + self.value(update, weight, split, strengths)
        return total
