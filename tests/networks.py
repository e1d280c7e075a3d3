"""Small networks that the tests of several methods share."""

from __future__ import annotations

import torch
from torch import nn


def net() -> nn.Module:
    """Two linear layers, 12 -> 8 -> 20, the same at each call."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 20))
