"""Starts from the gradient of the frozen weights, which is sketched while the backward pass runs.

Only one layer's gradient is held at a time: a hook folds it into the layer's sketch and drops it. The sketches, in
float32, are narrow: rank + 8 or 2 * rank + 8 columns. Layers whose sketches would together exceed a part of the model's
size are taken in groups, each with its own passes over the batches; with room for them, gradients are summed whole.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Count, NonNegative, Positive
from plait.initialize.base import (
    SHARE,
    Found,
    Start,
    groups,
    low_rank,
    model_bytes,
    move,
    refuse_sharers,
    refuse_stacked,
    undisturbed,
    weight_matrix,
)
from plait.layers import matches, matrix, matrix_shape, own_weight
from plait.math.svd import OVERSAMPLE, SumSVD, Triplets
from plait.method import Ask, Now, method
from plait.parametrize.base import Parametrization, attached
from plait.parametrize.low_rank import LowRank
from plait.parametrize.origin import record_left
from plait.parametrize.refusals import require_finite
from plait.sharding import averaged, full, like


@method
class GradientStart(Start):
    """A start from G = dL/dW, the mean over `batches` calibration batches, of each adapted layer's frozen weight.

    The model is in evaluation mode, so nothing is dropped and no running statistic moves. A large layer's gradient is
    sketched (`SumSVD`) in 2 * `rounds` passes over the batches, each of them the same, or summed whole in one pass
    where `memory` allows it in fewer passes. Both are linear, so micro-batches and processes give what one batch in one
    process gives.

    memory: what sketches or sums may take at once, in units of the model's size, at least 0. With room for all sums, 1
    in float32 and 2 in bfloat16, the batches are passed over once.
    """

    batches: Count = 4
    rounds: Count = 1
    memory: NonNegative = SHARE

    def needed(self, rank: int) -> int:
        """Return how many triplets of the gradient an adapter of this rank needs."""
        return rank

    def factors(self, triplets: Triplets, rank: int) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B [out, rank] for the gradient's triplets."""
        raise NotImplementedError

    def scaled(self, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the factors for an adapter W + scale * B A."""
        return a, b

    def found(self, model: nn.Module) -> list[Found]:
        """Return the adapters; a weight that several layers share has one gradient for all of them and is refused."""
        chosen = super().found(model)
        refuse_sharers(self, model, chosen)
        refuse_stacked(self, chosen)
        return chosen

    def gradients(
        self, model: nn.Module, now: Now, group: list[Found] | None = None, whole: bool = False
    ) -> dict[str, SumSVD]:
        """Return the sketch, or the `whole`, of each layer's summed gradient, of all layers or of a group."""
        if now.ask is None:
            raise BadInput(f"{type(self).__name__} needs gradients: use it inside plait.train, or set now.ask.")
        chosen = self.found(model)
        sketches: dict[str, SumSVD] = {}

        def fold_in(parameter: Tensor, *, name: str, layer: nn.Module) -> None:
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                sketches[name].add(matrix(layer, grad.to_dense() if grad.is_sparse else grad))

        with undisturbed(model, now), ExitStack() as hooks:
            numbers = {name: number for number, (name, _, _) in enumerate(chosen)}
            for name, layer, adapter in chosen if group is None else group:
                weight = own_weight(layer)
                seed = now.generator.initial_seed() % 2**31 + numbers[name]
                sketches[name] = SumSVD(matrix_shape(layer), self._width(adapter), seed, weight.device, whole)
                weight.requires_grad_(True)
                hook = partial(fold_in, name=name, layer=layer)
                hooks.enter_context(weight.register_post_accumulate_grad_hook(hook))
            self._passes(model, now, sketches)
        return sketches

    def _passes(self, model: nn.Module, now: Now, sketches: dict[str, SumSVD]) -> None:
        count = 1 if all(sketch.direct for sketch in sketches.values()) else 2 * self.rounds
        for number in range(count):
            last = number == count - 1
            for batch in now.calibration(self.batches):
                now.batch = batch
                try:
                    with torch.enable_grad():
                        now.ask(model, now)
                except RuntimeError as problem:
                    if "does not require grad" not in str(problem):
                        raise
            for name, sketch in sketches.items():
                sketch.sum = averaged(sketch.sum)
                if sketch.seen == 0 or float(sketch.sum.norm()) == 0:
                    raise BadInput(
                        f"{type(self).__name__} got no gradient for '{name}': nothing of the loss depends on it; leave "
                        f"it out of the adapters with where."
                    )
                require_finite(sketch.sum, f"{type(self).__name__} got a gradient for '{name}'")
                if not last:
                    sketch.turn()

    def _groups(self, model: nn.Module, chosen: list[Found]) -> list[tuple[list[Found], bool]]:
        """Return the groups of adapters, and whether their gradients are summed whole: whichever takes fewer passes."""

        def sketch(found: Found) -> int:
            return 4 * SumSVD.numbers(matrix_shape(found[1]), self._width(found[2]))

        def gradient(found: Found) -> int:
            return 4 * math.prod(matrix_shape(found[1]))

        def left(found: Found) -> int:
            return sum(p.numel() * p.element_size() for p in found[2].parameters())

        def passes(group: list[Found]) -> int:
            return 1 if all(sketch(found) == gradient(found) for found in group) else 2 * self.rounds

        room, adapters = self.memory * model_bytes(model), sum(map(left, chosen))
        sketched, summed = (list(groups(chosen, held, room, left, least=adapters)) for held in (sketch, gradient))
        whole = len(summed) <= sum(map(passes, sketched))
        return [(group, whole) for group in (summed if whole else sketched)]

    def _width(self, adapter: Parametrization) -> int:
        return self.needed(low_rank(adapter).rank) + OVERSAMPLE

    @torch.no_grad()
    def initialize(self, model: nn.Module, now: Now) -> None:
        """Start each adapter from its layer's gradient; all gradients are taken before the first adapter is started."""
        chosen = self.found(model)
        made: dict[str, tuple[Tensor, Tensor]] = {}

        for group, whole in self._groups(model, chosen):
            sketches = self.gradients(model, now, group, whole)
            for name, _, adapter in group:
                rank = low_rank(adapter).rank
                triplets = sketches.pop(name).svd(self.needed(rank), self.batches)
                made[name] = self.factors(triplets, rank)
        for name, layer, adapter in chosen:
            low = low_rank(adapter)
            a, b = self.scaled(*made.pop(name), low.scale)
            if self.moves:
                with weight_matrix(layer) as weight:
                    move(weight, low, a, b)
            else:
                low.set(a, b)
            record_left(layer, low)


@paper("wang2024loraga", key="lora-ga")
@method
class LoRAGA(GradientStart):
    """A = c V_[1..r]^T, B = c U_[r+1..2r], c = out^(1/4) / gamma^(1/2), and the frozen weight becomes W - scale * B A,
    where G = U S V^T is the gradient of W [out, in] at the start and r the adapter's rank.

    The first step of gradient descent then changes W by a multiple of the best approximation of G of rank 2r. Both
    factors are orthogonal and scaled alike, as in the paper (peft scales B by the singular values and leaves A). The
    function is the base model's, up to rounding; with a small gamma the moved part is large beside W.

    gamma: greater than 0; the larger, the smaller the start. batches: over which the gradient is averaged. rounds:
    pairs of passes for a sketched gradient. memory: at least 0, what sketches may take at once, in units of the model's
    size; with room for whole gradients, 1 in float32 and 2 in bfloat16, these are summed in one pass over the batches.
    Where 2r is above a side of the weight, the columns of B for which there is no vector start at zero, and the first
    step follows all of G. Raises BadInput where no gradient arrives, and for shared weights.

    >>> from plait import LoRA, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 4), (x, x[:, :4]), methods=[LoRA(rank=2), LoRAGA()], steps=2)
    >>> run.model.plait.lora.A @ run.model.plait.lora.A.T > 0.08
    tensor([[ True, False],
            [False,  True]])
    """

    moves = True

    gamma: Positive = 16.0

    def needed(self, rank: int) -> int:
        """Return 2r."""
        return 2 * rank

    def factors(self, triplets: Triplets, rank: int) -> tuple[Tensor, Tensor]:
        """Return the first r vectors of the inputs, and the next r of the outputs."""
        u, _, vh = triplets
        size = len(u) ** 0.25 / self.gamma**0.5
        b = size * u[:, rank:]
        return size * vh[:rank], torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], dim=1)


@paper("bogachev2025riemannlora", key="riemannlora-start")
@method
class LocallyOptimal(GradientStart):
    """scale * B A = -(size / r^(1/2)) U_[1..r] V_[r+1..2r]^T, where G = U S V^T is the gradient of W [out, in] at the
    start and r the adapter's rank; the frozen weight is left as it is.

    Of all points of rank r, those with these two spans have the tangent space that holds most of G: its projection onto
    it is the best approximation of rank 2r. <G, B A> = 0, so the loss stays to first order. B and A are scaled alike.
    The start of `RiemannLoRA`, which needs a point of rank r. The published text was not at hand: the formula, its sign
    and the size are an implementation's.

    size: greater than 0, the Frobenius norm of the update. batches, rounds, memory: as for LoRAGA. Where G is of a
    lower rank than 2r, V's vectors are taken from the first on again; where it is below r, the columns of B that are
    left are 0. Raises BadInput without LoRA adapters, where no gradient arrives, and for weights that layers share.

    >>> from plait import LoRA, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 4), (x, x[:, :4]), methods=[LoRA(rank=2), LocallyOptimal()], steps=2)
    >>> run.history[-1]["objective"] < run.history[0]["objective"]
    True
    """

    size: Positive = 0.01

    def needed(self, rank: int) -> int:
        """Return 2r."""
        return 2 * rank

    def factors(self, triplets: Triplets, rank: int) -> tuple[Tensor, Tensor]:
        """Return the first r vectors of the outputs, and the next r of the inputs, for an adapter of scale 1."""
        u, s, vh = triplets
        found, order = int((s > 1e-5 * s[0]).sum()), torch.arange(rank, device=u.device)
        root = (self.size / rank**0.5) ** 0.5
        b = torch.where(order < found, u[:, order.clamp_max(found - 1)], 0.0)
        return root * vh[(rank + order) % found], -root * b

    def scaled(self, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the factors for an adapter of this scale."""
        return a / scale**0.5, b / scale**0.5


@paper("zhang2025loraone", key="lora-one")
@method
class LoRAOne(GradientStart):
    """B = U_r (S_r / (S_1 gamma))^(1/2), A = (S_r / (S_1 gamma))^(1/2) V_r^T, where -G = U S V^T; then, if
    `precondition`, at each step grad A <- (B^T B + damping I)^-1 grad A, grad B <- grad B (A A^T + damping I)^-1.

    The weight is left as it is, so training begins at W + scale * B A: one step of the best gradient of rank r, of size
    scale / gamma in units of the gradient's largest singular value. Nothing is subtracted, unlike LoRA-GA's start.

    What follows which: roots, division by S_1, gamma and the weight left alone are the authors' code, line by line. Its
    description writes the factors as U_r S_r / gamma^(1/2) and S_r V_r^T / gamma^(1/2), undivided, whose product is not
    the step along the gradient that it names; it too subtracts nothing. scale is the adapter's, alpha / r^(1/2) there
    (LoRA's scaling="rank-stabilized"). The preconditioner, with its damping, is the one in their first release (later
    withdrawn), where it stands before Adam's moments; that steps B after A is stepped, here both see the same A and B.
    The paper's own statement of the algorithm could not be read for this.

    gamma: greater than 0; the larger, the shorter the first step. precondition: off by default, as in the released
    code; Adam rescales what it gives, plain gradient descent does not. damping: of the preconditioner, at least 0.
    batches, rounds, memory: as for LoRAGA. Put it after methods that clip, so that what they see is the plain gradient.
    Raises BadInput without LoRA adapters, where no gradient arrives, and for weights that layers share.

    >>> from plait import LoRA, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 4), (x, x[:, :4]), methods=[LoRA(rank=2), LoRAOne()], steps=2)
    >>> "start_A" in dict(run.model.named_buffers())
    False
    """

    gamma: Positive = 128.0
    precondition: bool = False
    damping: NonNegative = 1e-6

    def factors(self, triplets: Triplets, rank: int) -> tuple[Tensor, Tensor]:
        """Return the two halves of one step of gradient descent."""
        u, s, vh = triplets
        root = (s / (s[0] * self.gamma)).sqrt()
        return root[:, None] * vh, -u * root

    def gradient(self, ask: Ask) -> Ask:
        """Precondition the gradients of the factors; one call."""
        if not self.precondition:
            return ask

        def asked(model: nn.Module, now: Now) -> Tensor:
            value = ask(model, now)
            for name, _, adapter in attached(model, LowRank):
                A, B = adapter.A, adapter.B
                if matches(self.where, name) and A.grad is not None and B.grad is not None:
                    a, b, to_a, to_b = (full(t.detach()).double() for t in (A, B, A.grad, B.grad))
                    ridge = self.damping * torch.eye(adapter.rank, dtype=a.dtype, device=a.device)
                    A.grad.copy_(like(torch.linalg.solve(b.T @ b + ridge, to_a).to(A.dtype), A))
                    B.grad.copy_(like(torch.linalg.solve(a @ a.T + ridge, to_b.T).T.to(B.dtype), B))
            return value

        return asked
