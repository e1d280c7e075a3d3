"""Write a trained model for other programs: a transformers folder, a PEFT adapter, ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import BadInput, did_you_mean
from plait.recipe import Recipe
from plait.workbench.run import load, run_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from plait.tasks.base import Task


def export(
    what: Path,
    to: str,
    folder: Path,
    overrides: Sequence[str] = (),
    rank: int | None = None,
    tell: Callable[[str], None] = print,
) -> list[Path]:
    """Write the model of a run's folder, or of a recipe that is trained first, and return the files written.

    rank: for PEFT, where updates that are of a higher rank are cut off; `tell` is given the relative error of that.
    """
    if to not in WRITERS:
        raise BadInput(f"--to '{to}' is not known{did_you_mean(to, WRITERS)}.")
    if rank is not None and to != "peft":
        raise BadInput(
            f"--rank is of a PEFT adapter, and --to {to} writes the whole model: give --to peft, or no rank."
        )
    if what.is_dir() and not (what / "recipe.yaml").exists():
        raise BadInput(f"{what} holds no run (it has no recipe.yaml): give a run's folder, or a recipe.")
    recipe = Recipe.read(what / "recipe.yaml" if what.is_dir() else what, overrides)
    if what.is_dir() and not (what / "results.json").exists():
        raise BadInput(
            f"{what} holds a run that is not finished: finish it first, with the same `plait run ... --out {what}`."
        )
    if what.is_dir() and recipe.train.steps != (held := Recipe.read(what / "recipe.yaml").train.steps):
        raise BadInput(
            f"{what} holds a run of {held} steps, not {recipe.train.steps}: let `plait run` train it further first."
        )
    outcome = run_recipe(recipe, what if what.is_dir() else Path("runs") / recipe.name, write=not what.is_dir())
    stood = _files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if rank is None:
        WRITERS[to](outcome.task, outcome.model, folder)
    else:
        tell(to_peft_of_rank(load(recipe).model, outcome.model, folder, rank))
    return sorted(path for path, mark in _files(folder).items() if stood.get(path) != mark)


def _files(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Return the files in a folder, each with what changes when it is written."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (held.st_ino, held.st_size, held.st_mtime_ns) for path, held in found.items()}


def to_transformers(task: Task, model: Any, folder: Path) -> None:
    """Fold the adapters into the weights and save what `from_pretrained` loads, with the tokenizer beside it."""
    from plait.parametrize.folding import fold

    if not hasattr(model, "save_pretrained"):
        raise BadInput(f"{type(model).__name__} is no transformers model: export it with --to onnx.")
    fold(model).save_pretrained(folder)  # type: ignore[operator]
    if task.save is not None:
        task.save(folder)


def to_peft(task: Task, model: Any, folder: Path) -> None:
    """Save the low-rank adapters as PEFT's adapter_config.json and adapter_model.safetensors."""
    from plait.integrations.peft import save_adapter

    save_adapter(model, folder)


def to_peft_of_rank(base: Any, model: Any, folder: Path, rank: int) -> str:
    """Save what training made of a base as a PEFT adapter of at most a rank; return how much was lost."""
    from plait.integrations.peft import write_update
    from plait.parametrize.update import update_of

    update = update_of(model, base, rank)
    write_update(update, model, folder)
    return update.says() or "nothing was cut off: every update is of no higher rank"


def to_onnx(task: Task, model: Any, folder: Path) -> None:
    """Fold the adapters into the weights and trace the model, soft prompts included, on one batch of the test set."""
    import torch

    from plait.math.logits import dense
    from plait.parametrize.folding import fold
    from plait.parametrize.prompt import soft_prompts

    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise BadInput("exporting to ONNX needs two packages: pip install 'plait[onnx]'.")
    batch = task.test.batch(torch.arange(min(2, len(task.test))))
    plain = (model if any(True for _ in soft_prompts(model)) else fold(model)).eval()

    class Logits(torch.nn.Module):
        """The model with its inputs by position, and nothing but the logits as its output."""

        def __init__(self) -> None:
            super().__init__()
            self.model = plain

        def forward(self, *inputs: Tensor) -> Any:
            return dense(task.call(self.model, dict(zip(names, inputs, strict=True)) if many else inputs[0]))

    many = isinstance(batch.inputs, dict)
    given = tuple(batch.inputs.values()) if many else (batch.inputs,)
    names = list(batch.inputs) if many else ["input"]
    try:
        torch.onnx.export(
            Logits().eval(),
            given,
            str(folder / "model.onnx"),
            input_names=names,
            output_names=["logits"],
            dynamic_shapes={"inputs": tuple({0: torch.export.Dim.DYNAMIC} for _ in given)},
            dynamo=True,
            verbose=False,
        )
    except (torch.onnx.OnnxExporterError, RuntimeError, TypeError) as problem:
        reason = str(problem.__cause__ or problem).strip().splitlines()[0].rstrip(".")
        other = "export it with --to transformers" if hasattr(model, "save_pretrained") else "use it from Python"
        raise BadInput(f"{type(model).__name__} cannot be written as ONNX ({reason}): {other}.") from None
    if task.save is not None:
        task.save(folder)


WRITERS: dict[str, Callable[[Task, Any, Path], None]] = {
    "transformers": to_transformers,
    "peft": to_peft,
    "onnx": to_onnx,
}
"""The formats, and what writes each."""
