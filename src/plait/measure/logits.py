"""Whether logits grow: those of attention, and those of the output. Both go before large transformers diverge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from plait.catalogue import paper
from plait.fields import Count
from plait.layers import evaluating, hooked, matches
from plait.math.curvature import differentiable_twice
from plait.math.logits import dense
from plait.measure.base import curve
from plait.method import Method, Now, method


class _Softmax(TorchDispatchMode):
    """Note what goes into every softmax while an attention layer runs; -inf and a mask's lowest number do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: list[str] = []
        self.seen: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.inside and name in ("_softmax", "_safe_softmax") and args[0].dim() >= 3:
            logits = args[0].detach().float()
            kept = logits[logits > torch.finfo(args[0].dtype).min / 2]
            if kept.numel():
                layer = self.inside[-1]
                self.seen[layer] = max(self.seen.get(layer, -torch.inf), float(kept.abs().max()))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def attention_logits(model: nn.Module, where: str = ".*") -> Iterator[dict[str, float]]:
    """Yield a dict that fills, as the model runs, with the largest |q^T k / sqrt(d)| of each attention layer, by name.

    An attention layer is a module whose class is named so (transformers, nn.MultiheadAttention); masked pairs do not
    count. Attention runs in its plain form meanwhile.
    """
    watch = _Softmax()

    def enter(*_: Any, name: str) -> None:
        watch.inside.append(name)

    def leave(*_: Any) -> None:
        watch.inside.pop()

    attention = [
        (name, layer)
        for name, layer in model.named_modules()
        if "attention" in type(layer).__name__.lower() and matches(where, name)
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            hooked(layer.register_forward_pre_hook(partial(enter, name=name)) for name, layer in attention),
            hooked(layer.register_forward_hook(leave, always_call=True) for _, layer in attention),
            differentiable_twice(),
            torch.no_grad(),
            watch,
        ):
            yield watch.seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@paper("wortsman2024small", key="small-scale-proxies", kind="probe")
@method
class LogitGrowth(Method):
    """max |q_i^T k_j / sqrt(d)| of attention, and log Z = log sum_k exp(y_k) of the output logits y.

    Two ways in which transformers diverge at large learning rates, that small ones show too: attention logits grow
    until attention is one-hot (QKNorm mitigates it), and output logits drift away together, log Z far from 0 (ZLoss
    does). Both are to be seen before the loss rises: set measure_every. How much the final loss depends on the
    learning rate at all, `learning_rate_sensitivity` tells.

    where: the attention layers. On `batches` batches of training data, in evaluation mode. Returns {"attention logit"
    (the largest over layers, if there is attention), "log Z" (mean), "largest |log Z|", "output logit" (mean),
    "largest output logit", "by layer": a curve}; without classes nothing is said of log Z. Raises BadInput without
    training data.

    >>> LogitGrowth(batches=2)
    LogitGrowth(batches=2)
    """

    batches: Count = 1

    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return how large the logits are at the present weights."""
        outputs: list[Tensor] = []
        classes = True
        with evaluating(model), attention_logits(model, self.where) as seen:
            for batch in now.calibration(self.batches):
                now.batch = batch
                outputs.append(dense(now.call(model, batch.inputs)).float())
                classes = classes and not batch.target.is_floating_point()
        found: dict[str, Any] = {"attention logit": max(seen.values())} if seen else {}
        if classes:
            partition = torch.cat([y.logsumexp(-1).flatten() for y in outputs])
            found |= {"log Z": float(partition.mean()), "largest |log Z|": float(partition.abs().max())}
        logits = torch.cat([y.flatten() for y in outputs])
        found |= {"output logit": float(logits.mean()), "largest output logit": float(logits.abs().max())}
        if seen:
            places = list(range(len(seen)))
            found["by layer"] = curve(
                places, {"attention logit": list(seen.values())}, across="layer", along="attention logit"
            )
        return found
