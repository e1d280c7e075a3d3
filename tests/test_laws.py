"""One product: every method of the catalogue x the laws of its places. A new method is tried without a line here.

What a method needs to be tried at all (partners, a transformer) stands in CASES; what it is excused from, with the
reason, in EXCUSED.
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from laws import Case, another_model, hypernetwork, is_method, made, recorded_importance, run, same, weights
from plait import catalogue
from plait.claims.base import load as load_claims
from plait.method import Ask, Method, Now, method, places
from plait.predict.base import predictor
from plait.schedule import Tuned

EVIDENCE = Path(__file__).parents[1] / "evidence"

ENTRIES = {key: entry for key, entry in catalogue.load().items() if is_method(entry)}

LORA = (("lora", {"rank": 2}),)
LINEAR = (("lora", {"rank": 2, "where": "body|head"}),)
MEMBER = {"members": (another_model(),)}
TO_TUNE = (("l2", {"strength": Tuned(start=0.01)}),)
CASES: dict[str, Case] = {
    "el2n-grand": Case({"epoch": 0}),  # laws of three steps end within the first epoch
    "adamw": Case({"lr": 3e-3}),  # without a method of the step place a run uses AdamW with its defaults
    "lora": Case({"rank": 2}),
    "dora": Case({"rank": 2}),
    "sorsa": Case({"rank": 2}),
    "lora-xs": Case({"rank": 2}),
    "lost": Case({"rank": 2, "density": 0.4, "where": "body|head"}),
    "svfit": Case({"rank": 3}),
    "allora": Case({"rank": 2}),
    # Its offset has no gradient but rounding after a norm or before a softmax; nor do equal entries compete.
    "snella": Case({"rank": 2, "warmup": 0.7, "where": "conv"}),
    "diffora": Case({"rank": 2, "shared_rank": 1}),
    "triadaptlora": Case({"rank": 2, "most": 3, "period": 2}),
    "lora-dropout": Case({"rank": 2}, without=(("lora", {"rank": 2}),)),
    "lora-init-ab": Case(partners=LORA),
    "bone": Case({"rank": 2, "kind": "shared"}),
    "randlora": Case({"rank": 2}),
    "hydra": Case({"rank": 2}),
    "sltrain": Case({"rank": 2, "density": 0.1}),
    "compacter": Case({"factors": 2, "width": 4, "where": "body"}),
    "dsee": Case({"rank": 2, "entries": 6, "sparsity": 0.4}),
    "r-amt": Case({"where": "body|conv"}),
    "sara": Case({"share": 0.2, "stages": 3}),
    "sft": Case({"density": 0.2, "every": 3, "estimate": 2, "rate": 0.5}),
    "prompt-tuning": Case({"tokens": 3}, model="bert"),
    "prefix-tuning": Case({"tokens": 3, "width": 4}, model="bert"),
    "iapt": Case({"width": 4}, model="bert"),
    "ept": Case({"tokens": 3, "reach": 12, "rank": 2, "width": 4}, model="bert"),
    "spt": Case({"share": 0.2, "rank": 2, "where": "body|conv"}),
    "bitfit": Case(),
    "freeze": Case({"where": "body"}),
    "mup": Case({"base": 2}),
    "logah": Case({"source": hypernetwork()}),
    "mixture-growth": Case(),
    "tleg": Case(model="bert"),
    "learngene-sws": Case({"stages": (2,)}, model="bert"),
    "olora": Case(partners=LINEAR),
    "quantize": Case({"group": 8}),
    "loftq": Case(partners=(("quantize", {"group": 8}), ("lora", {"rank": 2}))),
    "requantize": Case({"group": 8}, partners=LORA),
    "lora-plus": Case(partners=LORA),
    "lora-sb": Case(partners=(("lora-xs", {"rank": 2}),)),
    "pissa": Case(partners=LORA),
    "eva": Case(partners=LINEAR),
    # The gradient of the head has rank 2, below the 2r singular vectors that LoRA-GA takes.
    "lora-ga": Case(partners=(("lora", {"rank": 2, "where": "body"}),)),
    "lora-one": Case(partners=LORA),
    "lora-pro": Case(partners=LORA),
    "fold": Case(partners=LORA),
    "fisher-merge": Case(MEMBER),
    "model-soups": Case(MEMBER | {"kind": "uniform"}),
    "tlm": Case(model="bert"),
    "qk-norm": Case(model="bert"),
    "fira": Case({"rank": 4}),
    "galore": Case({"rank": 4}),
    "dct-adam": Case({"rank": 4}),
    "natural-galore": Case({"rank": 4}),
    "gradnormlorp": Case({"rank": 4}),
    "lisa": Case({"layers": 1, "period": 2}, model="bert"),
    "hft": Case({"period": 2}, model="bert"),
    "subspace-angle": Case(partners=(("galore", {"rank": 4}),)),
    "clip": Case({"norm": 0.01}),
    # Two pieces and at most 24 of 48 examples: every batch, the last of an epoch too, has two.
    "adadagrad": Case({"pieces": 2, "most": 24}),
    "swa": Case({"begin": 0.5}),  # of six steps more than the last
    "pgc": Case({"where": "conv", "bound": 0.01}),
    "flooding": Case({"level": 5.0}),  # above every loss of these runs
    "full-batch": Case(options={"batch_size": 48}),  # one block: two calls
    "rnn-clip": Case(model="recurrent"),
    "eq-prop": Case(model="equilibrium"),
    "jacobian-homeostasis": Case(model="equilibrium"),
    "ghost-bn": Case({"size": 4}, model="normalized"),  # a micro-batch is one ghost batch
    "agvm": Case({"every": 1, "momentum": 0.5}),  # laws count the calls of a step that compares halves
    "dropout": Case({"rate": 0.3}),  # the model's own rate is the default
    "bo-rep": Case({"warmup": 1, "lower_steps": 1}, TO_TUNE, without=(("l2", {}),)),
    "hoag": Case({"warmup": 1, "every": 1, "iterations": 3}, TO_TUNE, without=(("l2", {}),)),
    "maid": Case(
        {"warmup": 1, "every": 1, "iterations": 3, "budget": 20, "convexity": 1.0, "smoothness": 1.0},
        TO_TUNE,
        without=(("l2", {}),),
    ),
    "lv-hba": Case({"warmup": 1, "step_size": 0.1}, TO_TUNE, without=(("l2", {}),)),
    "norm-ball": Case({"radius": 0.5}),
    "stn": Case({"lr": 0.1}, TO_TUNE, without=(("l2", {}),)),
    "riemannlora": Case({"lr": 0.02}, LORA),
    "riemannlora-start": Case(partners=LORA),
    "eata": Case({"lr": 0.1, "entropy_margin": 1.0}),
    "lora-bam": Case({"strength": 3.0, "layers": 2}, LORA, model="paraphrased"),
}
CASES |= dict.fromkeys(["pdlt", "criticality"], Case({"activation": "relu"}))  # a function call in that model
CASES["lora-limits"] = Case(model="bert")
CASES["hlora-forget"] = Case({"file": recorded_importance()})
CASES = {key: case for key, case in CASES.items() if key in ENTRIES}

ONLY_LOOKS = {"measure"}
"""Places that never touch training; a measure may take note of the start in `initialize`."""


def only_looks(key: str) -> bool:
    return "measure" in places(ENTRIES[key].make) and set(places(ENTRIES[key].make)) <= {"initialize", "measure"}


EXCUSED: dict[tuple[str, str], str] = {
    ("accumulates", "ba-lora"): "is of the covariance and the singular values of a micro-batch",
    ("accumulates", "jacobian-homeostasis"): "draws a direction for each example of each pass",
    ("accumulates", "mixout"): "draws a mask for each pass",
    ("accumulates", "lora-dropout"): "draws a mask for each pass",
    ("accumulates", "sft"): "chooses candidates by the first pass, so as to hold no gradient of a matrix's size",
    ("accumulates", "tlm"): "draws tokens for each pass",
    ("accumulates", "loss-reweighting"): "weighs an example against the others of its micro-batch",
}
"""(law, key) -> why the law is not asked of this method."""


def law(name: str, *, only: set[str] | None = None) -> Any:
    """Parametrize a test over the methods that act at one of the places `only`, but for the excused."""
    keys = [
        key
        for key, entry in ENTRIES.items()
        if (name, key) not in EXCUSED and (only is None or only & set(places(entry.make)))
    ]
    return pytest.mark.parametrize("key", keys)


def case(key: str) -> Case:
    return CASES.get(key, Case())


@law("rebuilds")
def test_repr_rebuilds_the_method(key: str) -> None:
    from plait import schedule

    for m in made(key, **case(key).fields):
        assert eval(repr(m), {type(m).__name__: type(m), **vars(schedule)}) == m


@law("seeded")
def test_same_seed_same_weights(key: str) -> None:
    methods = case(key).methods(key)
    assert same(weights(run(case(key), methods)), weights(run(case(key), methods)))


@law("does something")
def test_never_does_nothing(key: str) -> None:
    """The run without the method must differ: in its weights, or, for what only looks, in giving figures at all."""
    acts = set(places(ENTRIES[key].make))
    done, plain = run(case(key), case(key).methods(key)), run(case(key), case(key).baseline())
    if only_looks(key):
        assert any(len(figures) > 1 for seen in done.measures.values() for figures in seen)
    elif acts <= {"predict"}:
        inputs = done.now.calibration(1).__next__().inputs
        plainly, wrapped = predictor([]), predictor(case(key).methods(key))
        first = wrapped(done.model, inputs, done.now)  # a method that adapts as it predicts differs from the second on
        again = wrapped(done.model, inputs, done.now)
        assert not all(torch.equal(p, plainly(plain.model, inputs, plain.now)) for p in (first, again))
    else:
        assert not same(weights(done), weights(plain))


@law("watches", only=ONLY_LOOKS)
def test_a_measure_leaves_training_bitwise_unchanged(key: str) -> None:
    if only_looks(key):
        done = run(case(key), case(key).methods(key), measure_every=2)
        assert same(weights(done), weights(run(case(key), case(key).baseline())))


class Killed(Exception):
    """Stands for a machine that stops."""


@law("resumes")
def test_resumes_bitwise_after_an_interruption(key: str, tmp_path: Path) -> None:
    methods = case(key).methods(key)
    whole = weights(run(case(key), methods))

    def stop(now: Any) -> None:
        if now.step == 4:
            raise Killed

    with pytest.raises(Killed):
        run(case(key), methods, folder=tmp_path, save_every=3, on_step=stop)
    assert same(weights(run(case(key), methods, folder=tmp_path, save_every=3)), whole)


def killed_run(key: str, folder: Path, step: int | None) -> None:
    """Train in a child process that is killed with SIGKILL at a step (never, if None)."""
    child = os.fork()
    if child == 0:

        def die(now: Any) -> None:
            if now.step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            run(case(key), case(key).methods(key), folder=folder, save_every=1, on_step=die)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@law("survives kill -9")
def test_kill_9_then_resume_gives_bitwise_the_same_weights(key: str, tmp_path: Path) -> None:
    methods = case(key).methods(key)
    whole = weights(run(case(key), methods))
    killed_run(key, tmp_path, random.Random(key).randint(1, case(key).steps - 1))
    assert same(weights(run(case(key), methods, folder=tmp_path, save_every=1)), whole)


@law("accumulates")
def test_accumulated_gradients_equal_the_whole_batch(key: str) -> None:
    """Three micro-batches give the step of the whole batch, to float32 rounding; dropout is off, which draws anew."""
    methods = case(key).methods(key)
    one, three = (weights(run(case(key), methods, accumulate=n, steps=3, dropout=False)) for n in (1, 3))
    for name, tensor in one.items():
        torch.testing.assert_close(three[name], tensor, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@law("bfloat16")
def test_trains_in_bfloat16(key: str) -> None:
    done = run(case(key), case(key).methods(key), dtype=torch.bfloat16, steps=3)
    assert all(torch.isfinite(t).all() for t in weights(done).values() if t.is_floating_point())


@method
class Probe(Method):
    """Stands before or after a gradient method in the list: it counts how often it is asked, and compares weights."""

    asked: ClassVar[list[bool]] = []

    def gradient(self, ask: Ask) -> Ask:
        def probing(model: nn.Module, now: Now) -> torch.Tensor:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            value = ask(model, now)
            Probe.asked.append(all(torch.equal(p, before[name]) for name, p in model.named_parameters()))
            return value

        return probing


@law("weights restored", only={"gradient"})
def test_asking_leaves_the_weights_bitwise(key: str) -> None:
    """A gradient method may move the weights while it asks, and must put them back exactly."""
    Probe.asked.clear()
    run(case(key), [*case(key).methods(key), Probe()])
    assert len(Probe.asked) == case(key).steps
    assert all(Probe.asked)


@law("calls", only={"gradient"})
def test_the_number_of_calls_is_as_stated(key: str) -> None:
    """`calls` says how often a step asks the oracle, once the method is past any warmup."""
    Probe.asked.clear()
    methods = [*case(key).company(), Probe(), *made(key, **case(key).fields)]
    run(case(key), methods)
    stated = max(getattr(m, "calls", 1) for m in made(key, **case(key).fields))
    assert len(Probe.asked) == stated * case(key).steps


@pytest.mark.parametrize("key", ENTRIES)
def test_has_a_claim_with_committed_evidence(key: str) -> None:
    """Every row of the ledger states what it must reach, and what it reached stands in evidence/."""
    if ENTRIES[key].kind == "ground":
        return
    claims = load_claims().get(key, {})
    assert claims, f"{key} has no claim: add one in plait/claims"
    verdicts = json.loads((EVIDENCE / f"{key}.json").read_text())["claims"]
    assert {v["name"] for v in verdicts} == set(claims), f"evidence/{key}.json is stale: run plait verify {key}"
