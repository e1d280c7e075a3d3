"""The page of a comparison: what it says, and what a real browser draws of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from browser import look
from made_up_runs import run, runs
from plait.workbench.analysis import analyse, regroup
from plait.workbench.report import render, write_report

KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "full fine-tuning": (0.741, {"peak": 1400, "step": 0.31, "trained": 22_700_000, "methods": ("adamw",)}),
    "lora": (0.738, {"peak": 780, "step": 0.21, "trained": 340_000, "methods": ("lora",)}),
    "pissa and gor": (0.744, {"peak": 800, "step": 0.22, "trained": 340_000, "methods": ("lora", "gor")}),
    "head only": (0.702, {"peak": 120, "step": 0.08, "trained": 1155, "methods": ()}),
}


def analysed(made: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    kept = {r["name"]: r for r in made}
    groups = regroup([(n, r.get("recipe", {}), r.get("yaml", "")) for n, r in kept.items()], made)
    return analyse(groups, list(range(seeds)))


def results(found: dict[str, Any], title: str = "4 recipes on tweets") -> dict[str, Any]:
    method = {
        "name": "LoRA", "places": ["parametrize"], "equation": "W + (alpha / rank) * B A", "given": "rank = 8",
        "reference": "Hu et al. (2022). LoRA.", "link": "https://arxiv.org/abs/2106.09685",
    }  # fmt: skip
    return {
        "title": title,
        "facts": ["minilm", "tweets", "5 seeds"],
        "analysis": found,
        "methods": {r["name"]: [method] for r in found["recipes"]},
        "made": {"Seeds": "0 to 4", "Machine": "Linux"},
        "versions": {"plait": "0.1.0"},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(results(analysed(runs(KINDS), 5)), tmp_path_factory.mktemp("page") / "report.html")


@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_draws_every_figure_and_nothing_overflows(page: Path, tmp_path: Path, width: int) -> None:
    seen, picture, log = look(page, tmp_path, width)
    asked = json.loads(re.search(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)[1])  # type: ignore[index]
    plots: Any = seen["plots"]
    assert {p["id"] for p in plots} == {f["id"] for f in asked}
    assert len(plots) >= 9
    # panels that are folded are drawn when they are opened; the others must hold their traces now
    assert [p["id"] for p in plots if not p["drawn"]] == []
    open_now = {f["id"]: len(f["traces"]) for f in asked if not re.search(r"-[1-9](-|$)", f["id"])}
    assert {p["id"]: p["traces"] for p in plots if p["id"] in open_now} == open_now
    assert seen["errors"] == ""
    assert "CONSOLE" not in log
    assert seen["overflow"] == []
    assert seen["scrolls"] is False
    assert picture.stat().st_size > 20_000


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?!data:)', text)
    assert "Use " in text
    assert "within noise" in text


def test_what_a_measure_saw_is_in_the_page(page: Path) -> None:
    """A measure's numbers are drawn over the steps, and its curve with the axes that it named, one line a seed."""
    held = json.loads(re.search(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)[1])  # type: ignore[index]
    drawn = {f["id"]: f for f in held}
    numbers, curve = drawn["measure-0-1"], drawn["measure-0-1-density"]
    assert {t["name"]: (t["x"], t["y"]) for t in numbers["traces"]} == {
        "largest": ([60, 120], [50, 50]),
        "trace": ([60, 120], [60, 120]),
    }
    assert [t["y"] for t in curve["traces"]] == [[1.0, None, 0.1]] * 5
    assert [t["showlegend"] for t in curve["traces"]] == [True, *[False] * 4]
    assert curve["layout"]["xaxis"]["title"]["text"] == "eigenvalue"
    assert curve["layout"]["yaxis"]["type"] == "log"
    text = page.read_text()
    for figure in (numbers, curve):
        assert f'id="{figure["id"]}"' in text


def test_numbers_that_are_not_finite_are_gaps() -> None:
    """A page with NaN in it would not be JSON, and would draw nothing."""
    from plait.workbench.panels import panels

    seen = [{"step": 1, "a": 1.0}, {"step": 2, "a": float("nan")}, {"step": 3, "a": 500.0}]
    (made,) = panels([{"history": [[]], "measures": [{"M()": seen}]}])[0]
    assert made["traces"][0]["x"] == [1, 3]
    assert made["layout"]["yaxis"]["type"] == "log"


def test_what_a_recipe_is_called_cannot_run_in_the_page() -> None:
    evil = "</script><script>alert(1)</script>"
    text = render(results(analysed([run(evil, s, 0.7) for s in range(3)], 3), title=evil))
    assert "<script>alert(1)" not in text


def test_a_difference_within_noise_is_said_in_words() -> None:
    found = analysed([*(run("a", s, 0.7 + 0.01 * s) for s in range(3)), *(run("b", s, 0.714) for s in range(3))], 3)
    says = " ".join(w["text"] for w in found["warnings"])
    assert "The difference between a and b (0.4 points) is within noise: the 95 % interval runs from" in says
    assert "over 3 seeds" in says


def test_recipes_that_are_equal_with_every_seed_are_not_said_to_be_equal() -> None:
    found = analysed([run(name, s, 0.7 + 0.01 * s) for name in "ab" for s in range(3)], 3)
    (says,) = [w["text"] for w in found["warnings"] if "a and b" in w["text"]]
    assert says.startswith("a and b gave the same accuracy with each of 3 seeds: that is within noise")


def test_columns_whose_names_do_not_say_what_they_mean_are_explained(page: Path) -> None:
    text = page.read_text()
    for name in ("Above the model is", "Forgetting is the rise of the loss", "Calibration error is"):
        assert name in text


def test_few_seeds_do_not_judge_and_the_leader_is_the_guess_until_then() -> None:
    dear = {"peak": 900.0, "step": 0.3}
    found = analysed([run("a", 0, 0.7), run("b", 0, 0.9, **dear)], 1)
    assert found["summary"]["headline"] == "Undecided on one seed: b leads with 90.0 % accuracy."
    assert found["summary"]["use"] == "b"
    assert "Until then b is the best guess." in found["summary"]["why"][0]
    assert found["summary"]["why"][-1].startswith("a is the cheapest: ")
    assert found["recipes"][1]["difference"]["verdict"] == "unknown"
    assert [w["text"] for w in found["warnings"] if w["kind"] in ("seeds", "noise")] == [
        "One seed cannot tell a difference from luck, also those here against a: b (+20.0 points). Use --seeds 5 "
        "before you decide anything that matters."
    ]


def test_seeds_that_reach_the_same_figure_are_suspect_only_where_they_trained_alike_or_are_perfect() -> None:
    said = {
        name: [w["text"] for w in analysed(made, 3)["warnings"] if w["kind"] == "same"]
        for name, made in {
            "chance": [run("a", s, 0.75) for s in range(3)],
            "alike": [run("a", s, 0.75) | {"history": run("a", 0, 0.75)["history"]} for s in range(3)],
            "perfect": [run("a", s, 1.0) for s in range(3)],
        }.items()
    }
    assert said == {
        "chance": [],
        "alike": ["All seeds of a trained alike: the seed changes nothing here."],
        "perfect": ["All seeds of a are perfect: the task is too easy to tell recipes apart."],
    }


def test_the_cheaper_of_two_that_cannot_be_told_apart_is_recommended() -> None:
    cheap, dear = {"peak": 100.0, "step": 0.1}, {"peak": 900.0, "step": 0.3}
    made = runs({"dear": (0.744, dear), "cheap": (0.742, cheap), "bad": (0.5, cheap | {"peak": 10.0})}, noise=0.01)
    found = analysed(made, 5)
    assert found["summary"]["use"] == "cheap"
    assert "bad" not in found["summary"]["tied"]


def test_what_costs_least_is_said_of_what_does() -> None:
    """Least memory, but five times the time: the faster recipe is named."""
    slow, quick = {"peak": 100.0, "step": 1.0}, {"peak": 300.0, "step": 0.2}
    for better in ({"slow": (0.744, slow), "quick": (0.743, quick)}, {"quick": (0.744, quick), "slow": (0.743, slow)}):
        said = analysed(runs(better, noise=0.01), 5)["summary"]
        assert said["use"] == "slow"
        assert said["headline"] == "Use slow: no recipe is better beyond noise, and it needs the least memory."
        assert re.fullmatch(
            r"quick is faster than slow: 29 % more peak memory and (79|80|81) % less time per step\.", said["why"][-1]
        )
        assert not re.search("cheap|costs least", " ".join(said["why"]))
    said = analysed(runs({"slow": (0.744, slow), "quick": (0.743, quick | {"peak": 90.0})}, noise=0.01), 5)["summary"]
    assert said["headline"] == "Use quick: no recipe is better beyond noise, and it costs least."
    bare = runs({"a": (0.744, {}), "b": (0.743, {})}, noise=0.01)
    for one in bare:
        one["memory"], one["seconds"] = {}, {}
    said = analysed(bare, 5)["summary"]
    assert said["headline"] == f"Use {said['best']}: no recipe is better beyond noise, and it has the best mean."


def test_failed_runs_are_left_out_and_named() -> None:
    failed = {"name": "b", "seed": 1, "error": "the objective became NaN."}
    found = analysed([run("a", 0, 0.7), run("a", 1, 0.71), run("b", 0, 0.7), failed], 2)
    assert "1 of 2 runs of b failed and are left out: the objective became NaN." in found["warnings"][0]["text"]


def test_a_run_whose_quality_is_not_finite_has_failed() -> None:
    """results.json holds null for NaN: one such run must not destroy the comparison."""
    lost = {s: run("b", s, 0.7) for s in range(2)}
    lost[1]["metrics"]["after"]["test"]["accuracy"] = None
    found = analysed([run("a", 0, 0.7), run("a", 1, 0.71), *lost.values(), run("c", 0, float("nan"))], 2)
    assert [w["text"] for w in found["warnings"] if w["kind"] == "failed"] == [
        f"1 of {count} runs of {name} failed and are left out: its accuracy on the test set is NaN or infinite; lower "
        "the learning rate."
        for count, name in ((2, "b"), (1, "c"))
    ]
    assert {r["name"]: r["seeds"] for r in found["recipes"]} == {"a": [0, 1], "b": [0]}


def test_a_folded_model_whose_quality_is_not_finite_is_left_out() -> None:
    made = [run("a", s, 0.7) | {"folded": {"folded": {"accuracy": v}}} for s, v in enumerate((0.5, None, 0.7))]
    (row,) = analysed(made, 3)["recipes"]
    assert row["folded"]["folded"]["values"] == [0.5, 0.7]


def test_lower_is_better_turns_the_judgement() -> None:
    made = [*(run("a", s, 3.0 + 0.01 * s, metric="loss", better="lower") for s in range(4))]
    made += [run("b", s, 2.5 + 0.011 * s, metric="loss", better="lower") for s in range(4)]
    for place, r in enumerate(made):  # `run` writes a loss of its own
        r["metrics"]["after"]["test"]["loss"] = (3.0 if place < 4 else 2.5) + 0.01 * r["seed"]
    found = analysed(made, 4)
    assert found["metric"] == {"name": "loss", "better": "lower", "percent": False}
    assert found["recipes"][1]["difference"]["better"] is True
    assert found["summary"]["best"] == "b"
