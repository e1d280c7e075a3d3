"""Every gradient method of the catalogue with every other, in both orders, and with every rule of the step place.

A pair works, or it is refused in one sentence before any training: it never does nothing silently. Dropout is off, so
that what a method changes is never mistaken for other random numbers.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws import MODELS, Case, made
from plait.errors import BadInput
from plait.gradient.clip import Clip
from plait.method import Ask, Method, Now, method, places
from plait.step.momentum import SGD
from plait.train import train
from test_laws import CASES, ENTRIES

GRADIENT = [key for key, entry in ENTRIES.items() if "gradient" in places(entry.make)]
RULES = [key for key, entry in ENTRIES.items() if "step" in places(entry.make)]
SHARP = [key for key in GRADIENT if key in ("sam", "amp", "gam", "gradient-reg", "full-batch")]
"""The methods that ask at weights which they have moved."""

EXTRA: dict[str, dict[str, Any]] = {
    "lora-one": {"precondition": True, "damping": 0.1},  # else it only starts; undamped, plain descent diverges
    "adadagrad": {"tolerance": 1e-3},  # every test fails, so that batches grow in these few steps
    "lawn": {"warmup": 0.0},
    "lora-pro": {"damping": 0.1},  # while B is small its inverse magnifies rounding
    # What keeps plain descent on adapters, whose curvature is large, from diverging:
    "lora-plus": {"ratio": 2.0},
    "gradient-reg": {"strength": 0.02, "ascent": 0.02},
    "full-batch": {"strength": 0.02},
    "lisa": {"where": "conv|body", "period": 1, "layers": 2},  # their other model is of words
    "hft": {"where": "conv|norm|body|head"},
    "clip": {"norm": 0.05},
    # With "gradients" the candidates are those of a round's first pass, so that no gradient of a matrix is held from
    # one pass to the next: there micro-batches and processes see another first pass than the whole batch does.
    "sft": {"growth": "momenta"},
    "r-amt": {"start": 0.0051},  # masks that are about to close
}
"""Fields at which a method acts on the gradient from the first step, beyond those of the laws."""

Weights = dict[str, Tensor]

STEPS, RATE = 3, 0.05
LEAST = 1e-6
"""What a method must change of some weight to be seen, far above rounding."""

ALONE = {"egn": "one process", "lv-hba": "several processes"}
"""Methods for one process, and what they say on several."""
REPLICATED = dict.fromkeys(("winsorized-gradient", "r-amt", "sft"), "sharding='none'")
"""Methods that need the weights whole on every process, and what they say where these are sharded."""

SCRIPT = Path(__file__).with_name("distributed_gradients.py")


class Sum(nn.Module):
    """Several networks whose answers are added, so that methods for layers of different kinds share a model."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        for number, network in enumerate(networks):
            self.add_module(f"network{number}", network)

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, 6] -> [n, 3]."""
        return torch.stack([network(inputs) for network in self.children()]).sum(0)


@method
class Watch(Method):
    """Stands last: notes whether asking left the weights bitwise as they were."""

    def gradient(self, ask: Ask) -> Ask:
        def watching(model: nn.Module, now: Now) -> Tensor:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            value = ask(model, now)
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "weights were left moved"
            return value

        return watching


def case(key: str) -> Case:
    return CASES.get(key, Case())


def own(key: str) -> list[Method]:
    """The methods that a key stands for, as they are tried here."""
    return made(key, **(case(key).fields | EXTRA.get(key, {})))


Ground = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, Any], ...]]
"""Kinds of model, keys whose partners are there, options of training."""


def ground(*keys: str) -> Ground:
    """What the methods of some keys need between them."""
    cases = {key: case(key) for key in keys}
    options: dict[str, Any] = {}
    for c in cases.values():
        options |= c.options
    kinds = tuple(sorted({c.model for c in cases.values()}))
    return kinds, tuple(sorted(key for key in keys if cases[key].partners)), tuple(sorted(options.items()))


@functools.cache
def final(keys: tuple[str, ...], on: Ground, rule: str = "", extra: tuple[Any, ...] = (), **options: Any) -> Weights:
    """The weights after a few steps with the methods of `keys`, then `extra`."""
    kinds, partners, given = on
    torch.manual_seed(0)
    model = MODELS[kinds[0]][0]() if len(kinds) == 1 else Sum(*(MODELS[kind][0]() for kind in kinds))
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    company: list[Method] = []
    for key in partners:
        with_it = case(key).company() if key in keys else case(key).baseline()
        company += [m for m in with_it if m not in company]
    trying = [m for key in keys for m in own(key)]
    if not any("step" in places(type(m)) for m in trying):
        company += own(rule) if rule else [SGD(lr=RATE, momentum=0.0)]
    data = MODELS[kinds[0]][1]()
    settings = {"steps": STEPS, "batch_size": 12, "seed": 3, "validation": data} | dict(given) | options
    done = train(model, data, methods=[*company, *trying, *extra, Watch()], **settings)
    return {name: t.detach().clone() for name, t in done.model.state_dict().items()}


def change(one: Weights, other: Weights) -> float:
    """The largest difference of a weight; infinite where what is trained differs."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def works_or_says_why(keys: tuple[str, ...], rule: str = "") -> str:
    """Nothing if the methods work and each of them changes the result; what is wrong otherwise."""
    on = ground(*keys)
    try:
        both = final(keys, on, rule)
    except BadInput as refused:
        sentence = str(refused)
        one_with_its_cure = sentence.endswith(".") and "\n" not in sentence and ":" in sentence
        return "" if one_with_its_cure else f"{keys} {rule}: refused without a cure: {sentence}"
    except (ArithmeticError, RuntimeError, AssertionError) as problem:
        return f"{keys} {rule}: {problem}"
    for key in keys:
        try:
            without = final(tuple(k for k in keys if k != key), on, rule)
        except BadInput:
            continue  # what is left needs it: a rule of adapters, without the method that adds them
        if change(both, without) < LEAST:
            return f"{keys} {rule}: {key} does nothing"
    return ""


# An equilibrium reads the weights of its layers, not what STN would add to their biases.
@pytest.mark.filterwarnings("ignore:no gradient ever reached .*stn.bias_response")
@pytest.mark.parametrize("first", GRADIENT)
def test_every_pair_of_gradient_methods_works_or_is_refused(first: str) -> None:
    wrong = [works_or_says_why((first, second)) for second in GRADIENT if second != first]
    assert not [w for w in wrong if w]


@pytest.mark.parametrize("rule", RULES)
def test_every_gradient_method_works_with_every_rule(rule: str) -> None:
    wrong = [works_or_says_why((key,), rule) for key in GRADIENT if key != rule]
    assert not [w for w in wrong if w]


@pytest.mark.parametrize("sharp", SHARP)
def test_methods_that_move_weights_accumulate_with_every_other(sharp: str) -> None:
    """Three micro-batches give the step of the whole batch, beside every other gradient method."""
    for other in GRADIENT:
        if other == sharp:
            continue
        try:
            one, three = (final((other, sharp), ground(other, sharp), accumulate=n) for n in (1, 3))
        except BadInput:
            continue
        for name, weight in one.items():
            torch.testing.assert_close(
                three[name], weight, atol=2e-4, rtol=1e-3, msg=lambda m, at=f"{other} {name}": f"{at}: {m}"
            )


@pytest.mark.parametrize("sharp", SHARP)
def test_methods_that_move_weights_clip_and_work_in_mixed_precision(sharp: str) -> None:
    """The clipped step has the length of its bound, in float32, bfloat16 and float16, which agree to their rounding."""
    on, start = ground(sharp, "clip"), final((), ground(sharp), steps=1, extra=(Clip(norm=1e-30),))
    bound = own("clip")[0].norm
    whole = final((sharp, "clip"), on, steps=1)
    for precision in ("bfloat16", "float16"):
        mixed = final((sharp, "clip"), on, steps=1, precision=precision, accumulate=2)
        length = torch.stack([(mixed[n] - start[n]).norm() for n in start]).norm().item()
        assert length == pytest.approx(RATE * bound, rel=1e-2)
        far = torch.stack([(mixed[n] - whole[n]).norm() for n in start]).norm().item()
        assert 0 < far < 0.5 * length  # quotients of differences magnify rounding


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_give_what_one_gives(sharding: str) -> None:
    """Every gradient method, and those that move weights with clipping and accumulation around them."""
    lists = [*GRADIENT, *(f"{sharp},clip" for sharp in SHARP)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), sharding]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *lists], capture_output=True, text=True, timeout=240, env=alone)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    wrong, refused = [], ALONE if sharding == "none" else ALONE | REPLICATED
    for keys in lists:
        if isinstance(found[keys], str):
            wrong += [] if refused.get(keys, "no reason") in found[keys] else [f"{keys}: {found[keys]}"]
            continue
        names = tuple(keys.split(","))
        two = {name: torch.tensor(weight) for name, weight in found[keys].items()}
        far = change(final(names, ground(*names)), two)
        wrong += [f"{keys}: {far}"] if far > 1e-5 else []
    assert not wrong
