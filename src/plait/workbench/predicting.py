"""How well a finished model does as its methods predict at test time, where any do, and the score of each example."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from plait.method import Method, Now, Predictor
from plait.predict.base import predictor, probabilities, values
from plait.tasks.base import Task
from plait.workbench.scores import Scores, scores

Figures = dict[str, dict[str, float]]
"""Metrics by the name of the set."""


def metrics(task: Task, model: nn.Module) -> Figures:
    """Return the figures of a model that is simply called, on the test set and on another domain's if there is one."""
    return {name: task.metrics(model, data) for name, data in _sets(task).items()}


def judged(task: Task, methods: Sequence[Method], model: nn.Module, now: Now) -> tuple[Figures, list[float] | None]:
    """Return the figures of the finished model and the scores of the test examples, both from the same predictions.

    now: the run's own, with what its methods have seen. A method that learns from what it predicts begins anew with
    each set, on a copy of the model.
    """
    acting = [m for m in methods if type(m).predict is not Method.predict]
    if not acting:
        return metrics(task, model), scores(task, model)
    found, taken = Figures(), Scores(task)
    for name, data in _sets(task).items():
        seen = taken if name == "test" else Scores(task)
        own = replace(now, call=task.call, memory=copy.deepcopy(now.memory))
        base = values if task.name == "regression" else probabilities
        found[name] = task.metrics(copy.deepcopy(model), data, _scored(predictor(acting, base), own, seen))
    return found, taken.listed()


def _sets(task: Task) -> dict[str, Any]:
    return {"test": task.test} | ({"other": task.other} if task.other is not None else {})


def _scored(predict: Predictor, own: Now, seen: Scores) -> Predictor:
    """Return a predictor that works with the run's `now`, and scores what it predicts."""

    def predicting(model: nn.Module, inputs: Any, now: Now) -> Tensor:
        own.batch, own.model = now.batch, model
        output = predict(model, inputs, own)
        likely = output.float().clamp_min(torch.finfo(torch.float32).tiny)
        seen.take(likely.log() if seen.task.quality == "loss" else output, own.batch, own)
        return output

    return predicting
