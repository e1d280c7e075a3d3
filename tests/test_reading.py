"""Data of every kind is read to the same table; what cannot be read is refused in one sentence that names the cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from plait.errors import BadInput
from plait.tasks import load_task
from plait.tasks.base import Options
from plait.tasks.packaged import SETS
from plait.tasks.reading import column, read
from plait.tasks.splits import classes_of, limit, three

ROWS = [{"text": f"text {i} naïve", "label": "ab"[i % 2]} for i in range(20)]
FRAME = pd.DataFrame(ROWS)


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "parquet":
        FRAME.to_parquet(path)
    else:
        FRAME.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_table(kind: str, tmp_path: Path) -> None:
    assert read(write(tmp_path, kind))["all"].to_dict("records") == ROWS


def test_tables_lists_dicts_and_datasets_objects_give_the_same_table() -> None:
    from datasets import ClassLabel, Dataset, DatasetDict

    made = Dataset.from_list(ROWS)
    named = made.cast_column("label", ClassLabel(names=["a", "b"]))
    for source in (FRAME, ROWS, {"text": FRAME["text"], "label": FRAME["label"]}, made, named):
        assert read(source)["all"].to_dict("records") == ROWS
    tables = read(DatasetDict({"train": made, "val": named.select(range(3)), "unsupervised": made}))
    assert {part: len(table) for part, table in tables.items()} == {"train": 20, "validation": 3}


def test_a_folder_of_texts_or_of_splits(tmp_path: Path) -> None:
    for name, label in (("1", "good"), ("2", "bad")):
        (tmp_path / "texts" / label).mkdir(parents=True)
        (tmp_path / "texts" / label / f"{name}.txt").write_text(name)
    assert read(tmp_path / "texts")["all"].to_dict("records") == [
        {"text": "2", "label": "bad"},
        {"text": "1", "label": "good"},
    ]
    (tmp_path / "splits").mkdir()
    FRAME.to_csv(tmp_path / "splits" / "train.csv", index=False)
    FRAME[:4].to_csv(tmp_path / "splits" / "test.csv", index=False)
    assert {part: len(table) for part, table in read(tmp_path / "splits").items()} == {"train": 20, "test": 4}


def test_a_text_beside_the_folders_of_classes_is_no_reason_to_forget_the_classes(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.txt").write_text(f"text {i} " * 9)
    assert load_task(None, "llama-tiny", tmp_path).name == "text-classification"
    (tmp_path / "README.txt").write_text("read me")
    says = f"{tmp_path}/README.txt lies in no folder of a class: put each text in a folder named after its class"
    for task, cure in ((None, ", or give the task, such as causal-language-modelling."), ("text-classification", ".")):
        with pytest.raises(BadInput) as caught:
            load_task(task, "llama-tiny", tmp_path)
        assert str(caught.value) == says + cure
    assert load_task("causal-language-modelling", "llama-tiny", tmp_path, length=32).classes == ()


def test_words_that_look_like_gaps_are_words(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nnull,NA\nNone,yes\n")
    assert column(read(tmp_path / "a.csv")["all"], "text", "text") == ["null", "None"]


def broken(folder: Path) -> dict[str, Any]:
    """Return sources that must be refused, by the sentence that refuses them ({} is the folder)."""

    def put(name: str, content: bytes) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    put("both/a.txt", b"x"), put("both/b.png", b"x")
    put("stray/a/x.png", b"x"), put("stray/y.png", b"x")
    (folder / "none").mkdir()
    return {
        "there is no file or folder 'tweet', and no packaged set of that name (did you mean 'tweets'?).": "tweet",
        "{}/a.xlsx is of a kind that plait does not read ('.xlsx')": put("a.xlsx", b"x"),
        "{}/empty.csv is empty: give at least one example.": put("empty.csv", b""),
        "{}/head.csv holds no example: give at least one.": put("head.csv", b"text,label\n"),
        "{}/blank.txt holds no example: give at least one.": put("blank.txt", b" \n"),
        "{}/latin.csv is not UTF-8 at line 3 (byte 0xe9): save it as UTF-8, or give its encoding, as in encoding="
        "'latin-1'.": put("latin.csv", "text,label\nplain,a\ncafé,b\n".encode("latin-1")),
        "{}/ragged.csv is not a table that can be read as csv": put("ragged.csv", b"a,b\n1,2\n1,2,3\n"),
        "{}/bad.jsonl is not JSON at line 2": put("bad.jsonl", b'{"a": 1}\n{a}\n'),
        "{}/list.jsonl holds no object at line 1": put("list.jsonl", b"[1]\n"),
        "{}/bad.json is not a table that can be read as json": put("bad.json", b"{"),
        "{}/bad.parquet is not a parquet file": put("bad.parquet", b"no"),
        "{}/both holds both images and texts": folder / "both",
        "{}/stray/y.png lies in no folder of a class": folder / "stray",
        "{}/none holds no .txt and no image": folder / "none",
        "the list of examples holds no example": [],
        "data given as a list must hold one dict for each example": [1, 2],
        "data must be a name, a path, a datasets object, a DataFrame or a list of dicts, not int.": 3,
        "data has no split 'tset' (did you mean 'test'?)": {"train": FRAME, "tset": FRAME},
        "data given as a dict must hold columns of equal length": {"text": ["a"], "label": []},
    }


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for sentence, source in broken(tmp_path).items():
        with pytest.raises(BadInput) as caught:
            read(source)
        assert str(caught.value).startswith(sentence.replace("{}", str(tmp_path))), str(caught.value)
    assert read(tmp_path / "latin.csv", "latin-1")["all"]["text"].tolist() == ["plain", "café"]


LETTERS = [{"text": f"words {i}", "label": "a" if i % 3 else "b"} for i in range(30)]


@pytest.mark.parametrize(
    ("data", "given", "sentence"),
    [
        (
            LETTERS,
            {"label": "lable"},
            "the list of examples has no column 'lable' (did you mean 'label'?): name the one",
        ),
        (
            LETTERS,
            {"text": "txt"},
            "the list of examples has no column 'txt' (did you mean 'text'?): name the one to use",
        ),
        (
            [*LETTERS, {"text": None, "label": "a"}],
            {"validation": LETTERS, "test": LETTERS},
            "has no text in row 31: fill",
        ),
        ([*LETTERS, {"text": "x"}], {}, "has no label in row 31: fill it in, or remove the row."),
        (
            [*LETTERS, {"text": "x", "label": "c"}],
            {},
            "has only 1 row left of the class 'c' for test: give at least three",
        ),
        (
            [{"text": "x", "label": "a"}] * 9,
            {},
            "has only the class 'a' in the 7 rows to train on: a",
        ),
        (LETTERS[:2], {}, "has only 1 row left of the class"),
        (
            LETTERS,
            {"test": [{"text": "x", "label": "q"}]},
            "the test set has the label 'q', which the training set never",
        ),
        (LETTERS, {"test": 0.7}, "test must be a share between 0 and 0.5, or a data set of its own, not 0.7."),
        (LETTERS, {"lenght": 3}, "a task has no option 'lenght' (did you mean 'length'?)."),
        (LETTERS, {"rows": 1}, "rows must be a whole number of 2 or more, not 1."),
        (LETTERS, {"length": 4096}, "length must be at most 2048, the positions that"),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused(data: Any, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_task("text-classification", "llama-tiny", data, **given)
    assert sentence in str(caught.value)


def test_a_column_of_images_by_another_name_is_offered() -> None:
    rows = [{"img": np.zeros((8, 8), dtype="uint8"), "label": i % 2} for i in range(20)]
    with pytest.raises(BadInput, match=r"no column 'image' \(did you mean 'img'\?\): call the one to use 'image'\."):
        load_task("image-classification", "cnn", rows)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 9 * i, dtype="uint8")).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    whole = (tmp_path / "a" / "4.png").read_bytes()
    (tmp_path / "a" / "4.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"a/4\.png is not an image that can be read \(.*\): replace it, or remove it\."):
        load_task("image-classification", "cnn", tmp_path)


def test_splits_are_seeded_disjoint_whole_and_in_proportion() -> None:
    table = pd.DataFrame({"text": [f"t{i}" for i in range(200)], "label": ["a"] * 150 + ["b"] * 50})
    options = Options(task="text-classification", model=None, data=table, seed=3)
    parts = three(options, "label")
    assert [len(part) for part in parts] == [140, 30, 30]
    assert sorted(text for part in parts for text in part["text"]) == sorted(table["text"])
    assert [round((part["label"] == "b").mean(), 1) for part in parts] == pytest.approx([0.25] * 3, abs=0.06)
    again = three(options, "label")
    assert all(a["text"].tolist() == b["text"].tolist() for a, b in zip(parts, again, strict=True))
    other = three(Options(task="", model=None, data=table, seed=4), "label")
    assert other[2]["text"].tolist() != parts[2]["text"].tolist()
    few = limit(read(table)["all"], 40, "label", 0)
    assert (few["label"] == "b").sum() == 10


def test_classes_are_in_order_and_equal_numbers_are_one_class() -> None:
    assert classes_of([10, 9, 2], {"test": [2.0, np.int64(10)]}, "it") == (
        ["2", "9", "10"],
        {"train": [2, 1, 0], "test": [0, 2]},
    )
    with pytest.raises(BadInput, match="not whole numbers: use the task regression"):
        classes_of([0.5, 1.5], {}, "it")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([1, True, 0], ["0", "1", "True"]),
        ([True, 1, 0], ["0", "1", "True"]),
        ([1, "1", 0], ["0", "1"]),
        ([2.0, 2, "2", "b"], ["2", "b"]),
        ([False, True], ["False", "True"]),
        ([10, 9, -1], ["-1", "9", "10"]),
    ],
)
def test_the_text_of_a_label_is_its_class(labels: list[Any], classes: list[str], tmp_path: Path) -> None:
    names, coded = classes_of(labels, {"test": labels[::-1]}, "it")
    assert names == classes
    said = ["2" if label == 2.0 else str(label) for label in labels]
    assert [names[number] for number in coded["train"]] == said
    assert coded["test"] == coded["train"][::-1]
    rows = [{"x": i, "label": labels[i % len(labels)]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_task("classification", "mlp", tmp_path / "a.jsonl").classes == tuple(classes)


def test_packaged_sets_hold_what_they_say() -> None:
    sizes = {"tweets": 37243, "kjv": 1189, "mnist": 5000, "digits": 1797, "wine": 178, "breast-cancer": 569}
    for name, size in sizes.items():
        assert len(read(name)["all"]) == size, name
    tweets = read("tweets")["all"]
    assert tweets["text"].is_unique
    assert set(tweets["label"]) == {"negative", "neutral", "positive"}
    bible = read("kjv")["all"]["text"]
    assert bible[0].startswith("In the beginning God created")
    assert "generation of Jesus Christ" not in bible[0]
    assert not bible.str.contains(r"\d+:\d+", regex=True).any()


def test_a_set_whose_package_is_missing_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"run `pip install --no-deps chatterbot-corpus`"):
        SETS["chatterbot"].load()
