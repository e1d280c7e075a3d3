"""Predict what a recipe will need before it is trained: parameters, memory by its parts, time per step.

Parameters, gradients and the optimizer's state are counted on the recipe's own model. What grows with the batch is
probed: a few throwaway steps on a quarter and on half of a micro-batch, each in a process of its own, give two points
of a line (a constant, and a share for each example) that is read at the whole micro-batch. Rows are padded as in the
whole micro-batch, so that a text costs in the probe what it will cost in the run.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plait.errors import BadInput
from plait.recipe import Recipe
from plait.workbench.progress import working
from plait.workbench.writing import Values, write_json

if TYPE_CHECKING:
    from plait.batch import Batch
    from plait.method import Now

STEPS = 7
"""Steps of a probe; the first is not timed."""
UNITS = {
    "": 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_memory(text: str) -> int:
    """Return bytes.

    >>> parse_memory("8GB"), parse_memory("512 MiB")
    (8000000000, 536870912)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS or float(found[1]) * UNITS[found[2].upper()] < 1e6:
        raise BadInput(f"--memory takes a size such as 8GB or 512MiB, not '{text}'.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def plan(recipe: Recipe, memory: int | None = None) -> Values:
    """Return the prediction for a recipe, and whether it fits in `memory` bytes and what to change if it does not."""
    micro = math.ceil(recipe.train.batch_size / recipe.train.accumulate)
    sizes = sorted({max(1, micro // 4), max(1, micro // 2)}) if micro > 1 else [1]
    if len(sizes) == 1 and micro > 1:
        sizes.append(2)
    probes = []
    for number, size in enumerate(sizes, 1):
        with working(f"{recipe.name}: probe {number} of {len(sizes)}, {STEPS} steps of {size} examples"):
            probes.append(probe_apart(recipe, size))
    found = predict(recipe, sizes, probes)
    if memory is not None:
        found["fit"] = fit(recipe, found, memory)
    return found


# -- the probe -----------------------------------------------------------------------------------------------------
class Padded:
    """A data set whose batches hold a few examples, padded as a whole micro-batch would be."""

    def __init__(self, data: Any, micro: int) -> None:
        self.data, self.micro = data, min(micro, len(data))
        self._generator = torch.Generator().manual_seed(7)

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, positions: Tensor) -> Batch:
        """Return the examples at those positions, cut from a whole micro-batch."""
        more = torch.randint(len(self.data), (max(0, self.micro - len(positions)),), generator=self._generator)
        made: Batch = self.data.batch(torch.cat([positions, more]))
        return made.take(slice(0, len(positions)))


def probe(recipe: Recipe, examples: int, steps: int = STEPS) -> Values:
    """Take a few steps on so many examples, on a model that is thrown away, and return what was counted."""
    import plait
    from plait.workbench.memory import Gauge, load_libraries
    from plait.workbench.run import load
    from plait.workbench.scores import Part

    task, methods = load(recipe), recipe.build()
    recipe.check(task.model)
    whole = sum(p.numel() for p in task.model.parameters())
    micro = math.ceil(recipe.train.batch_size / recipe.train.accumulate)
    task.metrics(task.model, Part(task.test, examples))  # a run does so too, before it trains
    load_libraries(methods)
    gauge = Gauge(task.model)
    options: Values = asdict(recipe.train) | {
        "batch_size": examples,
        "steps": recipe.train.steps * math.ceil(recipe.train.batch_size / examples),  # as many epochs
        "accumulate": 1,
        "save_every": 0,
        "measure_every": 0,
    }
    trained: list[int] = []
    processor = [time.process_time()]

    def on_step(now: Now) -> bool:
        gauge.on_step(now)
        processor.append(time.process_time())
        trained.append(sum(p.numel() for p in task.model.parameters() if p.requires_grad))
        return now.step >= steps

    with gauge:
        plait.train(
            task.model, gauge.data(Padded(task.train, micro)), task.loss, methods, **options,
            call=gauge.call(task.call), seed=recipe.seed, validation=task.validation, on_step=on_step,
        )  # fmt: skip
    return {
        "examples": examples,
        "memory": gauge.memory.as_dict(),
        "step": gauge.seconds[1:],
        "rule": gauge.rule_seconds[1:],
        "processor": [b - a for a, b in pairwise(processor[1:])],
        "trainable": trained[-1],
        "parameters": whole,
        "steps in an epoch": math.ceil(len(task.train) / recipe.train.batch_size),
    }


def probe_apart(recipe: Recipe, examples: int) -> Values:
    """Return what `probe` does, from a process of its own, whose memory holds nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "recipe.yaml", Path(folder) / "probe.json"
        recipe.write(path)
        command = [sys.executable, "-m", "plait.workbench.plan", str(path), str(examples), str(out)]
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if not out.exists():
            said = ended.stderr.strip().splitlines()
            if ended.returncode == -9:
                raise BadInput(
                    f"even a probe of {examples} examples does not fit in this machine's memory: use a smaller model, "
                    "or shorter examples (data.length)."
                )
            raise BadInput(f"the probe of {recipe.name} failed: {said[-1] if said else 'it said nothing'}.")
        found: Values = json.loads(out.read_text())
    if "error" in found:
        raise BadInput(found["error"])
    return found


# -- the prediction ------------------------------------------------------------------------------------------------
def line(sizes: Sequence[int], values: Sequence[float], at: float) -> float:
    """Return the value at `at` of the line through one or two points, with a slope of at least 0.

    >>> line([1, 2], [3.0, 5.0], 4)
    9.0
    """
    if len(sizes) == 1:
        return float(values[0])
    slope = max(0.0, (values[-1] - values[0]) / (sizes[-1] - sizes[0]))
    return float(values[-1] + slope * (at - sizes[-1]))


def predict(recipe: Recipe, sizes: Sequence[int], probes: Sequence[Mapping[str, Any]]) -> Values:
    """Return the figures at the whole micro-batch from those of the probes."""
    last, parts, batch = probes[-1], recipe.train.accumulate, recipe.train.batch_size
    micro = math.ceil(batch / parts)

    def memory(name: str, at: float = micro) -> float:
        return line(sizes, [float(p["memory"][name]) for p in probes], at)

    rule = median([s for p in probes for s in p["rule"]]) if last["rule"] else 0.0
    asked = line(sizes, [max(0.0, median(p["step"]) - rule) for p in probes], micro)
    busy = line(sizes, [max(0.0, median(p["processor"]) - rule) for p in probes], micro)
    loaded = median([p["memory"]["loaded"] for p in probes])
    return {
        "name": recipe.name,
        "parameters": {"model": last["parameters"], "trained": last["trainable"]},
        "memory": {
            "weights": last["memory"]["weights"],
            "gradients": last["memory"]["gradients"],
            "optimizer": last["memory"]["optimizer"],
            "activations": memory("activations"),
            "above": memory("above"),
            "loaded": loaded,
            "peak": loaded + memory("above"),
            "per example": memory("above", micro + 1) - memory("above"),
        },
        "seconds": {
            "step": parts * asked + rule,
            "processor": parts * busy + rule,
            "optimizer": rule,
            "run": recipe.train.steps * (parts * asked + rule),
        },
        "batch": {"size": batch, "accumulate": parts, "micro": micro, "probed": list(sizes)},
    }


def fit(recipe: Recipe, found: Mapping[str, Any], limit: int) -> Values:
    """Return whether a prediction fits in `limit` bytes, and what to change if it does not."""
    from plait.workbench.wording import megabytes

    m, batch = found["memory"], found["batch"]
    fits = m["peak"] <= limit
    if fits:
        left = megabytes(limit - m["peak"])
        return {
            "fits": True,
            "limit": limit,
            "says": f"It fits in {megabytes(limit)}, with {left} to spare.",
            "change": [],
        }
    over = m["peak"] - limit
    change = []
    fixed = m["above"] - m["per example"] * batch["micro"]
    room = limit - m["loaded"] - fixed
    if m["per example"] > 0 and room >= m["per example"] and batch["micro"] > 1:
        micro = int(room / m["per example"])
        parts = math.ceil(batch["size"] / micro)
        change.append(
            f"Set train.accumulate to {parts}: micro-batches of {math.ceil(batch['size'] / parts)} examples, the same "
            f"gradients, about {megabytes(m['loaded'] + fixed + m['per example'] * math.ceil(batch['size'] / parts))}."
        )
    trained, whole = found["parameters"]["trained"], found["parameters"]["model"]
    held = m["gradients"] + m["optimizer"]
    if trained > 0.5 * whole and held > 0.1 * over:
        change.append(
            f"Train an adapter (such as lora) in place of all weights: gradients and optimizer state take "
            f"{megabytes(held)}, an adapter's about a hundredth of that."
        )
    if m["per example"] * batch["micro"] > 0.1 * over and (recipe.data.length or 0) > 16:
        change.append(f"Shorten the examples: data.length is {recipe.data.length}, and activations grow with it.")
    if m["loaded"] > limit:
        change.append(f"The loaded model and libraries alone take {megabytes(m['loaded'])}: use a smaller model.")
    says = f"It does not fit in {megabytes(limit)}: it needs about {megabytes(m['peak'])}, {megabytes(over)} more."
    return {"fits": False, "limit": limit, "says": says, "change": change}


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the table for the terminal."""
    from plait.workbench.report import count, share
    from plait.workbench.wording import megabytes, seconds

    m, s, p = found["memory"], found["seconds"], found["parameters"]
    return [
        ["trained parameters", count(p["trained"]), share(p["trained"], p["model"])],
        *([name, megabytes(m[key]), says] for name, key, says in (
            ("weights", "weights", ""),
            ("gradients", "gradients", ""),
            ("optimizer state", "optimizer", ""),
            ("activations", "activations", f"of {found['batch']['micro']} examples at once"),
            ("above the loaded model", "above", "the peak while training"),
            ("peak", "peak", "the whole process: libraries, model, training"),
        )),
        ["time per step", seconds(s["step"]), f"of which the optimizer {seconds(s['optimizer'])}"],
        ["time of all steps", f"{s['run']:.0f} s", ""],
    ]  # fmt: skip


def main(recipe: str, examples: str, out: str) -> int:
    """Probe a recipe in this process and write what was counted."""
    from plait.workbench.worker import die_with_parent

    die_with_parent()
    try:
        found = probe(Recipe.read(recipe), int(examples))
    except BadInput as problem:
        found = {"error": str(problem)}
    write_json(Path(out), found)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
