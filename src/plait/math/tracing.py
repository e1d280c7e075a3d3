"""Whether torch traces or transforms what runs now."""

from __future__ import annotations

import torch


def traced() -> bool:
    """Say whether torch.compile, torch.func or forward-mode differentiation is at work: our own kernels and autograd
    functions stand back then, and torch's operations run.

    >>> traced(), torch.func.vmap(lambda x: x + traced())(torch.zeros(2))
    (False, tensor([1., 1.]))
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
