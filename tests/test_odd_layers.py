"""Every adapter and every start on layers that are at an edge: it works, folds and is loaded, or says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws import made
from plait import AdamW, catalogue
from plait.errors import BadInput
from plait.initialize.base import Start
from plait.method import Method
from plait.parametrize.base import stack
from plait.parametrize.core import LoRAXS
from plait.parametrize.folding import fold
from plait.parametrize.low_rank import LoRA
from plait.parametrize.quantized import Quantize
from plait.parametrize.sparse_smallest import SaRA
from plait.train import train
from test_adapter_refusals import ADAPTERS, fields_of
from test_laws import CASES, Case

ROWS, CLASSES = 32, torch.arange(32) % 4


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def zeros() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    return model


def words() -> Tensor:
    return torch.randint(12, (ROWS, 3), generator=torch.Generator().manual_seed(0))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "one output, one input": (
        lambda: nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 1), nn.Linear(1, 4)),
        lambda: drawn(ROWS, 8),
    ),
    "zero weight": (zeros, lambda: drawn(ROWS, 8)),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(128, 4)),
        lambda: drawn(ROWS, 4, 4, 4),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(12, 8, padding_idx=0), nn.Flatten(), nn.Linear(24, 4)),
        words,
    ),
    "1 x 1": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(32, 4)),
        lambda: drawn(ROWS, 4, 2, 2),
    ),
    "bfloat16": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(torch.bfloat16),
        lambda: drawn(ROWS, 8).bfloat16(),
    ),
}
FIELDS: dict[str, dict[str, Any]] = {
    "ia3": {"outputs": "0", "inputs": "2"},
    "compacter": {"where": ".*", "factors": 1, "width": 1},
    "snella": {"rank": 2},
    "triadaptlora": {"rank": 2, "first": 1, "period": 1},
    "sltrain": {"density": 0.5},
    "lost": {"density": 0.6},
}
STARTS = [
    key
    for key, entry in catalogue.load().items()
    if isinstance(entry.make, type) and issubclass(entry.make, Start) and entry.make.starts.made_by
]


def methods_of(key: str) -> list[Method]:
    """An adapter, or a start after the adapter that it starts, small enough for these nets."""
    small = {name: 1 for name in ("rank", "shared_rank", "entries") if name in fields_of(key)}
    tried = {name: value for name, value in CASES.get(key, Case()).fields.items() if name not in ("where", "group")}
    chosen = made(key, **(tried | small | FIELDS.get(key, {})))
    if not isinstance(chosen[0], Start):
        return chosen
    before: list[Method] = [Quantize(bits=8)] if key == "loftq" else []
    return [*before, LoRAXS(rank=1) if chosen[0].starts.made_by == "LoRAXS" else LoRA(rank=1, alpha=1.0), *chosen]


def test_there_are_starts() -> None:
    assert {"pissa", "eva", "lora-ga", "lora-sb", "loftq"} <= set(STARTS)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("key", [*ADAPTERS, *STARTS])
def test_layers_at_an_edge(key: str, net: str) -> None:
    """Three steps, then the folded model, a loaded one and the trained one agree."""
    build, inputs = NETS[net]
    torch.manual_seed(0)
    base, x = build(), inputs()
    methods = methods_of(key)
    said, run = "", None
    try:
        run = train(copy.deepcopy(base), (x, CLASSES), methods=[*methods, AdamW(lr=1e-2)], steps=3, batch_size=16,
                    validation=(x, CLASSES))  # fmt: skip
    except BadInput as refused:
        said = str(refused)
    if run is None:
        assert said.endswith(".")
        assert "\n" not in said
        return
    loaded = copy.deepcopy(base)
    for method in methods:
        method.parametrize(loaded)
    loaded.load_state_dict(run.model.state_dict())
    with torch.no_grad():
        wanted = run.model.eval()(x).float()
        assert wanted.isfinite().all()
        size = max(float(wanted.abs().max()), 1.0)
        off = {"rtol": 0.0, "atol": size * (2e-2 if net == "bfloat16" else 1e-5)}
        torch.testing.assert_close(loaded.eval()(x).float(), wanted, **off)
        if all(part.linear for layer in loaded.modules() for part in stack(layer)):
            plain = fold(copy.deepcopy(run.model))
            assert not any(stack(layer) for layer in plain.modules())
            torch.testing.assert_close(plain(x).float(), wanted, **off)


def test_sara_says_so_where_the_smallest_weights_are_zero() -> None:
    model = zeros()
    with pytest.raises(BadInput, match=r"^SaRA.share is 0.2, and as many weights are 0, none of which could grow and"):
        SaRA(share=0.2).parametrize(model)
    assert not any(stack(layer) for layer in model.modules())
    SaRA(share=0.9).parametrize(model)
    assert all(stack(layer) for layer in model)
