"""Optimizers from update rules: what knows parameters, groups, dtypes and checkpoints, so that a rule is mathematics.

A method of this place is used in two ways. `AdamW(lr=1e-3)` is the method, for a recipe or `plait.train`;
`AdamW(model.parameters(), lr=1e-3)` is the torch optimizer, for anybody's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.errors import BadInput, did_you_mean
from plait.fields import ScheduledPositive
from plait.layers import matches_weight
from plait.math import triton_kernels
from plait.math.kernel_source import Layout
from plait.math.kernels import Kernel, kernel, launch
from plait.math.storage import key_of
from plait.math.update_rule import UpdateRule, plain_step
from plait.method import Method, method
from plait.schedule import Schedule
from plait.sharding import full, is_sharded, like
from plait.step import states as kept

NOT_OF_A_GROUP = ("where",)
"""Fields that are not hyperparameters of a parameter group."""


def as_groups(given: list[Any]) -> list[dict[str, Any]]:
    """Return parameters, or groups of them, as groups, each with a list of its own.

    >>> as_groups([{"params": "ab", "lr": 0.1}]), as_groups(["a", "b"])
    ([{'params': ['a', 'b'], 'lr': 0.1}], [{'params': ['a', 'b']}])
    """
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    return [{**g, "params": [g["params"]] if isinstance(g["params"], Tensor) else list(g["params"])} for g in groups]


@method
class Rule(Method):
    """w <- w - lr * direction(w, gradient, states), and times `trust` where a rule has one.

    lr: the learning rate. decay_vectors: whether biases, norm scales and other weights of less than two dimensions
    decay too, as in torch. maximize: ascend. where: names of the weights that are stepped; the others stay. states: how
    the running states are kept, float32, bfloat16 or 8bit; the latter two are rounded at random, see
    `plait.math.storage`, and small weights (vectors, less than 4096 elements) keep float32 in place of 8bit.
    """

    lr: ScheduledPositive = 1e-3
    decay_vectors: bool = True
    maximize: bool = False
    states: Literal["float32", "bfloat16", "8bit"] = "float32"

    direction: ClassVar[Callable[..., Any]]
    trust: ClassVar[Callable[..., Any] | None] = None
    normed: ClassVar[Callable[..., Any] | None] = None
    perpendicular: ClassVar[Callable[..., Any] | None] = None
    radial: ClassVar[Callable[..., Any] | None] = None
    of_matrices: ClassVar[tuple[str, ...]] = ()
    """Numbers that are 0 for weights of less than two dimensions."""

    @classmethod
    def rounds(cls) -> bool:
        """Say whether the states may be rounded: not where a rule takes weights whole and keeps states of its own."""
        return cls.takes_whole is Rule.takes_whole

    def __new__(cls, parameters: Any = None, /, *rest: Any, **given: Any) -> Any:
        """Return the method, or, when the first argument holds parameters, the optimizer over them."""
        if parameters is None:
            return super().__new__(cls)
        if rest or not isinstance(parameters, Iterable) or isinstance(parameters, nn.Module):
            raise BadInput(
                f"{cls.__name__} takes its fields by name, as in {cls.__name__}(lr=...), or "
                f"{cls.__name__}(model.parameters(), lr=...)."
            )
        made = cls(**given)
        for f in fields(made):
            if isinstance(getattr(made, f.name), Schedule):
                raise BadInput(
                    f"{cls.__name__}.{f.name} must be a number in your own loop, not {getattr(made, f.name)!r}: drive "
                    "it with a scheduler of torch.optim.lr_scheduler, or train with plait.train."
                )
        return made.optimizer(parameters)

    @classmethod
    def rule(cls) -> UpdateRule:
        """Return the mathematics of the method."""
        return UpdateRule(cls.direction, cls.trust, cls.normed, cls.perpendicular, cls.radial)

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return what the rule reads at its step 1, 2, ..., beyond the group's own numbers, and the rate if not lr."""
        return {}

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse a pattern that no trained weight matches."""
        if self.where != ".*":
            self.chosen([name for name, _ in model.named_parameters()])

    def chosen(self, names: list[str]) -> set[str]:
        """Return the names that `where` matches."""
        found = {n for n in names if matches_weight(self.where, n)}
        if not found:
            hint = did_you_mean(self.where, {name.rpartition(".")[2] for name in names} | set(names))
            raise BadInput(f"{type(self).__name__}(where={self.where!r}) matches no trained weight{hint}.")
        return found

    def optimizer(self, named_parameters: Any) -> RuleOptimizer:
        """Return the optimizer over parameters, (name, parameter) pairs, or groups of either."""
        return RuleOptimizer(self, self.stepped(list(named_parameters)))

    def stepped(self, given: list[Any]) -> list[Any]:
        """Return which of the parameters (or groups) are stepped: those whose name or layer `where` matches."""
        return self.parted(given)[0]

    def parted(self, given: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return what `where` matches of the parameters (or groups), and the rest in groups of its own."""
        if self.where == ".*":
            return given, []
        groups = as_groups(given)
        if not all(isinstance(pair, tuple) for group in groups for pair in group["params"]):
            raise BadInput(
                f"{type(self).__name__}(where={self.where!r}) needs names: give it model.named_parameters()"
                f"{', or groups of such pairs' if isinstance(given[0], dict) else ''}."
            )
        named = self.chosen([name for group in groups for name, _ in group["params"]])
        inside = [{**group, "params": [pair for pair in group["params"] if pair[0] in named]} for group in groups]
        outside = [{**group, "params": [pair for pair in group["params"] if pair[0] not in named]} for group in groups]
        return [group for group in inside if group["params"]], [group for group in outside if group["params"]]

    def takes_whole(self, weight: Tensor, group: Mapping[str, Any]) -> bool:
        """Say whether `step_whole` steps this weight in place of the elementwise rule."""
        return False

    def keeps(self, weight: Tensor) -> tuple[str, ...]:
        """Return names that the state of a weight taken whole always holds, by which it is told from other rules'."""
        return ()

    def step_whole(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int
    ) -> None:
        """Step a weight that is taken whole, the optimizer's parameter `number`; state["step"] counts from 1."""
        raise NotImplementedError


STORED = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _is_flat(tensor: Tensor) -> bool:
    at_hand = tensor.is_cpu or tensor.device.type in triton_kernels.DEVICES
    return type(tensor) in (Tensor, nn.Parameter) and at_hand and tensor.is_contiguous()


class Work:
    """What one step hands to kernels: tensors by how they are stored, and the rows of scalars that they share."""

    def __init__(self, rule: UpdateRule, name: str) -> None:
        self.rule, self.name = rule, name
        self.rows: dict[Any, int] = {}
        self.numbers: list[tuple[float, ...]] = []
        self.items: dict[tuple[torch.device, Layout], list[tuple[int, ...]]] = {}
        self.kernels: dict[tuple[torch.device, Layout], Kernel | triton_kernels.TritonKernel | None] = {}
        self.held: list[list[Tensor]] = []

    def kernel(self, device: torch.device, layout: Layout) -> Kernel | triton_kernels.TritonKernel | None:
        """Return the kernel for tensors that are stored so; None where there is no compiler."""
        if (device, layout) not in self.kernels:
            compile_for = triton_kernels.triton_kernel if device.type in triton_kernels.DEVICES else kernel
            self.kernels[device, layout] = compile_for(self.rule, self.name, layout)
        return self.kernels[device, layout]

    def add(self, layout: Layout, row: int, tensors: list[Tensor], width: int, first: int) -> None:
        """Add a weight, its gradient and what holds its states."""
        self.held.append(tensors)  # of a sharded weight the gradient may be a copy that nothing else holds
        self.items.setdefault((tensors[0].device, layout), []).append(
            (row, tensors[0].numel(), width, first, *(t.data_ptr() for t in tensors))
        )

    def run(self) -> None:
        """Step all of them."""
        for (device, layout), items in self.items.items():
            run = self.kernel(device, layout)
            assert run is not None
            if isinstance(run, triton_kernels.TritonKernel):
                run.launch(items, self.numbers, device)
            else:
                launch(run, items, self.numbers, whole=self.rule.whole, sizes=layout.sizes(self.rule))
        # A kernel writes past autograd: an older graph that is differentiated after this step is to say so, as always.
        torch.autograd.graph.increment_version([weight for weight, *_ in self.held if not weight.is_inference()])


class RuleOptimizer(torch.optim.Optimizer):
    """A torch optimizer that follows a `Rule`: fused kernels for float32 and bfloat16 weights, else the plain loop.

    Hyperparameters stand in `param_groups` under the names of the method's fields. States are kept as the field
    `states` says (float64 for float64 weights), whatever the weight's dtype, and are loaded as they were saved; with
    named parameters they are matched by name. `fused=False` on the object takes the plain loop. Of weights sharded by
    FSDP2 each process steps its share; what must be taken whole is gathered, and stepped alike by every process.
    """

    of_a_run: ClassVar[tuple[str, ...]] = ()
    """What its groups hold of the run beside hyperparameters: left out where they are copied into another optimizer."""

    def __init__(self, rule: Rule, parameters: Any) -> None:
        self.method, self.fused = rule, True
        defaults = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in NOT_OF_A_GROUP}
        defaults = {name: v.at(0.0) if isinstance(v, Schedule) else v for name, v in defaults.items()}
        super().__init__(parameters, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with hyperparameters of its own; each is held to the range of its field."""
        param_group = {name: value for name, value in param_group.items() if name not in self.of_a_run}
        title = type(self.method).__name__
        known = {f.name for f in fields(self.method)} - set(NOT_OF_A_GROUP)
        own = {name: value for name, value in param_group.items() if name in known}
        if own:
            plain: dict[str, Any] = {n: float(v) if isinstance(v, Tensor) else v for n, v in own.items()}
            replace(self.method, **plain)
        for name in set(param_group) - known - {"params", "param_names", "initial_lr"}:
            raise BadInput(f"{title} has no field '{name}'{did_you_mean(name, known)}.")
        super().add_param_group(param_group)
        for name, value in self.param_groups[-1].items():
            if isinstance(value, dict):
                self.param_groups.pop()
                raise BadInput(
                    f"{title}.{name} was given by the names of weights: give this group a number of its own."
                )
        if self.param_groups[-1]["states"] != "float32" and not type(self.method).rounds():
            raise BadInput(f"{title} keeps states of its own in float32: leave out states=.")
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                raise BadInput(f"{title} is not defined for complex weights: train torch.view_as_real of them.")

    def __getstate__(self) -> dict[str, Any]:
        """Return all that a copy or a file needs: torch's own leaves out what is not its own."""
        return {name: held for name, held in vars(self).items() if name[0] != "_" and name != "step"}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise BadInput(
                f"{type(self.method).__name__} needs dense gradients: build the embedding with sparse=False."
            )
        self.advance()
        return loss

    def advance(self) -> None:
        """Take the step along the gradients that are at hand; a rule that looks further overrides this."""
        number, work = -1, Work(self.method.rule(), type(self.method).__name__)
        for place, group in enumerate(self.param_groups):
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                if self.method.takes_whole(p, group):
                    self._whole(p, state, group, number)
                else:
                    self._elementwise(p, state, group, place, work)
        work.run()

    def _whole(self, p: Tensor, state: dict[str, Any], group: Mapping[str, Any], number: int) -> None:
        """Step a weight that the rule takes whole; of a sharded one every process gathers all and keeps its share."""
        assert p.grad is not None
        gradient = full(p.grad)
        weight = full(p) if is_sharded(p) else p
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = kept.as_precise(full(value), p.dtype)
        self.method.step_whole(weight, -gradient if group["maximize"] else gradient, state, group, number)
        if weight is not p:
            p.copy_(like(weight, p))

    def _elementwise(self, p: Tensor, state: dict[str, Any], group: Mapping[str, Any], place: int, work: Work) -> None:
        """Step a weight, or this process's share of it, element by element: now, or with the kernels' other work."""
        assert p.grad is not None
        rule, step, sharded = work.rule, state["step"], is_sharded(p)
        kind = kept.make(state, rule.states, p, group["states"])
        held = [state[name] for name in rule.states]
        if kind == "8bit":
            held = [t for name, t in zip(rule.states, held, strict=True) for t in (t, state[kept.scale_of(name)])]
        weight, gradient, first = (p, p.grad, 0) if not sharded else kept.share(p)
        if weight.shape != gradient.shape:
            raise BadInput(
                f"a weight of shape {tuple(weight.shape)} has a gradient of shape {tuple(gradient.shape)}: call "
                "zero_grad() after the weight has its shape."
            )
        tensors = [weight, gradient, *(map(kept.own, held) if sharded else held)]
        layout = Layout(STORED.get(weight.dtype, ""), kind)
        if self._fits(work, layout, tensors, alone=not sharded):
            key = (place, step, p.dim() > 1)
            if key not in work.rows:
                work.rows[key] = len(work.numbers)
                scalars = self._scalars(group, step, p)
                ascend = -1.0 if group["maximize"] else 1.0
                work.numbers.append(
                    (scalars["rate"], ascend, float(key_of(step)), *(scalars[name] for name in rule.scalars))
                )
            if weight.numel():
                width = weight.shape[1:].numel() if p.dim() > 1 else weight.numel()
                width = width if kind == "8bit" or rule.radial is not None else 1
                work.add(layout, work.rows[key], tensors, width, first)
            return
        scalars = self._scalars(group, step, p)
        values = kept.read(state, rule.states, kind)
        gradient = -gradient if scalars["maximize"] else gradient
        plain_step(rule, weight, gradient, values, scalars, kept.whole(p))
        kept.write(state, values, kind, step, first)

    def _fits(self, work: Work, layout: Layout, tensors: list[Tensor], *, alone: bool) -> bool:
        """Say whether a kernel steps these tensors: not where norms are over several processes."""
        if not (self.fused and layout.weight and tensors[0].dtype == tensors[1].dtype and all(map(_is_flat, tensors))):
            return False
        if not alone and work.rule.whole:
            return False
        if work.kernel(tensors[0].device, layout) is None:
            self.fused = False
        return self.fused

    def _scalars(self, group: Mapping[str, Any], step: int, p: Tensor) -> dict[str, float]:
        scalars = {"rate": group["lr"], **group, **type(self.method).scalars(step, group)}
        if p.dim() < 2:
            scalars |= dict.fromkeys(self.method.of_matrices, 0.0)
            scalars |= {} if group["decay_vectors"] else {"weight_decay": 0.0}
        names = ("rate", "maximize", *self.method.rule().scalars)
        return {name: float(scalars[name]) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state: groups and parameters are matched by name where both sides have names; dtypes stay as saved."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        named = {frozenset(group["param_names"]): group for group in groups if "param_names" in group}
        for place, (saved, own) in enumerate(zip(groups, self.param_groups, strict=False)):
            saved = named.get(frozenset(own.get("param_names", ())), saved)  # groups may stand in another order
            saved = groups[place] = {**{k: v for k, v in own.items() if k in self.defaults}, **saved}
            theirs, ours = saved.get("param_names"), own.get("param_names")
            if theirs is None or ours is None:
                continue
            if set(theirs) != set(ours):
                odd = sorted(set(theirs) ^ set(ours))[0]
                raise BadInput(f"this optimizer state is of other parameters: '{odd}' stands on one side only.")
            numbers = dict(zip(theirs, saved["params"], strict=True))
            saved["params"], saved["param_names"] = [numbers[name] for name in ours], list(ours)
        self._refuse_others(state_dict["state"], groups)
        super().load_state_dict({**state_dict, "param_groups": groups})
        # torch casts every state to its weight's dtype: put back what a bfloat16 weight's float32 state lost.
        own_parameters = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip([k for group in groups for k in group["params"]], own_parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and self.state[p][name].dtype != value.dtype:
                    self.state[p][name] = value.detach().to(p.device, copy=True)
                if is_sharded(p) and name.endswith(kept.scale_of("")) and not is_sharded(self.state[p][name]):
                    self.state[p][name] = kept.rows_of(self.state[p][name], p)
            if isinstance(self.state.get(p, {}).get("step"), Tensor):  # as torch's own optimizers keep it
                self.state[p]["step"] = int(self.state[p]["step"])

    def _refuse_others(self, states: Mapping[Any, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Refuse the states of another rule, where what this one keeps is known."""
        title, own = type(self.method).__name__, self.method.rule().states
        known = {"step", *own, *map(kept.scale_of, own)}
        for saved, group in zip(groups, self.param_groups, strict=False):
            for key, p in zip(saved["params"], group["params"], strict=False):
                state = set(states.get(key, ()))
                if state and self.method.takes_whole(p, saved):
                    if missing := [name for name in self.method.keeps(p) if name not in state]:
                        raise BadInput(
                            f"this optimizer state has no '{missing[0]}', which {title} keeps: it is another rule's."
                        )
                elif type(self) is RuleOptimizer and (odd := sorted(state - known)):
                    raise BadInput(
                        f"this optimizer state holds '{odd[0]}', which {title} does not keep: it is another rule's."
                    )

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, type(self.method).__name__, 1)
