"""A comparison for real, small: processes of their own, restarts, failures, Ctrl-C, and the same over Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from plait.checkpoint import last_step
from plait.cli import app
from plait.errors import BadInput
from plait.recipe import Recipe
from plait.workbench import compare as comparing
from plait.workbench.run import run_recipe
from plait.workbench.store import jobs

PLAIN = "name: plain\nmodel: mlp\ndata: wine\ntask: classification\ntrain: {steps: 12, batch_size: 16}\nmethods:\n"
RECIPES = {"plain": PLAIN + "- adamw: {lr: 0.01}\n", "noisy": PLAIN.replace("plain", "noisy") + "- maxsup\n"}


def recipes(*names: str) -> list[Recipe]:
    return [Recipe.parse(RECIPES[name]) for name in names]


def figures(place: Path) -> dict[str, float]:
    found = json.loads((place / "results.json").read_text())
    return {f"{r['name']} {r['seed']}": r["metrics"]["after"]["test"]["loss"] for r in found["runs"]}


def test_each_run_has_its_process_and_finished_runs_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = comparing.compare(recipes("plain", "noisy"), seeds=1, out=tmp_path)
    memory = results["analysis"]["recipes"][0]["memory"]
    # AdamW keeps two numbers for each that is trained; the weights have buffers beside them
    assert memory["optimizer"] >= 2 * memory["gradients"] > 0
    assert memory["activations"] > 0
    assert memory["peak"] == memory["loaded"] + memory["above"]
    first = figures(tmp_path)
    assert set(first) == {"plain 0", "noisy 0"}
    assert not list(tmp_path.glob("runs/*/*/step-*"))
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    again = tmp_path / "again.txt"
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/*/results.json")}
    capfd.readouterr()
    comparing.compare(recipes("plain", "noisy"), seeds=1, out=tmp_path)
    assert "plain, seed 0: kept" in capfd.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not again.exists()


def test_several_runs_at_a_time_give_the_same_figures_and_equal_runs_are_shared(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"workers must be between 1 and the \d+ cores of this machine, not 0\."):
        comparing.compare(recipes("plain"), out=tmp_path, workers=0)
    one = comparing.compare(recipes("plain", "noisy"), seeds=1, out=tmp_path / "one", quiet=True)
    shared = tmp_path / "shared"
    several = comparing.compare(
        recipes("plain", "noisy"), seeds=1, out=tmp_path / "two", runs=shared, workers=min(2, os.cpu_count() or 1)
    )
    assert figures(tmp_path / "one") == figures(tmp_path / "two")
    assert len(several["runs"]) == len(one["runs"]) == 2
    before = {p: p.stat().st_mtime_ns for p in shared.glob("*/*/results.json")}
    comparing.compare(recipes("plain"), seeds=1, out=tmp_path / "three", runs=shared, quiet=True)
    assert {p: p.stat().st_mtime_ns for p in shared.glob("*/*/results.json")} == before


def test_the_validation_curve_has_a_point_every_so_many_steps() -> None:
    text = RECIPES["plain"].replace("methods:", "validate_every: 5\nmethods:")
    assert [point["step"] for point in run_recipe(Recipe.parse(text), quiet=True).results["curve"]] == [5, 10]
    every = run_recipe(Recipe.parse(RECIPES["plain"]), quiet=True).results["curve"]
    assert [point["step"] for point in every] == list(range(2, 13, 2))


def test_a_run_that_fails_is_named_and_the_others_stand(tmp_path: Path) -> None:
    bad = Recipe.parse(
        RECIPES["plain"].replace("name: plain", "name: bad").replace("adamw: {lr: 0.01}", "adamw: {lr: 1.0e30}")
    )
    results = comparing.compare([*recipes("plain"), bad], seeds=1, out=tmp_path, quiet=True)
    says = " ".join(w["text"] for w in results["analysis"]["warnings"])
    assert "1 of 1 runs of bad failed and are left out" in says
    assert [r["name"] for r in results["analysis"]["recipes"]] == ["plain"]
    paths = [str(tmp_path / "plain.yaml"), str(tmp_path / "bad.yaml")]
    for path, recipe in zip(paths, [*recipes("plain"), bad], strict=True):
        recipe.write(path)
    again = CliRunner().invoke(app, ["compare", *paths, "--seeds", "1", "--out", str(tmp_path)])
    assert again.exit_code == 1  # though a recipe that never ended stands in no table


def test_a_model_that_answers_nan_is_a_failed_run_and_the_report_stands(tmp_path: Path) -> None:
    todo = jobs(recipes("plain", "noisy"), 1, tmp_path / "runs")
    comparing.compare(recipes("plain", "noisy"), seeds=1, out=tmp_path, quiet=True)
    kept = todo[1].folder / "results.json"
    values = json.loads(kept.read_text())
    values["metrics"]["after"]["test"][values["quality"]] = None  # as NaN is written
    kept.write_text(json.dumps(values))
    (tmp_path / "report.html").unlink()
    results = comparing.compare(recipes("plain", "noisy"), seeds=1, out=tmp_path, quiet=True)
    assert [r["name"] for r in results["analysis"]["recipes"]] == ["plain"]
    assert "1 of 1 runs of noisy failed and are left out: its " in results["analysis"]["warnings"][0]["text"]
    assert (tmp_path / "report.html").exists()


def test_a_comparison_is_not_gone_on_with_when_its_data_changed(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    rows = [f"{i},{i % 7},{i % 2}" for i in range(90)]
    table.write_text("\n".join(["a,b,label", *rows]) + "\n")
    made = [recipe.with_(f"data={table}") for recipe in recipes("plain", "noisy")]
    comparing.compare(made[:1], seeds=1, out=tmp_path, quiet=True)
    table.write_text("\n".join(["a,b,label", *rows[1:], "5,5,0"]) + "\n")
    with pytest.raises(BadInput) as refused:
        comparing.compare(made, seeds=1, out=tmp_path, quiet=True)
    assert str(refused.value) == (
        f"{table} changed since runs in {tmp_path / 'runs'} were finished: restore it, give another --out, or delete "
        "that folder to run all anew."
    )
    todo = jobs(made, 1, tmp_path / "runs")
    run_recipe(made[1], todo[1].folder, quiet=True)
    results = comparing.collect(made, todo, tmp_path)
    assert results["analysis"]["warnings"][0]["text"].startswith("The data changed while the runs were made")
    assert results["made"]["Data"].endswith("; not the same for all runs")


def test_the_report_shows_the_command_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some recipes").mkdir()
    Path("some recipes/plain.yaml").write_text(RECIPES["plain"])
    given = ["compare", "some recipes/plain.yaml", "--set", "train.steps=2", "--seeds", "1", "--out", "here"]
    done = CliRunner().invoke(app, given, env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert "calibration" not in done.stdout  # a narrow terminal has no room for every column
    made = json.loads(Path("here/results.json").read_text())["made"]
    assert made["Command"] == "plait compare 'some recipes/plain.yaml' --set train.steps=2 --seeds 1 --out here"


def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(RECIPES["plain"].replace("steps: 12", "steps: 400000, save_every: 20"))
    command = [sys.executable, "-m", "plait.cli", "compare", str(path), "--seeds", "1", "--out", str(tmp_path / "out")]
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    started = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    folder = jobs([Recipe.read(path)], 1, tmp_path / "out" / "runs")[0].folder
    until = time.monotonic() + 60
    while last_step(folder) is None and time.monotonic() < until:
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130
    assert (last_step(folder) or 0) >= 20, "the run under way left a checkpoint"
    assert said == "plait: stopped; what was done is kept, and the same command goes on from there.\n"
    assert not (folder / "failed.json").exists()
    assert "Traceback" not in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data: digits", "plain and other differ in 'data'"),
        ("seed: 3", "plain and other differ in 'seed'"),
    ],
)
def test_recipes_that_cannot_be_compared_are_refused(change: str, says: str) -> None:
    name = change.split(":")[0]
    text = RECIPES["plain"].replace("name: plain", "name: other").replace("data: wine", "data: wine\nseed: 0")
    lines = [change if line.startswith(f"{name}:") else line for line in text.splitlines()]
    with pytest.raises(BadInput, match=says):
        comparing.check([*recipes("plain"), Recipe.parse("\n".join(lines))], 2)


def test_two_of_one_name_and_no_recipe_are_refused() -> None:
    with pytest.raises(BadInput, match="two recipes are called 'plain'"):
        comparing.check(recipes("plain", "plain"), 2)
    with pytest.raises(BadInput, match="nothing to compare"):
        comparing.check([], 2)


def test_an_engine_that_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="engine must be local or ray, not 'slurm'"):
        comparing.compare(recipes("plain"), out=tmp_path, engine="slurm")


def test_ray_gives_the_same_figures_and_a_killed_worker_is_tried_again(tmp_path: Path) -> None:
    script = tmp_path / "over_ray.py"
    script.write_text(
        "import sys\nfrom plait.recipe import Recipe\nfrom plait.workbench.compare import compare\n"
        "if __name__ == '__main__':\n"
        "    compare([Recipe.read(sys.argv[1])], seeds=1, out=sys.argv[2], engine=sys.argv[3])\n"
    )
    path = tmp_path / "plain.yaml"
    path.write_text(RECIPES["plain"].replace("steps: 12", "steps: 1500"))
    environment = os.environ | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}

    def start(place: str, engine: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(script), str(path), str(tmp_path / place), engine], env=environment
        )

    killed = start("ray", "ray")
    folder = jobs([Recipe.read(path)], 1, tmp_path / "ray" / "runs")[0].folder
    until = time.monotonic() + 90
    while not list(folder.glob("step-*")) and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    import psutil

    run = next(p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or []))
    worker = run.parent()
    assert worker is not None
    assert "ray::" in " ".join(worker.cmdline())
    worker.kill()
    assert killed.wait(90) == 0
    assert start("local", "local").wait(60) == 0
    assert figures(tmp_path / "ray") == figures(tmp_path / "local")


def test_results_are_strict_json(tmp_path: Path) -> None:
    from plait.workbench.writing import write_json

    values = {"a": [1.5, float("nan"), float("-inf")], 2: (True, None, torch.ones(2)), "path": tmp_path}
    write_json(tmp_path / "results.json", values)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert read == {"a": [1.5, None, None], "2": [True, None, [1.0, 1.0]], "path": str(tmp_path)}


def test_a_recipe_that_cannot_work_is_refused_before_the_first_run(tmp_path: Path) -> None:
    bad = Recipe.parse(RECIPES["plain"].replace("name: plain", "name: bad") + "- pissa\n")
    with pytest.raises(BadInput, match=r"^bad: PiSSA starts LoRA adapters, but the model has none"):
        comparing.compare([*recipes("plain"), bad], seeds=1, out=tmp_path, quiet=True)
    assert not list(tmp_path.rglob("results.json"))
