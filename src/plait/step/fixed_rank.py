"""Steps of a low-rank adapter on the manifold of matrices of its rank: the update counts, not how it is factored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import NonNegative, Probability, ScheduledNonNegative, ScheduledPositive, ScheduledProbability
from plait.math.fixed_rank import point, polar, projected, retracted, riemannian_gradient
from plait.math.update_rule import exact
from plait.method import Method, method
from plait.sharding import full, is_sharded, like
from plait.step.adam import AdamW, corrections
from plait.step.base import Rule, RuleOptimizer


class PairOptimizer(RuleOptimizer):
    """The optimizer of `RiemannLoRA`: parameters of groups with manifold=True are pairs A, B, A, B, ..."""

    def advance(self) -> None:
        """Step the pairs together, and the other parameters each by itself."""
        for group in self.param_groups:
            if group["manifold"]:
                held = group["params"]
                for a, b in zip(held[::2], held[1::2], strict=True):
                    if a.grad is not None and b.grad is not None and len(a):
                        self._step_pair(a, b, group)
        super().advance()

    def _step_pair(self, a: Tensor, b: Tensor, group: Mapping[str, Any]) -> None:
        state, kind, ascend = self.state[a], exact(a.dtype), -1.0 if group["maximize"] else 1.0
        assert a.grad is not None
        assert b.grad is not None
        grads = [ascend * full(p.grad).to(kind) for p in (a, b) if p.grad is not None]
        at = point(full(a).to(kind), full(b).to(kind), *grads)
        mean = riemannian_gradient(at, *grads)
        if "left" in state:
            mean = mean.add(projected(full(state["left"]), full(state["right"]), at), group["momentum"])
        state["left"], state["right"] = mean.factors(at)
        direction = projected(*polar(state["left"], state["right"]), at)
        rate = group["lr"]
        nothing = direction.add(direction, -1.0)
        made = retracted(at, nothing.add(direction, -rate), 1 - rate * group["weight_decay"])
        for p, value in zip((a, b), made, strict=True):
            p.copy_(like(value.to(p.dtype), p) if is_sharded(p) else value)


@paper("bogachev2025riemannlora", key="riemannlora")
@method
class RiemannLoRA(Rule):
    """M <- momentum * P_X(M) + P_X(G),  D = P_X(polar(M)),  X <- SVD_r((1 - lr * weight_decay) X - lr * D), for the
    adapter X = B A of rank r as a point on the manifold of matrices of rank r, whose tangent space P_X projects onto.

    Muon on that manifold (Riemannion): polar(M) has M's singular vectors and singular values of 1. X' depends on X, G
    and M only, never on how X is factored, so no factor learns faster than the other and their scales do not matter.
    G = dL/dX is never formed: P_X(G) follows from the factors' gradients. X is written back as B = U S^(1/2), A =
    S^(1/2) V^T. A factor that is zero (LoRA's start, which is no point of the manifold) takes the directions of its
    gradient in the first step; `LocallyOptimal` is the paper's own start.

    The published text was not at hand; the equations are those that two independent implementations give. They differ
    in which momentum is kept; here it is the one before `polar`, as in Muon. Of W + scale * X, lr is a length of X.

    lr: the spectral norm of a step, before the second projection. weight_decay: of X. momentum: in [0, 1). Parameters
    that are no pair of factors (heads, biases, other adapters) are stepped by AdamW at lr * `others`, with `betas`,
    `eps` and the same decay. Needs names: model.named_parameters(). Raises BadInput if there is no pair.

    >>> import torch
    >>> from plait import LoRA, train
    >>> x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    >>> run = train(nn.Linear(8, 4), (x, x[:, :4]), methods=[LoRA(rank=2), RiemannLoRA(lr=0.02)], steps=20)
    >>> run.history[-1]["objective"] < run.history[0]["objective"]
    True
    """

    lr: ScheduledPositive = 1e-4
    momentum: ScheduledProbability = 0.9
    weight_decay: ScheduledNonNegative = 0.00316
    manifold: bool = True
    others: NonNegative = 1.0
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-8

    direction = staticmethod(AdamW.direction)

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return AdamW's numbers, and its rate."""
        return {**corrections(step, group), "rate": group["lr"] * group["others"]}

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a recipe in which nothing adds low-rank adapters."""
        from plait.parametrize.base import Parametrize

        if not any(isinstance(m, Parametrize) for m in methods):
            self.stepped(list(model.named_parameters()))

    def optimizer(self, named_parameters: Any) -> PairOptimizer:
        """Return the optimizer over (name, parameter) pairs."""
        return PairOptimizer(self, self.stepped(list(named_parameters)))

    def stepped(self, given: list[Any]) -> list[Any]:
        """Return the factors A, B, A, B, ... of the adapters that `where` names, and all others in a second group."""
        title = type(self).__name__
        if not all(isinstance(pair, tuple) for pair in given):
            raise BadInput(f"{title} tells factors by their names: give it model.named_parameters().")
        pairs = list(self._pairs(dict(given)))
        if not pairs:
            raise BadInput(f"{title} finds no trained low-rank adapter: put LoRA before it, or use AdamW.")
        inside = [(name, p) for pair in pairs for name, p in pair]
        names = {name for name, _ in inside}
        outside = [(name, p) for name, p in given if name not in names]
        return [{"params": inside}, *([{"params": outside, "manifold": False}] if outside else [])]

    def _pairs(self, given: dict[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
        factors = [name for name in given if ".plait." in f".{name}" and name.endswith(".A")]
        layers = {name: f".{name}".rpartition(".plait.")[0].removeprefix(".") for name in factors}
        chosen = set(layers.values()) if self.where == ".*" else self.chosen(list(layers.values()))
        for name, layer in layers.items():
            other = f"{name.removesuffix('A')}B"
            if layer not in chosen or other not in given:
                continue
            a, b = given[name], given[other]
            if a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] <= min(a.shape[1], b.shape[0]):
                yield [(name, a), (other, b)]

    @classmethod
    def rounds(cls) -> bool:
        """Say that the states of what AdamW steps may be rounded."""
        return True

    def takes_whole(self, weight: Tensor, group: Mapping[str, Any]) -> bool:
        """Say whether a weight is one of a pair."""
        return bool(group["manifold"])

    def step_whole(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int
    ) -> None:
        """Do nothing: the optimizer has stepped the pair."""
