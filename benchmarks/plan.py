"""What `plait plan` predicts beside what the run then measures: time per step and memory, on real models.

    OMP_NUM_THREADS=2 python benchmarks/plan.py [--rounds 3]

Each recipe is planned and then run, in turns, every probe and every run in a process of its own. The ratio is of the
medians over the rounds. Time is compared here and not in a test, where a busy machine would decide.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from plait.recipe import Recipe
from plait.workbench.local import run_one
from plait.workbench.plan import plan
from plait.workbench.store import Job

RESULTS = Path(__file__).parent / "results" / "plan.json"
RECIPES = {
    "MiniLM on tweets, LoRA": "model: minilm\ndata: {source: tweets, rows: 600}\ntrain: {steps: 20, batch_size: 32}\n"
    "methods: [{lora: {rank: 8}}, {adamw: {lr: 0.001}}]\n",
    "SmolLM2-135M on a book, LoRA": "model: smollm2-135m\ndata: {source: kjv, rows: 60, length: 128}\n"
    "train: {steps: 6, batch_size: 4}\nmethods: [{lora: {rank: 16, where: .*_proj}}, {adamw: {lr: 0.001}}]\n",
    "a CNN on digits": "model: cnn\ndata: mnist\ntask: image-classification\ntrain: {steps: 40, batch_size: 256}\n",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    pairs: dict[str, dict[str, list[list[float]]]] = {name: {} for name in RECIPES}
    for number in range(rounds):
        for name, text in RECIPES.items():
            recipe = Recipe.parse(text)
            with tempfile.TemporaryDirectory() as folder:
                found = plan(recipe)
                job = Job(recipe, Path(folder) / f"run{number}")
                run_one(job)
                seen: dict[str, Any] | None = job.finished()
            if seen is None:
                raise SystemExit(f"{name}: {job.failed()}")
            figures = {"seconds per step": [found["seconds"]["step"], seen["seconds"]["step"]]}
            figures |= {
                f"{k} memory": [found["memory"][k], seen["memory"][k]] for k in ("activations", "above", "peak")
            }
            for what, pair in figures.items():
                pairs[name].setdefault(what, []).append(pair)
    report = {
        "what": "predicted / measured, medians of the rounds",
        "machine": platform.machine(),
        "rounds": rounds,
        "ratios": {
            name: {what: round(median(p[0] for p in seen) / median(p[1] for p in seen), 3) for what, seen in of.items()}
            for name, of in pairs.items()
        },
        "seconds": {name: of["seconds per step"] for name, of in pairs.items()},
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
