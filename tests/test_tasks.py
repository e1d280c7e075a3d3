"""The five tasks: what a model is given, what it should say, how it is judged, and that judging changes nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import plait
from plait.batch import IGNORE
from plait.errors import BadInput
from plait.models import byte_tokenizer, cnn, llama_tiny
from plait.parametrize.freeze import fresh
from plait.tasks import Task, forgetting, load_task
from plait.tasks.images import opened
from plait.tasks.sets import Texts

TWEETS: dict[str, Any] = {
    "task": "text-classification",
    "model": "llama-tiny",
    "data": "tweets",
    "rows": 60,
    "length": 40,
}
PAIRED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIRS = [{"prompt": f"say {i}", "response": f"number {i}"} for i in range(20)]


@pytest.fixture(scope="module")
def tweets() -> Task:
    return load_task(**TWEETS)


@pytest.fixture(scope="module")
def bible() -> Task:
    return load_task(None, "llama-tiny", "kjv", rows=40, length=32, other="python-stdlib")


def test_text_classification_pads_to_the_longest_and_marks_its_head(tweets: Task) -> None:
    assert tweets.classes == ("negative", "neutral", "positive")
    assert fresh(tweets.model) == ("score",)
    batch = tweets.train.batch(torch.tensor([3, 0, 7]))
    for row, position in enumerate([3, 0, 7]):
        alone = tweets.train.batch(torch.tensor([position])).inputs["input_ids"][0]
        mask = batch.inputs["attention_mask"][row].bool()
        assert torch.equal(batch.inputs["input_ids"][row][mask], alone)
        assert not batch.inputs["input_ids"][row][~mask].any()
    assert batch.index.tolist() == [3, 0, 7]
    assert batch.inputs["input_ids"].shape[1] <= 40


def test_the_same_seed_gives_the_same_splits_and_head_and_leaves_the_random_state(tweets: Task) -> None:
    state = torch.get_rng_state()
    again, other = load_task(**TWEETS), load_task(**TWEETS, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    same = zip(again.model.parameters(), tweets.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(other.model.score.weight, again.model.score.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(again.test.batch(torch.arange(3)).target, tweets.test.batch(torch.arange(3)).target)


def test_judging_leaves_modes_gradients_and_randomness(tweets: Task) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[2].eval()
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 4))).rename(columns=str)
    task = load_task("classification", model, table.assign(label=[0, 1] * 20))
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    mean = model[2].running_mean.clone()  # type: ignore[union-attr, operator]
    first, second = (task.metrics(model, task.test) for _ in range(2))
    assert first == second
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(mean, model[2].running_mean)  # type: ignore[arg-type]
    assert all(p.grad is None for p in model.parameters())


class Fixed(nn.Module):
    """Returns its inputs as logits."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def test_classification_metrics_against_a_slow_count() -> None:
    from plait.batch import Batch
    from plait.engine import Pairs, call_model
    from plait.loss.base import cross_entropy
    from plait.tasks.metrics import classification

    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(200, 3, generator=generator) * 3, torch.randint(3, (200,), generator=generator)
    seen = classification(call_model, cross_entropy, 3, size=7)(Fixed(), Pairs(logits, target))
    likely = torch.softmax(logits.double(), 1)
    sure, said = likely.max(1)
    error = 0.0
    for k in range(15):
        inside = (sure > k / 15) & (sure <= (k + 1) / 15)
        if inside.any():
            gap = (said[inside] == target[inside]).double().mean() - sure[inside].mean()
            error += float(inside.double().mean() * gap.abs())
    f1 = []
    for c in range(3):
        hit = int(((said == c) & (target == c)).sum())
        f1.append(2 * hit / int((said == c).sum() + (target == c).sum()))
    assert seen["loss"] == pytest.approx(float(-likely[torch.arange(200), target].log().mean()), abs=1e-5)
    assert seen["accuracy"] == pytest.approx(float((said == target).double().mean()), abs=1e-6)
    assert seen["macro_f1"] == pytest.approx(sum(f1) / 3, abs=1e-6)
    assert seen["calibration_error"] == pytest.approx(error, abs=1e-5)
    predicted = classification(call_model, cross_entropy, 3)(
        Fixed(), Pairs(logits, target), lambda model, inputs, now: torch.softmax(model(inputs), -1)
    )
    assert predicted == pytest.approx(seen, abs=1e-5)
    assert isinstance(Pairs(logits, target).batch(torch.tensor([0])), Batch)


def test_packed_text_predicts_the_next_token(bible: Task) -> None:
    assert (len(bible.train), len(bible.validation), len(bible.test)) == (28, 6, 6)
    assert bible.other is not None
    assert len(bible.other) == 6
    batch = bible.train.batch(torch.tensor([0, 1]))
    tokens = batch.inputs["input_ids"]
    assert tokens.shape == (2, 32)
    assert torch.equal(batch.target[:, :-1], tokens[:, 1:])
    assert (batch.target[:, -1] == IGNORE).all()


def test_language_loss_against_dense_logits_and_torchmetrics_perplexity(bible: Task) -> None:
    from torchmetrics.functional.text import perplexity

    batch = bible.test.batch(torch.arange(len(bible.test)))
    model = bible.model.eval()
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    seen = bible.metrics(bible.model, bible.test)
    assert seen["perplexity"] == pytest.approx(float(perplexity(logits, batch.target, ignore_index=IGNORE)), rel=1e-4)
    assert seen["loss"] == pytest.approx(math.log(seen["perplexity"]), rel=1e-6)


def test_a_language_model_learns_and_forgetting_is_the_rise_of_the_other_loss() -> None:
    task = load_task(None, "llama-tiny", "kjv", rows=40, length=32, other="python-stdlib")
    before, first = task.metrics(task.model, task.other)["loss"], task.metrics(task.model, task.test)["loss"]
    plait.train(task.model, task.train, task.loss, steps=15, batch_size=8, call=task.call)
    seen = forgetting(task, before)
    assert task.metrics(task.model, task.test)["loss"] < first - 0.3
    assert seen["forgetting"] == pytest.approx(task.metrics(task.model, task.other)["loss"] - before)
    with pytest.raises(BadInput, match="forgetting needs a second domain: give the task other="):
        forgetting(load_task("classification", "mlp", "wine"), 0.0)


def test_only_answers_have_targets() -> None:
    task = load_task(None, "llama-tiny", PAIRS, length=200)
    assert task.name == "causal-language-modelling"
    data = task.train
    assert isinstance(data, Texts)
    batch, tokenizer = data.batch(torch.arange(len(data))), task.tokenizer
    for tokens, target in zip(batch.inputs["input_ids"], batch.target, strict=True):
        said = tokenizer.decode(target[target != IGNORE])
        number = said.removeprefix("number ").removesuffix("<|im_end|>\n")
        assert said == f"number {number}<|im_end|>\n"
        assert f"<|im_start|>user\nsay {number}<|im_end|>\n<|im_start|>assistant\n{said}" in tokenizer.decode(tokens)
        counted = (target != IGNORE).nonzero().squeeze(1)
        assert torch.equal(target[counted], tokens[counted + 1])


def test_every_turn_of_the_assistant_counts() -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
    ]
    task = load_task("causal-language-modelling", "llama-tiny", [{"messages": talk}] * 12, length=200)
    target = task.test.batch(torch.tensor([0])).target[0]
    assert task.tokenizer.decode(target[target != IGNORE]) == "one<|im_end|>\ntwo<|im_end|>\n"


def test_answers_that_do_not_fit_are_left_out_and_said() -> None:
    long = [{"prompt": "x" * 300, "response": "y"} for _ in range(20)]
    with pytest.raises(BadInput, match="has no response within 64 tokens: give a larger length"):
        load_task(None, "llama-tiny", long, length=64)
    task = load_task(None, "llama-tiny", {"train": [*PAIRS, *long], "validation": PAIRS, "test": PAIRS}, length=100)
    assert len(task.train) == 20
    assert "20 of 40 examples" in task.notes[0]


def test_what_a_chat_template_refuses_is_named_by_its_row() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') if messages[0].role == 'system' }}"
    talk = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    with pytest.raises(BadInput, match=r"the chat template cannot write row \d+ of .* \(no such role\): change it"):
        load_task("causal-language-modelling", "llama-tiny", [{"messages": talk}] * 12, tokenizer=tokenizer)


def test_prompts_and_responses_by_other_names_tell_the_task() -> None:
    rows = [{"question": f"say {i}", "answer": f"number {i}"} for i in range(20)]
    task = load_task(None, "llama-tiny", rows, prompt="question", response="answer")
    assert task.name == "causal-language-modelling"


def test_a_short_text_is_split_inside_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(800)))
    task = load_task(None, "llama-tiny", tmp_path / "a.txt", length=40)
    assert (len(task.train), len(task.validation), len(task.test)) == (14, 3, 3)
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(BadInput, match="has text for 0 blocks of 40 tokens, too few to split"):
        load_task(None, "llama-tiny", tmp_path / "a.txt", length=40)


def test_a_model_that_sees_the_future_is_refused() -> None:
    from transformers import BertConfig, BertForMaskedLM

    shape = {
        "vocab_size": 260,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    with pytest.raises(BadInput, match="BertForMaskedLM sees the words that it should predict: take a causal"):
        load_task(
            "causal-language-modelling", BertForMaskedLM(BertConfig(**shape, initializer_range=1.0)), PAIRS,
            tokenizer=byte_tokenizer(),
        )  # fmt: skip


def test_images_of_a_folder_are_standardized_and_learnt(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / "xy"[i % 2]).mkdir(exist_ok=True)
        picture = generator.integers(0, 80, (10 + i % 2, 12, 3)) + 150 * (i % 2)
        Image.fromarray(picture.astype("uint8")).save(tmp_path / "xy"[i % 2] / f"{i}.png")
    with pytest.raises(BadInput, match=r"differ in size, as in \(10, 12\) and \(11, 12\) pixels: give size="):
        load_task(None, "cnn", tmp_path)
    task = load_task(None, "cnn", tmp_path, size=8)
    inputs = task.train.batch(torch.arange(len(task.train))).inputs
    assert inputs.shape[1:] == (3, 8, 8)
    assert torch.allclose(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(inputs.std((0, 2, 3)), torch.ones(3), atol=1e-4)
    plait.train(task.model, task.train, task.loss, steps=20, batch_size=8, call=task.call)
    assert task.metrics(task.model, task.test)["accuracy"] == 1.0
    assert task.save is not None
    task.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "preprocessing.json").read_text())["classes"] == ["x", "y"]


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.png", Image.fromarray(np.rint(RAMP * 65535).astype("uint16"))),
        ("a.tif", Image.fromarray(np.rint(RAMP * 65535).astype(">u2"))),
        ("a.tif", Image.fromarray(np.rint(RAMP * 65535).astype("int32"))),
        ("a.tif", Image.fromarray(RAMP.astype("float32"))),
    ],
    ids=["16 bits", "16 bits, big end first", "32 bits", "real"],
)
def test_images_of_more_than_bytes_are_scaled_by_their_range(name: str, image: Image.Image, tmp_path: Path) -> None:
    image.save(tmp_path / name)
    with Image.open(tmp_path / name) as read:
        assert read.mode not in ("L", "RGB")
    for value in (image, str(tmp_path / name)):
        assert np.abs(np.asarray(opened(value, "it")) - 255 * RAMP).max() <= 0.51


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "uint16", "int32", "int64", "uint8"])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_every_kind_are_scaled_by_their_range(kind: str, channels: int) -> None:
    top = 1 if "float" in kind else 65535 if kind == "uint16" else 255
    values = np.repeat(RAMP[:, :, None], 3, axis=2) if channels == 3 else RAMP
    given = (values * top if top == 1 else np.rint(values * top)).astype(kind)
    rows = [{"image": given, "label": i % 2} for i in range(20)]
    task = load_task("image-classification", "cnn", rows)
    assert task.train.pixels.shape[1:] == (channels, 8, 8)  # type: ignore[attr-defined]
    seen = task.train.pixels[0].movedim(0, -1).squeeze(-1).numpy()  # type: ignore[attr-defined]
    assert np.abs(seen - 255 * values).max() <= 0.51 + 255 * 2**-11 * (kind == "float16")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.full((4, 4), 7.5), "has values from 7.5 to 7.5, outside 0 to 1: give bytes"),
        (np.full((4, 4), np.nan), "has values from nan to nan, outside 0 to 1: give bytes"),
        (np.full((4, 4), -1), "has values from -1 to -1, outside 0 to 255: give bytes"),
        (Image.fromarray(np.full((4, 4), 70000, dtype="int32")), "from 70000 to 70000, outside 0 to 65535: give bytes"),
        (Image.fromarray(np.full((4, 4), -0.5, dtype="float32")), "from -0.5 to -0.5, outside 0 to 1: give bytes"),
    ],
)
def test_images_with_values_outside_their_range_are_refused(value: Any, says: str) -> None:
    with pytest.raises(BadInput, match=r"^the image in row \d+ of the list of examples has values from") as caught:
        load_task("image-classification", "cnn", [{"image": value, "label": i % 2} for i in range(20)])
    assert says in str(caught.value)


@pytest.mark.parametrize("model", ["mlp", "vit"])
def test_other_image_models_run(model: str) -> None:
    task = load_task(None, model, "digits", rows=100)
    assert task.metrics(task.model, task.test).keys() == {"loss", "accuracy", "macro_f1", "calibration_error"}
    assert fresh(task.model)


def test_a_table_is_standardized_by_its_training_rows(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = pd.DataFrame({"size": generator.normal(50, 9, 100), "kind": ["old", "new"] * 50})
    rows["label"] = 3 * rows["size"] + 20 * (rows["kind"] == "new")
    rows.loc[3, "size"] = None
    odd = rows[:5].assign(kind="never seen")
    task = load_task(None, "mlp", rows, test=odd)
    assert task.name == "regression"
    inputs = task.train.batch(torch.arange(len(task.train))).inputs
    assert inputs.shape[1] == 3
    assert float(inputs[:, 0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(inputs[:, 0].std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert task.test.batch(torch.tensor([0])).inputs[0, 1:].tolist() == [0.0, 0.0]
    perfect = task.test.batch(torch.arange(5)).target
    ones = task.metrics(Looks(perfect), task.test)
    assert ones["mae"] == pytest.approx(0, abs=1e-3)
    assert ones["r2"] == pytest.approx(1, abs=1e-4)
    units = task.metrics(Looks(perfect + 1), task.test)
    assert units["rmse"] == pytest.approx(float(rows["label"].std()), rel=0.2)
    assert task.save is not None
    task.save(tmp_path)
    assert json.loads((tmp_path / "preprocessing.json").read_text())["words"] == {"kind": ["new", "old"]}


@pytest.mark.parametrize("gap", ["NA", "N/A", "nan", "null", "None", "?", " "])
def test_a_word_for_a_gap_leaves_a_column_of_numbers_one(gap: str, tmp_path: Path) -> None:
    def loaded(cell: str) -> Task:
        rows = [f"{cell if i in (3, 30) else i % 9},{'NA' if i % 2 else 'old'},{i}" for i in range(60)]
        (tmp_path / "a.csv").write_text("\n".join(["size,kind,label", *rows]))
        return load_task("regression", "mlp", tmp_path / "a.csv")

    empty, written = loaded(""), loaded(gap)
    assert empty.notes == ()
    for part in ("train", "validation", "test"):
        every = torch.arange(len(getattr(empty, part)))
        assert torch.equal(getattr(written, part).batch(every).inputs, getattr(empty, part).batch(every).inputs)
    if gap != "nan":  # which pandas reads as a gap by itself
        says = f"the column 'size' of {tmp_path}/a.csv holds numbers and '{gap.strip()}', which is read as a gap"
        assert written.notes == (says,)


def test_columns_may_be_numbered_and_one_without_a_finite_number_is_left_out() -> None:
    values = np.random.default_rng(0).normal(size=(40, 4))
    values[:, 1] = np.inf
    task = load_task("regression", "mlp", pd.DataFrame(values), label=3)
    assert task.train.batch(torch.arange(4)).inputs.shape == (4, 2)


def test_a_column_with_one_word_more_stays_one_of_words_and_a_label_without_a_value_is_refused() -> None:
    rows = [{"size": "NA" if i == 3 else "large" if i == 4 else i % 3, "label": i} for i in range(60)]
    task = load_task("regression", "mlp", {"train": rows, "validation": rows, "test": rows})
    assert task.train.batch(torch.arange(1)).inputs.shape == (1, 5)
    assert task.notes == ()
    with pytest.raises(BadInput, match=r"the column 'label' of .* must hold numbers"):
        load_task("regression", "mlp", [{"size": i, "label": "NA" if i == 3 else i} for i in range(60)])


def test_a_word_for_a_gap_may_stand_in_the_test_set_alone() -> None:
    rows = [{"size": i, "label": i} for i in range(40)]
    task = load_task("regression", "mlp", rows, test=[{"size": "NA", "label": 1}, *rows])
    assert task.test.batch(torch.arange(1)).inputs.tolist() == [[pytest.approx(0.0, abs=1e-6)]]


def test_the_inputs_of_a_table_can_be_made_from_what_is_written_beside_its_model(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in generator.integers(0, 150, 600)]
    rows = pd.DataFrame({"x": generator.normal(size=600), "word": words, "few": ["a", "b", "c"] * 200})
    rows["label"] = generator.integers(0, 2, 600)
    rows.loc[5, "x"] = None
    task = load_task("classification", "mlp", {"train": rows, "validation": rows, "test": rows})
    assert task.save is not None
    task.save(tmp_path)
    kept = json.loads((tmp_path / "preprocessing.json").read_text())
    assert list(kept["infrequent"]) == ["word"]
    made = []
    for row in rows.to_dict("records"):
        inputs = [
            0.0 if math.isnan(row[n]) else (row[n] - mean) / scale for n, (mean, scale) in kept["numeric"].items()
        ]
        for name, known in kept["words"].items():
            inputs += [float(row[name] == word) for word in known]
            inputs += [float(row[name] in kept["infrequent"][name])] if name in kept["infrequent"] else []
        made.append(inputs)
    torch.testing.assert_close(torch.tensor(made), task.train.batch(torch.arange(600)).inputs)


class Looks(nn.Module):
    """Returns the same values for whatever it is given."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, inputs: Tensor) -> Tensor:
        return self.values[: len(inputs), None]


def test_a_module_of_ones_own_is_used_as_it_is() -> None:
    mine = cnn(1, 10)
    assert load_task("image-classification", mine, "digits", rows=100).model is mine
    with pytest.raises(BadInput, match="given as a module needs its tokenizer: give tokenizer="):
        load_task("text-classification", llama_tiny(outputs=3), "tweets", rows=60)


@pytest.mark.parametrize(
    ("task", "model", "data", "sentence"),
    [
        ("clasification", "mlp", "wine", "there is no task 'clasification': give one of text-classification, causal-"),
        ("classification", "cnn", "wine", "the model 'cnn' does not read tables: use mlp"),
        ("text-classification", "cnn", "tweets", "the model 'cnn' does not read text: use minilm"),
        ("image-classification", "minilm", "digits", "the model 'minilm' does not see images: use efficientnet-lite0"),
        (None, "mlp", [{"a": 1, "b": 2}] * 9, "the data has the columns a, b, which do not tell what mlp is for"),
        ("regression", "mlp", [{"a": 1, "label": "x"}] * 9, "must hold numbers"),
        (
            "classification",
            "mlp",
            [{"label": i % 2} for i in range(30)],
            "has no column to learn from beside the label",
        ),
    ],
)
def test_what_does_not_fit_is_refused(task: str | None, model: str, data: Any, sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_task(task, model, data)
    assert sentence in str(caught.value)


def test_importing_tasks_imports_no_heavy_library() -> None:
    heavy = "('transformers', 'datasets', 'pandas', 'sklearn', 'torchmetrics', 'PIL')"
    code = f"import sys, plait.tasks; sys.exit(','.join(n for n in {heavy} if n in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert done.returncode == 0


def test_a_first_batch_without_a_target_that_counts_is_said() -> None:
    data = (torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.full((8,), IGNORE))
    with pytest.warns(UserWarning, match="every target of the first batch is -100, which is left out"):
        plait.train(nn.Linear(4, 3), data, steps=2, batch_size=4)


def test_the_parts_of_the_objective_add_up_however_a_batch_is_split() -> None:
    x, y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    for pieces in (1, 4):
        torch.manual_seed(0)
        step = plait.train(
            nn.Linear(8, 3), (x, y), methods=[plait.L2(strength=0.1)], steps=1, accumulate=pieces
        ).history[0]
        assert step["loss"] + step["L2"] == pytest.approx(step["objective"], rel=1e-5)


def test_a_row_is_named_by_its_place_in_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("x,label\n" + "\n".join(f"{i},{i if i != 20 else ''}" for i in range(40)))
    with pytest.raises(BadInput, match="has no label in row 21"):
        load_task("regression", "mlp", str(path))


@pytest.mark.parametrize(
    ("name", "lines", "task", "options", "says"),
    [
        ("w.csv", ["x,y,label", *(f"{i},{i},{'ab'[i % 2]},9" for i in range(30))], "classification", {},
         "its rows have more fields than its header: name every column there"),
        ("l.jsonl", [json.dumps({"x": i, "label": ["a"]}) for i in range(30)], "classification", {},
         "has the label ['a']: a label is one text or number."),
        ("m.jsonl", [json.dumps({"messages": "hi"}) for _ in range(30)], "causal-language-modelling", {},
         "has the messages 'hi' in row "),
        ("e.jsonl", [json.dumps({"messages": PAIRED if i != 20 else []}) for i in range(30)],
         "causal-language-modelling", {}, "has the messages '[]' in row 21: give a list of one {role, content}"),
        ("s.jsonl", [json.dumps({"messages": PAIRED if i != 20 else PAIRED[1:]}) for i in range(30)],
         "causal-language-modelling", {}, "s.jsonl begins with the assistant: put before it what it answers to"),
        ("f.csv", ["x,label", *(f"{i},{'ab'[i % 2]}" for i in range(30))], "classification", {"features": ["x", "x"]},
         "features has 'x' 2 times: name each column once."),
        ("d.csv", ["x,label,label", *(f"{i},{'ab'[i % 2]},{'ab'[i % 2]}" for i in range(30))], "classification", {},
         "d.csv has more than one column 'label': give each a name of its own."),
        ("t.jsonl", [json.dumps({"text": "a" * 200 if i != 20 else ["a"]}) for i in range(30)],
         "causal-language-modelling", {},
         "t.jsonl has the text \"['a']\" in row 21, which is no text (list): write it out, or remove the row."),
        ("q.jsonl", [json.dumps({"question": "a", "answer": "b"})] * 30, "causal-language-modelling",
         {"prompt": "questn"}, "no column 'questn' (did you mean 'question'?): name the one to use with prompt=."),
        *(
            (f"c{number}.jsonl", [json.dumps({"messages": [PAIRED[0], odd]})] * 30, "causal-language-modelling", {},
             f"has the message {str(odd)!r} in row 1: give its role and its content as text.")
            for number, odd in enumerate(({"role": "assistant"}, {"content": "a"}, {"role": "assistant", "content": 5}))
        ),
    ],
)  # fmt: skip
def test_odd_tables_are_refused_in_one_sentence(
    name: str, lines: list[str], task: str, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text("\n".join(lines))
    with pytest.raises(BadInput) as caught:
        load_task(task, "llama-tiny" if "language" in task else "mlp", str(path), **options)
    assert says in str(caught.value)
