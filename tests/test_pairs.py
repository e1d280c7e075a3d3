"""Every adapter with every start, gradient method, rule, penalty and adapter: docs/pairs.json is whole and true.

The walk itself, on three nets, is `python tests/pairs.py`. Here a part of it is walked again, each day of the matrix
another, and all that is in the catalogue but not in the matrix yet, on one net each.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import pytest
import torch
from torch import nn

import pairs
from pairs import MATRIX, NETS, TRAINS, adapters, outcome, read, seconds
from plait import DoRA, LoRA, train
from plait.errors import BadInput
from plait.parametrize.folding import fold

PART = 10
"""One pair in so many is tried again here."""
NEW = 60
"""At most so many pairs that the matrix lacks are tried."""


def number(*names: str) -> int:
    """A number that depends on the names alone."""
    return int(hashlib.sha256(" ".join(names).encode()).hexdigest()[:8], 16)


def net_of(first: str, second: str) -> str:
    """The net on which a pair is tried: chosen by its names, among those that the matrix has it on."""
    known = sorted(KNOWN.get(first, {}).get(second, {}) or NETS)
    return known[number(first, second) % len(known)]


def kind(said: str) -> str:
    """Whether a pair trains and folds, trains, fails, or is refused."""
    if said.startswith("fails"):
        return "fails"
    return said if said == TRAINS else TRAINS + "; ..." if said.startswith(f"{TRAINS};") else "refused"


EVERY = [(first, second) for first in adapters() for second in seconds()]
KNOWN = read()
CHOSEN = [pair for pair in EVERY if number(*pair, "part") % PART == 0 and pair[1] in KNOWN.get(pair[0], {})]
MISSING = sorted((pair for pair in EVERY if pair[1] not in KNOWN.get(pair[0], {})), key=lambda p: number(*p))[:NEW]


def test_no_pair_fails() -> None:
    wrong = [
        f"{first} + {second} on {net}: {said}"
        for first, row in KNOWN.items()
        for second, by_net in row.items()
        for net, said in by_net.items()
        if kind(said) == "fails"
    ]
    assert not wrong


def test_each_refusal_is_one_sentence_with_a_cure() -> None:
    for row in KNOWN.values():
        for by_net in row.values():
            for said in by_net.values():
                if kind(said) == "refused":
                    assert said.endswith(".")
                    assert "\n" not in said
                    assert not re.search(r"/(tmp|dev)/|plait-pairs", said), said


def test_the_matrix_is_of_all_three_nets_and_mostly_of_pairs_that_train() -> None:
    assert json.loads(MATRIX.read_text())["nets"] == list(NETS)
    for net in NETS:
        outcomes = [kind(by_net[net]) for row in KNOWN.values() for by_net in row.values() if net in by_net]
        assert len(outcomes) > 1000
        assert sum(said.startswith(TRAINS) for said in outcomes) > len(outcomes) / 2


@pytest.mark.parametrize("first", sorted({first for first, _ in CHOSEN}))
def test_a_part_of_the_walk_comes_out_as_the_matrix_says(first: str) -> None:
    wrong = []
    for second in (second for one, second in CHOSEN if one == first):
        net = net_of(first, second)
        said, stands = outcome(first, second, net), KNOWN[first][second][net]
        if kind(said) != kind(stands):
            wrong.append(f"{first} + {second} on {net}: {said!r}, in the matrix {stands!r}")
    assert not wrong, "run python tests/pairs.py --only KEY, or mend it"


def test_what_the_matrix_lacks_works_or_says_why() -> None:
    said = {(first, second): outcome(first, second, net_of(first, second)) for first, second in MISSING}
    assert not {pair: what for pair, what in said.items() if kind(what) == "fails"}


# -- what the walk brought to light ------------------------------------------------------------------------------------
X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def trained(*methods: Any, **fields: Any) -> nn.Module:
    return train(net(), (X, Y), methods=list(methods), steps=3, batch_size=8, device="cpu", **fields).model


@pytest.mark.parametrize("first", ["ia3", "sltrain", "lora", "hydra"])
@pytest.mark.parametrize("second", ["dora", "sara"])
def test_what_stands_on_an_adapter_folds_with_what_is_below(first: str, second: str) -> None:
    below = {"ia3": {"outputs": "0", "inputs": "2"}, "sltrain": {"density": 0.3, "rank": 2}}.get(first, {"rank": 2})
    above = {"sara": {"share": 0.4, "stages": 2}, "dora": {"rank": 1}}[second]
    model = trained(*pairs.make(first, below), *pairs.make(second, above), *pairs.make("adamw", {"lr": 0.05})).eval()
    said = model(X)
    torch.testing.assert_close(fold(model)(X), said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", ["l2", "l2-sp", "gor", "norm-loss", "wasserstein-init"])
def test_a_penalty_of_nothing_that_is_trained_is_refused(key: str) -> None:
    name = pairs.entries()[key].name
    says = f"^{name} finds no weight that is trained: drop it, or what freezes the weights it is of.$"
    with pytest.raises(BadInput, match=says):
        trained(*pairs.make("bitfit", {}), *pairs.make(key, {}))


def test_methods_that_would_do_nothing_after_an_adapter_are_refused() -> None:
    with pytest.raises(BadInput, match=r"^LoRA freezes the weights that Freeze names: put Freeze first, or drop it.$"):
        trained(LoRA(rank=2), *pairs.make("freeze", {"where": "0"}))
    with pytest.raises(
        BadInput, match=r"^Mixout finds no weight that is trained: drop it, or what freezes the model.$"
    ):
        trained(*pairs.make("bitfit", {}), *pairs.make("mixout", {}))
    assert trained(LoRA(rank=2, train="0.bias"), *pairs.make("freeze", {"where": "0"}))


def test_adapters_of_rank_0_run_on_convolutions_and_under_dropout() -> None:
    for key in ("lora", "lora-dropout"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(2, 4, 3))
        (method,) = pairs.make(key, {"rank": 2})
        method.parametrize(model)
        (part,) = model[0].plait.values()
        part.set(part.A[:0], part.B[:, :0])
        inputs = torch.randn(3, 2, 7)
        torch.testing.assert_close(
            model.train()(inputs), model[0]._conv_forward(inputs, model[0].weight, model[0].bias)
        )


def test_dora_leaves_a_row_that_is_pruned_its_bias() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    for m in DoRA(rank=2):
        m.parametrize(model)
    with torch.no_grad():
        model[0].weight[1] = 0.0
    said = model(X)
    assert torch.equal(said[:, 1], model[0].bias[1].expand(16))
    torch.testing.assert_close(fold(model)(X), said)


def test_dora_trains_beside_a_scale_with_the_gradients_of_its_definition() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    for m in [*pairs.make("ia3", {"outputs": "0", "inputs": "0"})[:1], *DoRA(rank=2)]:
        m.parametrize(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).double())
    from plait.parametrize.base import dense_bias, dense_weight

    said = model(X.double())
    defined = nn.functional.linear(X.double(), dense_weight(model[0]), dense_bias(model[0]))
    torch.testing.assert_close(said, defined)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(said.square().sum(), list(wanted.values()), retain_graph=True)
    theirs = torch.autograd.grad(defined.square().sum(), list(wanted.values()))
    for name, one, other in zip(wanted, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, n=name: f"{n}: {m}")
