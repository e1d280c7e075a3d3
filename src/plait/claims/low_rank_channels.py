"""The claim of LOST, on upright digits of `plait.claims.parametrize`: what a few whole inputs add to low rank."""

from __future__ import annotations

from functools import partial

from plait.claims.base import claim
from plait.claims.low_rank_sparse import factored, from_scratch
from plait.claims.parametrize import network
from plait.parametrize.low_rank_channels import LOST


@claim(
    "lost",
    says="trained from scratch, LOST (rank 4 and 4 inputs of 64 a layer) classifies digits better than low rank alone",
    baseline="the same layers as products of factors of rank 6 (as many numbers), begun by the SVD of the usual start",
    figure="accuracy on held-out digits",
    better="higher",
    seeds=24,
    first_seed=1000,
)
def whole_inputs_help_low_rank(seed: int) -> tuple[float, float]:
    """Compare at 300 steps on 400 digits; each side has the best of four learning rates."""
    lost = LOST(rank=4, density=0.0625, where="0|2")
    return from_scratch(seed, network, lost), from_scratch(seed, partial(factored, rank=6))
