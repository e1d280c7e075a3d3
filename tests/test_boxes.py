"""LoRA-BAM: boxes against a slow definition, in a recipe, with paraphrases, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plait
from laws import MODELS
from plait.errors import BadInput
from plait.finish.fold import Fold
from plait.initialize.activation_svd import EVA
from plait.initialize.gradient_svd import LoRAGA
from plait.initialize.sensitivity import SPT
from plait.method import Now
from plait.parametrize.low_rank import LoRA
from plait.parametrize.module_selection import DiffoRA
from plait.predict.base import predictor, probabilities
from plait.predict.boxes import LoRABAM, boxes, clusters, margin
from plait.recipe import Recipe


def slow_margin(x: Tensor, low: Tensor, high: Tensor, deviation: Tensor) -> float:
    """The smallest enlargement, found by trying, at which the definition calls x inside."""

    def inside(enlargement: float) -> bool:
        return any(
            all(
                low[k, j] - enlargement * deviation[k, j] <= x[j] <= high[k, j] + enlargement * deviation[k, j]
                for j in range(len(x))
            )
            for k in range(len(low))
        )

    if inside(0.0):
        return 0.0
    small, large = 0.0, 1e4
    for _ in range(60):
        middle = (small + large) / 2
        small, large = (small, middle) if inside(middle) else (middle, large)
    return large


def test_margins_are_those_of_the_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    points, others = torch.randn(40, 3, generator=draw).double(), 2 * torch.randn(25, 3, generator=draw).double()
    chosen = clusters(points, 4, torch.Generator().manual_seed(1))
    made = boxes(points, chosen)
    assert margin(points, *made).max() == 0
    expected = [slow_margin(x, *made) for x in others]
    torch.testing.assert_close(margin(others, *made), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    assert sum(value > 0 for value in expected) > 0


def test_clusters_are_a_fixed_point_and_never_more_than_the_different_points() -> None:
    points = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    points[:20] += 10
    points[20:40] -= 10
    chosen = clusters(points, 3, torch.Generator().manual_seed(2))
    centres = torch.stack([points[chosen == k].mean(0) for k in range(3)])
    assert torch.equal(torch.cdist(points, centres).argmin(1), chosen)
    assert len(chosen[:20].unique()) == len(chosen[20:40].unique()) == 1
    twice = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    assert len(clusters(twice, 3, torch.Generator().manual_seed(0)).unique()) == 2
    low, high, deviation = boxes(torch.tensor([[0.0], [3.0], [4.0]]), torch.tensor([0, 1, 1]))
    assert low.tolist() == [[0.0], [3.0]]
    assert high.tolist() == [[0.0], [4.0]]
    spread = torch.tensor([0.0, 3.0, 4.0]).std(correction=0).item()
    assert deviation.flatten().tolist() == pytest.approx([spread, 0.5])  # one point has the deviation of all


def trained(**fields: Any) -> tuple[Any, LoRABAM, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    monitor = LoRABAM(**{"clusters": 3, **fields})
    run = plait.train(model, (x, (x[:, 0] > 0).long()), methods=[LoRA(rank=2), monitor, Fold()], steps=6, batch_size=20)
    return run, monitor, x


def test_in_a_recipe_the_folded_model_keeps_its_boxes_and_outsiders_lose_their_confidence() -> None:
    run, monitor, x = trained()
    assert set(run.model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    far = torch.cat([x[:4], 50 * x[4:8]])
    torch.testing.assert_close(monitor.margins(run.model, x, Now()), torch.zeros(60), rtol=0, atol=1e-4)
    outside = monitor.outside(run.model, far, Now())  # the workbench asks with a `now` of its own
    assert outside.tolist() == [False] * 4 + [True] * 4
    plain, guarded = probabilities(run.model, far, Now()), predictor([monitor])(run.model, far, Now())
    assert torch.equal(guarded[:4], plain[:4])
    assert torch.equal(guarded.argmax(-1), plain.argmax(-1))
    assert guarded[4:].amax() < 1 / 3 + 1e-3
    torch.testing.assert_close(guarded.sum(-1), torch.ones(8))
    moved = copy.deepcopy(run.model)
    assert torch.equal(monitor.margins(moved, far, Now()), monitor.margins(run.model, far, Now()))
    wide = LoRABAM(clusters=3, enlargement=1e6)
    assert not wide.outside(run.model, far, Now()).any()


def test_the_features_are_the_mean_outputs_of_the_last_adapted_layers_over_real_tokens() -> None:
    build, data = MODELS["bert"]
    model, inputs = build().eval(), data()[0]
    LoRA(rank=2, where="query|value").parametrize(model)
    monitor, now = LoRABAM(layers=2), Now(call=lambda model, inputs: model(**inputs).logits)
    names = monitor.monitored(model)
    assert names == [f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "value")]
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, i, out, name=name: seen.update({name: out}))
    made = monitor.features(model, inputs, now, names)
    for row, mask in enumerate(inputs["attention_mask"]):
        expected = torch.cat([seen[name][row, mask.bool()].mean(0) for name in names])
        torch.testing.assert_close(made[row], expected, rtol=1e-4, atol=1e-6)


def test_the_penalty_draws_paraphrases_together() -> None:
    build, data = MODELS["paraphrased"]
    (inputs, target), distances = data(), {}
    for strength in (0.0, 30.0):
        monitor = LoRABAM(strength=strength, layers=2)
        methods = [LoRA(rank=4, where="query|value"), monitor, plait.AdamW(lr=1e-2)]
        run = plait.train(build(), (inputs, target), methods=methods, steps=15, batch_size=16, seed=0)
        model, names = run.model.eval(), monitor.monitored(run.model)
        other = {key.removeprefix("paraphrase_"): v for key, v in inputs.items() if key.startswith("paraphrase_")}
        own = {key: v for key, v in inputs.items() if not key.startswith("paraphrase_")}
        with torch.no_grad():
            ours, theirs = (monitor.features(model, side, run.now, names) for side in (own, other))
        distances[strength] = float((ours - theirs).square().mean())
        run.now.batch = plait.Batch.of(inputs, target)
        with torch.no_grad():
            assert float(monitor.penalty(model, run.now)) == pytest.approx(strength * distances[strength], rel=1e-4)
    assert distances[30.0] < 0.7 * distances[0.0]


class Strict(nn.Module):
    """Reads `x` and knows no other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


RUNNING_BEFORE = {
    "diffora": [DiffoRA(rank=1)],
    "spt": [SPT(share=0.5, rank=1)],
    "lora-ga": [LoRA(rank=1), LoRAGA(batches=1)],
    "eva": [LoRA(rank=1), EVA(batches=1)],
}


@pytest.mark.parametrize("key", RUNNING_BEFORE)
def test_starts_that_run_a_model_keep_paraphrases_from_it_too(key: str) -> None:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    data = {"x": x, "paraphrase_x": x + 0.1}, torch.arange(16) % 2
    methods = [*RUNNING_BEFORE[key], LoRABAM(strength=1.0, clusters=2)]
    run = plait.train(Strict(), data, methods=methods, steps=2, batch_size=8, validation=data)
    assert run.now.step == 2
    with pytest.raises(BadInput, match="no example brings a paraphrase along: give inputs named"):
        plait.train(Strict(), ({"x": x}, data[1]), methods=methods, steps=2, batch_size=8, validation=data)


def test_what_cannot_work_is_refused() -> None:
    x, y = torch.randn(8, 5), torch.zeros(8, dtype=torch.long)
    with pytest.raises(BadInput, match="finds no adapter to watch: put LoRA before it, Fold after"):
        plait.train(nn.Linear(5, 2), (x, y), methods=[LoRABAM(), LoRA(rank=1)], steps=1)
    with pytest.raises(BadInput, match="finds no adapter to watch"):
        plait.train(nn.Sequential(nn.Linear(5, 2)), (x, y), methods=[LoRA(rank=1), Fold(), LoRABAM()], steps=1)
    with pytest.raises(BadInput, match="no example brings a paraphrase along: give inputs named"):
        plait.train(nn.Sequential(nn.Linear(5, 2)), (x, y), methods=[LoRA(rank=1), LoRABAM(strength=1.0)], steps=1)
    assert Recipe.parse("model: mlp\ndata: wine\nmethods: [lora, lora-bam: {clusters: 4}]").build()[-1] == LoRABAM(
        clusters=4
    )
