"""Adapters where numbers are narrow: bfloat16 models, and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plait import AdamW, LoRA, train
from plait.adapters import Adapters
from plait.method import Method
from plait.models import llama_tiny
from plait.parametrize.low_rank_sparse import SLTrain
from plait.parametrize.pruned import DSEE
from plait.parametrize.quantized import QLoRA
from plait.parametrize.random_bases import RandLoRA

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def test_models_of_bfloat16_that_are_not_small_take_adapters() -> None:
    """Above 4096 numbers a digest looks at every so many."""
    model = nn.Sequential(nn.Linear(128, 128)).to(torch.bfloat16)
    digests = {}
    for kind in (torch.bfloat16, torch.float32):
        made = nn.Sequential(nn.Linear(128, 128)).to(kind)
        made.load_state_dict(model.state_dict())
        LoRA(rank=2).parametrize(made)
        digests[kind] = made._plait_origin
    assert digests[torch.bfloat16] == digests[torch.float32]
    Adapters(llama_tiny(width=128).to(torch.bfloat16))
    for part in QLoRA(rank=2):
        part.parametrize(model)


@pytest.mark.parametrize(
    "method", [DSEE(rank=2, entries=8, sparsity=0.0), SLTrain(rank=2, density=0.2), RandLoRA(rank=2), LoRA(rank=2)]
)
def test_they_train_under_autocast(method: Method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    run = train(model, (X, Y), methods=[method, AdamW(lr=1e-2)], steps=30, batch_size=16, precision="bfloat16")
    assert run.history[-1]["objective"] < run.history[0]["objective"]
