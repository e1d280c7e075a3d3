"""Where plait keeps what can be computed again: converted models, the index of methods, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder that PLAIT_CACHE names, else plait's in XDG_CACHE_HOME, else ~/.cache/plait.

    >>> cache_folder().is_absolute()
    True
    """
    if named := os.environ.get("PLAIT_CACHE"):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "plait"
