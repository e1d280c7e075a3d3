"""Gradients of low-rank factors that act on the weight as its full gradient would."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import NonNegative, Positive, Probability
from plait.gradient.base import Gradient
from plait.layers import matches
from plait.method import Ask, Method, Now, method
from plait.parametrize.base import Adapter, attached, stack
from plait.parametrize.low_rank import LowRank
from plait.sharding import remembered


def eigen(gram: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (eigenvalues, eigenvectors, inverse) of a Gram matrix; the inverse of a zero direction is zero."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    floor = values.max() * len(values) * torch.finfo(values.dtype).eps if len(values) else 0.0
    inverse = torch.where(values > floor, 1 / (values + damping).clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    return values, vectors, (vectors * inverse) @ vectors.T


def closest(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scale: float, balanced: bool = True, damping: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the factors' gradients (g_A, g_B) whose effect scale * (B g_A + g_B A) on the weight is closest to its G.

    A [rank, in], B [out, rank] in float64; grad_A = scale * B^T G and grad_B = scale * G A^T, all that is known of G.
    Of all such pairs, `balanced` takes the one closest to (grad_A, grad_B); otherwise LoRAPro's X is 0.
    """
    left, P, left_inverse = eigen(B.T @ B, damping)
    right, Q, right_inverse = eigen(A @ A.T, damping)
    new_A = left_inverse @ grad_A / scale**2
    new_B = (grad_B - B @ (left_inverse @ (B.T @ grad_B))) @ right_inverse / scale**2
    if balanced:
        # B^T B X + X A A^T = -(B^T B)^-1 grad_A A^T / scale^2, in the eigenvectors of both sides
        rotated = -P.T @ new_A @ A.T @ Q
        total = left[:, None] + right[None, :]
        X = P @ torch.where(total > 0, rotated / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0) @ Q.T
        new_A, new_B = new_A + X @ A, new_B - B @ X
    return new_A, new_B


@paper("wang2025lorapro", key="lora-pro")
@method
class LoRAPro(Gradient):
    """g_A = (B^T B)^-1 grad A / s^2 + X A,  g_B = (I - B (B^T B)^-1 B^T) grad B (A A^T)^-1 / s^2 - B X, where X solves
    B^T B X + X A A^T = -(B^T B)^-1 grad A A^T / s^2, for each adapter W + s B A.

    s (B g_A + g_B A) is then the matrix of that form closest to the weight's full gradient, and among all such pairs
    (g_A, g_B) is closest to the plain gradients. Both replace the factors' `.grad`; one call of the oracle. While B = 0
    inverses are pseudo-inverses, so that the first step moves B only.

    adam: the paper's form for AdamW: Adam's moments are those of the weight's gradient above, [out, in] numbers twice
    for each adapter, and their quotient, projected in the same way, is what the step gets; the step must then be plain
    gradient descent, SGD(momentum=0). Without it, the adjusted gradients go to whatever step there is; they are large
    while B is small, which Adam's second moments remember, so under AdamW this form can be worse than plain LoRA.
    balanced: whether X is used; 0 otherwise. damping: added to the eigenvalues that are inverted, at least 0. beta1,
    beta2, epsilon: Adam's.

    Shapes: W [out, in], A [rank, in], B [out, rank]; computed in float64, kept in the factors' precision. Raises
    BadInput if the model has no adapter of this form.

    >>> from plait import LoRA, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 4), (x, x[:, :4]), methods=[LoRA(rank=2), LoRAPro()], steps=20)
    >>> run.history[-1]["objective"] < run.history[0]["objective"]
    True
    """

    balanced: bool = True
    damping: NonNegative = 1e-8
    adam: bool = False
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    epsilon: Positive = 1e-8

    def adapters(self, model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter, float]]:
        """Return (A, B, scale) of each adapter, by a name of its own."""
        found = {}
        for name, layer in model.named_modules():
            if matches(self.where, name):
                for number, parametrization in enumerate(stack(layer)):
                    factors = parametrization.low_rank()
                    if factors is not None:
                        found[f"{name}.{number}"] = factors
        if not found:
            raise BadInput(f"LoRAPro(where={self.where!r}) finds no low-rank adapter: add LoRA, or change where.")
        return found

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse Adam twice, and a model without adapters."""
        if not any(isinstance(m, Adapter) for m in methods) and not any(attached(model, LowRank)):
            raise BadInput("LoRAPro changes the gradients of low-rank adapters: put one such as LoRA before it.")
        from plait.step.adam import AdamW

        steps = [m for m in methods if type(m).optimizer is not Method.optimizer]
        if self.adam and (not steps or isinstance(steps[0], AdamW)):
            raise BadInput("LoRAPro(adam=True) has Adam in it and needs a plain step: add SGD, or set adam to False.")
        after = methods[next((i for i, m in enumerate(methods) if m is self), 0) + 1 :]
        several = [type(m).__name__ for m in after if getattr(m, "calls", 1) > 1]
        if self.adam and several:
            raise BadInput(
                f"LoRAPro(adam=True) averages once a step, {several[0]} asks more often: put {several[0]} before it."
            )

    def gradient(self, ask: Ask) -> Ask:
        """Rewrite the gradients of the factors; one call."""

        def asked(model: nn.Module, now: Now) -> Tensor:
            value = ask(model, now)
            with torch.no_grad():
                for name, (A, B, scale) in self.adapters(model).items():
                    if A.grad is not None and B.grad is not None and A.shape[0]:
                        new_A, new_B = self.adjusted(name, A, B, scale, now)
                        A.grad.copy_(new_A)
                        B.grad.copy_(new_B)
            return value

        return asked

    def adjusted(self, name: str, A: nn.Parameter, B: nn.Parameter, scale: float, now: Now) -> tuple[Tensor, Tensor]:
        """Return what replaces the gradients of one adapter's factors."""
        grad_A, grad_B = (torch.zeros_like(p) if p.grad is None else p.grad for p in (A, B))
        a, b = A.double(), B.double()
        new_A, new_B = closest(a, b, grad_A.double(), grad_B.double(), scale, self.balanced, self.damping)
        if not self.adam:
            return new_A, new_B
        gradient = (scale * (b @ new_A + new_B @ a)).to(torch.promote_types(A.dtype, torch.float32))
        memory = now.of(self)
        first = remembered(memory, f"{name}/first", gradient)
        second = remembered(memory, f"{name}/second", gradient)
        count = memory.setdefault(f"{name}/count", torch.zeros((), dtype=torch.float64)).add_(1)
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        corrected = first / (1 - self.beta1 ** float(count))
        root = (second / (1 - self.beta2 ** float(count))).sqrt().add_(self.epsilon)
        update = (corrected / root).double()
        return closest(a, b, scale * b.T @ update, scale * update @ a.T, scale, self.balanced, self.damping)
