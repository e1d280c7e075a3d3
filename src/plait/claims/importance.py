"""Claims of holding weights by their importance: upright digits are learned first, turned ones after them."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from plait.claims.base import claim
from plait.claims.parametrize import Task, accuracy_on_both, digits, fit, network, rotated
from plait.method import Method
from plait.penalty.importance import HierarchicalImportance
from plait.penalty.norm import L2SP

STRENGTHS, PULLS = (0.1, 1.0, 10.0, 100.0, 1000.0), (1e-3, 1e-2, 0.1, 1.0, 10.0)


@functools.cache
def _general(seed: int) -> tuple[nn.Module, str]:
    """Return a network that learned upright digits, and the file that says what mattered."""
    file = str(Path(tempfile.mkdtemp(prefix="plait-claim-")) / "importance.safetensors")
    images, labels = digits()
    record = HierarchicalImportance(phase="record", file=file)
    return fit(network(seed), (images[:1000], labels[:1000]), [record], 300, 3e-3, seed), file


def _on_both(seed: int, penalties: Sequence[Method]) -> float:
    """Return the accuracy on turned and upright digits, at the penalty that is best for both on other digits."""
    task, general = Task(rotated, 300, 200, seed), _general(seed)[0]
    models = [fit(copy.deepcopy(general), task.train, [m], task.steps, 3e-3, seed) for m in penalties]
    return accuracy_on_both(models, task)


@claim(
    "hlora-forget",
    says="a network that learned upright digits and then turned ones reads both better if what mattered is held",
    baseline="L2-SP, which holds all weights alike, its strength chosen from as many values on the same digits",
    figure="mean accuracy on held-out turned and upright digits",
    better="higher",
)
def importance_beats_uniform_pull(seed: int) -> tuple[float, float]:
    """300 steps on 1000 upright digits, then 200 on 300 turned ones, all weights trained."""
    file = _general(seed)[1]
    ours = _on_both(seed, [HierarchicalImportance(file=file, strength=s) for s in STRENGTHS])
    return ours, _on_both(seed, [L2SP(strength=s) for s in PULLS])
