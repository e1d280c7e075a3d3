"""Methods that act at test time, from a recipe: the figures and the scores are of the same predictions."""

from __future__ import annotations

from statistics import mean

import pytest
import torch

from plait.recipe import Recipe
from plait.workbench.predicting import judged
from plait.workbench.run import run_recipe

RECIPES = {
    "eata": "model: cnn\ndata: {source: digits, rows: 200}\nmethods: [{eata: {lr: 0.05}}]",
    "logit-norm-sc": "model: mlp\ndata: wine\nmethods: [logit-norm-sc]",
    "lora-dropout": "model: mlp\ndata: wine\nmethods: [{lora-dropout: {members: 3}}]",
    "de-elbo": "model: mlp\ndata: wine\nmethods: [{de-elbo: {center: zero}}]",
    "lora-bam": "model: mlp\ndata: wine\nmethods: [{lora: {rank: 2}}, {lora-bam: {clusters: 2}}]",
}


@pytest.mark.parametrize("key", RECIPES)
def test_the_headline_is_the_mean_of_the_scores(key: str) -> None:
    results = run_recipe(Recipe.parse(f"{RECIPES[key]}\ntrain: {{steps: 8, batch_size: 32}}"), quiet=True).results
    assert mean(results["scores"]) == pytest.approx(results["metrics"]["after"]["test"]["accuracy"], abs=1e-5)


def test_the_scores_of_a_language_model_are_in_the_order_of_the_set() -> None:
    text = "model: llama-tiny\ndata: {source: kjv, rows: 12, length: 16}\nmethods: [lora, lora-bam]\ntrain: {steps: 2}"
    results = run_recipe(Recipe.parse(text), quiet=True).results
    assert mean(results["scores"]) == pytest.approx(results["metrics"]["after"]["test"]["loss"], rel=1e-4)


def test_a_method_that_learns_at_test_time_leaves_the_finished_model_as_it_is() -> None:
    done = run_recipe(Recipe.parse(f"{RECIPES['eata']}\ntrain: {{steps: 8, batch_size: 32}}"), quiet=True)
    held = {name: value.clone() for name, value in done.model.state_dict().items()}
    figures, scores = judged(done.task, done.run.now.methods, done.model, done.run.now)
    assert all(torch.equal(value, held[name]) for name, value in done.model.state_dict().items())
    assert figures == done.results["metrics"]["after"]
    assert scores == done.results["scores"]
