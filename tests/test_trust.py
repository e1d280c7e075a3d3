"""What a run survives: kill -9 at any moment, a full disk, damaged and foreign checkpoints, NaN, senseless options."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws import mlp, same
from plait import checkpoint, train
from plait.checkpoint import steps_kept
from plait.engine import Engine, Pairs, default_loss
from plait.errors import BadInput, NonFinite
from plait.finish.prune import MagnitudePruning
from plait.gradient.noise import GradientNoise
from plait.gradient.sharpness import SAM
from plait.initialize.weight_svd import PiSSA
from plait.loss.base import cross_entropy, squared_error
from plait.loss.own_targets import ELR
from plait.measure.distance import WeightDistance
from plait.method import Method, Now
from plait.parametrize.low_rank import LoRA
from plait.recipe import Recipe
from plait.schedule import Linear
from plait.step.adam import AdamW
from plait.step.momentum import SGD, Lion
from plait.train import Run
from plait.workbench.run import load

STEPS = 24


def numbers() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.3).long()


def interlaced() -> list[Method]:
    """Methods of six places at once; between them they use the memory and every random state."""
    return [
        LoRA(rank=2), PiSSA(), ELR(), SAM(), GradientNoise(), Lion(lr=Linear(start=1e-2, end=1e-3)),
    ]  # fmt: skip


def run(folder: Path | None = None, methods: list[Method] | None = None, **options: Any) -> Run:
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 12, "seed": 3, "save_every": 1, "device": "cpu"}
    methods = interlaced() if methods is None else methods
    return train(mlp(), numbers(), methods=methods, folder=folder, **settings | options)


def weights(done: Run) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in done.model.state_dict().items()}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(work: Callable[[], Any], kill_after: float | None = None) -> int:
    """Do work in a forked process, which is killed from outside after so many seconds; return how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    timer = threading.Timer(kill_after or 0.0, os.kill, (child, signal.SIGKILL))
    if kill_after is not None:
        timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    if kill_after is not None:
        timer.join()
    return os.waitstatus_to_exitcode(status)


def killed_at_step(folder: Path, step: int, **options: Any) -> int:
    return in_a_child(lambda: run(folder, on_step=lambda now: die() if now.step == step else None, **options))


def killed_after(folder: Path, seconds: float, **options: Any) -> int:
    """Kill a run from outside, whatever it does then; its steps are slowed, so that it cannot be done before."""
    return in_a_child(lambda: run(folder, on_step=lambda now: time.sleep(0.01), **options), kill_after=seconds)


def killed_within_a_save(folder: Path, call: int, **options: Any) -> int:
    """Kill a run as it calls, for the `call`th time, anything by which a checkpoint reaches the disk."""

    def work() -> None:
        calls = [0]

        def counting(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*given: Any, **named: Any) -> Any:
                calls[0] += 1
                if calls[0] == call:
                    die()
                return function(*given, **named)

            return counted

        for place, name in ((checkpoint, "sync"), (checkpoint, "write_tensors"), (checkpoint.shutil, "rmtree")):
            setattr(place, name, counting(getattr(place, name)))
        Path.replace = counting(Path.replace)  # type: ignore[method-assign]
        run(folder, **options)

    return in_a_child(work)


def test_killed_20_times_with_minus_9_it_ends_in_bitwise_the_same_weights(tmp_path: Path) -> None:
    steps = 96
    whole = run(steps=steps)
    draw = random.Random(0)
    ended, reached = [], [0]
    for number in range(20):
        if number % 3 == 0:
            ended.append(killed_at_step(tmp_path, reached[-1] + draw.randint(1, 3), steps=steps))
        elif number % 3 == 1:
            ended.append(killed_within_a_save(tmp_path, draw.randint(1, 30), steps=steps))
        else:
            ended.append(killed_after(tmp_path, draw.uniform(0.0, 0.15), steps=steps))
        reached.append(max(steps_kept(tmp_path), default=0))
    assert ended == [-signal.SIGKILL] * 20
    assert reached == sorted(reached), "no kill costs a checkpoint that was there"
    assert 0 < reached[-1] < steps
    again = run(tmp_path, steps=steps)
    assert same(weights(again), weights(whole))
    assert again.history == whole.history
    assert len(steps_kept(tmp_path)) == 2
    assert not list(tmp_path.glob(".*")), "what the killed left is tidied away"


@pytest.mark.parametrize("call", range(1, 24))
def test_killed_at_every_moment_of_its_saves(call: int, tmp_path: Path) -> None:
    """A save makes some ten calls: two saves, cut before each of them."""
    assert killed_within_a_save(tmp_path, call) == -signal.SIGKILL
    assert same(weights(run(tmp_path, steps=STEPS)), weights(uninterrupted()))


def uninterrupted() -> Run:
    if not _UNINTERRUPTED:
        _UNINTERRUPTED.append(run())
    return _UNINTERRUPTED[0]


_UNINTERRUPTED: list[Run] = []


def test_minilm_killed_goes_on_bitwise(tmp_path: Path) -> None:
    from plait.tasks.base import load_task

    def work(folder: Path | None, kill_at: int | None = None) -> Run:
        torch.manual_seed(0)
        task = load_task(None, "minilm", "tweets", rows=60, length=16)
        methods = [LoRA(rank=2, where="query|value"), PiSSA(), ELR(), Lion(lr=1e-3)]
        return train(
            task.model, task.train, task.loss, methods, call=task.call, steps=4, batch_size=4, folder=folder,
            save_every=1, device="cpu", on_step=lambda now: die() if now.step == kill_at else None,
        )  # fmt: skip

    assert in_a_child(lambda: work(tmp_path, kill_at=3)) == -signal.SIGKILL
    assert steps_kept(tmp_path) == [1, 2]
    assert same(weights(work(tmp_path)), weights(work(None)))


# -- damaged, foreign, unwritable ------------------------------------------------------------------------------------
def stopped(folder: Path, step: int = 3, **options: Any) -> None:
    run(folder, on_step=lambda now: now.step == step, **options)


def said(folder: Path, **options: Any) -> str:
    """What a run in a folder says instead of running."""
    with pytest.raises(BadInput) as caught:
        run(folder, **options)
    return str(caught.value)


def test_a_full_disk_is_said_and_the_checkpoint_before_stands(tmp_path: Path) -> None:
    """A limit on the size of files fails a write half way, as a full disk does."""
    stopped(tmp_path)
    messages = tmp_path / "said.txt"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            run(tmp_path)
        except BadInput as problem:
            messages.write_text(str(problem))

    assert in_a_child(work) == 0
    assert re.fullmatch(
        re.escape(f"the checkpoint of step 4 could not be written to {tmp_path}: ")
        + r".*File too large.*; the checkpoint of step 3 stands\. Free some room and run the same command again\.",
        messages.read_text(),
    )
    assert steps_kept(tmp_path) == [2, 3]
    assert not list(tmp_path.glob(".*"))
    assert same(weights(run(tmp_path)), weights(uninterrupted()))


def test_no_room_for_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert said(tmp_path) == (
            f"the checkpoint of step 4 could not be written to {tmp_path}: No space left on device; the checkpoint of "
            "step 3 stands. Free some room and run the same command again."
        )
    assert same(weights(run(tmp_path)), weights(uninterrupted()))


FILES = ["state.json", "model.safetensors", "optimizer.safetensors", "memory.safetensors", "random.safetensors"]


@pytest.mark.parametrize("part", [0.0, 0.6])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_checkpoint_is_named_and_the_one_before_goes_on(name: str, part: float, tmp_path: Path) -> None:
    stopped(tmp_path)
    damaged = tmp_path / "step-3" / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(part * len(content))])
    message = said(tmp_path)
    assert message.startswith(f"{damaged} is truncated or damaged (")
    assert message.endswith(f"): delete {tmp_path / 'step-3'} to go on from step 2.")
    for file in (tmp_path / "step-3").iterdir():
        file.unlink()
    (tmp_path / "step-3").rmdir()
    assert same(weights(run(tmp_path)), weights(uninterrupted()))


@pytest.mark.parametrize("name", FILES[1:])
def test_a_checkpoint_with_one_bit_turned_is_named(name: str, tmp_path: Path) -> None:
    stopped(tmp_path)
    damaged = tmp_path / "step-3" / name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert said(tmp_path).startswith(f"{damaged} is truncated or damaged (it does not hold what was written): delete")


def test_a_state_in_which_a_name_or_a_number_changed_is_named(tmp_path: Path) -> None:
    stopped(tmp_path)
    damaged = tmp_path / "step-3" / "state.json"
    content = damaged.read_text()
    for changed in (content.replace('"skipped"', '"skopped"'), content.replace('"step": 3', '"step": 2')):
        assert changed != content
        damaged.write_text(changed)
        assert said(tmp_path).startswith(f"{damaged} is truncated or damaged (it does not hold what was written)")


def test_frozen_weights_with_one_bit_turned_are_named(tmp_path: Path) -> None:
    stopped(tmp_path)
    (frozen,) = tmp_path.glob("frozen-*.safetensors")
    content = bytearray(frozen.read_bytes())
    content[-1] ^= 1
    frozen.write_bytes(content)
    assert said(tmp_path).startswith(f"{frozen} is truncated or damaged (it does not hold what was written): delete")


def test_truncated_frozen_weights_and_a_lone_damaged_checkpoint_mean_to_start_anew(tmp_path: Path) -> None:
    stopped(tmp_path / "a")
    (frozen,) = (tmp_path / "a").glob("frozen-*.safetensors")
    frozen.write_bytes(frozen.read_bytes()[:100])
    assert said(tmp_path / "a").startswith(f"{frozen} is truncated or damaged (")
    assert said(tmp_path / "a").endswith(f"): delete {tmp_path / 'a'} to start anew.")
    stopped(tmp_path / "b", step=1)
    (tmp_path / "b" / "step-1" / "state.json").write_text("[]")
    assert said(tmp_path / "b") == (
        f"{tmp_path / 'b' / 'step-1' / 'state.json'} is truncated or damaged (it holds no run): delete "
        f"{tmp_path / 'b'} to start anew."
    )


def test_frozen_weights_of_a_run_that_died_before_its_first_checkpoint_are_not_taken(tmp_path: Path) -> None:
    """Another start has other frozen weights (PiSSA's remainder) under the same names."""
    assert killed_within_a_save(tmp_path, 8) == -signal.SIGKILL
    assert list(tmp_path.glob("frozen-*.safetensors"))
    assert not steps_kept(tmp_path)
    other = [LoRA(rank=2), SGD(lr=0.1)]
    stopped(tmp_path, methods=other)
    assert len(list(tmp_path.glob("frozen-*.safetensors"))) == 1
    assert same(weights(run(tmp_path, methods=other)), weights(run(methods=other)))


ANOTHER: dict[str, tuple[dict[str, Any], str]] = {
    "methods": (
        {"methods": [LoRA(rank=3)]},
        r"methods: \['LoRA\(rank=2\)', .*\], this run's: \['LoRA\(rank=3\)'\]",
    ),
    "seed": ({"seed": 4}, "seed: 3, this run's: 4"),
    "batch_size": ({"batch_size": 8}, "batch_size: 12, this run's: 8"),
    "accumulate": ({"accumulate": 2}, "accumulate: 1, this run's: 2"),
    "precision": ({"precision": "bfloat16"}, "precision: float32, this run's: bfloat16"),
}


@pytest.mark.parametrize("odd", ANOTHER)
def test_a_checkpoint_of_another_recipe_is_refused(odd: str, tmp_path: Path) -> None:
    stopped(tmp_path)
    options, differs = ANOTHER[odd]
    assert re.fullmatch(
        re.escape(f"{tmp_path} holds a checkpoint of another recipe (its ") + differs
        + re.escape("): choose another folder, or delete that one to start anew."),
        said(tmp_path, **options),
    )  # fmt: skip
    assert same(weights(run(tmp_path)), weights(uninterrupted()))


def test_a_checkpoint_of_another_model_or_of_other_data_is_refused(tmp_path: Path) -> None:
    inputs, targets = numbers()
    settings: dict[str, Any] = {"steps": 2, "folder": tmp_path, "device": "cpu"}
    train(nn.Linear(6, 3), (inputs, targets), **settings)
    ending = "): choose another folder, or delete that one to start anew."
    with pytest.raises(BadInput) as caught:
        train(nn.Sequential(nn.Linear(6, 3)), (inputs, targets), **settings)
    assert str(caught.value) == (
        f"{tmp_path} holds a checkpoint of another recipe (its model: Linear, this run's: Sequential{ending}"
    )
    with pytest.raises(BadInput, match=r"\(its shapes of weights: \w{12}, this run's: \w{12}\): choose another folder"):
        train(nn.Linear(6, 4), (inputs, targets), **settings)
    with pytest.raises(BadInput) as caught:
        train(nn.Linear(6, 3), (inputs[:40], targets[:40]), **settings)
    assert str(caught.value) == (
        f"{tmp_path} holds a checkpoint of another recipe (its examples: 48, this run's: 40{ending}"
    )


def test_more_steps_go_on_where_nothing_is_scheduled(tmp_path: Path) -> None:
    constant, scheduled = [AdamW(lr=1e-2)], [AdamW(lr=Linear(start=1e-2, end=0.0))]
    run(tmp_path / "a", constant, steps=4)
    assert same(weights(run(tmp_path / "a", constant, steps=9)), weights(run(None, constant, steps=9)))
    cure = "choose another folder, or delete that one to start anew."
    assert said(tmp_path / "a", methods=constant, steps=3) == (
        f"{tmp_path / 'a'} holds a checkpoint of step 9, beyond the 3 steps of this run: give steps=9, or {cure}"
    )
    run(tmp_path / "b", scheduled, steps=4)
    assert said(tmp_path / "b", methods=scheduled, steps=9) == (
        f"{tmp_path / 'b'} holds a run of 4 steps whose schedules follow that number, and this run has 9: give "
        f"steps=4, or {cure}"
    )


# -- NaN and infinity ------------------------------------------------------------------------------------------------
BAD = 17
"""The example whose input is NaN, or whose gradient is made infinite."""


def spoiled() -> tuple[Tensor, Tensor]:
    inputs, targets = numbers()
    inputs[BAD] = torch.nan
    return inputs, targets


class Explode(torch.autograd.Function):
    """x -> x, with an infinite gradient."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return torch.where(slope == 0, 0.0, torch.inf)


def steep(output: Tensor, target: Tensor, now: Now) -> Tensor:
    """Cross entropy whose value is finite and whose gradient is not, on the bad example."""
    misfit = cross_entropy(output, target, now)
    return torch.where(now.batch.index == BAD, Explode.apply(misfit), misfit)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("what", ["the objective", "a gradient"])
def test_what_is_not_finite_stops_with_the_step_the_examples_and_the_checkpoint(
    what: str, precision: str, tmp_path: Path
) -> None:
    data, loss = (spoiled(), None) if what == "the objective" else (numbers(), steep)
    settings: dict[str, Any] = {"steps": 8, "batch_size": 12, "seed": 3, "device": "cpu", "precision": precision}
    seen: list[list[int]] = []
    train(
        mlp(), numbers(), methods=[AdamW()], on_step=lambda now: seen.append(now.batch.index.tolist()), **settings
    )  # fmt: skip
    step = next(i for i, rows in enumerate(seen) if BAD in rows)
    assert step > 0, "a seed whose first step is good"
    for folder, kept in (
        (None, "no checkpoint was kept"),
        (tmp_path, f"the last good checkpoint is of step {step} in {tmp_path}"),
    ):
        with pytest.raises(NonFinite) as caught:
            train(mlp(), data, loss, [AdamW()], folder=folder, save_every=1, **settings)
        assert str(caught.value) == (
            f"{what} became NaN or infinite at step {step}, on the examples {seen[step]}; {kept}. Look at these "
            "examples, lower the learning rate, or set nonfinite to 'skip'."
        )
    assert steps_kept(tmp_path)[-1] == step


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loss", [None, steep])
def test_skip_leaves_the_step_out_and_counts_it(loss: Any, precision: str, tmp_path: Path) -> None:
    """Neither weights, nor what methods remember, nor running statistics keep a trace of the step."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            """[n, 6] -> [n, 3]."""
            return self.head(self.norm(inputs))

    states: dict[int, dict[str, Tensor]] = {}
    visits: dict[int, list[int]] = {}

    def watch(model: nn.Module) -> Callable[[Now], None]:
        def look(now: Now) -> None:
            memory = {f"memory {name}": t for held in now.memory.values() for name, t in held.items()}
            states[now.step] = {k: t.clone() for k, t in {**model.state_dict(), **memory}.items()}
            visits[now.step] = now.batch.index.tolist()

        return look

    model, data = Normed(), numbers() if loss else spoiled()
    done = train(
        model, data, loss, [ELR(), AdamW(lr=1e-2)], steps=8, batch_size=12, seed=3, device="cpu", nonfinite="skip",
        precision=precision, on_step=watch(model), folder=tmp_path,
    )  # fmt: skip
    spoilt = [step - 1 for step, rows in visits.items() if BAD in rows]
    assert done.skipped == spoilt
    assert len(spoilt) == 2, "once an epoch"
    for step in spoilt:
        assert same(states[step], states[step + 1])
    assert all(torch.isfinite(t).all() for t in states[8].values())
    assert json.loads((tmp_path / "step-8" / "state.json").read_text())["skipped"] == spoilt


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("steps", [1, 6])
def test_weights_that_are_not_finite_are_not_kept(nonfinite: str, steps: int, tmp_path: Path) -> None:
    """Gradients are finite at the step that spoils the weights, so the objective shows it a step later, if ever."""
    settings: dict[str, Any] = {"batch_size": 12, "seed": 3, "device": "cpu", "nonfinite": nonfinite, "save_every": 1}
    with pytest.raises(NonFinite, match=r"a weight became NaN or infinite by step 1, .* no checkpoint was kept. Lower"):
        train(mlp(), numbers(), methods=[SGD(lr=1e39)], steps=steps, folder=tmp_path, **settings)
    assert steps_kept(tmp_path) == []
    with pytest.raises(NonFinite, match="a weight became NaN or infinite by step 1"):
        train(mlp(), numbers(), methods=[SGD(lr=1e39)], steps=1, **settings)


def test_a_regression_that_left_the_numbers_has_no_figures() -> None:
    text = "model: mlp\ndata: diabetes\ntrain: {steps: 1, batch_size: 16}"
    task = load(Recipe.parse(text))
    with torch.no_grad():
        next(task.model.parameters()).fill_(torch.nan)
    assert all(value != value for value in task.metrics(task.model, task.test).values())


def test_a_run_that_is_stopped_at_its_last_step_is_not_finished(tmp_path: Path) -> None:
    made = dict[str, Any](steps=3, folder=tmp_path, methods=[MagnitudePruning(n=1, m=2)])
    stopped = train(mlp(), numbers(), on_step=lambda now: now.step == 3, **made)
    assert stopped.stopped
    assert not any((p == 0).any() for p in stopped.model.parameters())
    done = train(mlp(), numbers(), **made)
    assert not done.stopped
    assert any((p == 0).any() for p in done.model.parameters())


def test_measures_are_taken_once_at_the_last_step() -> None:
    run = train(mlp(), numbers(), methods=[WeightDistance()], steps=6, measure_every=3)
    assert [seen["step"] for seen in run.measures[repr(WeightDistance())]] == [3, 6]


def test_a_run_that_stopped_may_go_on_by_skipping(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 8, "batch_size": 12, "seed": 3, "device": "cpu", "folder": tmp_path}
    with pytest.raises(NonFinite):
        train(mlp(), spoiled(), save_every=1, **settings)
    assert len(train(mlp(), spoiled(), nonfinite="skip", **settings).skipped) == 2


def test_float16_scales_the_objective_so_that_small_gradients_live_and_large_ones_pass() -> None:
    """A gradient below float16's smallest number is lost without the scale; one that overflows is asked for again."""

    def tiny(output: Tensor, target: Tensor, now: Now) -> Tensor:
        return 1e-7 * cross_entropy(output, target, now)

    def huge(output: Tensor, target: Tensor, now: Now) -> Tensor:
        return 1e5 * cross_entropy(output, target, now)

    for loss in (tiny, huge):
        grads = {}

        def look(now: Now, name: str, grads: dict[str, Tensor] = grads) -> None:
            grads[name] = torch.cat([p.grad.flatten() for p in now.model.parameters() if p.grad is not None])

        for precision in ("float32", "float16"):
            model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
            for p in model.parameters():
                nn.init.uniform_(p, -1, 1, generator=torch.Generator().manual_seed(0))
            done = train(
                model, numbers(), loss, [SGD(lr=1e-9)], steps=1, batch_size=48, device="cpu", precision=precision,
                on_step=lambda now, p=precision: look(now, p),
            )  # fmt: skip
        assert torch.nn.functional.cosine_similarity(grads["float16"], grads["float32"], dim=0) > 0.999
        assert (grads["float16"].norm() / grads["float32"].norm() - 1).abs() < 0.01
        assert (int(done.now.memory["float16"]["k"]) < 15) == (loss is huge)


# -- options ---------------------------------------------------------------------------------------------------------
WHOLE = "a whole number of at least"
SENSELESS: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"steps": 0}, f"train.steps must be {WHOLE} 1, not 0."),
    "half a step": ({"steps": 0.5}, f"train.steps must be {WHOLE} 1, not 0.5."),
    "no batch": ({"batch_size": 0}, f"train.batch_size must be {WHOLE} 1, not 0."),
    "no parts": ({"accumulate": 0}, f"train.accumulate must be {WHOLE} 1, not 0."),
    "saves": ({"save_every": -1}, f"train.save_every must be {WHOLE} 0, not -1."),
    "measures": ({"measure_every": -1}, f"train.measure_every must be {WHOLE} 0, not -1."),
    "precision": ({"precision": "fp16"}, "train.precision must be one of float32, bfloat16, float16, not 'fp16'."),
    "sharding": ({"sharding": "zero3"}, "train.sharding must be one of none, fsdp, not 'zero3'."),
    "nonfinite": ({"nonfinite": "ignore"}, "train.nonfinite must be one of stop, skip, not 'ignore'."),
    "compile": ({"compile": "yes"}, "train.compile must be true or false, not 'yes'."),
    "device": ({"device": "gpu"}, "there is no device 'gpu' here: give 'cpu', or 'cuda' on a machine that has one."),
    "seed": ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, not -1."),
    "a class": ({"methods": [LoRA]}, "LoRA is a class: write LoRA()."),
    "a name": (
        {"methods": ["lora"]},
        "'lora' is no method: give methods such as LoRA(rank=8), a function's list unpacked.",
    ),
    "a method": (
        {"methods": LoRA(rank=2)},
        "methods must be a list, as in methods=[LoRA(rank=8)], not LoRA(rank=2).",
    ),
    "a class of models": ({"model": nn.Linear}, "the model must be an nn.Module, not the class Linear."),
    "no data": ({"data": []}, "the training data is empty: give at least one example."),
    "text": (
        {"data": "tweets"},
        "the training data must be (inputs, targets) tensors, a sequence of pairs, or have len and batch(positions), "
        "not str.",
    ),
    "triples": (
        {"data": [(1, 2, 3)]},
        "the training data is a sequence: it must hold (input, target) pairs of tensors or numbers.",
    ),
    "fewer targets": (
        {"data": (torch.zeros(4, 6), torch.zeros(3))},
        "the data has inputs of shape (4, 6) and targets of shape (3,): give one target for each input.",
    ),
    "a label too many": (
        {"data": (torch.zeros(4, 6), torch.full((4,), 99)), "methods": []},
        "a target is 99, but the model has 3 outputs: targets must be 0 to 2.",
    ),
    "the name of a loss": (
        {"loss": "mse"},
        "loss must be a function (output, target, now) -> misfit per example, not 'mse'.",
    ),
    "no validation": ({"validation": []}, "the validation data is empty: give at least one example."),
}


@pytest.mark.parametrize("title", SENSELESS)
def test_senseless_options_are_refused_in_one_sentence(title: str, tmp_path: Path) -> None:
    given, sentence = SENSELESS[title]
    options: dict[str, Any] = {"model": mlp(), "data": numbers(), "steps": 1, "device": "cpu", "folder": tmp_path}
    with pytest.raises(BadInput) as caught:
        train(**options | given)
    assert str(caught.value) == sentence
    assert not list(tmp_path.iterdir())


def test_data_that_is_scored_too_late_is_refused() -> None:
    from plait.data.pruning import DataDiet

    with pytest.raises(BadInput) as caught:
        run(methods=[DataDiet(keep=0.5, epoch=6)])
    assert str(caught.value) == (
        "DataDiet scores after 24 steps (epoch=6), which a run of 24 steps does not reach: train for more steps, or "
        "lower its epoch."
    )


# -- what else one process meets -------------------------------------------------------------------------------------
def test_precision_may_change_from_run_to_run_and_after_a_host() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def curve(precision: str) -> list[float]:
        return [h["objective"] for h in run(methods=[AdamW()], precision=precision, steps=3).history]

    first = {precision: curve(precision) for precision in ("float32", "bfloat16", "float16")}
    assert len({tuple(values) for values in first.values()}) == 3
    for precision in ("bfloat16", "float32"):
        assert curve(precision) == first[precision]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
    assert curve("float32") == first["float32"]


def test_the_loss_is_told_from_the_targets_and_validation_uses_the_runs_own() -> None:
    inputs, labels = numbers()
    soft = torch.softmax(torch.randn(48, 3, generator=torch.Generator().manual_seed(0)), -1)
    tokens = labels[:, None].repeat(1, 4)
    for target, loss in (
        (labels, cross_entropy), (tokens, cross_entropy), (soft, cross_entropy), (inputs[:, 0], squared_error),
        (inputs[:, :2], squared_error), (torch.ones(48, 1), squared_error), (2 * soft, squared_error),
    ):  # fmt: skip
        assert default_loss(Pairs(inputs, target)) is loss

    def evaluated(target: Tensor, loss: Any = None, head: nn.Module | None = None) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        model = head or nn.Linear(6, 3)
        done = train(model, (inputs, target), loss, steps=1, validation=(inputs, target), batch_size=7, device="cpu")
        with torch.no_grad():
            return done.now.evaluate(done.model), done.model(inputs)

    value, output = evaluated(soft)
    expected = -(soft * output.log_softmax(-1)).sum(-1).mean()
    assert value == pytest.approx(float(expected), rel=1e-5)
    tokens[::2, 2:] = -100
    value, output = evaluated(tokens, head=nn.Sequential(nn.Linear(6, 12), nn.Unflatten(1, (4, 3))))
    counted = tokens != -100
    expected = -output.log_softmax(-1)[counted].gather(1, tokens[counted][:, None]).mean()
    assert value == pytest.approx(float(expected), rel=1e-5)
    value, output = evaluated(soft, squared_error)
    assert value == pytest.approx(float((output - soft).square().sum(-1).mean()), rel=1e-5)


def test_evaluation_leaves_every_layers_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).train()
    model[0].eval()
    engine = Engine(device="cpu")
    now = engine.start(model, Pairs(*numbers()), None, 1, 8, numbers())
    assert now.evaluate(model) == now.evaluate(model)
    assert [m.training for m in model.modules()] == [True, False, True]
