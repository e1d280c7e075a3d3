"""Soft prompts in parts: a short one before the tokens, and a low-rank one that is added to them; EPT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.fields import Count
from plait.method import method
from plait.parametrize.low_rank import adapter_dtype
from plait.parametrize.prompt import PromptMethod, SoftPrompt, words_of


class Decomposed(SoftPrompt):
    """[F; E + A B]: F, [length, d], is made of a short prompt P [length, d] and of A B, [reach, d]; A starts at zero.

    A: [reach, rank], B: [rank, d]. down: [spaces, d, width], up: [spaces, width, d], gate: [spaces, d].
    """

    def __init__(self, start: Tensor, reach: int, rank: int, spaces: int, width: int) -> None:
        super().__init__()
        self.length, size = start.shape
        kind = adapter_dtype(start)
        self.P = nn.Parameter(start.detach().to(kind).clone())
        self.A = nn.Parameter(torch.zeros(reach, rank, dtype=kind))
        self.B = nn.Parameter(torch.randn(rank, size, dtype=kind) * float(start.float().std()))
        self.down = nn.Parameter(torch.randn(spaces, size, width, dtype=kind) / math.sqrt(size))
        self.up = nn.Parameter(torch.zeros(spaces, width, size, dtype=kind))
        self.gate = nn.Parameter(torch.zeros(spaces, size, dtype=kind))

    def fused(self) -> Tensor:
        """Return P + softmax(P (A B)^T / sqrt(d)) A B, [length, d]: what the short prompt finds in the low-rank one."""
        known = self.A @ self.B
        weights = (self.P @ known.t() / math.sqrt(self.P.shape[1])).softmax(-1)
        return self.P + weights @ known

    def flat(self) -> Tensor:
        """Return F, [length, d]: the mean of what each space makes of the fused prompt, weighted by the gate."""
        fused = self.fused()
        inside = torch.relu(torch.einsum("ld,sdw->slw", fused, self.down))
        views = fused + torch.einsum("slw,swd->sld", inside, self.up)
        shares = (self.gate @ fused.mean(0)).softmax(-1)
        return torch.einsum("s,sld->ld", shares, views)

    def vectors(self, embedded: Tensor, mask: Tensor, ids: Tensor | None) -> Tensor:
        """Return F, alike for every example: [1, length, d]."""
        return self.flat().unsqueeze(0)

    def shifted(self, embedded: Tensor, places: Tensor) -> Tensor:
        """Return E + A B, the row of A B for the place of each token; tokens beyond the reach stay as they are."""
        rows = F.embedding(places.clamp_max(len(self.A)), F.pad(self.A, (0, 0, 0, 1)))
        return embedded + (rows @ self.B).to(embedded.dtype)


@paper("lan2025ept", key="ept")
@method
class EPT(PromptMethod):
    """[F; E(x) + A B]: a soft prompt is decomposed into a short one P, [tokens, d], and a low-rank one A B, A [reach,
    rank] and B [rank, d], which is added to the embedded tokens in place of standing before them. Fusion: P' = P +
    softmax(P (A B)^T / sqrt(d)) A B. Projection into several spaces k, weighed by a gate: F = sum_k g_k (P' +
    relu(P' D_k) U_k), g = softmax(G mean(P')), D_k [d, width], U_k [width, d], G [spaces, d].

    At the start A, U and G are zero: F = P, embeddings of words drawn from the vocabulary or given by `words`, and the
    tokens are as they were. The paper's text could not be read: the parts are those of its abstract, and how each is
    formed is chosen here. Fusion, spaces and gate amount to one F for all texts, which the prompt's `flat` gives.

    tokens: of the short prompt. reach: how many tokens of a text the low-rank one is added to, counted from its first;
    padding is not counted. rank: of it. spaces, width: of the projections. Raises BadInput for models that are no
    encoder or decoder of transformers, for a `where`, and for words that are none of its tokens.

    >>> from plait.models.small import llama_tiny
    >>> model = llama_tiny()
    >>> EPT(tokens=4, reach=16, rank=2).parametrize(model)
    >>> [(name.rpartition(".")[2], tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad][:3]
    [('P', (4, 64)), ('A', (16, 2)), ('B', (2, 64))]
    """

    tokens: Count = 20
    reach: Count = 256
    rank: Count = 8
    spaces: Count = 4
    width: Count = 16
    words: tuple[int, ...] = ()

    def build(self, backbone: Any) -> Decomposed:
        """Return the prompt at its start."""
        ids = words_of(type(self).__name__, backbone, self.words, self.tokens)
        with torch.no_grad():
            start: Tensor = backbone.get_input_embeddings()(ids)
        return Decomposed(start, self.reach, self.rank, self.spaces, self.width)
