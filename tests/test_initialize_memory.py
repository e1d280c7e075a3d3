"""What a start takes of memory while it works, counted in bytes of live tensors: every start of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws import made
from plait import catalogue
from plait.engine import Engine, as_data
from plait.initialize import full_step, gradient_svd
from plait.initialize.base import Start, groups
from plait.initialize.gradient_svd import LoRAGA
from plait.method import Method, Now
from plait.oracle import oracle
from plait.parametrize.base import dense_weight
from plait.workbench.memory import LiveBytes
from test_laws import CASES

WIDTH, BLOCKS, RANK = 256, 16, 4
STARTS = [
    key
    for key, entry in catalogue.load().items()
    if isinstance(entry.make, type) and issubclass(entry.make, Start) and key in CASES
]
"""A start has a case with its partners, or the laws that try every method fail."""
FIELDS: dict[str, dict[str, Any]] = {"eva": {"batches": 12}}
VARIANTS = [*((key, {}) for key in STARTS), ("pissa", {"iterations": None}), ("lora-ga", {"rounds": 2})]


class Block(nn.Module):
    """Two linear maps of different shapes beside a path that leaves the inputs as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, WIDTH] -> [n, WIDTH]."""
        return inputs + self.down(torch.tanh(self.up(inputs)))


def squares(output: Tensor, target: Tensor, now: Now) -> Tensor:
    return (output - target).square().sum(1)


def ready(methods: list[Method]) -> tuple[nn.Module, Now]:
    """A model with adapters before their start, and the `now` of that; batches of two examples."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    draw = torch.Generator().manual_seed(1)
    data = as_data((torch.randn(24, WIDTH, generator=draw), torch.randn(24, WIDTH, generator=draw)))
    engine = Engine(seed=0, device="cpu")
    now = engine.start(model, data, squares, 10, 2, None)
    for m in methods:
        m.parametrize(model)
    now.ask = oracle(engine, squares, methods, 1)
    return model, now


def adapters(key: str) -> list[Method]:
    """What the start's case puts before it, on all layers and at the rank of this test."""
    wanted = []
    for partner, fields in CASES[key].partners:
        rank = {"rank": RANK} if "rank" in fields else {}
        wanted += made(partner, **({name: value for name, value in fields.items() if name != "where"} | rank))
    return wanted


@pytest.mark.parametrize(("key", "fields"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_a_start_takes_less_than_a_tenth_of_the_model_and_one_layers_gradient(key: str, fields: dict[str, Any]) -> None:
    """All is counted that is alive above what was before: activations, sketches, sums, and what the start leaves."""
    start = made(key, **(FIELDS.get(key, {}) | fields))[0]
    with LiveBytes() as live:
        model, now = ready(adapters(key))
        size = 4 * sum(p.numel() for p in model.parameters())
        live.mark()
        before = live.live
        start.initialize(model, now)
        extra = live.peak - before
    gradient = 4 * 2 * WIDTH * WIDTH
    assert extra < 0.1 * size + gradient, f"{extra / size:.3f} of the model"


def test_the_count_sees_what_it_is_to_see() -> None:
    """Two gradients of a layer at once, in float64, are four times a layer's size."""
    with LiveBytes() as live:
        layer = torch.zeros(WIDTH, WIDTH)
        live.mark()
        before = live.live
        kept = [layer.double() + 1 for _ in range(2)]
        assert live.peak - before in range(4 * layer.nbytes, 6 * layer.nbytes + 1)
        del kept
        assert live.live == before


@pytest.mark.parametrize(
    ("key", "place"), [("lora-ga", gradient_svd), ("lora-one", gradient_svd), ("lora-sb", full_step)]
)
def test_groups_of_layers_start_as_all_at_once(key: str, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for memory in (1.0, 0.0):
        if not memory:
            monkeypatch.setattr(place, "groups", lambda chosen, *_, **__: ([found] for found in chosen))
        model, now = ready(adapters(key))
        made(key, batches=2, memory=memory)[0].initialize(model, now)
        found.append([dense_weight(layer) for block in model for layer in (block.up, block.down)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("memory", "passes"), [(0.1, 2), (0.5, 2), (1.0, 1)])
def test_with_room_for_whole_gradients_the_batches_are_passed_over_once(memory: float, passes: int) -> None:
    """At a half, two passes for whole gradients: as many as for sketches, and exact."""
    model, now = ready(adapters("lora-ga"))
    calibration, started = now.calibration, []
    now.calibration = lambda count: (started.append(count), calibration(count))[1]
    start = LoRAGA(batches=2, memory=memory)
    planned = start._groups(model, start.found(model))
    start.initialize(model, now)
    assert len(started) == passes
    assert [whole for _, whole in planned] == ([False] if memory == 0.1 else [True] * passes)


def test_groups_hold_what_the_room_allows_and_at_least_one() -> None:
    def sizes(chosen: list[int], room: float, **options: Any) -> list[list[int]]:
        return [list(group) for group in groups(chosen, lambda n: n, room, **options)]  # type: ignore[arg-type,return-value]

    assert sizes([3, 3, 3, 3], 6) == [[3, 3], [3, 3]]
    assert sizes([9, 1, 1], 6) == [[9], [1, 1]]
    assert sizes([3, 3, 3, 3], 6, left=lambda _: 1) == [[3, 3], [3], [3]]
    assert sizes([3, 3, 3, 3], 6, left=lambda _: 1, least=6) == [[3, 3], [3, 3]]
