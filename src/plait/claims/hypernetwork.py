"""What networks that a hypernetwork starts must reach: small transformers that read digits, of unseen sizes."""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.claims.digits import best_test_loss, digits
from plait.gradient.clip import Clip
from plait.initialize.hypernetwork import Family, Hypernetwork, LoGAH
from plait.method import Method
from plait.schedule import Cosine
from plait.step.adam import AdamW
from plait.tensors import write_tensors
from plait.train import train

RATES = (1e-3, 3e-3, 1e-2)
SEEN = tuple((depth, width) for depth in (1, 2, 3) for width in (16, 20, 28, 32))
UNSEEN = (4, 24)


class Block(nn.Module):
    """Attention with heads of size 4 and a feed-forward part, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, rows, width] -> the same."""
        seen = self.first(x)
        q, k, v = (part(seen).unflatten(2, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        widened: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return widened


class Reader(nn.Module):
    """A transformer over the 8 rows of a digit, of any depth and width: [n, 64] -> [n, 10]."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(torch.randn(1, 8, width) * 0.1)
        self.layers = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.embed(inputs.view(-1, 8, 8)) + self.place
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden).mean(1))
        return logits


@cache
def _written(seed: int) -> str:
    """Return the file of a hypernetwork that was trained for 500 steps on twelve networks."""
    inputs, targets = digits(seed)
    torch.manual_seed(seed)
    family = Family(Hypernetwork(most=64, hidden=64, rank=16), [Reader(*sizes) for sizes in SEEN], inputs[:2])
    methods: list[Method] = [Clip(norm=1.0), AdamW(lr=Cosine(peak=4e-3, warmup=0.1))]
    train(family, (inputs[:1000], targets[:1000]), methods=methods, steps=500, seed=seed)
    path = Path(tempfile.mkdtemp(prefix="plait-logah-")) / "hypernetwork.safetensors"
    write_tensors(path, family.state_dict())
    return str(path)


@cache
def _unseen(seed: int) -> Reader:
    torch.manual_seed(1000 + seed)
    return Reader(*UNSEEN)


def _after(seed: int, written: bool, steps: int) -> float:
    """Return the test loss of the unseen network after some steps, at the best of three rates."""
    start = [LoGAH(source=_written(seed))] if written else []
    return best_test_loss(seed, partial(_unseen, seed), start, RATES if steps > 1 else (1e-30,), steps)


@claim(
    "logah",
    says="A network of a depth and a width that the hypernetwork has not seen reads better after 15 steps.",
    baseline="the network's own start, each at the best of three rates",
    figure="test loss on digits",
    better="lower",
)
def unseen_networks_start_ahead(seed: int) -> tuple[float, float]:
    """Depth 4 and width 24, after depths 1 to 3 and widths 16, 20, 28 and 32."""
    return _after(seed, True, 15), _after(seed, False, 15)


@claim(
    "logah",
    says="It reads better also after 60 steps.",
    baseline="the network's own start, each at the best of three rates",
    figure="test loss on digits",
    better="lower",
)
def and_stay_ahead(seed: int) -> tuple[float, float]:
    """The same networks."""
    return _after(seed, True, 60), _after(seed, False, 60)


@claim(
    "logah",
    says="As it is written, before any step, it reads better than as it starts by itself.",
    baseline="the network's own start",
    figure="test loss on digits",
    better="lower",
)
def written_weights_read(seed: int) -> tuple[float, float]:
    """One step at a rate of zero, to float32."""
    return _after(seed, True, 1), _after(seed, False, 1)
