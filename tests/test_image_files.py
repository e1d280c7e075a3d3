"""Images that a table points to, and images of kinds that are not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plait.tasks import load_task


def drawn(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    generator, paths = np.random.default_rng(0), [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (8, 8, 3)).astype("uint8")).save(path)
    return paths


def test_paths_in_a_table_are_beside_the_table_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"pictures/{path.name},{'ab'[i % 2]}" for i, path in enumerate(drawn(tmp_path / "pictures", 20))]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *rows]))
    (tmp_path / "elsewhere").mkdir()
    for place, table in ((tmp_path, "table.csv"), (tmp_path / "elsewhere", "../table.csv")):
        monkeypatch.chdir(place)
        assert len(load_task("image-classification", "cnn", table).train) > 0


def test_images_of_kinds_that_are_not_read_are_counted(tmp_path: Path) -> None:
    for name in "ab":
        drawn(tmp_path / name, 10)
    (tmp_path / "a" / "x.heic").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"not read and left out \(1, 'x.heic' first\): save them as PNG or JPEG"):
        load_task(None, "cnn", tmp_path)
