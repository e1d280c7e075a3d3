"""Models by name, and small networks."""

from __future__ import annotations

from plait.models.pretrained import NAMED, load_transformers, located
from plait.models.small import byte_tokenizer, cnn, llama_tiny, mlp, vit

__all__ = [
    "NAMED",
    "byte_tokenizer",
    "cnn",
    "llama_tiny",
    "load_transformers",
    "located",
    "mlp",
    "vit",
]
