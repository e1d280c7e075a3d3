"""Update rules compiled for the CPU: one pass over each weight, its gradient and its states, in place.

The kernel's source is made from the rule's own text (`plait.math.kernel_source`). It is written to the user's cache
folder, so that numba keeps the machine code too and only the first process that uses a rule compiles it. Scalars are
arguments: no number recompiles anything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch

from plait.cache import cache_folder
from plait.math.kernel_source import Layout, source
from plait.math.storage import BLOCK
from plait.math.threads import pool
from plait.math.update_rule import UpdateRule

Kernel = Callable[[Any, Any], None]
"""kernel(items, scalars): items [n, 4 + addresses] of int64 (row of scalars, count, width, index of the first element,
addresses), scalars [rows, 3 + names] of float64 (rate, sign of the gradient, random key, the rule's own)."""

CHUNK = 1 << 18
"""Elements that one thread takes at a time from a tensor; a rule that looks at whole tensors takes them whole."""
SMALL = 1 << 16
"""Steps over fewer elements than this are not worth a second thread."""


def kernel_folder() -> Path:
    """Return the folder of compiled kernels, or, where it cannot be written, one that lasts as long as the process."""
    folder = cache_folder() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="plait-kernels-"))


_COMPILED: dict[tuple[UpdateRule, Layout], Kernel | None] = {}
_LOCK = threading.Lock()


def kernel(rule: UpdateRule, name: str, layout: Layout | None = None) -> Kernel | None:
    """Return a rule's kernel, compiled now or before; None, with one notice, where numba cannot be used."""
    layout = layout or Layout()
    with _LOCK:
        if (rule, layout) not in _COMPILED:
            missing = unusable("numba")
            if missing and None not in _COMPILED.values():
                slower = "optimizers run as plain torch loops, several times slower on a CPU"
                warnings.warn(f"{missing}: {slower}; pip install numba.", stacklevel=2)
            _COMPILED[rule, layout] = None if missing else _load(source(rule, name, layout, _version()), name).run
        return _COMPILED[rule, layout]


def unusable(compiler: str) -> str:
    """Return why a compiler cannot be used, empty where it can: an installed one may refuse this NumPy or Python."""
    if importlib.util.find_spec(compiler) is None:
        return f"{compiler} is not installed"
    try:
        importlib.import_module(compiler)
    except ImportError as problem:
        return f"{compiler} cannot be imported ({problem})"
    return ""


@cache
def _version() -> str:
    """Return what changes with the functions that kernels call: numba looks at the kernel's own text only."""
    return hashlib.sha256(Path(__file__).with_name("kernel_functions.py").read_bytes()).hexdigest()[:16]


def load(text: str, name: str) -> ModuleType:
    """Return a module of that text, kept in the cache folder."""
    return _load(text, name)


def _load(text: str, name: str) -> ModuleType:
    """Write a module's text to the cache folder and import it from there."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = kernel_folder() / f"{name.lower()}_{digest}.py"
    if not path.exists() or path.read_text() != text:
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)
    specification = importlib.util.spec_from_file_location(f"plait_kernel_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # numba keeps machine code for functions of known modules only
    specification.loader.exec_module(module)
    return module


def pieces(item: tuple[int, ...], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Cut an item into items of whole rows and about `CHUNK` elements; sizes as of `Layout.sizes`."""
    row, count, width, first, *addresses = item
    step = max(CHUNK // width, 1) * width
    return [
        (
            row,
            min(step, count - begin),
            width,
            first + begin,
            *(
                address + (size * begin if size else 4 * begin // width * -(-width // BLOCK))
                for address, size in zip(addresses, sizes, strict=True)
            ),
        )
        for begin in range(0, count, step)
    ]


def launch(
    run: Kernel,
    items: list[tuple[int, ...]],
    scalars: list[tuple[float, ...]],
    *,
    whole: bool,
    sizes: Sequence[int] | None = None,
) -> None:
    """Run a kernel over tensors, on as many threads as torch uses; items and scalars as `Kernel` takes them.

    `whole` keeps each tensor on one thread, as a rule that needs norms must. sizes: bytes per element at each address,
    as of `Layout.sizes`; 4 at all of them if not given.
    """
    numbers = numpy.array(scalars, dtype=numpy.float64)
    threads = torch.get_num_threads()
    if threads == 1 or sum(item[1] for item in items) < SMALL:
        run(numpy.array(items, dtype=numpy.int64), numbers)
        return
    if not whole:
        sizes = sizes or [4] * (len(items[0]) - 4)
        items = [piece for item in items for piece in pieces(item, sizes)]
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for item in sorted(items, key=lambda item: -item[1]) if whole else items:
        lightest = loads.index(min(loads))
        shares[lightest].append(item)
        loads[lightest] += item[1]
    arrays = [numpy.array(share, dtype=numpy.int64) for share in shares if share]
    waiting = [pool(threads).submit(run, share, numbers) for share in arrays[1:]]
    run(arrays[0], numbers)
    for task in waiting:
        task.result()
