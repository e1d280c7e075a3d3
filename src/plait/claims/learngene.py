"""What networks that start from learngenes must reach: small transformers that read digits, of other depths."""

from __future__ import annotations

import copy
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from plait.claims.base import claim
from plait.claims.digits import best_test_loss, digits
from plait.initialize.learngene import SWS, TLEG
from plait.method import Method
from plait.step.adam import AdamW
from plait.tensors import write_tensors
from plait.train import train

RATES = (1e-3, 3e-3)
TRAINED, DEEPER, SHALLOWER = 4, 6, 3
SHORT = 15


class Reader(nn.Module):
    """A transformer over the 8 rows of a digit: [n, 64] -> [n, 10]."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, 32), nn.Parameter(torch.randn(1, 8, 32) * 0.1)
        block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList([copy.deepcopy(block) for _ in range(depth)])
        for layer in self.layers:
            for part in layer.modules():
                if isinstance(part, nn.Linear | nn.LayerNorm):
                    part.reset_parameters()
                if isinstance(part, nn.MultiheadAttention):
                    part._reset_parameters()
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.embed(inputs.view(-1, 8, 8)) + self.place
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden).mean(1))
        return logits


def _fresh(seed: int, depth: int) -> Reader:
    torch.manual_seed(1000 * depth + seed)
    return Reader(depth)


@cache
def _source(seed: int, made: Method | None, depth: int = TRAINED) -> str:
    """Return the file of a network that was trained for 150 steps, as genes or freely."""
    inputs, targets = digits(seed)
    methods = [AdamW(lr=3e-3)] if made is None else [made, AdamW(lr=3e-3)]
    model = train(_fresh(seed, depth), (inputs[:1000], targets[:1000]), methods=methods, steps=150, seed=seed).model
    path = Path(tempfile.mkdtemp(prefix="plait-genes-")) / "model.safetensors"
    write_tensors(path, model.state_dict())
    return str(path)


@cache
def _after(seed: int, depth: int, start: Method | None) -> float:
    """Return the test loss of a network of some depth after a short training, at the better of two rates."""
    return best_test_loss(seed, partial(_fresh, seed, depth), [] if start is None else [start], RATES, SHORT)


@claim(
    "tleg",
    says="A network of six layers started from genes trained in four reads better after 15 steps.",
    baseline="the same network from scratch, each at the better of two rates",
    figure="test loss on digits",
    better="lower",
)
def a_deeper_network_starts_ahead(seed: int) -> tuple[float, float]:
    """Genes of 150 steps."""
    return _after(seed, DEEPER, TLEG(source=_source(seed, TLEG()))), _after(seed, DEEPER, None)


@claim(
    "tleg",
    says="It reads better than one started from the line that is nearest to four layers trained freely for as long.",
    baseline="the same expansion of a network whose layers were trained without the line",
    figure="test loss on digits",
    better="lower",
)
def the_line_must_be_trained(seed: int) -> tuple[float, float]:
    """The same expansion of both."""
    return (
        _after(seed, DEEPER, TLEG(source=_source(seed, TLEG()))),
        _after(seed, DEEPER, TLEG(source=_source(seed, None))),
    )


@claim(
    "learngene-sws",
    says="A network of six layers started from two stages trained in four layers reads better after 15 steps.",
    baseline="the same network from scratch, each at the better of two rates",
    figure="test loss on digits",
    better="lower",
)
def a_deeper_network_starts_from_stages(seed: int) -> tuple[float, float]:
    """Genes of 150 steps."""
    return _after(seed, DEEPER, SWS(source=_source(seed, SWS(stages=(2, 2))))), _after(seed, DEEPER, None)


@claim(
    "learngene-sws",
    says="One of six layers reads better than one that repeats four layers that were trained freely for as long.",
    baseline="each of four layers of an ordinary network, repeated in order",
    figure="test loss on digits",
    better="lower",
)
def sharing_must_be_trained(seed: int) -> tuple[float, float]:
    """The layers of the ordinary network are stages of one layer each: 2, 2, 1 and 1 of them."""
    return (
        _after(seed, DEEPER, SWS(source=_source(seed, SWS(stages=(2, 2))))),
        _after(seed, DEEPER, SWS(source=_source(seed, None))),
    )


@claim(
    "learngene-sws",
    says="One of six layers reads better than one that repeats the two layers of a network of two, as many weights.",
    baseline="a network of two layers trained for as long, each repeated three times",
    figure="test loss on digits",
    better="lower",
    first_seed=100,
)
def stages_learn_to_be_repeated(seed: int) -> tuple[float, float]:
    """Both sources hold two layers."""
    return (
        _after(seed, DEEPER, SWS(source=_source(seed, SWS(stages=(2, 2))))),
        _after(seed, DEEPER, SWS(source=_source(seed, None, 2))),
    )


@claim(
    "learngene-sws",
    says="One of three layers started from the two stages reads better than one that keeps three of four free layers.",
    baseline="the first three layers of an ordinary network trained for as long",
    figure="test loss on digits",
    better="lower",
)
def a_shallower_network_starts_ahead(seed: int) -> tuple[float, float]:
    """The baseline's expansion cuts the last layer off."""
    return _after(seed, SHALLOWER, SWS(source=_source(seed, SWS(stages=(2, 2))))), _cut(seed)


@cache
def _cut(seed: int) -> float:
    from plait.tensors import read_state

    state = {name: t for name, t in read_state(_source(seed, None)).items() if not name.startswith("layers.3.")}
    path = Path(tempfile.mkdtemp(prefix="plait-genes-")) / "model.safetensors"
    write_tensors(path, state)
    return _after(seed, SHALLOWER, SWS(source=str(path)))
