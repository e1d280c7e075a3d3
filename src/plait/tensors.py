"""Files of tensors: safetensors, written atomically, read without running anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from plait.errors import BadInput

State = dict[str, Tensor]
"""Weights by name."""


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically: a temporary file, fsync, rename. Shared storage is written once a name."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, str(temporary))
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raise BadInput if it is truncated or no such file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as problem:
        raise BadInput(f"{path} is truncated or damaged ({problem}).") from None


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a checkpoint `step-N`: the trained ones, and the frozen beside it."""
    try:
        frozen = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("frozen")
    except (OSError, ValueError, AttributeError) as problem:
        raise BadInput(f"{folder / 'state.json'} is truncated or damaged ({problem}).") from None
    return [folder / "model.safetensors", *([folder.parent / frozen] if frozen else [])]


def files_of(path: str | Path) -> list[Path]:
    """Return the safetensors files of a model's weights: the file itself, or those of a folder that holds a model.

    The folder is one of transformers or of a run, of which the newest checkpoint is taken, as training left it. Raises
    BadInput where there is none.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"there is no file {path}: name a safetensors file or the folder that holds one.")
    if not path.is_dir():
        return [path]
    if (path / "state.json").exists():
        return checkpoint_files(path)
    if found := sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("frozen-")):
        return found
    steps = {int(f.parent.name[5:]): f.parent for f in path.glob("step-*/state.json") if f.parent.name[5:].isdigit()}
    if steps:
        return checkpoint_files(steps[max(steps)])
    if found := sorted(path.glob("model/*.safetensors")):
        return found
    raise BadInput(f"{path} holds no safetensors file: name a model's file or the folder that holds it.")


def read_state(path: str | Path) -> State:
    """Read the weights of a model: a safetensors file, or a folder of one (transformers' or a run's)."""
    return {name: t for file in files_of(path) for name, t in read_tensors(file).items()}
