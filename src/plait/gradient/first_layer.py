"""The first layer is trained as if its activations were, and not its weights: an image's contrast does not scale it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Positive
from plait.gradient.base import Gradient
from plait.layers import (
    CONVOLUTIONS,
    hooked,
    is_linear_map,
    is_transformers_conv1d,
    layers,
    matrix,
    own_weight,
    require_layers,
    unmatrix,
)
from plait.method import Ask, Method, Now, method
from plait.sharding import full, gather, like


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the vectors that a layer's matrix [out, in/groups * kernel] is applied to: [groups, rows, in/groups * k].

    Linear and transformers' Conv1D [..., in] have one row for each vector; a convolution one for each place of each
    image, whatever its stride, padding and dilation.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return inputs.reshape(1, -1, inputs.shape[-1])
    images = inputs if inputs.dim() > len(layer.kernel_size) + 1 else inputs[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    seen = F.pad(images, layer._reversed_padding_repeated_twice, mode)
    for axis, (size, dilation, stride) in enumerate(zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)):
        seen = seen.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    places = seen.movedim(1, 1 + len(layer.kernel_size)).flatten(0, len(layer.kernel_size))
    return places.reshape(len(places), layer.groups, -1).transpose(0, 1)


class Rows:
    """The rows that a layer saw in a step, or, once they are more than their width, their Gram matrix alone."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.gram: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take in rows [groups, rows, width], in float32 at least."""
        self.parts.append(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        self.count += rows.shape[1]
        if self.count >= rows.shape[2]:
            self.fold()

    def fold(self) -> None:
        """Turn the rows into their Gram matrix."""
        for rows in self.parts:
            gram = rows.mT @ rows
            self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.parts = []

    def share(self, device: torch.device) -> None:
        """Add up what all processes saw."""
        counts = gather(torch.tensor(self.count, device=device))
        if len(counts) > 1:
            self.fold()
            assert self.gram is not None
            self.gram, self.count = torch.stack(gather(self.gram)).sum(0), int(torch.stack(counts).sum())

    def whiten(self, gradient: Tensor, damping: float) -> Tensor:
        """Return gradient (X^T X / rows + damping I)^-1 for [groups, out, width], by the smaller of two systems."""
        if self.gram is not None:
            eye = torch.eye(self.gram.shape[-1], dtype=self.gram.dtype, device=self.gram.device)
            factor = torch.linalg.cholesky(self.gram / self.count + damping * eye)
            return torch.cholesky_solve(gradient.to(eye.dtype).mT, factor).mT
        X = torch.cat(self.parts, 1)
        gradient = gradient.to(X.dtype)
        eye = torch.eye(self.count, dtype=X.dtype, device=X.device)
        factor = torch.linalg.cholesky(X @ X.mT + self.count * damping * eye)
        return (gradient - torch.cholesky_solve(X @ gradient.mT, factor).mT @ X) / damping


@paper("petersen2024tract", key="tract")
@method
class TrAct(Gradient):
    """g <- g (X^T X / b + damping I)^-1,  for the gradient g = dL/dZ^T X [out, in] of the first layer, Z = X W^T.

    The weights that bring the activations of the b rows X [b, in] closest to Z - lr dL/dZ, a step of gradient descent
    on the activations themselves, with a penalty on how far the weights move. For a convolution the rows are the
    patches of all images (of a ViT: its patches), each group of channels by itself. Where b < in the same is computed
    with a system of b equations. One call; the bias keeps its gradient. Micro-batches and processes add up
    to exactly the whole batch's X^T X. A penalty's gradient is mapped along with the loss's.

    damping: greater than 0; the paper's lambda, 0.1 there for inputs that are standardized. where: the layers; unless
    given, the model's first linear or convolutional layer. Raises BadInput where that layer is not trained, or stands
    after an embedding, which is trained by its activations as it is.

    The authors' package inverts with torch.inverse, and agrees; its option cholesky_inverse takes the Gram matrix for
    its own Cholesky factor and is wrong.

    >>> from plait import train
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 8)
    >>> from plait.step.momentum import SGD
    >>> runs = [train(nn.Linear(8, 1), (x, x.sign().sum(1)), methods=[SGD(lr=0.1), *m]) for m in ([], [TrAct()])]
    >>> runs[1].history[-1]["objective"] < runs[0].history[-1]["objective"]
    True
    """

    damping: Positive = 0.1

    excludes: ClassVar[tuple[str, ...]] = ("EGN",)  # whose step is no gradient of activations

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return the layers: those that `where` names, or the first."""
        defined = (nn.Linear, *CONVOLUTIONS)
        if self.where != ".*":
            return require_layers(
                self, model, self.where, lambda m: isinstance(m, defined) or is_transformers_conv1d(m)
            )
        found = next(layers(model, ".*", is_linear_map), None)
        if found is None or isinstance(found[1], nn.Embedding):
            first = "no linear layer" if found is None else f"the embedding '{found[0]}', trained by its activations"
            raise BadInput(f"TrAct finds as the first layer {first}: name in where the layer that sees numbers.")
        return [found]

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a model without such a layer, and one whose first layer is frozen."""
        for name, layer in self.targets(model):
            if not layer.weight.requires_grad:
                raise BadInput(f"TrAct: the weight of '{name}' is frozen: unfreeze it, or name another layer in where.")

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle whose gradient of the first layer's weight moves activations."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            targets = self.targets(model)
            seen = [Rows() for _ in targets]

            def watch(rows: Rows) -> Any:
                def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
                    if torch.is_grad_enabled():
                        rows.add(patches(layer, (args[0] if args else next(iter(kwargs.values()))).detach()))

                return keep

            watched = zip(targets, seen, strict=True)
            with hooked(layer.register_forward_hook(watch(rows), with_kwargs=True) for (_, layer), rows in watched):
                value = ask(model, now)
            for (name, layer), rows in zip(targets, seen, strict=True):
                if layer.weight.grad is not None or not now.resting:
                    self.rewrite(name, layer, rows)
            return value

        return asked

    @torch.no_grad()
    def rewrite(self, name: str, layer: nn.Module, rows: Rows) -> None:
        """Replace the gradient of one layer's weight."""
        weight = own_weight(layer)
        if weight.grad is None or not rows.count:
            raise BadInput(
                f"TrAct saw no gradient of '{name}': train its own weight (adapters have another), uncompiled, or "
                "name another layer in where."
            )
        flat = matrix(layer, full(weight.grad))
        rows.share(flat.device)
        moved = rows.whiten(flat.reshape(getattr(layer, "groups", 1), -1, flat.shape[1]), self.damping)
        weight.grad = like(unmatrix(layer, moved.reshape(flat.shape), weight).to(weight.dtype).contiguous(), weight)
