"""Second derivatives that are never formed: products of the Hessian and of the Gauss-Newton matrix with vectors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plait.batch import IGNORE
from plait.errors import BadInput

Operator = Callable[[Tensor], Tensor]
"""v [size] -> A v [size], for a symmetric matrix A."""

EXACT = 64
"""Up to so many outputs an example, the misfit's own Hessian in them is factored exactly."""


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors end to end, as one vector of at least float32."""
    return torch.cat([t.detach().reshape(-1).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `flat`: cut a vector into tensors of the shapes and types of `like`."""
    parts = torch.split(vector, [t.numel() for t in like])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True)]


@contextlib.contextmanager
def differentiable_twice() -> Iterator[None]:
    """Run attention and recurrent layers in the form whose gradient has a gradient; autograd is on."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def _pull(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor], **options: Any) -> Any:
    """Return sum_i vectors_i^T d outputs_i / d inputs; zeros where nothing depends on an input."""
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in inputs]
    reached, weights = zip(*pairs, strict=True)
    with warnings.catch_warnings():  # the graph of a graph is freed here, as soon as the operator is
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True", UserWarning)
        return torch.autograd.grad(reached, inputs, weights, materialize_grads=True, **options)


def gradient(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a loss as one vector; `.grad` is left alone."""
    with torch.enable_grad():
        value = loss()
        return flat(_pull([value], parameters, [torch.ones_like(value)]))


def _mean(parts: Sequence[Callable[[], Operator]]) -> Operator:
    """Return the mean of operators. One alone keeps its graph; of several, each builds it anew for each product."""
    held = parts[0]() if len(parts) == 1 else None

    def product(vector: Tensor) -> Tensor:
        if held is not None:
            return held(vector)
        return torch.stack([part()(vector) for part in parts]).mean(0)

    return product


def hessian(losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Tensor]) -> Operator:
    """Return v -> mean_b H_b v, for the Hessians H_b of scalar losses in the parameters.

    A product costs about as much as two gradients. One loss keeps the graph of its gradient until the operator is gone.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian([lambda: w[0] ** 2 * w[1]], [w])(torch.tensor([1.0, 0.0]))
    tensor([4., 2.])
    """

    def one(loss: Callable[[], Tensor]) -> Operator:
        with differentiable_twice():
            value = loss()
            slope = _pull([value], parameters, [torch.ones_like(value)], create_graph=True)

        def product(vector: Tensor) -> Tensor:
            with differentiable_twice():
                return flat(_pull(slope, parameters, unflat(vector, slope), retain_graph=True))

        return product

    return _mean([partial(one, loss) for loss in losses])


def gauss_newton(
    pairs: Sequence[tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]], parameters: Sequence[Tensor]
) -> Operator:
    """Return v -> mean_b J_b^T A_b J_b v: pairs (f, loss), J_b the Jacobian of f() in the parameters, A_b the Hessian
    of loss(f()) in f(). Positive semidefinite where the loss is convex in f; the Hessian where f is linear.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gauss_newton([(lambda: w[0] * w[1], lambda f: f**2)], [w])(torch.tensor([1.0, 0.0]))
    tensor([8., 4.])
    """

    def one(outputs: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]) -> Operator:
        with differentiable_twice():
            made = outputs()
            dummy = torch.zeros_like(made, requires_grad=True)  # J v is the gradient in u of v^T (J^T u)
            pulled = _pull([made], parameters, [dummy], create_graph=True)
            free = made.detach().requires_grad_()
            value = loss(free)
            (slope,) = _pull([value], [free], [torch.ones_like(value)], create_graph=True)

        def product(vector: Tensor) -> Tensor:
            with differentiable_twice():
                (pushed,) = _pull(pulled, [dummy], unflat(vector, pulled), retain_graph=True)
                (bent,) = _pull([slope], [free], [pushed], retain_graph=True)
                return flat(_pull([made], parameters, [bent], retain_graph=True))

        return product

    return _mean([partial(one, *pair) for pair in pairs])


def gauss_newton_factors(
    model: nn.Module, batch: Any, now: Any, parameters: Sequence[Tensor], draws: int = 8
) -> list[Tensor]:
    """Return, for each example i of a batch, K_i [k, size] with K_i^T K_i = J_i^T A_i J_i, its Gauss-Newton matrix.

    J_i is the Jacobian of the example's outputs, A_i >= 0 the Hessian of its mean misfit in them. Up to EXACT outputs
    the factor is exact; with more (a language model) it comes from `draws` labels drawn from the model's own softmax,
    with E[K_i^T K_i] what it should be. `now.batch` is each example in turn, and in the end what it was.
    """
    found, held = [], now.batch
    for row in range(len(batch)):
        one = now.batch = batch.take(slice(row, row + 1))
        with torch.enable_grad():
            output = now.call(model, one.inputs)
            output = output.dense() if hasattr(output, "dense") else output
            exact = output.numel() <= EXACT
            roots = _root(output.detach(), one, now) if exact else _drawn(output.detach(), one, now, draws)
            rows = [flat(_pull([output], parameters, [root], retain_graph=True)) for root in roots]
        found.append(torch.stack(rows) if rows else flat(parameters).new_zeros(1, sum(p.numel() for p in parameters)))
    now.batch = held
    return found


def _root(output: Tensor, one: Any, now: Any) -> list[Tensor]:
    """Return the columns b_k of A = sum_k b_k b_k^T, each of the output's shape."""

    def misfit(free: Tensor) -> Tensor:
        value: Tensor = now.misfit(free.view(output.shape), one.target, now).sum() / one.mass().clamp_min(1)
        return value

    free = output.to(torch.promote_types(output.dtype, torch.float32)).reshape(-1)
    with differentiable_twice():
        bent = torch.autograd.functional.hessian(misfit, free)
    values, vectors = torch.linalg.eigh(bent.double())
    kept = values > values.abs().max() * 1e-6
    return [
        (value.sqrt() * vector).view(output.shape).to(output.dtype)
        for value, vector in zip(values[kept], vectors.T[kept], strict=True)
    ]


def _drawn(output: Tensor, one: Any, now: Any, draws: int) -> list[Tensor]:
    """Return vectors r with E[sum r r^T] = A for cross entropy: softmax minus a drawn label, over sqrt(targets)."""
    if one.target.is_floating_point():
        raise BadInput(f"more than {EXACT} outputs an example are possible only for whole-number targets: use fewer.")
    share = output.float().softmax(-1).flatten(0, -2)
    counted = (one.target.flatten() != IGNORE).to(share)
    scale = (counted / (counted.sum().clamp_min(1) * draws)).sqrt().unsqueeze(-1)
    found = []
    for _ in range(draws):
        label = torch.multinomial(share.cpu(), 1, generator=now.generator).to(share.device)
        found.append((share.scatter_add(1, label, -torch.ones_like(share[:, :1])) * scale).view(output.shape))
    return [root.to(output.dtype) for root in found]
