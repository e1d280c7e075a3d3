"""What a run's memory is made of, counted in bytes, and the true peak that the operating system saw."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def _inside(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield ordinary tensors: quantized ones (ours, torchao's) hold others, and nothing themselves."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            yield from _inside(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def _bytes_of(given: Iterable[Tensor]) -> int:
    """Return the bytes that tensors hold, each storage once."""
    tensors = list(_inside(given))
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"}
    meta = {id(t): t.numel() * t.element_size() for t in tensors if t.device.type == "meta"}
    return sum(held.values()) + sum(meta.values())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones once."""
    return _bytes_of([*model.parameters(), *model.buffers()])


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of the gradients that stand."""
    return _bytes_of([p.grad for p in model.parameters() if p.grad is not None])


def optimizer_bytes(rule: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state."""
    return _bytes_of([t for held in rule.state.values() for t in tree_leaves(held) if isinstance(t, Tensor)])


def _status(field: str) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def resident() -> int:
    """Return the bytes of this process that are in memory now."""
    now = _status("VmRSS")
    if now is not None:
        return now
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Return the most bytes of this process that were ever in memory, or since `forget_peak`."""
    kept = _status("VmHWM")
    if kept is not None:
        return kept
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _on_cuda() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())


def forget_peak() -> bool:
    """Start the peak anew from what is in memory now; say whether this system can."""
    if _on_cuda():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive, and their highest sum: what torch asked for.

    It sees every tensor that an operation returns, not the scratch room that a kernel takes and frees inside.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def mark(self) -> None:
        """Start the peak anew from what is alive now."""
        self.peak = self.live

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0 or tensor.device.type == "meta":
            return

        def leave(_: Any, key: int = key, size: int = size) -> None:
            if self._known.pop(key, None) is not None:
                self.live -= size

        self._known[key] = weakref.ref(storage, leave)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and enter what it returns that was not given to it."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = {t.untyped_storage()._cdata for t in _inside(given)}
        result = func(*args, **(kwargs or {}))
        for tensor in _inside(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if tensor.untyped_storage()._cdata not in before:
                self._enter(tensor)
        return result


class Saved:
    """Counts the bytes that a forward pass keeps for its backward pass, each storage once, parameters and buffers not.

    >>> layer, kept = nn.Linear(4, 4), Saved()
    >>> with kept.counting(layer):
    ...     output = layer(torch.zeros(8, 4)).tanh()
    >>> kept.bytes  # the input and the output of tanh, 8 x 4 numbers of 4 bytes each
    256
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._known: set[int] = set()

    @contextmanager
    def counting(self, model: nn.Module, inputs: Any = None) -> Iterator[None]:
        """Count what is saved by the operations inside, without the batch itself, if given."""
        batch = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        own = {t.untyped_storage()._cdata for t in _inside([*model.parameters(), *model.buffers(), *batch])}

        def pack(tensor: Tensor) -> Tensor:
            for held in _inside([tensor]):
                storage = held.untyped_storage()
                if storage._cdata not in own and storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.bytes += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield


@dataclass
class Memory:
    """Bytes of a run. `above` is the peak above what was resident with the model loaded, just before training.

    start: the part of `above` that was reached before the first step, while adapters were made and given their start.
    """

    loaded: int = 0
    peak: int = 0
    above: int = 0
    start: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the figures by name."""
        return asdict(self)


class Gauge:
    """Watches a training run from outside: the memory of its parts, the peak, the seconds of each step.

    `with Gauge(model) as gauge:` around
    `plait.train(model, gauge.data(data), call=gauge.call(call), on_step=gauge.on_step)`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.memory = model, Memory()
        self.seconds: list[float] = []
        """Seconds of each step, the first (which allocates and compiles) included."""
        self.rule_seconds: list[float] = []
        """Seconds that the optimizer took of each step."""
        self._saved, self._calls, self._handles, self._began = Saved(), 0, list[Any](), 0.0
        self._asked = 0.0
        self.start_seconds: float | None = None
        """Seconds from the loaded model to the first step: adapters made and given their start."""

    def __enter__(self) -> Gauge:
        from torch.optim import optimizer

        return_to_system()
        forget_peak()
        self.memory.loaded = resident()
        self._handles = [
            optimizer.register_optimizer_step_pre_hook(self._before_rule),
            optimizer.register_optimizer_step_post_hook(self._after_rule),
        ]
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self.memory.peak = peak_resident()
        if _on_cuda():
            self.memory.loaded, self.memory.peak = self.memory.weights, int(torch.cuda.max_memory_allocated())
        self.memory.above = max(0, self.memory.peak - self.memory.loaded)

    def _before_rule(self, rule: torch.optim.Optimizer, *_: Any) -> None:
        if not self.seconds:
            self.memory.weights = weight_bytes(self.model)
        self.memory.gradients = max(self.memory.gradients, gradient_bytes(self.model))
        self._asked = time.perf_counter()

    def _after_rule(self, rule: torch.optim.Optimizer, *_: Any) -> None:
        self.rule_seconds.append(time.perf_counter() - self._asked)
        self.memory.optimizer = max(self.memory.optimizer, optimizer_bytes(rule))

    def call(self, call: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
        """Return `call`, with what the first training pass keeps for its backward pass counted as activations."""

        def counted(model: nn.Module, inputs: Any) -> Any:
            if self._calls or not (model.training and torch.is_grad_enabled()):
                return call(model, inputs)
            self._calls += 1
            with self._saved.counting(model, inputs):
                output = call(model, inputs)
            self.memory.activations = self._saved.bytes
            return output

        return counted

    def on_start(self, now: Any) -> None:
        """Take the time and the peak of what lies before the first step."""
        self.start_seconds = time.perf_counter() - self._began
        peak = int(torch.cuda.max_memory_allocated()) if _on_cuda() else peak_resident()
        self.memory.start = max(0, peak - self.memory.loaded)

    def on_step(self, now: Any) -> None:
        """Take the time of a step."""
        ended = time.perf_counter()
        self.seconds.append(ended - self._began)
        self._began = ended

    def data(self, data: Any) -> Any:
        """Return the data, with the clock of a step started when its batch is asked for.

        What lies between two steps (a checkpoint, a point of the validation curve) is no part of either.
        """
        return _Clocked(data, self)

    def begin(self) -> None:
        """Start the clock of a step."""
        self._began = time.perf_counter()

    @property
    def seconds_per_step(self) -> float | None:
        """The median over all steps but the first."""
        later = sorted(self.seconds[1:] or self.seconds)
        return statistics.median(later) if later else None


class _Clocked:
    """A data set that tells a gauge when a batch is asked for."""

    def __init__(self, data: Any, gauge: Gauge) -> None:
        self._data, self._gauge = data, gauge

    def __len__(self) -> int:
        return len(self._data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def batch(self, positions: Tensor) -> Any:
        self._gauge.begin()
        return self._data.batch(positions)


def load_libraries(methods: Sequence[Any]) -> None:
    """Load what the first step of a run would load (libraries, compiled kernels): no part of a recipe's memory."""
    from plait.engine import optimizer_for

    with suppress(Exception), torch.random.fork_rng(devices=[]):  # without it the reading is less exact, no more
        layer = nn.Sequential(nn.Linear(64, 64))  # large enough for states in 8 bits
        rule = optimizer_for(methods, layer)
        loss: Tensor = nn.functional.cross_entropy(layer(torch.zeros(8, 64)), torch.zeros(8, dtype=torch.long))
        loss.backward()
        rule.step()


def return_to_system() -> None:
    """Give free room that the allocator keeps back to the system, so that what comes after is seen in full."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
