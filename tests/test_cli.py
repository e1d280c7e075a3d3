"""The command line as a user meets it: what it prints, what it writes, and its exit codes."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from plait import __version__ as plait_version
from plait.claims import base as claims
from plait.cli import app
from plait.errors import BadInput
from plait.recipe import Recipe
from plait.workbench import find, index, writing
from plait.workbench.run import COSTS

RECIPE = """
model: mlp
data: wine
train: {steps: 30, batch_size: 16}
methods:
- label-smoothing: {smoothing: 0.05}
- adamw: {lr: {cosine: {peak: 1e-2, warmup: 0.1}}}
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wine.yaml").write_text(RECIPE)


def plait(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_a_warning_is_one_line() -> None:
    script = "import warnings; from plait import cli; cli.app = lambda **_: warnings.warn('look here'); cli.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: look here\n"


# -- run -----------------------------------------------------------------------------------------------------------
def test_a_figure_that_is_no_number_is_null_in_what_is_printed_too() -> None:
    Path("three.csv").write_text("x,label\n1,2\n2,3\n3,4\n")
    Path("three.yaml").write_text("{model: mlp, data: three.csv, task: regression, train: {steps: 2, batch_size: 2}}")
    printed = plait("run", "three.yaml", "--json").stdout  # of one example there is no r2
    assert "NaN" not in printed
    assert json.loads(printed) == json.loads(Path("runs/three/results.json").read_text())


def test_run_trains_and_writes_down_what_it_saw() -> None:
    done = plait("run", "wine.yaml", "--json")
    assert done.exit_code == 0
    results = json.loads(done.stdout)
    assert results == json.loads(Path("runs/wine/results.json").read_text())
    assert results["metrics"]["after"]["test"]["accuracy"] > results["metrics"]["before"]["test"]["accuracy"]
    assert [h["step"] for h in results["history"]] == list(range(30))
    assert results["parameters"]["trained"] == results["parameters"]["model"]
    assert {"plait", "torch", "python"} <= set(results["versions"])
    assert "30/30" in done.stderr
    assert "memory" in done.stderr


def test_a_finished_run_is_not_trained_again_and_another_recipe_is_refused() -> None:
    first = json.loads(plait("run", "wine.yaml", "--json").stdout)
    again = json.loads(plait("run", "wine.yaml", "--json").stdout)
    assert again["metrics"] == first["metrics"]
    refused = plait("run", "wine.yaml", "--set", "seed=1")
    assert refused.exit_code == 2
    assert "holds a run of another recipe (its seed: None; this one's: 1): give another --out" in refused.stderr
    assert plait("run", "wine.yaml", "--set", "seed=1", "--out", "runs/one").exit_code == 0


def test_a_stopped_run_goes_on_to_the_same_figures() -> None:
    whole = json.loads(plait("run", "wine.yaml", "--json", "--set", "train.steps=4000").stdout)
    command = [
        sys.executable,
        "-m",
        "plait.cli",
        "run",
        "wine.yaml",
        "--set",
        "train.steps=4000",
        "--out",
        "stopped",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(Path("stopped").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run it again to go on from the checkpoint in stopped" in errors
    assert "Traceback" not in errors
    assert not Path("stopped/results.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    resumed = json.loads(Path("stopped/results.json").read_text())
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["history"] == whole["history"]
    assert whole["measured"] == "seconds and memory are of all 4000 steps"
    assert re.fullmatch(r"seconds and memory are of steps [1-9]\d* to 3999, after a checkpoint", resumed["measured"])


def test_a_finished_run_that_is_run_again_or_exported_keeps_what_it_cost() -> None:
    first = json.loads(plait("run", "wine.yaml", "--json").stdout)
    assert first["seconds"]["step"] > 0
    again = plait("run", "wine.yaml")
    assert f"{first['seconds']['train']:.1f} s of training" in again.stdout
    kept = Path("runs/wine/results.json")
    held = json.loads(kept.read_text())
    assert {name: held[name] for name in COSTS} == {name: first[name] for name in COSTS}
    before = kept.stat().st_mtime_ns
    assert plait("export", "runs/wine", "out", "--to", "peft", "--rank", "2").exit_code == 0
    assert kept.stat().st_mtime_ns == before


def test_a_run_may_go_on_with_more_steps_where_nothing_is_scheduled() -> None:
    """Its own folder takes it; what it held of fewer steps is gone only when the run goes on."""
    Path("plain.yaml").write_text(RECIPE.replace("{cosine: {peak: 1e-2, warmup: 0.1}}", "1e-2"))
    for name in ("plain", "wine"):
        assert plait("run", f"{name}.yaml").exit_code == 0
    ready = plait("export", "runs/plain", "out", "--to", "peft", "--rank", "2", "--set", "train.steps=40")
    assert ready.stderr == (
        "plait: runs/plain holds a run of 30 steps, not 40: let `plait run` train it further first.\n"
    )
    longer = json.loads(plait("run", "plain.yaml", "--set", "train.steps=40", "--json").stdout)
    assert [h["step"] for h in longer["history"]] == list(range(40))
    assert longer["measured"] == "seconds and memory are of steps 30 to 39, after a checkpoint"
    assert longer["recipe"]["train"]["steps"] == 40
    assert Recipe.read("runs/plain/recipe.yaml").train.steps == 40
    whole = json.loads(plait("run", "plain.yaml", "--set", "train.steps=40", "--out", "whole", "--json").stdout)
    assert longer["metrics"] == whole["metrics"]
    for name, steps, says in (("wine", 40, "whose schedules follow that number"), ("plain", 9, "beyond the 9 steps")):
        held = Path(f"runs/{name}/results.json").read_text()
        refused = plait("run", f"{name}.yaml", "--set", f"train.steps={steps}")
        assert refused.exit_code == 2
        assert says in refused.stderr
        assert Path(f"runs/{name}/results.json").read_text() == held
        assert Recipe.read(f"runs/{name}/recipe.yaml").train.steps == json.loads(held)["recipe"]["train"]["steps"]


def test_a_run_is_not_gone_on_with_when_its_data_changed() -> None:
    rows = [f"{i},{i % 7},{i % 2}" for i in range(90)]
    Path("rows.csv").write_text("\n".join(["a,b,label", *rows]) + "\n")
    given = ["run", "wine.yaml", "--set", "data=rows.csv"]
    assert plait(*given).exit_code == 0
    assert plait(*given).exit_code == 0
    Path("rows.csv").write_text("\n".join(["a,b,label", *rows[1:], "5,5,0"]) + "\n")
    refused = plait(*given)
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1] == (
        "plait: the data of the run in runs/wine changed since it began (rows.csv holds other examples now): restore "
        "them, give another --out, or delete that folder to start anew."
    )
    assert plait(*given, "--out", "anew").exit_code == 0


@pytest.mark.parametrize(("room", "file"), [(100, "recipe.yaml"), (700, "the checkpoint of step 3")])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(room: int, file: str) -> None:
    """A limit on the size of files fails a write half way, as a full disk does; the curve alone stops no run."""
    command = [sys.executable, "-m", "plait.cli", "run", "wine.yaml", "--out"]
    subprocess.run([*command, "before"], check=True, capture_output=True)  # what the cache keeps is there
    done = subprocess.run(
        [*command, "full"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.startswith("plait: ")
    assert f"{file} could not be written" in said
    assert "File too large" in said
    assert "run the same command again." in said
    assert "Traceback" not in done.stderr
    assert not list(Path("full").glob(".*"))
    assert plait("run", "wine.yaml", "--out", "full").exit_code == 0


def test_a_run_needs_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.workbench import run as running

    def full(path: Path, values: object) -> None:
        if path.name == "curve.json":
            raise BadInput(f"{path} could not be written: No space left on device.")
        writing.write_json(path, values)

    monkeypatch.setattr(running, "write_json", full)
    assert plait("run", "wine.yaml").exit_code == 0
    assert len(json.loads(Path("runs/wine/results.json").read_text())["curve"]) == 7


def test_a_disk_that_is_full_elsewhere_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    refused = plait("run", "wine.yaml")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1] == (
        "plait: No space left on device: free some room and run the same command again."
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "nope.yaml"], "plait: there is no recipe 'nope.yaml': give the path of a YAML file."),
        (["run", "wine.yaml", "--set", "train.step=3"], "plait: train has no option 'step' (did you mean 'steps'?)."),
        (["show", "pisa"], "plait: there is no method 'pisa' (did you mean 'pissa'?): `plait list` shows them all."),
        (["verify", "pisa"], "plait: there is no method 'pisa' (did you mean 'pissa'?): `plait list` shows them all."),
        (["export", "wine.yaml", "out", "--to", "pefd"], "plait: --to 'pefd' is not known (did you mean 'peft'?)."),
        (["export", ".", "out"], "plait: . holds no run (it has no recipe.yaml): give a run's folder, or a recipe."),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], sentence: str) -> None:
    done = plait(*arguments)
    assert (done.exit_code, done.stderr.strip()) == (2, sentence)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [("wine.yaml", "File exists"), ("/proc/x", "No such file or directory"), ("x" * 300, "File name too long")],
)
def test_a_name_that_no_folder_can_have_is_bad_input(name: str, reason: str) -> None:
    refused = plait("run", "wine.yaml", "--out", name)
    assert refused.exit_code == 2
    said = refused.stderr.splitlines()[-1]
    assert said.startswith(f"plait: cannot use '{name}")
    assert said.endswith(f" ({reason}): give another file or folder.")


def test_an_unknown_command_is_bad_input() -> None:
    assert plait("rnu").exit_code == 2


def test_a_run_that_fails_says_where() -> None:
    done = plait("run", "wine.yaml", "--set", "methods.adamw.lr=1e30")
    assert done.exit_code == 1
    assert "became NaN or infinite at step" in done.stderr


# -- list and show -------------------------------------------------------------------------------------------------
def test_list_carries_every_entry() -> None:
    entries = json.loads(plait("list", "--json").stdout)
    lora = next(e for e in entries if e["key"] == "lora")
    assert {"key", "name", "kind", "theme", "places", "reference", "fields", "claims"} <= set(lora)
    assert (lora["name"], lora["kind"], lora["theme"], lora["places"]) == ("LoRA", "ground", "adapt", ["parametrize"])
    assert lora["reference"].startswith("Hu et al. (2022). LoRA: Low-Rank Adaptation")
    assert {"name": "rank", "type": "int, at least 1", "default": 8, "required": False} in lora["fields"]
    for entry in entries:
        assert entry["reference"].count("(") >= 1, entry["key"]
        for claim in entry["claims"]:
            assert {"name", "figure", "baseline", "verdict"} <= set(claim)


def test_list_by_place_and_theme() -> None:
    rules = json.loads(plait("list", "--place", "step", "--json").stdout)
    assert "adamw" in {e["key"] for e in rules}
    assert all("step" in e["places"] for e in rules)
    assert all(e["theme"] == "loss" for e in json.loads(plait("list", "--theme", "loss", "--json").stdout))
    refused = plait("list", "--place", "stp")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("plait: there is no place 'stp' (known: ")


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("labels are noisy", ["elr"]),
        ("the model is overconfident", ["label-smoothing", "maxsup"]),
        ("make my model smaller", ["magnitude-pruning", "nm-mask", "quantize"]),
        ("out of distribution detection", ["lora-bam"]),
        ("the loss explodes", ["clip", "qk-norm", "log-z-loss"]),
        ("it forgets the old task", ["mixout", "l2-sp", "hlora-forget"]),
    ],
)
def test_list_finds_by_meaning(words: str, keys: list[str]) -> None:
    found = [e["key"] for e in json.loads(plait("list", words, "--json").stdout)]
    assert found[0] in keys
    assert set(keys) <= set(found[:6])


def test_what_hurts_names_methods_that_there_are() -> None:
    assert {key for key in index.needs() if key not in {e["key"] for e in index.read()}} == set()


def test_list_finds_by_words_where_there_is_no_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "find_spec", lambda name: None)
    assert json.loads(plait("list", "labels are noisy", "--json").stdout)[0]["key"] == "elr"
    found = json.loads(plait("list", "low-rank adaptation", "--json").stdout)
    assert {"lora", "lora-ga", "dora"} <= {e["key"] for e in found[:5]}


def test_a_warm_list_imports_no_torch() -> None:
    plait("list")
    script = "import sys, plait.cli; plait.cli.app(['list'], standalone_mode=False); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=dict(os.environ))


def test_the_index_is_made_anew_when_a_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index.read()
    kept = tmp_path / "cache" / "index.json"
    held = json.loads(kept.read_text())
    kept.write_text(json.dumps(held | {"entries": held["entries"][:1]}))
    assert len(index.read()) == 1
    monkeypatch.setattr(index, "evidence_folder", lambda: tmp_path)
    (tmp_path / "lora.json").write_text("{}")
    assert len(index.read()) == len(first)
    kept.write_text("{broken")
    assert len(index.read()) == len(first)


def test_show_tells_all_of_a_method() -> None:
    shown = plait("show", "LoRA").stdout
    for part in (
        "W + (alpha / rank) * B A",
        "Hu et al. (2022)",
        "int, at least 1",
        "src/plait/parametrize/low_rank.py:",
    ):
        assert part in shown
    assert json.loads(plait("show", "lora", "--json").stdout)["key"] == "lora"


# -- verify --------------------------------------------------------------------------------------------------------
@pytest.fixture
def _two_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str, gain: float) -> claims.Claim:
        return claims.Claim(
            "lora", name, "is better", "nothing", "accuracy", "higher", lambda s: (1 + gain + s / 100, 1.0), seeds=3
        )

    held = {"lora": {"good": made("good", 1.0)}, "adamw": {"bad": made("bad", -1.0)}}
    monkeypatch.setattr(claims, "load", lambda: held)


@pytest.mark.usefixtures("_two_claims")
def test_verify_writes_evidence() -> None:
    done = plait("verify", "LoRA", "--out", "evidence", "--json")
    assert done.exit_code == 0
    written = json.loads(Path("evidence/lora.json").read_text())
    assert json.loads(done.stdout) == [written]
    (claim,) = written["claims"]
    assert claim["verdict"] == "holds"
    assert claim["figures"] == pytest.approx([2.0, 2.01, 2.02])
    assert claim["baselines"] == [1.0, 1.0, 1.0]
    assert claim["interval"][0] < claim["improvement"] < claim["interval"][1]
    assert {"plait", "torch", "python"} <= set(written["versions"])


@pytest.mark.usefixtures("_two_claims")
def test_verify_can_begin_at_a_fresh_seed() -> None:
    plait("verify", "lora", "--out", "evidence", "--first-seed", "50", "--seeds", "2")
    (claim,) = json.loads(Path("evidence/lora.json").read_text())["claims"]
    assert (claim["first seed"], claim["seeds"]) == (50, 2)
    assert claim["figures"] == pytest.approx([2.5, 2.51])


@pytest.mark.usefixtures("_two_claims")
def test_a_claim_that_does_not_hold_gives_exit_code_1() -> None:
    done = plait("verify", "--out", "evidence")
    assert done.exit_code == 1
    assert "does not hold" in done.stdout
    assert Path("evidence/adamw.json").exists()
    bare = plait("verify", "lion", "--out", "evidence")
    assert bare.exit_code == 2
    assert bare.stderr.startswith("plait: 'lion' has no claim to verify")


# -- export --------------------------------------------------------------------------------------------------------
def test_export_to_onnx_gives_the_same_logits() -> None:
    import onnxruntime
    import torch

    from plait.workbench.run import run_recipe

    command = [sys.executable, "-m", "plait.cli", "export", "wine.yaml", "out", "--to", "onnx"]
    subprocess.run(command, check=True, capture_output=True)
    outcome = run_recipe(Recipe.read("wine.yaml"), "runs/wine", quiet=True)
    inputs = outcome.task.test.batch(torch.arange(7)).inputs
    session = onnxruntime.InferenceSession("out/model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    assert torch.allclose(torch.from_numpy(logits), outcome.model.eval()(inputs), atol=1e-5)


def test_a_language_model_is_exported_to_onnx_with_whole_logits() -> None:
    import onnxruntime
    import torch

    from plait.workbench.run import run_recipe

    Path("some.txt").write_text("in the beginning was the word " * 60)
    Path("lm.yaml").write_text("{model: llama-tiny, data: {source: some.txt, length: 16}, train: {steps: 1}}")
    command = [sys.executable, "-m", "plait.cli", "export", "lm.yaml", "out", "--to", "onnx"]
    subprocess.run(command, check=True, capture_output=True)
    outcome = run_recipe(Recipe.read("lm.yaml"), "runs/lm", quiet=True)
    tokens = outcome.task.test.batch(torch.arange(3)).inputs["input_ids"]
    (logits,) = onnxruntime.InferenceSession("out/model.onnx").run(None, {"input_ids": tokens.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), outcome.model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


def test_export_of_what_a_format_cannot_hold_names_another() -> None:
    done = plait("export", "wine.yaml", "out", "--to", "transformers")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == "plait: Sequential is no transformers model: export it with --to onnx."
    done = plait("export", "runs/wine", "out", "--to", "peft")
    assert done.exit_code == 2
    assert "has no low-rank adapter to save" in done.stderr


def test_export_of_any_trained_model_at_a_rank_prints_what_is_lost() -> None:
    done = plait("export", "wine.yaml", "out", "--to", "peft", "--rank", "2")
    assert done.exit_code == 0
    first, *files = done.stdout.splitlines()
    assert first.startswith("relative error of the truncated update: 0.")
    assert "at most, in '" in first
    assert [Path(file).name for file in files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "plait_base.json",
    ]
    Path("whole").mkdir()
    Path("whole/notes.txt").write_text("of the user\n")
    done = plait("export", "wine.yaml", "whole", "--to", "peft", "--rank", "64")
    assert [Path(file).name for file in done.stdout.splitlines()[1:]] == [Path(file).name for file in files]
    assert done.stdout.startswith("relative error of the truncated update: 0 over")
    refused = plait("export", "wine.yaml", "out", "--rank", "2")
    assert refused.exit_code == 2
    assert "plait: --rank is of a PEFT adapter, and --to transformers writes the whole model" in refused.stderr


def test_words_that_nothing_fits_are_said_so() -> None:
    assert "no method fits 'qwertyuiop asdf' well" in plait("list", "qwertyuiop asdf").stderr
    assert plait("list", "labels are noisy").stderr == ""


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--vershun"], "plait: No such option: --vershun"),
        (["lst"], "plait: No such command 'lst'. Did you mean 'list'"),
        (["compare", "--sedes", "3", "a.yaml"], "plait: No such option: --sedes"),
        (["show"], "plait: Missing argument"),
        (["compare", "--seeds", "0", "a.yaml"], "plait: Invalid value for '--seeds'"),
    ],
)
def test_a_mistyped_command_is_one_sentence(typed: list[str], says: str) -> None:
    refused = plait(*typed)
    assert refused.exit_code == 2
    assert refused.stderr.startswith(says)
    assert refused.stderr.count("\n") == 1


def test_it_says_its_version() -> None:
    said = plait("--version")
    assert (said.exit_code, said.stdout) == (0, f"plait {plait_version}\n")


def test_an_unfinished_run_is_not_exported() -> None:
    Path("half").mkdir()
    Path("half/recipe.yaml").write_text("model: mlp\ndata: digits\ntask: classification\n")
    refused = plait("export", "half", "out")
    assert refused.exit_code == 2
    assert refused.stderr == (
        "plait: half holds a run that is not finished: finish it first, with the same `plait run ... --out half`.\n"
    )
    assert not Path("out").exists()
