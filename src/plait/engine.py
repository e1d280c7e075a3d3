"""What the loop stands on: devices, precision, sharding, the order of examples. accelerate does the work."""

from __future__ import annotations

import atexit
import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plait import sharding
from plait.batch import Batch, are_probabilities, tree_map, weighted_sum
from plait.errors import BadInput
from plait.layers import evaluating, hooked, layers
from plait.loss.base import cross_entropy, squared_error
from plait.math.packed import Packed, quantized_elsewhere
from plait.method import Method, Misfit, Now
from plait.parametrize.freeze import trainable
from plait.passes import without_what_methods_read
from plait.rates import multiply_rates, scales_of
from plait.sampler import Sampler
from plait.schedule import Schedule
from plait.shapes import naming_the_layer
from plait.unreached import Unreached


class Pairs:
    """Data from a pair of tensors (inputs, targets), or inputs as a dict of tensors."""

    def __init__(self, inputs: Any, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets
        tree_map(self._require_as_many, inputs)

    def _require_as_many(self, inputs: Tensor) -> Tensor:
        if inputs.shape[:1] != self.targets.shape[:1]:
            shapes = f"inputs of shape {tuple(inputs.shape)} and targets of shape {tuple(self.targets.shape)}"
            raise BadInput(f"the data has {shapes}: give one target for each input.")
        return inputs

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, positions: Tensor) -> Batch:
        """Return the examples at those positions."""
        return Batch.of(tree_map(lambda t: t[positions], self.inputs), self.targets[positions], positions)


def as_data(data: Any, name: str = "training") -> Any:
    """Return data with `len` and `batch(positions)`, from what a user is likely to have."""
    if hasattr(data, "batch") and hasattr(data, "__len__"):
        made = data
    elif isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        made = Pairs(*data)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | Tensor | dict):
        if len(data) == 0:
            raise BadInput(f"the {name} data is empty: give at least one example.")
        rows = [data[i] for i in range(len(data))]
        if not all(isinstance(row, tuple | list) and len(row) == 2 for row in rows):
            raise BadInput(f"the {name} data is a sequence: it must hold (input, target) pairs of tensors or numbers.")
        made = Pairs(
            torch.stack([torch.as_tensor(x) for x, _ in rows]), torch.stack([torch.as_tensor(y) for _, y in rows])
        )
    else:
        raise BadInput(
            f"the {name} data must be (inputs, targets) tensors, a sequence of pairs, or have len and "
            f"batch(positions), not {type(data).__name__}."
        )
    if len(made) == 0:
        raise BadInput(f"the {name} data is empty: give at least one example.")
    return made


def default_loss(data: Any) -> Misfit:
    """Return cross entropy for whole-number targets and for rows of probabilities, squared error for other real ones.

    Rows [n, classes] of at least two numbers are probabilities if the first 64 are not negative and each sums to 1.
    """
    target = data.batch(torch.arange(min(len(data), 64))).target
    if target.dtype == torch.bool:
        raise BadInput("the targets are true and false: give them as whole numbers for classes, or as real numbers.")
    return cross_entropy if not target.is_floating_point() or are_probabilities(target) else squared_error


def _is_misfit(loss: Any) -> bool:
    """Say whether it can be called with (output, target, now): torch's own losses take other arguments."""
    if isinstance(loss, nn.Module) or str(getattr(loss, "__module__", "")).startswith("torch."):
        return False
    with contextlib.suppress(ValueError):  # some built in functions have no signature to look at
        try:
            inspect.signature(loss).bind(None, None, None)
        except TypeError:
            return False
    return True


def _named(given: Any) -> str:
    return str(getattr(given, "__name__", repr(given)))


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, or on a dict by keyword; return the logits of what transformers' models return."""

    def run() -> Any:
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)

    with naming_the_layer(model, run):
        output = run()
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        raise BadInput(
            f"{type(model).__name__} returns {len(output)} things: say which is the output, as in "
            "call=lambda model, inputs: model(inputs)[0]."
        )
    return output if logits is None else logits


def check(model: nn.Module, methods: Sequence[Method]) -> None:
    """Refuse, before any training, methods that cannot work on this model or together."""
    from plait.recipe import check as check_methods

    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise BadInput(f"the model must be an nn.Module, not {given}.")
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise BadInput(f"{type(model).__name__} has lazy layers without a size yet: run it once on a batch first.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise BadInput(f"'{name}' is on the meta device: load the model's weights before training.")
    if isinstance(methods, Method) or not isinstance(methods, Sequence):
        raise BadInput(f"methods must be a list, as in methods=[LoRA(rank=8)], not {methods!r}.")
    check_methods(list(methods), model)


def check_options(seed: int, device: str | None, **options: Any) -> None:
    """Refuse options of training that a recipe would refuse too, and a device that is not here."""
    from plait.recipe import Train

    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise BadInput(f"seed must be a whole number from 0 to {2**32 - 1}, not {seed!r}.")
    Train(device=device, **options)
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError):  # torch says each in its own way, at length
        raise BadInput(
            f"there is no device '{device}' here: give 'cpu', or 'cuda' on a machine that has one."
        ) from None


def rows_of_batch(order: Tensor, number: int | None, size: int) -> Tensor:
    """Return the rows of a batch of an order that is gone through again and again; all rows where there is no number.

    >>> rows_of_batch(torch.tensor([2, 0, 1]), 1, 2)
    tensor([1, 2])
    """
    if number is None:
        return order
    return order[torch.arange(number * size, (number + 1) * size)[: len(order)] % len(order)]


def optimizer_for(methods: Sequence[Method], model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the one method that has one, or AdamW with its defaults."""
    named = [(name, p) for name, p in model.named_parameters() if trainable(name, p, p.requires_grad)]
    if not named:
        raise BadInput(
            "nothing is trained: every parameter is frozen; drop the method that freezes, or add an adapter."
        )
    chosen = next((m for m in methods if type(m).optimizer is not Method.optimizer), None)
    if chosen is None:
        from plait.step.adam import AdamW

        chosen = AdamW()
    rule = chosen.optimizer(named)
    multiply_rates(rule, methods, model)
    return rule


@contextlib.contextmanager
def prepared(model: nn.Module, rule: torch.optim.Optimizer, methods: Sequence[Method], now: Now) -> Iterator[None]:
    """Set scheduled hyperparameters and clear gradients before a step."""
    schedule_rates(rule, methods, now)
    model.train()
    rule.zero_grad(set_to_none=True)
    yield


def schedule_rates(rule: torch.optim.Optimizer, methods: Sequence[Method], now: Now) -> None:
    """Set the hyperparameters that follow a schedule to what they are at this step; begin a round that is due."""
    if turn := getattr(rule, "turn", None):
        turn()
    scales = scales_of(rule)
    for m in [m for m in methods if type(m).optimizer is not Method.optimizer]:
        scheduled = {field: now.at(value) for field, value in vars(m).items() if isinstance(value, Schedule)}
        if scheduled.get("lr") == 0 and now.step == 0 and now.steps:
            _refuse_no_rate(m, now.steps)
        for group, scale in zip(rule.param_groups, scales, strict=True):
            group.update({field: value * scale.get(field, 1.0) for field, value in scheduled.items()})
    now.optimizer, now.learning_rate = rule, float(rule.param_groups[0].get("lr", 0.0)) / scales[0].get("lr", 1.0)


def _refuse_no_rate(m: Any, steps: int) -> None:
    """Refuse a run so short that its warmup, which begins at 0, never leaves 0."""
    if all(m.lr.at(step / steps) == 0 for step in range(steps)):
        raise BadInput(
            f"{type(m).__name__}.lr is 0 in all of {steps} step{'' if steps == 1 else 's'}: train longer, or leave out "
            "the warmup."
        )


def new_accelerator(device: str | None) -> Any:
    """Return an accelerator for devices and processes; precision is torch.autocast's, and so may change between runs.

    accelerate keeps one state for a process: what an earlier run or a host left there is forgotten if it is another's,
    but for the group of processes.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    held, cpu = AcceleratorState._shared_state, device == "cpu"
    if held and (held["_mixed_precision"] != "no" or bool(held["_cpu"]) != cpu):
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    made = Accelerator(mixed_precision="no", cpu=cpu or None)
    if made.num_processes > 1:
        atexit.unregister(sharding.part)
        atexit.register(sharding.part)
    return made


class Engine:
    """Devices, precision and processes, through accelerate."""

    def __init__(
        self,
        *,
        seed: int = 0,
        device: str | None = None,
        precision: str = "float32",
        sharding_by: str = "none",
        call: Callable[[nn.Module, Any], Any] | None = None,
        accelerator: Any = None,
        methods: Sequence[Method] = (),
    ) -> None:
        from accelerate.utils import set_seed

        self.hosted = accelerator is not None
        if accelerator is None:  # a host such as transformers' Trainer brings its own, and has set its seed
            set_seed(seed)
            accelerator = new_accelerator(device)
        self.seed, self.sharding, self.accelerator = seed, sharding_by, accelerator
        self.lower: torch.dtype | None = None if precision == "float32" else getattr(torch, precision)
        self.scale, self.batch_size = 1.0, 0
        self.unreached, self.processes = Unreached(), accelerator.num_processes
        self.device = torch.device(device) if device else accelerator.device
        self.call = without_what_methods_read(call or call_model, methods)

    # -- what train reads, in order --------------------------------------------------------------------------------
    def start(
        self, model: nn.Module, data: Any, loss: Misfit | None, steps: int, batch_size: int, validation: Any
    ) -> Now:
        """Return the `now` of the first step."""
        if loss is not None and not callable(loss):
            raise BadInput(f"loss must be a function (output, target, now) -> misfit per example, not {loss!r}.")
        if loss is not None and not _is_misfit(loss):
            raise BadInput(
                f"loss must be a function (output, target, now) -> misfit per example, not {_named(loss)}: wrap it, as "
                "in lambda output, target, now: F.cross_entropy(output, target, reduction='none')."
            )
        self.batch_size = batch_size
        now = Now(steps=steps, model=model, generator=torch.Generator().manual_seed(self.seed))
        now.call, now.misfit = self.call, loss or default_loss(data)
        now.steps_per_epoch, now.examples = -(-len(data) // batch_size), len(data)
        watched: Any = None if validation is None else as_data(validation, "validation")

        def calibration(count: int) -> Iterator[Batch]:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.seed + 7919))
            for number in range(count):
                rows = torch.arange(number * batch_size, (number + 1) * batch_size) % len(order)
                yield self.batch(data, order[rows[: max(len(order), 1)]])

        def evaluate(candidate: nn.Module) -> float:
            return self.evaluate(candidate, watched, loss or default_loss(watched), now, batch_size)

        def validate(candidate: nn.Module, number: int | None) -> Tensor:
            order = torch.randperm(len(watched), generator=torch.Generator().manual_seed(self.seed + 104_729))
            batch = watched.batch(rows_of_batch(order, number, batch_size)).to(self.device)
            with evaluating(candidate):
                misfit = (loss or default_loss(watched))(self.call(candidate, batch.inputs), batch.target, now)
            mean: Tensor = weighted_sum(misfit, batch.weight) / batch.mass().clamp_min(1e-12)
            return mean

        now.calibration = calibration
        if validation is not None:
            now.evaluate, now.validate = evaluate, validate
        return now

    def place(self, model: nn.Module) -> None:
        """Move the model to the device."""
        model.to(self.device)

    def distribute(self, model: nn.Module, compile: bool, methods: Sequence[Method] = ()) -> nn.Module:
        """Return the model as it is called: compiled, and wrapped for several processes where there are several."""
        if self.sharding != "none":
            self.skeleton = sharding.skeleton(model)
            sharding.shard(model)
        called: nn.Module = torch.compile(model) if compile else model  # type: ignore[assignment]
        if self.sharding != "none":
            return called
        if held := [name for name, p in model.named_parameters() if isinstance(p, Packed) or quantized_elsewhere(p)]:
            # Every process has quantized the same weights alike: there is nothing to send.
            model._ddp_params_and_buffers_to_ignore = held  # type: ignore[assignment]
        if self.processes > 1 and any(m.freezes for m in methods):
            from accelerate.utils import DistributedDataParallelKwargs

            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        return self.accelerator.prepare(called) if self.processes > 1 else called

    def sampler(self, count: int, batch_size: int, methods: Sequence[Method]) -> Sampler:
        """Return the order of examples."""
        return Sampler(count, batch_size, self.seed, methods)

    def batch(self, data: Any, positions: Tensor) -> Batch:
        """Return this process's share of a batch, on the device; where it has none, an example that counts 0."""
        share = positions[self.accelerator.process_index :: self.processes]
        made: Batch = data.batch(share if len(share) else positions[:1]).to(self.device)
        return made if len(share) else made.uncounted()

    def micro_batches(self, examples: int, accumulate: int) -> int:
        """Return in how many parts to work through that many examples: a batch that has grown takes more of them."""
        share = -(-self.batch_size // self.processes)
        return accumulate * (-(-examples // share) if share else 1)

    def parts(self, batch: Batch, accumulate: int) -> list[tuple[Batch, float]]:
        """Return a batch's micro-batches, each with its share of the examples.

        Of a sharded model every pass is one of all processes: one that has fewer parts than others repeats one that
        counts 0.
        """
        split = batch.split(self.micro_batches(len(batch), accumulate))
        own = [(part, len(part) / len(batch)) for part in split]
        if self.sharding != "none":
            counts = sharding.gather(torch.tensor(len(own), device=self.device))
            own += [(own[0][0].uncounted(), 0.0)] * (max(map(int, counts)) - len(own))
        return own

    def total(self, mass: Tensor) -> Tensor:
        """Return the sum of the masses of all processes, never 0."""
        whole = self.accelerator.reduce(mass, "sum") if self.processes > 1 else mass
        return whole.clamp_min(torch.finfo(torch.float32).tiny)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over processes."""
        return self.accelerator.reduce(value, "mean") if self.processes > 1 else value

    def synchronized(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients between processes only at the last micro-batch; autocast where precision is mixed."""
        stack = contextlib.ExitStack()
        if self.sharding != "none":
            sharding.synchronize_gradients(model, last)
        elif self.processes > 1 and not last:
            stack.enter_context(self.accelerator.no_sync(model))
        if self.hosted:
            stack.enter_context(self.accelerator.autocast())
        elif self.lower is not None:
            stack.enter_context(torch.autocast(self.device.type, self.lower))
        return stack

    @contextlib.contextmanager
    def watching(self, model: nn.Module, methods: Sequence[Method], now: Now) -> Iterator[None]:
        """Fill `now.features` with the outputs of the layers that methods watch, during a forward pass."""
        patterns = {m.where if m.watches == "where" else m.watches for m in methods if m.watches}

        def keep(_: nn.Module, __: Any, output: Any, name: str) -> None:
            now.features[name] = output[0] if isinstance(output, tuple) else output

        watched = [found for pattern in sorted(patterns) for found in layers(self.plain(model), pattern, nn.Module)]
        try:
            with hooked(layer.register_forward_hook(partial(keep, name=name)) for name, layer in watched):
                yield
        finally:
            now.features = {}

    def plain(self, model: nn.Module) -> nn.Module:
        """Return the model without wrappers, with its own names."""
        wrapped = self.processes > 1 and self.sharding == "none"
        return self.accelerator.unwrap_model(model) if wrapped else getattr(model, "_orig_mod", model)

    def backward(self, objective: Tensor) -> None:
        """Add the gradient of the objective, times `scale`, to `.grad`."""
        self.accelerator.backward(objective if self.scale == 1 else objective * self.scale)

    def whole(self, model: nn.Module) -> nn.Module:
        """Return the model with all its weights on this process."""
        return model if self.sharding == "none" else sharding.whole(model, self.skeleton)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Any, loss: Misfit, now: Now, batch_size: int) -> float:
        """Return the mean of a loss over a data set, in evaluation mode; nothing about the run changes."""
        total, mass = 0.0, 0.0
        with evaluating(model):
            for start in range(0, len(data), batch_size):
                batch = data.batch(torch.arange(start, min(start + batch_size, len(data)))).to(self.device)
                misfit = loss(self.call(model, batch.inputs), batch.target, now)
                total, mass = total + float(weighted_sum(misfit, batch.weight)), mass + float(batch.mass())
        return total / max(mass, 1e-12)
