"""Optimizer steps over the weights of SmolLM2-135M (float32): ours beside torch's, pytorch_optimizer's and fira's.

Every contender steps the same weights, in turns, in one process; each is given by its best turn. The bound is what this
machine moves: a kernel that reads and writes as many arrays as the rule must, and computes next to nothing. Ratios are
what counts; milliseconds are of the machine and of what else it did. --save adds to what the results file holds. Peers
are compared with where they can be imported: pytorch_optimizer and bitsandbytes may stand in an environment of their
own, whose site-packages PYTHONPATH names.

    python benchmarks/optimizers.py [--small] [--threads 1 2] [--rounds 7] [--save]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import platform
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait import catalogue
from plait.math import kernels
from plait.math.update_rule import UpdateRule
from plait.step.adam import AdamW
from plait.step.low_rank import Fira, GaLore

sys.path.insert(0, str(Path(__file__).parent))
from turns import in_turns

RESULTS = Path(__file__).parent / "results" / "optimizers.json"
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]


def shapes(small: bool) -> list[tuple[int, ...]]:
    """The shapes of SmolLM2-135M's weights; --small takes three of its thirty layers and a twelfth of its words."""
    return [(4096 if small else 49152, 576), *(LAYER * (3 if small else 30)), (576,)]


def stream3(weight: Any, gradient: Any, first: Any, second: Any) -> tuple[Any, ...]:
    """Read four arrays, write three: AdamW's traffic."""
    return gradient, first + gradient, second + gradient


def stream2(weight: Any, gradient: Any, first: Any) -> tuple[Any, ...]:
    """Read three arrays, write two: Lion's traffic."""
    return gradient, first + gradient


def stream1(weight: Any, gradient: Any) -> tuple[Any, ...]:
    """Read two arrays, write one: the traffic of a rule without states."""
    return (gradient,)


def stream4(weight: Any, gradient: Any, first: Any, second: Any, third: Any) -> tuple[Any, ...]:
    """Read five arrays, write four: DiffGrad's traffic, and that of MARS without its norm."""
    return gradient, first + gradient, second + gradient, third + gradient


def stream5(weight: Any, gradient: Any, first: Any, second: Any, third: Any, fourth: Any) -> tuple[Any, ...]:
    """Read six arrays, write five: Adan's traffic."""
    return gradient, first + gradient, second + gradient, third + gradient, fourth + gradient


STREAMS = (stream1, stream2, stream3, stream4, stream5)
"""By number of states."""


class Stream:
    """The bound of a rule: the same bytes, no arithmetic to speak of."""

    def __init__(self, weights: list[nn.Parameter], direction: Callable[..., Any]) -> None:
        self.rule, self.weights = UpdateRule(direction), weights
        self.states = [[torch.zeros_like(p) for _ in self.rule.states] for p in weights]

    def step(self) -> None:
        run = kernels.kernel(self.rule, "stream")
        assert run is not None
        items = [
            (0, p.numel(), 1, 0, p.data_ptr(), p.grad.data_ptr(), *(s.data_ptr() for s in held))
            for p, held in zip(self.weights, self.states, strict=True)
        ]
        kernels.launch(run, items, [(0.0, 0.0, 0.0)], whole=False)


def peer(module: str, name: str) -> Any:
    """A peer's class, or None where it is not installed."""
    stubbed = "bitsandbytes" in sys.modules
    if module.startswith("galore") and not stubbed and importlib.util.find_spec("bitsandbytes") is None:
        for absent in ("", ".optim", ".optim.optimizer", ".functional"):  # galore_torch imports what it then leaves
            stub = sys.modules[f"bitsandbytes{absent}"] = types.ModuleType(f"bitsandbytes{absent}")
            stub.Optimizer2State, stub.functional = object, None  # type: ignore[attr-defined]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


THEIRS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "adabelief": "AdaBelief",
    "diffgrad": "DiffGrad",
    "adamp": "AdamP",
    "adan": "Adan",
    "adopt": "ADOPT",
    "laprop": "LaProp",
    "mars": "MARS",
    "sgd": "SGD",
    "sgdw": "SGDW",
    "lion": "Lion",
    "signsgd": "SignSGD",
    "adagrad": "",
    "lamb": "Lamb",
    "lars": "LARS",
}
"""Rules that kernels step, and their names in pytorch_optimizer; SGD stands there for torch's own."""
MOMENTUM = {"sgd", "sgdw", "signsgd"}
BY_NORM = {"lamb", "lars", "adamp", "mars"}
"""Rules that read a weight, or its gradient, once more for a norm."""


def contenders(weights: list[nn.Parameter], rule: str) -> dict[str, Any]:
    """The optimizers to compare for a rule, ours first, then the bound."""
    ours = catalogue.find(rule).make
    made: dict[str, Any] = {"plait": ours(weights, lr=1e-6)}
    made["stream"] = Stream(weights, STREAMS[len(ours.rule().states)])
    more = {"momentum": 0.9} if rule in MOMENTUM else {}
    if rule in ("adam", "adamw", "sgd", "adagrad"):
        names = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "adagrad": "Adagrad"}
        made["torch fused"] = getattr(torch.optim, names[rule])(weights, lr=1e-6, fused=True, **more)
    if rule == "adamw":
        made["torch loop"] = torch.optim.AdamW(weights, lr=1e-6, foreach=False)
    if rule == "mars":
        more = {"optimize_1d": True}  # by the same rule for every shape
    if THEIRS[rule] and (theirs := peer("pytorch_optimizer", THEIRS[rule])) is not None:
        made["pytorch_optimizer"] = theirs(weights, lr=1e-6, **more)
    return made


def eight_bit(small: bool, rounds: int) -> dict[str, Any]:
    """AdamW with states in 8 bits and in bfloat16 beside float32, torch's, and bitsandbytes' for the CPU."""
    weights = weights_with_gradients(small)
    made: dict[str, Any] = {"plait": AdamW(weights, lr=1e-6, states="8bit")}
    made["plait bfloat16"] = AdamW(weights, lr=1e-6, states="bfloat16")
    made["plait float32"] = AdamW(weights, lr=1e-6)
    made["stream float32"] = Stream(weights, stream3)
    made["torch fused float32"] = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    theirs = peer("bitsandbytes.optim", "AdamW8bit")
    if theirs is not None:
        made["bitsandbytes"] = theirs(weights, lr=1e-6)
    times = in_turns(made, rounds)
    found: dict[str, Any] = {
        "ms": {name: round(1e3 * t, 1) for name, t in times.items()},
        "to the stream": round(times["plait"] / times["stream float32"], 3),
        "state MB": {name: held(made[name]) for name in made if hasattr(made[name], "state")},
    }
    if theirs is not None:
        found["faster than bitsandbytes"] = round(times["bitsandbytes"] / times["plait"], 1)
    print("8bit adamw", json.dumps(found), flush=True)
    return found


def held(optimizer: torch.optim.Optimizer) -> float:
    """Megabytes of the states."""
    return round(
        sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)) / 1e6, 1
    )


def mean(ratios: list[float]) -> float:
    """The geometric mean."""
    return round(math.exp(sum(map(math.log, ratios)) / max(len(ratios), 1)), 3)


def weights_with_gradients(small: bool, matrices_only: bool = False) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes(small)[1 if matrices_only else 0 :]:
        if matrices_only and len(shape) < 2:
            continue
        p = nn.Parameter(0.02 * torch.randn(shape, generator=draw))
        p.grad = 1e-3 * torch.randn(shape, generator=draw)
        made.append(p)
    return made


def seconds(step: Callable[[], Any]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def elementwise(small: bool, rounds: int, chosen: list[str], earlier: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {rule: row for rule, row in earlier.items() if rule in THEIRS}
    for rule in chosen:
        weights = weights_with_gradients(small)
        times = in_turns(contenders(weights, rule), rounds)
        found[rule] = {
            "ms": {name: round(1e3 * t, 2) for name, t in times.items()},
            "to the stream": round(times["plait"] / times["stream"], 3),
            "to peers": {n: round(times["plait"] / t, 3) for n, t in times.items() if n not in ("plait", "stream")},
        }
        print(rule, json.dumps(found[rule]), flush=True)
        del weights
        gc.collect()
    rules = [row for rule, row in found.items() if rule not in BY_NORM]
    peers = [row["to peers"]["pytorch_optimizer"] for row in rules if "pytorch_optimizer" in row["to peers"]]
    found["geometric means"] = {"to the stream": mean([row["to the stream"] for row in rules])}
    if peers:
        found["geometric means"]["faster than pytorch_optimizer"] = round(1 / mean(peers), 2)
    print("geometric means", json.dumps(found["geometric means"]), flush=True)
    return found


def low_rank_peer(module: str, name: str, weights: list[nn.Parameter], **fields: float) -> dict[str, Any]:
    """A package's low-rank optimizer at rank 128 that never refreshes, by the package's name; empty without it."""
    theirs = peer(module, name)
    if theirs is None:
        return {}
    groups = [{"params": weights, "rank": 128, "update_proj_gap": 10**9, "proj_type": "std", **fields}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {module.partition(".")[0]: theirs(groups, lr=1e-6)}


def galore(small: bool, rounds: int) -> dict[str, Any]:
    """GaLore's plain step over the hidden matrices, rank 128, beside the authors' package."""
    weights = weights_with_gradients(small, matrices_only=True)
    made: dict[str, Any] = {"plait": GaLore(weights, lr=1e-6, rank=128, spread=False, period=10**9)}
    made |= low_rank_peer("galore_torch", "GaLoreAdamW", weights, scale=0.25)
    for optimizer in made.values():
        optimizer.step()
    plain = in_turns(made, rounds)
    found: dict[str, Any] = {"plain ms": {name: round(1e3 * t, 1) for name, t in plain.items()}}
    if "galore_torch" in made:
        found["plain ratio"] = round(plain["plait"] / plain["galore_torch"], 3)
    print("galore", json.dumps(found), flush=True)
    return found


def low_rank(small: bool, rounds: int) -> dict[str, Any]:
    """Fira's plain step and its refresh over the hidden matrices, rank 128, beside the authors' package.

    A refresh is a step that refreshes all matrices less a plain one. The authors' is the same every time and is
    measured at their first step; ours at the first and at a later one, with all refreshes at once (spread=False).
    """
    weights = weights_with_gradients(small, matrices_only=True)
    ours = Fira(weights, lr=1e-6, rank=128, spread=False, period=10**9)
    made: dict[str, Any] = {"plait": ours, **low_rank_peer("fira.fira_adamw", "AdamW", weights, alpha=1.0)}
    first = {name: seconds(optimizer.step) for name, optimizer in made.items()}
    plain = in_turns(made, rounds)
    ours.param_groups[0]["period"] = 1
    later = min(seconds(ours.step) for _ in range(max(rounds, 2)))
    found: dict[str, Any] = {
        "plain ms": {name: round(1e3 * t, 1) for name, t in plain.items()},
        "first step ms": {name: round(1e3 * t, 1) for name, t in first.items()},
        "refreshing step ms": round(1e3 * later, 1),
    }
    if "fira" in made:
        found["plain ratio"] = round(plain["plait"] / plain["fira"], 3)
        alone = {name: first[name] - plain[name] for name in made}
        found["first refresh ratio"] = round(alone["plait"] / alone["fira"], 4)
        found["refresh ratio"] = round((later - plain["plait"]) / alone["fira"], 4)
    found["spread"] = spread(weights)
    print("fira", json.dumps(found), flush=True)
    return found


def spread(weights: list[nn.Parameter], steps: int = 24) -> dict[str, float]:
    """The first steps of Fira as it is by default, in which each matrix finds its subspace at a time of its own."""
    optimizer = Fira(weights, lr=1e-6, rank=128)
    times = [seconds(optimizer.step) for _ in range(steps)]
    median = sorted(times)[steps // 2]
    return {
        "median ms": round(1e3 * median, 1),
        "first to the median": round(times[0] / median, 2),
        "longest other to the median": round(max(times[1:]) / median, 2),
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--small", action="store_true", help="three layers in place of thirty")
    words.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--rules", nargs="+", choices=list(THEIRS), default=list(THEIRS), help="of the elementwise ones")
    words.add_argument("--only", choices=["elementwise", "8bit", "fira", "galore"], help="one part of the table")
    words.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    given = words.parse_args()
    count = sum(torch.Size(shape).numel() for shape in shapes(given.small))
    about = {"parameters": count, "torch": torch.__version__, "machine": platform.machine()}
    table: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    table |= about
    for threads in given.threads:
        torch.set_num_threads(threads)
        print(f"{count / 1e6:.1f}M parameters, {threads} thread{'s' * (threads > 1)}", flush=True)
        row: dict[str, Any] = {}
        if given.only in (None, "elementwise"):
            row |= elementwise(given.small, given.rounds, given.rules, table.get(f"{threads} threads", {}))
        if given.only in (None, "8bit"):
            row["8bit adamw"] = eight_bit(given.small, max(given.rounds // 2, 1))
        if given.only in (None, "fira"):
            row["fira"] = low_rank(given.small, max(given.rounds // 2, 1))
        if given.only in (None, "galore"):
            row["galore"] = galore(given.small, max(given.rounds // 2, 1))
        row["load"] = round(os.getloadavg()[0], 1)
        table.setdefault(f"{threads} threads", {}).update(row)
    if given.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
