"""Running a language model so that the logits of the whole vocabulary are never held at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from plait.errors import BadInput
from plait.math.logits import Logits
from plait.math.packed import numbers
from plait.parametrize.base import dense_weight


def _pass_on(hidden: Tensor) -> Tensor:
    return hidden


def call_with_chunked_logits(model: nn.Module, inputs: Any) -> Logits:
    """Run a transformers language model up to its head; return `Logits`, whose losses are computed chunk by chunk.

    Use it as `plait.train(..., call=call_with_chunked_logits)`. inputs: a tensor of tokens, or a dict by keyword. The
    head may be frozen, trained, tied to the embedding, or carry parametrizations. Raises BadInput for a model without
    such a head, or one that changes its logits afterwards (soft caps, scales).

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> call_with_chunked_logits(LlamaForCausalLM(LlamaConfig(**shape)), torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 32])
    """
    plain: Any = getattr(model, "module", None) or getattr(model, "_orig_mod", model)
    head: Any = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise BadInput(f"{type(plain).__name__} has no linear language model head: leave out call=.")
    # The model's own forward runs with the head left out, so that wrappers (several processes, compilation) stay in it.
    own = head.__dict__.get("forward")
    head.__dict__["forward"] = _pass_on
    seen: list[Tensor] = []
    try:
        with head.register_forward_hook(lambda _, __, hidden: seen.append(hidden)):
            output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    finally:
        if own is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = own
    if len(seen) != 1 or output.logits is not seen[0]:
        raise BadInput(f"{type(plain).__name__} changes its logits after its head: leave out call=.")
    return Logits(seen[0], numbers(dense_weight(head)), head.bias)
