"""Attention whose logits cannot grow: queries and keys are normalized."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Positive
from plait.layers import matches
from plait.method import Method, method

NAMES = (("q_proj", "k_proj"), ("query", "key"))
"""What attention layers call their projections to queries and keys."""


def _normalized(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    norm: nn.LayerNorm = layer.qk_norm  # type: ignore[assignment]
    heads: Tensor = norm(output.view(*output.shape[:-1], -1, norm.normalized_shape[0]))
    return heads.flatten(-2)


@paper("dehghani2023scaling", key="qk-norm", kind="ground")
@method
class QKNorm(Method):
    """softmax(LN(q) LN(k)^T / sqrt(d)) v: queries and keys of each head pass a layer norm with a trained gain and no
    bias, before any rotation by their positions, so that no logit exceeds sqrt(d) max(gain)^2.

    It changes the function of a model, so it is for training from scratch (or with its gains trained along). The norms
    stand beside the projections, as `q_proj.qk_norm`, and stay in the model that comes out: load its weights into a
    model that was given QKNorm too. where: the attention layers, with separate projections q_proj and k_proj, or query
    and key (most of transformers); a fused projection is refused. Raises BadInput where no attention has separate ones,
    and where it has the norms already.

    >>> from plait.models.small import llama_tiny
    >>> model = llama_tiny(depth=1)
    >>> QKNorm().parametrize(model)
    >>> [name for name, _ in model.named_parameters() if "qk_norm" in name]
    ['model.layers.0.self_attn.q_proj.qk_norm.weight', 'model.layers.0.self_attn.k_proj.qk_norm.weight']
    """

    eps: Positive = 1e-6

    def parametrize(self, model: nn.Module) -> None:
        """Give each projection to queries and keys its norm."""
        for layer, projections in self.targets(model):
            size = getattr(layer, "head_dim", None) or layer.attention_head_size
            for projection in projections:
                like: Tensor = projection.weight
                projection.qk_norm = nn.LayerNorm(size, self.eps, bias=False, device=like.device, dtype=like.dtype)
                projection.register_forward_hook(_normalized)

    def targets(self, model: nn.Module) -> list[tuple[Any, list[Any]]]:
        """Return the attention layers and their projections to queries and keys, or say why there are none."""
        found: list[tuple[Any, list[Any]]] = []
        for name, layer in model.named_modules():
            for pair in NAMES:
                both = [getattr(layer, part, None) for part in pair]
                sized = hasattr(layer, "head_dim") or hasattr(layer, "attention_head_size")
                if sized and matches(self.where, name) and all(isinstance(p, nn.Linear) for p in both):
                    found.append((layer, both))
        if not found:
            raise BadInput(
                f"QKNorm(where={self.where!r}) finds no attention with separate projections to queries and keys: drop."
            )
        return found

    def check(self, model: nn.Module, methods: list[Method]) -> None:
        """Refuse models without such attention, and those that have the norms already."""
        for _, projections in self.targets(model):
            if hasattr(projections[0], "qk_norm"):
                raise BadInput("this model's queries and keys are normalized already: drop QKNorm.")
