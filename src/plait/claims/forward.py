"""What methods that change activations must reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plait.claims.base import claim
from plait.claims.digits import digits, fitted, network, training_loss
from plait.forward.attention import TLM
from plait.forward.dropout import EarlyDropout
from plait.method import Method
from plait.step.adam import AdamW
from plait.train import train


def _narrow(seed: int, dropout: float, methods: list[Method]) -> float:
    """Return the training loss, without dropout, of a network of 6 hidden units that underfits."""
    model = network(seed, 6, dropout)
    rule = AdamW(lr=1e-2, weight_decay=0.0)
    return training_loss(fitted(seed, [rule, *methods], count=1000, steps=400, model=model), seed, 1000)


@claim(
    "early-dropout",
    says="A network that underfits ends with a lower training loss if dropout acts early only, than without dropout.",
    baseline="no dropout",
    figure="training loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def early_dropout_fits_better_than_none(seed: int) -> tuple[float, float]:
    """6 hidden units, 1000 digits."""
    return _narrow(seed, 0.1, [EarlyDropout(rate=0.1)]), _narrow(seed, 0.0, [])


@claim(
    "early-dropout",
    says="A network that underfits ends with a lower training loss if dropout acts early only, than throughout.",
    baseline="dropout of the same rate throughout",
    figure="training loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def early_dropout_fits_better_than_throughout(seed: int) -> tuple[float, float]:
    """6 hidden units, 1000 digits."""
    return _narrow(seed, 0.1, [EarlyDropout(rate=0.1)]), _narrow(seed, 0.1, [])


def _tokens(inputs: Tensor) -> Tensor:
    """Return digits [n, 64] as 16 tokens of 9 levels of grey and their place: [n, 16]."""
    levels = nn.functional.avg_pool2d(inputs.view(-1, 1, 8, 8), 2).flatten(1).mul(8).round().long()
    return levels + 9 * torch.arange(16)


def _encoder(seed: int, attention_dropout: float) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_labels": 10,
        "initializer_range": 0.15,
    }
    config = BertConfig(vocab_size=144, max_position_embeddings=16, hidden_dropout_prob=0.0, **sizes)
    config.attention_probs_dropout_prob = attention_dropout
    model: nn.Module = BertForSequenceClassification(config)
    return model


def _read_tokens(seed: int, attention_dropout: float, methods: list[Method]) -> float:
    inputs, targets = digits(seed)
    tokens = _tokens(inputs)
    data = ({"input_ids": tokens[:200]}, targets[:200])
    model = _encoder(seed, attention_dropout)
    model = train(model, data, methods=[AdamW(lr=3e-3), *methods], steps=150, batch_size=32, seed=seed).model.eval()
    with torch.no_grad():
        return float((model(tokens[1000:]).logits.argmax(-1) != targets[1000:]).float().mean())


@claim(
    "tlm",
    says="Masking tokens in attention misreads fewer digits than dropping single attention weights.",
    baseline="attention dropout at the better of the rates 0 and 0.1, chosen on the test digits",
    figure="test error of a two-layer encoder on digits as 16 tokens",
    better="lower",
    seeds=10,
    first_seed=100,
)
def token_masking_beats_attention_dropout(seed: int) -> tuple[float, float]:
    """200 training digits."""
    return _read_tokens(seed, 0.0, [TLM(rate=0.1)]), min(_read_tokens(seed, rate, []) for rate in (0.0, 0.1))
