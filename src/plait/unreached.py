"""Trained parameters that no gradient reaches: an adapter on a layer that the loss does not see."""

from __future__ import annotations

import warnings

from torch import nn


class Unreached:
    """The names of what has had no gradient at any step.

    >>> import torch
    >>> model, unreached = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)]), Unreached()
    >>> model[0](torch.ones(2)).sum().backward()
    >>> unreached.look(model)
    >>> unreached.names
    {'1.weight'}
    """

    def __init__(self) -> None:
        self.names: set[str] | None = None

    def look(self, model: nn.Module) -> None:
        """Look for gradients once more, while there is anything left to look for."""
        if self.names is None or self.names:
            without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
            self.names = without if self.names is None else self.names & without

    def warn(self) -> None:
        """Warn of what is left."""
        if self.names:
            first, more = min(self.names), len(self.names) - 1
            warnings.warn(
                f"no gradient ever reached '{first}'{f' and {more} more' if more else ''}: the loss does not depend on "
                "what is trained there; leave it out of where, or freeze it.",
                stacklevel=3,
            )
