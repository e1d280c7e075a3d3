"""Image classification: a picture in, a class out; loss, accuracy, macro F1 and calibration error."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import BadInput
from plait.models.pretrained import efficientnet_lite0, load_transformers, located
from plait.models.small import cnn, mlp, require_size, vit
from plait.parametrize.freeze import mark_fresh
from plait.tasks.base import Options, Task
from plait.tasks.classes import classification, labelled, name_classes
from plait.tasks.reading import Table, column, rows_of
from plait.tasks.sets import Images

SCRATCH = ("mlp", "cnn", "vit")
GREY = ("1", "L", "LA")
MOST = 4 * 2**30
"""How many bytes of decoded images are held, at most."""


def as_bytes(values: Any, top: float, where: str) -> Any:
    """Return an array of values from 0 to `top` as one of bytes; BadInput for values that lie outside."""
    import numpy as np

    low, high = values.min(), values.max()
    rounding = 1e-4 * (values.dtype.kind == "f")
    if not (low >= -rounding and high <= top + rounding):  # also where one is no number
        raise BadInput(
            f"{where} has values from {low:g} to {high:g}, outside 0 to {top:g}: give bytes, whole numbers of 16 bits, "
            f"or real numbers in [0, 1]."
        )
    return np.rint(values * (255 / top)).astype("uint8")


def from_array(value: Any, where: str) -> Any:
    """Return an array as a PIL image: real numbers in [0, 1], 16 bits without a sign, or other whole numbers to 255."""
    import numpy as np
    from PIL import Image

    array = np.asarray(value)
    if array.size and array.dtype.kind in "iuf" and array.dtype != "uint8":
        top = 1 if array.dtype.kind == "f" else 65535 if array.dtype == "uint16" else 255
        array = as_bytes(array, top, where)
    return Image.fromarray(array)


def opened(value: Any, where: str) -> Any:
    """Return a decoded PIL image of bytes from a path, bytes, an array or a PIL image; BadInput names a broken one.

    An image of 16 or 32 bits a pixel (its values up to 65535) or of real numbers (up to 1) is scaled by that range.
    """
    import numpy as np
    from PIL import Image

    try:
        if isinstance(value, Mapping):  # as `datasets` stores images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            value = Image.open(io.BytesIO(value))
        elif isinstance(value, str | Path):
            where = str(value)
            value = Image.open(value)
        elif not isinstance(value, Image.Image):
            value = from_array(value, where)
        value.load()
    except BadInput:
        raise
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as problem:
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise BadInput(f"{where} is not an image that can be read ({reason}): replace it, or remove it.") from None
    if value.mode[0] in "IF":  # I, I;16 and its kin, F
        return Image.fromarray(as_bytes(np.asarray(value), 1 if value.mode == "F" else 65535, where))
    return value


def pixels(table: Table, size: int | None, channels: int | None) -> list[Any]:
    """Return a table's images as arrays of bytes [height, width] or [height, width, 3], squares of `size`."""
    import numpy as np

    arrays, source = [], table.attrs["source"]
    for row, value in zip(rows_of(table), column(table, "image", ""), strict=True):
        image = opened(_beside(source, value), f"the image in row {row} of {source}")
        grey = image.mode in GREY if channels is None else channels == 1
        image = image.convert("L" if grey else "RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), 2)  # bilinear
        arrays.append(np.asarray(image))
        if arrays[-1].nbytes * len(table) > MOST:
            raise BadInput(f"{source} would take more than 4 GiB as pixels: give a smaller size=, or rows=.")
    return arrays


def _beside(source: str, value: Any) -> Any:
    """Return a path in a table as one beside the table's file, where such an image lies there."""
    with contextlib.suppress(OSError):  # of a name that is too long to be one
        if isinstance(value, str) and (near := Path(source).parent / value).is_file():
            return near
    return value


def stacked(arrays: list[Any], channels: int, source: str) -> Tensor:
    """Return arrays as one tensor of bytes [n, channels, height, width]."""
    import numpy as np

    if channels == 3:
        arrays = [a if a.ndim == 3 else np.repeat(a[:, :, None], 3, axis=2) for a in arrays]
    shapes = sorted({a.shape[:2] for a in arrays})
    if len(shapes) > 1:
        raise BadInput(
            f"the images of {source} differ in size, as in {shapes[0]} and {shapes[-1]} pixels: give size=, the side "
            f"to resize them to."
        )
    made = torch.from_numpy(np.stack(arrays))
    return made[:, None] if made.dim() == 3 else made.permute(0, 3, 1, 2).contiguous()


def _wanted(options: Options) -> tuple[int | None, int | None, Tensor | None, Tensor | None]:
    """Return (size, channels, mean, deviation) that a pretrained model wants, in bytes; None where it does not say."""
    if isinstance(options.model, nn.Module) or str(options.model) in SCRATCH:
        return options.size, None, None, None
    if str(options.model) == "efficientnet-lite0":
        return options.size or 224, 3, torch.full((3,), 127.0), torch.full((3,), 128.0)
    if str(options.model) in ("minilm", "smollm2-135m", "llama-tiny"):
        raise BadInput(f"the model '{options.model}' does not see images: use efficientnet-lite0, vit, cnn or mlp.")
    from transformers import AutoConfig
    from transformers.image_processing_base import ImageProcessingMixin

    place = located(options.model)
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as problem:
        raise BadInput(f"transformers cannot load '{options.model}': {str(problem).strip().splitlines()[0]}") from None
    try:
        recipe, _ = ImageProcessingMixin.get_image_processor_dict(place)
    except OSError:
        recipe = {}
    channels = int(getattr(config, "num_channels", 3))
    mean = torch.tensor(recipe.get("image_mean") or [0.5] * channels)
    deviation = torch.tensor(recipe.get("image_std") or [0.5] * channels)
    return options.size or int(getattr(config, "image_size", 224)), channels, mean * 255, deviation * 255


def _model(options: Options, shape: torch.Size, classes: list[str]) -> nn.Module:
    channels, height, width = shape
    name = options.model
    if isinstance(name, nn.Module):
        return name
    require_size(str(name), height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if name == "efficientnet-lite0":
            return efficientnet_lite0(len(classes))
        if name == "mlp":
            model: nn.Module = mlp(channels * height * width, len(classes))
        elif name == "cnn":
            model = cnn(channels, len(classes))
        elif name == "vit":
            model = vit(channels, len(classes), height)
        else:
            model = load_transformers(name, options.task, outputs=len(classes))
    if isinstance(model, nn.Sequential):
        return mark_fresh(model, str(len(model) - 1))
    name_classes(model, classes)
    return mark_fresh(model, "classifier") if name == "vit" else model


def build(options: Options) -> Task:
    """Return the task; images are decoded once and held as bytes."""
    parts, classes, coded = labelled(options)
    size, channels, mean, deviation = _wanted(options)
    arrays = {part: pixels(table, size, channels) for part, table in parts.items()}
    if channels is None:
        channels = 1 if all(array.ndim == 2 for part in arrays.values() for array in part) else 3
    stacks = {part: stacked(found, channels, parts[part].attrs["source"]) for part, found in arrays.items()}
    shape = stacks["train"].shape[1:]
    for part, stack in stacks.items():
        if stack.shape[1:] != shape:
            raise BadInput(f"the {part} images have another size than the training images: give size=, the side.")
    if mean is None or deviation is None:
        seen = stacks["train"].float()
        mean, deviation = seen.mean((0, 2, 3)), seen.std((0, 2, 3)).clamp_min(1.0)
    sets = {part: Images(stack, torch.tensor(coded[part]), mean, deviation) for part, stack in stacks.items()}
    kept = {"classes": classes, "size": list(shape[1:]), "mean": mean.tolist(), "deviation": deviation.tolist()}

    def save(folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "preprocessing.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")

    return classification(options, _model(options, shape, classes), sets, classes, save)
