"""Modules of one network whose gradients are unequally noisy, and so want learning rates of their own."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Bounds, Count, Probability, Size
from plait.gradient.base import Gradient
from plait.layers import matches
from plait.method import Ask, Method, Now, method
from plait.sharding import full, gather, remembered

TINY = 1e-6
"""Keeps the ratio of two variances finite."""


def variance(one: list[Tensor], other: list[Tensor]) -> float:
    """Return 1 - cos of two gradients of the same parameters: 0 if two halves of a batch agree, 1 if all is noise.

    >>> variance([torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])]) < variance([torch.ones(1)], [-torch.ones(1)])
    True
    """

    def product(left: list[Tensor], right: list[Tensor]) -> float:
        return sum(float(full((a.double() * b.double()).sum())) for a, b in zip(left, right, strict=True))

    lengths = product(one, one) * product(other, other)
    return 1.0 - product(one, other) / lengths**0.5 if lengths > 0 else 1.0


@paper("xue2022agvm", key="agvm")
@method
class AGVM(Gradient):
    """lr_i = lr * phi_i,  phi_i <- momentum * phi_i + (1 - momentum) * sqrt(V_1 / V_i),  V_i = 1 - cos(g_i, g'_i),
    where g_i and g'_i are the gradients of module i on the two halves of a batch.

    With large batches the variances of the modules' gradients (backbone, neck, heads) drift apart; their learning rates
    follow those of the first module, the anchor, whose own stays as it is. Both halves are asked for every `every`
    steps from step `warmup` on, and add up to the whole batch's gradient, so that no step costs more than
    another: two calls on half a batch each. A batch of one example is not halved.

    What is scaled is the step, w <- w' + phi_i (w - w') after it, w' being the weights before it, so that this is a
    learning rate under every optimizer; it keeps a copy of the weights of all modules but the anchor during a step.
    bounds: V_1 / V_i is clamped to them, as in the authors' code (the paper's text was not at hand: what is
    here beside the equation is their code's).

    modules: names of modules, as patterns; the first is the anchor, and parameters under none of them are
    left alone. Unless given: the model's children that are trained. momentum: in [0, 1), 0.97; every: 5; warmup: 500
    steps there. adaptive: for Adam and its kin, V is that of g / (sqrt(v) + 1e-8), v the running mean of squares that
    Adam would have after a step along g, at rate `beta2`; one more copy of the weights. Raises BadInput for fewer than
    two modules that are trained, and for a pattern that names none of its own.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> AGVM().groups(model)
    {'0.weight': 0, '0.bias': 0, '2.weight': 1, '2.bias': 1}
    """

    modules: tuple[str, ...] = ()
    momentum: Probability = 0.97
    every: Count = 5
    warmup: Size = 0
    bounds: Bounds = (0.5, 10.0)
    adaptive: bool = False
    beta2: Probability = 0.999

    @property
    def calls(self) -> int:  # type: ignore[override]
        """How often a step asks in which both halves are compared, each with half of the batch; else once."""
        return 2

    def groups(self, model: nn.Module, now: Now | None = None) -> dict[str, int]:
        """Return the number of each trained parameter's module, by the parameter's name, also while it rests."""
        trained = {name for name, _ in (now or Now()).trained(model)}
        names = [name for name, _ in self.named(model) if name in trained]
        patterns = self.modules or tuple(re.escape(child) for child, _ in model.named_children())
        found: dict[str, int] = {}
        for name in names:
            parts = name.split(".")
            above = [".".join(parts[: end + 1]) for end in range(len(parts))]
            number = next((i for i, p in enumerate(patterns) if any(matches(p, whole) for whole in above)), None)
            if number is not None:
                found[name] = number
        used = sorted(set(found.values()))
        if self.modules and len(used) < len(patterns):
            lost = next(p for i, p in enumerate(patterns) if i not in used)
            raise BadInput(f"AGVM.modules: '{lost}' names no module of its own that is trained: change it, or drop it.")
        return {name: used.index(number) for name, number in found.items()}

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse fewer than two modules."""
        if self.modules and len(self.modules) < 2:
            raise BadInput("AGVM.modules must name at least two modules: the anchor, and one that follows it.")
        if not any(type(m).parametrize is not Method.parametrize for m in methods):
            self.require(self.groups(model))

    def require(self, groups: dict[str, int]) -> dict[str, int]:
        """Return the groups, of which there must be two."""
        if len(set(groups.values())) < 2:
            raise BadInput("AGVM compares at least two modules that are trained: name them in modules.")
        return groups

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle that, at some steps, is asked for both halves of the batch."""

        def aligned(model: nn.Module, now: Now) -> Tensor:
            plain = model if now.model is None else now.model
            groups, state = self.require(self.groups(plain, now)), now.of(self)
            parameters = dict(plain.named_parameters())
            state.setdefault("scale", torch.ones(1 + max(groups.values()), dtype=torch.float64))
            if "step" in state and int(state["step"]) == now.step:
                return ask(model, now)  # a method around this one asks again, at weights that it has moved
            state["step"] = torch.tensor(now.step)
            due = now.step >= self.warmup and (now.step - self.warmup) % self.every == 0
            if due and smallest(len(now.batch), now) > 1:
                value, halves = halved(ask, plain, model, now)
                ratios = self.ratios(groups, halves, state)  # of modules that rest in this step: none
                mixed = self.momentum * state["scale"] + (1 - self.momentum) * ratios
                state["scale"] = torch.where(ratios.isnan(), state["scale"], mixed)
            else:
                value = ask(model, now)
            scale = state["scale"]
            for name, number in groups.items():
                if self.adaptive and (gradient := parameters[name].grad) is not None:
                    squares = remembered(state, f"{name}/squares", gradient)
                    squares.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
                if number and float(scale[number]) != 1.0 and parameters[name].requires_grad:
                    state[f"{name}/before"] = parameters[name].detach().clone()
            return value

        return aligned

    @torch.no_grad()
    def constrain(self, model: nn.Module, now: Now) -> None:
        """Scale the step that was just taken."""
        state, parameters = now.of(self), dict(model.named_parameters())
        for name, number in self.groups(model, now).items():
            before = state.pop(f"{name}/before", None)
            if before is not None:
                parameters[name].copy_(before + float(state["scale"][number]) * (parameters[name] - before))

    def ratios(self, groups: dict[str, int], halves: list[dict[str, Tensor]], state: dict[str, Tensor]) -> Tensor:
        """Return sqrt(V_1 / V_i) for each module, from its gradients on both halves."""

        def of(number: int) -> float:
            names = [name for name, own in groups.items() if own == number and name in halves[0] and name in halves[1]]
            if not names:
                return float("nan")
            return variance(*([self.seen(name, half[name], state) for name in names] for half in halves))

        found = torch.tensor([of(number) for number in range(1 + max(groups.values()))], dtype=torch.float64)
        return ((found[0] + TINY) / (found + TINY)).clamp(*self.bounds).sqrt()

    def seen(self, name: str, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return a gradient as the optimizer will use it."""
        if not self.adaptive:
            return gradient
        squares = remembered(state, f"{name}/squares", gradient)
        return gradient / ((self.beta2 * squares + (1 - self.beta2) * gradient.square()).sqrt() + 1e-8)


def smallest(count: int, now: Now) -> int:
    """Return the smallest of all processes' numbers."""
    return int(torch.stack(gather(torch.tensor(count, device=now.batch.weight.device))).min())


def halved(ask: Ask, plain: nn.Module, model: nn.Module, now: Now) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Ask for both halves of the batch; fill `.grad` with the whole's, return its value, and each half's gradients.

    A half's gradient is divided by the half's own mass, so the whole's is their mean, weighted by mass.
    """
    whole, middle = now.batch, len(now.batch) // 2
    named = [(name, p) for name, p in plain.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    values, parts, masses, found = [], [], [], []
    for half in (whole.take(slice(0, middle)), whole.take(slice(middle, None))):
        now.batch = half
        values.append(ask(model, now))
        parts.append(now.parts)
        masses.append(torch.stack(gather(half.mass())).sum())
        found.append([p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad = None
    now.batch = whole
    one, other = (mass / torch.stack(masses).sum().clamp_min(torch.finfo(torch.float32).tiny) for mass in masses)
    for p, a, b in zip(parameters, *found, strict=True):
        if a is not None or b is not None:
            scaled = [share.to(g.dtype) * g for share, g in ((one, a), (other, b)) if g is not None]
            p.grad = scaled[0] if len(scaled) == 1 else scaled[0] + scaled[1]
    names = parts[0].keys() | parts[1].keys()
    now.parts = {n: float(one) * parts[0].get(n, 0.0) + float(other) * parts[1].get(n, 0.0) for n in names}
    halves = [{name: g for (name, _), g in zip(named, half, strict=True) if g is not None} for half in found]
    return one * values[0] + other * values[1], halves
