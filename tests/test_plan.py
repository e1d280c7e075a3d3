"""What is predicted before a run against what the run then measures, within 15 %."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.errors import BadInput
from plait.recipe import Recipe
from plait.workbench.local import run_one
from plait.workbench.plan import fit, parse_memory, plan, probe_apart
from plait.workbench.store import Job

RECIPES = {
    "a small CNN": "model: cnn\ndata: mnist\ntask: image-classification\ntrain: {steps: 8, batch_size: 192}\n",
    "a small Llama": "model: llama-tiny\ndata: {source: python-stdlib, rows: 60, length: 64}\n"
    "train: {steps: 8, batch_size: 24}\nmethods: [lora]\n",
    "an MLP": "model: mlp\ndata: digits\ntask: classification\ntrain: {steps: 8, batch_size: 1024, accumulate: 2}\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_prediction_holds_within_15_percent(name: str, tmp_path: Path) -> None:
    recipe = Recipe.parse(RECIPES[name])
    found = plan(recipe)
    job = Job(recipe, tmp_path / "run")
    run_one(job)
    seen = job.finished()
    assert seen is not None, job.failed()
    assert found["parameters"]["trained"] == seen["parameters"]["trained"]
    for part in ("weights", "gradients", "optimizer"):
        assert found["memory"][part] == seen["memory"][part]
    # "above" alone is not held: how much the allocator keeps differs by a quarter between two equal runs this small
    for part in ("activations", "peak"):
        assert found["memory"][part] == pytest.approx(seen["memory"][part], rel=0.15)


def test_sizes_of_memory() -> None:
    assert parse_memory("1.5GiB") == 1.5 * 2**30
    with pytest.raises(BadInput, match="--memory takes a size such as 8GB"):
        parse_memory("eight")
    with pytest.raises(BadInput, match="--memory takes a size such as 8GB"):
        parse_memory("8")  # bytes are never meant


def test_what_does_not_fit_comes_with_a_cure_that_fits() -> None:
    recipe = Recipe.parse("model: mlp\ndata: digits\ntrain: {steps: 8, batch_size: 64}\n")
    memory = {"loaded": 500e6, "above": 660e6, "peak": 1160e6, "per example": 10e6, "gradients": 5e6, "optimizer": 10e6}
    found = {
        "memory": memory,
        "batch": {"micro": 64, "size": 64, "accumulate": 1},
        "parameters": {"trained": 10, "model": 1000},
    }
    made = fit(recipe, found, int(900e6))
    assert made["says"] == "It does not fit in 900 MB: it needs about 1.16 GB, 260 MB more."
    # 900 - 500 - 20 MB that no batch size spares leave room for 38 examples: two micro-batches of 32
    assert made["change"][0].startswith("Set train.accumulate to 2: micro-batches of 32 examples")
    assert fit(recipe, found, int(2e9))["fits"]


def test_a_recipe_that_cannot_work_is_refused_by_the_probe(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no"):
        probe_apart(Recipe.parse("model: mlp\ndata: no-such-set\n"), 2)
