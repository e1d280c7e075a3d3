"""A study: values filled in, sizes per track, rates searched, tables gathered, and going on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plait.errors import BadInput
from plait.recipe import Recipe
from plait.workbench.run_study import run_study, summary
from plait.workbench.study import Study, is_study
from plait.workbench.tracks import largest, nearest, sizes

TINY = """
study: tiny
reference: lora
seeds: 1
search: {task: wines, factors: [0.0001, 1.0]}
tracks: {parameters: [wines], memory: [wines]}
values: {adamw: {adamw: {lr: $rate}}}
tasks:
  wines:
    model: mlp
    data: {source: wine, split: 0}
    folded: true
    train: {steps: 12, batch_size: 16}
    values: {size: 2, where: "1"}
methods:
  lora: {rate: 3e-2, methods: [{lora: {rank: $size, where: $where}}, $adamw]}
  full: {rate: 1e-2, methods: [$adamw]}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_a_study_fills_in_its_values(study: Path) -> None:
    made = Study.read(study)
    assert is_study(study)
    recipe = made.recipe("lora", "wines", size=4, factor=0.5)
    assert recipe.methods == ({"lora": {"rank": 4, "where": "1"}}, {"adamw": {"lr": 0.015}})
    assert (recipe.data.split, recipe.folded, recipe.name) == (0, True, "lora")
    assert made.sized("lora", "wines")
    assert not made.sized("full", "wines")


def test_a_study_extends_another(study: Path, tmp_path: Path) -> None:
    larger = tmp_path / "larger.yaml"
    larger.write_text("study: larger\nextends: tiny.yaml\nseeds: 5\ntasks: {wines: {train: {steps: 99}}}\n")
    for lost in ("small.yaml", "odd.yaml", "."):
        odd = tmp_path / "odd.yaml"
        odd.write_text(f"study: odd\nextends: {lost}\n")
        with pytest.raises(BadInput, match="which is no other study beside it"):
            Study.read(odd)
    largest = tmp_path / "largest.yaml"
    largest.write_text("study: largest\nextends: larger.yaml\nseeds: 9\n")
    assert Study.read(largest).recipe("full", "wines").train.steps == 99
    with pytest.raises(BadInput, match="is a study of many methods: run it with `plait compare "):
        Recipe.read(larger)
    made = Study.read(larger, ["tasks.wines.train.batch_size=8"])
    assert (made.study, made.seeds) == ("larger", 5)
    train = made.recipe("full", "wines").train
    assert (train.steps, train.batch_size) == (99, 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("reference=lara", "reference: there is no 'lara' (did you mean 'lora'?)."),
        ("search.task=wine", "search.task: there is no 'wine' (did you mean 'wines'?)."),
        ("search.factors=[1, 1]", "search.factors must be a list of different numbers above 0, not [1, 1]."),
        ("tracks={memori: [wines]}", "tracks: there is no 'memori' (did you mean 'memory'?)."),
        ("methods={}", "methods must be a mapping of names, not {}."),
        ("methods.lora.rate=0", "methods.rate must be a number above 0, not 0."),
        ("values={lorry: 1}", "lora on wines: there is no value 'adamw' for $adamw (known: lorry, rate, size, where)."),
        ("sedes=1", "the study has no option 'sedes' (did you mean 'seeds'?)."),
    ],
)
def test_a_wrong_study_is_refused_in_one_sentence(study: Path, change: str, says: str) -> None:
    with pytest.raises(BadInput) as refused:
        Study.read(study, [change])
    assert str(refused.value) == says


def test_sizes_come_near_the_budget_whichever_way_they_grow() -> None:
    assert nearest(lambda size: 10 * size, 71) == (8, 80)
    assert nearest(lambda size: 960 // size, 100) == (10, 96)
    assert nearest(lambda size: 10 * size if size < 5 else None, 1000) == (4, 40)
    assert nearest(lambda size: None, 10) == (None, None)
    assert largest(lambda size: 10 * size, 69) == (6, 60)
    assert largest(lambda size: 10 * size, 5) == (1, 10)


def test_equal_memory_is_counted_in_bytes(study: Path) -> None:
    made = Study.read(study, ["methods.wide={rate: 1, methods: [{lora: {rank: $size, where: '3'}}, $adamw]}"])
    found = sizes(made, "memory", "wines")
    assert found["lora"]["fits"]
    assert not found["full"]["fits"]  # gradients and two states for every weight
    assert found["wide"]["amount"] <= 1.02 * found["lora"]["amount"]


def test_a_study_runs_and_goes_on_where_it_stopped(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = Study.read(study, ["tracks={parameters: [wines]}"]), tmp_path / "out"
    results = run_study(made, out, quiet=True)
    assert {name: rate["factor"] for name, rate in results["rates"].items()} == dict.fromkeys(made.methods, 1.0)
    table = results["tables"]["parameters, wines"]
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["lora", "full"]
    assert rows["lora"]["size"]["fits"]
    assert not rows["full"]["size"]["fits"]
    assert rows["lora"]["trainable"] == rows["lora"]["size"]["amount"]
    assert set(rows["lora"]["folded"]) == {"folded", "folded, 4 bits"}
    assert rows["lora"]["folded"]["folded"]["mean"] == rows["lora"]["quality"]["mean"]
    assert rows["lora"]["start"]["seconds"] > 0
    assert json.loads((out / "study.json").read_text())["tables"] == results["tables"]
    assert [line[0] for line in summary(results)] == ["lora", "full"]

    def refuse(*_: object) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr("plait.workbench.local.run_one", refuse)
    assert run_study(made, out, quiet=True)["tables"] == results["tables"]


@pytest.mark.parametrize("path", sorted(Path("studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_published_studies_can_be_read(path: Path) -> None:
    made = Study.read(path)
    together = [name for name in made.methods if "+" in name]
    assert len(made.methods) - len(together) >= 25
    assert len(together) >= 10
    assert made.seeds >= 3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tracks.parameters=wines", "tracks.parameters must be a list of tasks, not 'wines'."),
        ("tracks.parameters=[[wines]]", "tracks.parameters must be a list of tasks, not [['wines']]."),
        ("tasks.wines=3", "tasks.wines must be a mapping of options, not 3."),
        ("tasks.wines.values=[1]", "tasks.wines.values must be a mapping of names, not [1]."),
        ("tasks.wines.values.rate=fast", "tasks.wines.values.rate must be a number above 0, not 'fast'."),
        ("search.factors=[[1]]", "search.factors must be a list of different numbers above 0, not [[1]]."),
        ("search.factors=[.inf]", "search.factors must be a list of different numbers above 0, not [inf]."),
    ],
)
def test_what_has_another_shape_is_told(study: Path, override: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        Study.read(study, [override])
    assert str(caught.value) == says
