"""The protocol. A method is a frozen value: its fields are its hyperparameters, the places it overrides its effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, TypeVar, dataclass_transform

import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn

from plait import schedule
from plait.errors import BadInput, did_you_mean

if TYPE_CHECKING:
    from plait.batch import Batch

T = TypeVar("T")

Misfit = Callable[[Any, Tensor, "Now"], Tensor]
"""(output, target, now) -> misfit, unreduced: [n], or [n, tokens]."""


class Ask(Protocol):
    """The gradient oracle: fills `.grad` of what is trained and returns the objective, detached."""

    def __call__(self, model: nn.Module, now: Now) -> Tensor:
        """Fill the gradients at the model's weights, on `now.batch`."""
        ...


Predictor = Callable[[nn.Module, Any, "Now"], Tensor]
"""(model, inputs, now) -> probabilities [n, classes], or values for regression."""


def _no_validation(model: nn.Module, number: int | None = 0) -> NoReturn:
    raise BadInput(
        "this needs a validation set: give one to plait.train (validation=...), to the recipe's data, or to "
        "transformers' Trainer (eval_dataset=...)."
    )


def _no_misfit(output: Any, target: Tensor, now: Now) -> NoReturn:
    raise BadInput("this needs each example's misfit: use it inside plait.train, or set now.misfit.")


def _no_calibration(count: int) -> Iterator[Batch]:
    raise BadInput("this needs batches of the training data: use it inside plait.train, or set now.calibration.")


@dataclass
class Now:
    """Where the run is. All running state of methods lives in `memory`, which every checkpoint saves."""

    step: int = 0
    steps: int = 1
    epoch: int = 0
    batch: Batch = None  # type: ignore[assignment]
    model: nn.Module = None  # type: ignore[assignment]
    """The model that is trained, without wrappers, for places that are not handed it (data)."""
    output: Any = None
    """What the model returned in the forward pass under way; a tensor of logits, or `Logits`."""
    objective: Tensor | None = None
    parts: dict[str, float] = field(default_factory=dict)
    """The objective's terms of the last step, by name, for progress and reports."""
    share: float = 0.0
    """What an example's own objective is multiplied by where it is differentiated, in the pass under way: 1 / examples
    of this process's batch, times the scale of float16. 0 where it is not known: in somebody else's loop."""
    steps_per_epoch: int = 0
    """Steps of an epoch that visits every example; 0 where it is not known."""
    learning_rate: float = 0.0
    """The learning rate of the step under way, of the optimizer's first group; 0 where it is not known."""
    optimizer: torch.optim.Optimizer = None  # type: ignore[assignment]
    """What turns gradients into updates, from the first step on."""
    timed: bool = False
    """Whether anything has read `progress`: then a run that goes on must keep its number of steps."""
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of the layers that a method's `watches` names, by layer name, of the forward pass under way."""
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    ask: Ask = None  # type: ignore[assignment]
    """The plain oracle (loss and penalties, no gradient method), for starts that need a gradient."""
    call: Callable[[nn.Module, Any], Any] = lambda model, inputs: model(inputs)
    """call(model, inputs) -> output: how this task runs the model."""
    misfit: Misfit = _no_misfit
    calibration: Callable[[int], Iterator[Batch]] = _no_calibration
    """calibration(count) yields that many batches of training data, always the same ones."""
    evaluate: Callable[[nn.Module], float] = _no_validation
    """evaluate(model) -> mean misfit on the validation set; lower is better."""
    validate: Callable[[nn.Module, int | None], Tensor] = _no_validation
    """validate(model, n) -> mean misfit on the n-th batch of the validation set, or on all of it where n is None, to be
    differentiated."""
    examples: int = 0
    """How many examples the training set holds; 0 where it is not known."""
    methods: Sequence[Method] = ()
    """The methods of the run, for those that tune others."""
    tuned: dict[schedule.Tuned, Any] = field(default_factory=dict)
    """The numbers that are tuned: floats, or tensors where the objective is differentiated in them."""

    @property
    def progress(self) -> float:
        """The part of the run that lies behind, in [0, 1]."""
        self.timed = True
        return min(self.step / max(self.steps, 1), 1.0)

    @property
    def resting(self) -> bool:
        """Whether some weights of the run's optimizer are left out of this step, as where layers take turns."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return not all(p.requires_grad for group in groups for p in group["params"])

    def trained(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights that the run trains, by name: also those that rest in this step."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        stepped = {id(p) for group in groups for p in group["params"]}
        for name, p in model.named_parameters():
            if p.requires_grad or id(p) in stepped:
                yield name, p

    def at(self, value: float | schedule.Schedule) -> float:
        """Return a field's number at this point of the run."""
        if isinstance(value, schedule.Tuned):
            number: float = self.tuned.get(value, value.start)
            return number
        return schedule.at(value, self.progress) if isinstance(value, schedule.Schedule) else value

    def of(self, method: Method) -> dict[str, Tensor]:
        """Return the memory of `method`: a dict of tensors that survives a checkpoint."""
        return self.memory.setdefault(repr(method), {})


def sentence(cls: type, problem: ValidationError) -> str:
    """Return the first problem that pydantic found as one sentence: method, field, value, range, cure."""
    error = problem.errors(include_url=False)[0]
    where = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "float", "Schedule"))]
    name, given, kind = ".".join(where) or "?", error.get("input"), error["type"]
    if kind == "unexpected_keyword_argument":
        known = [f.name for f in fields(cls)]
        return f"{cls.__name__} has no field '{name}'{did_you_mean(name, known)}."
    if kind in ("tuple_type", "too_long") or (kind == "missing" and len(where) > 1):
        default = next((f.default for f in fields(cls) if f.name == where[0]), None)
        such = f" such as {list(default)}" if isinstance(default, tuple) else ""
        return f"{cls.__name__}.{where[0]} must be a list{such}, not {given!r}."
    if kind in ("missing", "missing_keyword_only_argument"):
        return f"{cls.__name__} needs its field '{name}'."
    if kind == "unexpected_positional_argument":
        first = [f.name for f in fields(cls) if f.name != "where"][:1] or ["where"]
        return f"{cls.__name__} takes its fields by name, as in {cls.__name__}({first[0]}=...)."
    if kind == "string_type":
        names = isinstance(given, list | tuple) and all(isinstance(part, str) for part in given)
        cure = f": join the names, as in {'|'.join(given)!r}" if names and given else ""
        return f"{cls.__name__}.{name} must be a text, not {given!r}{cure}."
    if isinstance(inner := error.get("ctx", {}).get("error"), BadInput):
        return f"{cls.__name__}.{name}: {inner}" if where else str(inner)
    if kind.startswith(("int_", "float_")) and kind not in ("int_parsing_size",):
        return f"{cls.__name__}.{name} must be a {'whole ' if kind.startswith('int') else ''}number, not {given!r}."
    rule = error["msg"].removeprefix("Value error, ").removeprefix("Input should ")
    rule = rule if rule.startswith(("must", "be")) else f"must {rule}"
    rule = f"must {rule}" if rule.startswith("be") else rule
    return f"{cls.__name__}.{name} {rule}, not {given!r}."


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def method(cls: type[T]) -> type[T]:
    """Make a class a method: a frozen dataclass whose fields are validated, taken by keyword, and shown by `repr`.

    >>> @method
    ... class Shrink(Method):
    ...     strength: float = 0.1
    >>> Shrink(strength=0.2)
    Shrink(strength=0.2)
    """
    made = validated(
        frozen=True,
        kw_only=True,
        repr=False,
        config=ConfigDict(arbitrary_types_allowed=True, defer_build=True, extra="forbid"),
    )(cls)
    validate = made.__init__

    def __init__(self: Any, *positional: Any, **given: Any) -> None:
        try:
            validate(self, *positional, **given)
        except ValidationError as problem:
            raise BadInput(sentence(type(self), problem)) from None
        else:
            for name, value in given.items():
                if isinstance(value, bool) and value is not getattr(self, name, value):  # it was taken for 0 or 1
                    raise BadInput(f"{type(self).__name__}.{name} must be a number, not {value!r}.")
        finally:
            # Pydantic builds its validator at the first use of a class, and puts its own __init__ back as it does.
            made.__init__ = __init__  # type: ignore[method-assign]

    made.__init__ = __init__  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


@method
class Method:
    """One published idea. `where` names the layers or weights it acts on: a regular expression that must match a whole
    dotted name or its end ("q_proj", "layers.0.*", "q_proj|v_proj"); ".*" is all that the method is defined for.
    """

    where: str = ".*"

    key: ClassVar[str] = ""
    """The key in the catalogue."""
    after: ClassVar[tuple[str, ...]] = ()
    """Names of method classes, one of which must stand before this one in the list."""
    excludes: ClassVar[tuple[str, ...]] = ()
    """Names of method classes that cannot share a recipe with this one."""
    idle: ClassVar[dict[str, float]] = {"strength": 0, "smoothing": 0, "variance": 0, "lr": 0}
    """Values of fields at which the method changes nothing: a recipe that gives one throughout is refused."""
    remembers: ClassVar[bool] = False
    """Whether it keeps something for each example, told apart by the positions of `Batch.index`."""
    freezes: ClassVar[bool] = False
    """Whether it freezes and thaws weights in the course of a run, which several processes must be told."""
    reads: ClassVar[str] = ""
    """With what the names of inputs begin that it reads and the model does not know; "" for none."""
    watches: ClassVar[str] = ""
    """Layers whose outputs `now.features` must hold during a forward pass: "" none, "where" the field `where`."""

    # data
    def examples(self, order: Tensor, now: Now) -> Tensor:
        """Choose which examples the coming epoch visits: positions [n] -> positions [m]."""
        return order

    def batch_size(self, size: int, now: Now) -> int:
        """Choose how many examples the coming step takes: size -> size."""
        return size

    def batch(self, batch: Batch, now: Now) -> Batch:
        """Weigh or mix the examples of a batch."""
        return batch

    # parametrize, initialize, forward
    def parametrize(self, model: nn.Module) -> None:
        """Choose what is trained: make weights a function of it."""

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Choose where training starts; `now.calibration` and `now.ask` give data and gradients."""

    def forward(self, model: nn.Module, now: Now) -> None:
        """Attach to the model what changes its activations; read `now` at every pass."""

    # loss, penalty
    def loss(self, misfit: Misfit) -> Misfit:
        """Wrap the misfit: add a term, or change the targets."""
        return misfit

    def penalty(self, model: nn.Module, now: Now) -> Tensor | float:
        """Return a scalar that is added to the objective."""
        return 0.0

    # gradient, step, constrain
    def gradient(self, ask: Ask) -> Ask:
        """Wrap the gradient oracle: clip, project, ask twice."""
        return ask

    def optimizer(self, named_parameters: Any) -> torch.optim.Optimizer:
        """Return the optimizer that turns gradients into updates."""
        raise NotImplementedError

    def rates(self, model: nn.Module, rule: torch.optim.Optimizer) -> dict[str, float]:
        """Return what the learning rates of weights are multiplied by, by name: 1 for those that are not named.

        A weight decay is divided by the same, so that what decays a weight, rate times decay, is as it was.
        """
        return {}

    def constrain(self, model: nn.Module, now: Now) -> None:
        """Restore what must hold after each step."""

    # finish, predict, measure
    def finish(self, model: nn.Module, now: Now) -> nn.Module:
        """Return a plain model: merge, average, prune, quantize."""
        return model

    def predict(self, predictor: Predictor) -> Predictor:
        """Wrap the predictor: adapt, calibrate, abstain."""
        return predictor

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return figures about the model and the run; training goes on bitwise as if it had not been called."""
        return {}

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Raise BadInput, in one sentence that names the cure, if this method cannot work here."""

    def __repr__(self) -> str:
        given = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


PLACES: dict[str, tuple[str, ...]] = {
    "data": ("examples", "batch_size", "batch"),
    "parametrize": ("parametrize",),
    "initialize": ("initialize",),
    "forward": ("forward",),
    "loss": ("loss",),
    "penalty": ("penalty",),
    "gradient": ("gradient",),
    "step": ("optimizer", "rates"),
    "constrain": ("constrain",),
    "finish": ("finish",),
    "predict": ("predict",),
    "measure": ("measure",),
}
"""The places of a step, in order, and the functions by which a method acts there."""


def places(kind: type[Method]) -> list[str]:
    """Return the places at which a class of methods acts, derived from what it overrides."""
    return [
        place
        for place, names in PLACES.items()
        if any(getattr(kind, name) is not getattr(Method, name) for name in names)
    ]
