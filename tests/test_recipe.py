"""Recipes read back equal, cannot run code, and are refused in one sentence when they cannot work."""

import dataclasses
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml
from torch import Tensor, nn

from plait import BadInput, Cosine, LoRA, Method, PiSSA, Recipe, method, tsla
from plait.recipe import check
from plait.yaml import dump, load

BASE = "model: mlp\ndata: wine\n"
METHODS = BASE + "methods:\n"
SAFE = "write plain values."

BAD_TEXTS = {
    # what YAML may not hold
    METHODS + "- !!python/object/apply:os.system ['true']": (
        "the recipe, line 4: tags such as 'tag:yaml.org,2002:python/object/apply:os.system' are refused; " + SAFE
    ),
    METHODS + "- !lora {rank: 8}": f"the recipe, line 4: tags such as '!lora' are refused; {SAFE}",
    METHODS + "- &a lora\n- *a": "the recipe, line 4: references (& and *) are refused; write the value out.",
    METHODS + "- [lora": ("the recipe, line 4: this is not YAML (expected ',' or ']', but got '<stream end>')."),
    BASE + "model: cnn": "the recipe, line 3: 'model' stands twice; remove one.",
    METHODS + "- lora: {rank: 8, rank: 4}": "the recipe, line 4: 'rank' stands twice; remove one.",
    METHODS + "- {[lora]: 8}": "the recipe, line 4: a key is a list or mapping; write a name.",
    # the recipe's own lines
    "- lora": "the recipe must be a mapping of lines such as 'model: minilm', not ['lora'].",
    "data: wine": "the recipe names no model: add a line such as 'model: minilm'.",
    "model: mlp": "the recipe names no data: add a line such as 'data: tweets'.",
    BASE + "metods: [lora]": "the recipe has no option 'metods' (did you mean 'methods'?).",
    BASE + "name: a/b": "name must be usable as the name of a folder, not 'a/b'.",
    BASE + 'name: "a\\0b"': "name must be usable as the name of a folder, not 'a\\x00b'.",
    BASE + "seed: -1": "seed must be a whole number of at least 0 and at most 4294967295, not -1.",
    BASE + "seed: true": "seed must be a whole number of at least 0 and at most 4294967295, not True.",
    BASE + "train: {step: 5}": "train has no option 'step' (did you mean 'steps'?).",
    BASE + "train: [5]": "train must be a mapping of options, not [5].",
    BASE + "train: {steps: 0}": "train.steps must be a whole number of at least 1, not 0.",
    BASE + "train: {steps: many}": "train.steps must be a whole number of at least 1, not 'many'.",
    BASE + "train: {batch_size: 2.5}": "train.batch_size must be a whole number of at least 1, not 2.5.",
    BASE + "train: {precision: int4}": "train.precision must be one of float32, bfloat16, float16, not 'int4'.",
    BASE + "train: {sharding: zero3}": "train.sharding must be one of none, fsdp, not 'zero3'.",
    BASE + "train: {nonfinite: ignore}": "train.nonfinite must be one of stop, skip, not 'ignore'.",
    BASE + "train: {compile: 1}": "train.compile must be true or false, not 1.",
    "model: mlp\ndata: 3": "data must be a mapping of options, not 3.",
    "model: mlp\ndata: {source: wine, row: 5}": "data has no option 'row' (did you mean 'rows'?).",
    "model: mlp\ndata: {source: wine, rows: 1}": "data.rows must be a whole number of at least 2, not 1.",
    "model: mlp\ndata: {source: wine, test: 0.7}": (
        "data.test must be a share between 0 and 0.5, or a source of data, not 0.7."
    ),
    "model: mlp\ndata: {source: wine, features: ash}": "data.features must be a list of names, not 'ash'.",
    # how methods are written
    BASE + "methods: {lora: {rank: 8}}": ("methods must be a list, with one method a line: '- lora: {rank: 8}'."),
    METHODS + "- 3": "a method is written as '- lora' or '- lora: {rank: 8}', not 3.",
    METHODS + "- {lora: {rank: 8}, pissa: {}}": (
        "a method is written as '- lora' or '- lora: {rank: 8}', not {'lora': {'rank': 8}, 'pissa': {}}."
    ),
    METHODS + "- lora: 8": "the fields of 'lora' are written as '- lora: {field: value}', not 8.",
    METHODS + "- pisa": "there is no method 'pisa' (did you mean 'pissa'?): `plait list` shows them all.",
    METHODS + "- os.system": "there is no method 'os.system': `plait list` shows them all.",
    # their fields
    METHODS + "- lora: {rnk: 8}": "LoRA has no field 'rnk' (did you mean 'rank'?).",
    METHODS + "- lora: {rank: 0}": "LoRA.rank must be at least 1, not 0.",
    METHODS + "- lora: {rank: big}": "LoRA.rank must be a whole number, not 'big'.",
    METHODS + "- lora: {where: [q, v]}": "LoRA.where must be a text, not ['q', 'v']: join the names, as in 'q|v'.",
    METHODS + "- lora: {where: 3}": "LoRA.where must be a text, not 3.",
    METHODS + "- lora: {rank: true}": "LoRA.rank must be a number, not True.",
    METHODS + "- adamw: {lr: true}": "AdamW.lr must be a number, not True.",
    METHODS + "- lamb: {norm_range: [5, 1]}": "LAMB.norm_range must be a smaller number and a larger one, not [5, 1].",
    METHODS + "- nm-mask: {n: 4, m: 2}": "NMMask keeps n of m weights: n must be below m, not 4 of 2.",
    METHODS + "- adamw: {betas: 0.9}": "AdamW.betas must be a list such as [0.9, 0.999], not 0.9.",
    METHODS + "- adamw: {lr: {cosine: {peak: 1, warmup: 100}}}": (
        "AdamW.lr: the warmup of the schedule 'cosine' is a part of the run, in [0, 1], not 100."
    ),
    METHODS + "- lora: {alpha: -1}": "LoRA.alpha must be greater than 0, not -1.",
    METHODS + "- lora: {scaling: odd}": "LoRA.scaling must be 'standard' or 'rank-stabilized', not 'odd'.",
    METHODS + "- adamw: {lr: 0}": "AdamW.lr must be greater than 0, not 0.",
    METHODS + "- adamw: {lr: .nan}": "AdamW.lr must be greater than 0, not nan.",
    METHODS + "- adamw: {lr: {cosin: {peak: 1}}}": ("AdamW.lr: there is no schedule 'cosin' (did you mean 'cosine'?)."),
    METHODS + "- adamw: {lr: {cosine: {peek: 1}}}": (
        "AdamW.lr: the schedule 'cosine' has no field 'peek' (did you mean 'peak'?)."
    ),
    METHODS + "- adamw: {lr: {cosine: {peak: high}}}": (
        "AdamW.lr: the schedule 'cosine' needs a number for 'peak', not 'high'."
    ),
    METHODS + "- adamw: {lr: {linear: {start: 1}}}": (
        "AdamW.lr: the schedule 'linear' needs its fields: start, end, begin, until."
    ),
    METHODS + "- adamw: {lr: {linear: {start: 1, end: -1}}}": (
        "AdamW.lr must be greater than 0, not {'linear': {'start': 1, 'end': -1}}."
    ),
    METHODS + "- label-smoothing: {smoothing: 2}": "LabelSmoothing.smoothing must be in [0, 1], not 2.",
    METHODS + "- tsla: {smothing: 0.1}": "tsla has no field 'smothing' (did you mean 'smoothing'?).",
    METHODS + "- intruder-dims: {top: 0}": "IntruderDimensions.top must be at least 1, not 0.",
}


@pytest.mark.parametrize(("text", "sentence"), BAD_TEXTS.items(), ids=[s[:60] for s in BAD_TEXTS.values()])
def test_a_bad_recipe_is_refused_when_it_is_read(text: str, sentence: str) -> None:
    with pytest.raises(BadInput) as problem:
        Recipe.parse(text)
    assert str(problem.value) == sentence


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.head = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(inputs).relu())))


BAD_LISTS: list[tuple[list[object], str]] = [
    (
        [{"lora": {"train": "nrom"}}],
        "LoRA.train='nrom' matches no weight of Net (did you mean 'norm'?): change it, or drop it.",
    ),
    # order, partners
    (["pissa"], "PiSSA starts LoRA adapters, but the model has none: put a method that adds them before it."),
    (["lora-ga"], "LoRAGA starts LoRA adapters, but the model has none: put a method that adds them before it."),
    (["pissa", "lora"], "PiSSA starts the adapters that LoRA adds: put PiSSA after LoRA."),
    (["lora", "pissa", "eva"], "PiSSA and EVA start the same adapters: keep one, or part them by where."),
    (["lora-pro"], "LoRAPro changes the gradients of low-rank adapters: put one such as LoRA before it."),
    (["model-soups"], "ModelSoup has no members: name the other models' files in members."),
    (["fisher-merge"], "FisherMerge has no members: name the other models' files in members."),
    (["fold"], "Fold finds no adapter to fold: add one such as LoRA, or drop Fold."),
    # twice
    (["adamw", "lion"], "AdamW and Lion are both optimizers: keep one."),
    (["adamw", {"adamw": {"lr": 0.1}}], "AdamW and AdamW are both optimizers: keep one."),
    (["lora", "lora"], "LoRA() stands twice in the list: remove one."),
    # targets
    (
        [{"lora": {"where": "frist"}}],
        "LoRA(where='frist') matches no layer and no weight of Net (did you mean 'first'?).",
    ),
    ([{"sam": {"where": "hed"}}], "SAM(where='hed') matches no layer and no weight of Net (did you mean 'head'?)."),
    (
        [{"lora": {"where": "("}}],
        "LoRA.where is no regular expression (missing ), unterminated subpattern at position 0): '('.",
    ),
    (
        [{"intruder-dims": {"where": "norm"}}],
        "IntruderDimensions is not defined for the LayerNorm 'norm': name layers such as first, head, second in where.",
    ),
    ([{"lora": {"rank": 9}}], "LoRA.rank is 9, but 'first' has a (8, 8) weight: use at most 8."),
    (["galore"], "GaLore(rank=128) finds no matrix that is larger than its rank: use a rank below 8."),
    (["early-dropout"], "EarlyDropout finds no dropout in the model: name in where the layers to drop from."),
    (["tlm"], "TLM(where='.*') matches no attention of transformers: drop it, or where."),
    # what would do nothing
    ([{"maxsup": {"strength": 0}}], "MaxSup does nothing while strength is 0: change it, or drop MaxSup."),
    (
        [{"maxsup": {"strength": {"linear": {"start": 0, "end": 0}}}}],
        "MaxSup does nothing while strength is 0: change it, or drop MaxSup.",
    ),
    ([{"l2": {"strength": 0}}], "L2 does nothing while strength is 0: change it, or drop L2."),
    ([{"elr": {"strength": 0}}], "ELR does nothing while strength is 0: change it, or drop ELR."),
    (
        [{"label-smoothing": {"smoothing": 0}}],
        "LabelSmoothing does nothing while smoothing is 0: change it, or drop LabelSmoothing.",
    ),
    (
        [{"gradient-noise": {"variance": 0}}],
        "GradientNoise does nothing while variance is 0: change it, or drop GradientNoise.",
    ),
    ([{"mixout": {"p": 0}}], "Mixout does nothing while p is 0: change it, or drop Mixout."),
    ([{"amp": {"radius": 0}}], "AMP does nothing while radius is 0: change it, or drop AMP."),
    ([{"gam": {"radius": 0}}], "GAM does nothing while radius is 0: change it, or drop GAM."),
    (
        [{"smart": {"strength": 0, "proximal": 0}}],
        "SMART does nothing while strength and proximal are 0: change one, or drop SMART.",
    ),
    ([{"sam": {"radius": 0}}], "SAM does nothing while radius is 0: change it, or drop SAM."),
    ([{"ps-kd": {"alpha": 0}}], "PSKD does nothing while alpha is 0: change it, or drop PSKD."),
    ([{"el2n-grand": {"keep": 1}}], "DataDiet does nothing while keep is 1: change it, or drop DataDiet."),
    (
        [{"gmt": {"keep": 1}}],
        "GradientMaskTuning does nothing while keep is 1: change it, or drop GradientMaskTuning.",
    ),
]


@pytest.mark.parametrize(("lines", "sentence"), BAD_LISTS, ids=[f"{n} {s[:50]}" for n, (_, s) in enumerate(BAD_LISTS)])
def test_methods_that_cannot_work_are_refused_before_training(lines: list[object], sentence: str) -> None:
    recipe = Recipe(model="mlp", data="wine", methods=lines)
    with pytest.raises(BadInput) as problem:
        recipe.check(Net())
    assert str(problem.value) == sentence


@method
class Nothing(Method):
    pass


@method
class First(Method):
    def constrain(self, model: nn.Module, now: object) -> None:
        pass


@method
class Third(Method):
    def constrain(self, model: nn.Module, now: object) -> None:
        pass


@method
class Second(Method):
    after = ("First",)
    excludes = ("Third",)

    def constrain(self, model: nn.Module, now: object) -> None:
        pass


BAD_OBJECTS: list[tuple[list[object], str]] = [
    ([Second()], "Second builds on First: add one before Second."),
    ([Second(), First()], "Second builds on First: put it before Second."),
    ([First(), Second(), Third()], "Third and Second exclude each other: remove one."),
    ([Nothing()], "Nothing acts at no place: override one, such as penalty, or drop it."),
    ([LoRA], "LoRA is a class: write LoRA()."),
    (["lora"], "'lora' is no method: give methods such as LoRA(rank=8), a function's list unpacked."),
    (
        [tsla()],
        f"{tsla()!r} is no method: give methods such as LoRA(rank=8), a function's list unpacked.",
    ),
]


@pytest.mark.parametrize(("methods", "sentence"), BAD_OBJECTS, ids=[s[:50] for _, s in BAD_OBJECTS])
def test_methods_from_python_are_refused_alike(methods: list[Method], sentence: str) -> None:
    with pytest.raises(BadInput) as problem:
        check(methods, Net())
    assert str(problem.value) == sentence


@pytest.mark.parametrize("lines", [[], ["adamw"], ["maxsup"]])
def test_a_frozen_model_without_an_adapter_trains_nothing(lines: list[object]) -> None:
    model = Net().requires_grad_(False)
    with pytest.raises(BadInput, match=r"^nothing is trained: every parameter of the model is frozen; add an adapter"):
        Recipe(model="mlp", data="wine", methods=lines).check(model)
    Recipe(model="mlp", data="wine", methods=["lora", *lines]).check(model)


def test_every_sentence_is_one() -> None:
    sentences = [*BAD_TEXTS.values(), *(s for _, s in [*BAD_LISTS, *BAD_OBJECTS])]
    assert len(sentences) >= 40
    for sentence in sentences:
        assert "\n" not in sentence
        assert sentence.endswith((".", "?"))


# -- reading and writing -------------------------------------------------------------------------------------------
WHOLE = Recipe(
    name="everything",
    model="minilm",
    data={"source": "tweets", "rows": 500, "other": "spam", "test": 0.2, "features": ["a", "b"]},
    task="text-classification",
    seed=3,
    train={"steps": 7, "batch_size": 4, "precision": "bfloat16", "compile": True},
    methods=[
        {"LoRA": {"rank": 4, "where": "query|value"}},
        "PiSSA",
        {"adamw": {"lr": {"cosine": {"peak": 1e-5, "warmup": 0.1}}, "betas": [0.9, 0.99]}},
    ],
)


def test_a_recipe_reads_back_equal(tmp_path: Path) -> None:
    assert Recipe.parse(str(WHOLE)) == WHOLE
    WHOLE.write(tmp_path / "r.yaml")
    assert Recipe.read(tmp_path / "r.yaml") == WHOLE
    assert hash(Recipe.parse(str(WHOLE))) == hash(WHOLE)
    assert yaml.safe_load(str(WHOLE))["data"]["rows"] == 500


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        WHOLE.seed = 4  # type: ignore[misc]


def test_methods_can_be_given_as_values() -> None:
    given = Recipe(model="m", data="d", methods=[LoRA(rank=4), PiSSA(), "tsla"])
    assert given == Recipe(model="m", data="d", methods=[{"lora": {"rank": 4}}, "pissa", "tsla"])
    assert given.build()[:2] == [LoRA(rank=4), PiSSA()]
    assert given.build()[2:] == tsla()


def test_schedules_read_back_equal() -> None:
    text = METHODS + "- maxsup: {strength: {cosine: {peak: 1e-3, warmup: 0.1}}}"
    (made,) = Recipe.parse(text).build()
    assert made.strength == Cosine(peak=1e-3, warmup=0.1)
    assert Recipe(model="mlp", data="wine", methods=[made]).build() == [made]


def test_the_name_of_a_file_is_the_name_of_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "lora-8.yaml").write_text(BASE)
    assert Recipe.read(tmp_path / "lora-8.yaml").name == "lora-8"


@pytest.mark.parametrize("name", ["1e-3", "1e5", "-2E+4", "3.e8", "1_000", "0o7", "0x1F", "yes", "null", "2024-01-01"])
def test_text_that_looks_like_a_value_stays_text(name: str, tmp_path: Path) -> None:
    """A file may be called 1e-3.yaml; what a run keeps of it must read back."""
    (tmp_path / f"{name}.yaml").write_text(BASE)
    made = Recipe.read(tmp_path / f"{name}.yaml")
    assert made.name == name
    assert Recipe.parse(str(made)) == made
    assert load(dump({name: [name, 1e-3]}), "values") == {name: [name, 1e-3]}


def test_every_line_of_a_recipe_is_kept() -> None:
    text = (
        "name: all\nmodel: mlp\ndata: {source: wine, rows: 90}\ntask: classification\nseed: 3\nfolded: true\n"
        "validate_every: 4\ntrain: {steps: 5}\nmethods: [l2]"
    )
    made = Recipe.parse(text)
    assert all(getattr(made, f.name) != f.default for f in dataclasses.fields(made))
    assert Recipe.parse(str(made)) == made
    assert made.with_("seed=4").validate_every == 4


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.steps=50", lambda r: r.train.steps == 50),
        ("data.rows=9", lambda r: r.data.rows == 9 and r.data.source == "wine"),
        ("seed=7", lambda r: r.seed == 7),
        ("model=cnn", lambda r: r.model == "cnn"),
        ("methods.lora.rank=4", lambda r: r.build()[0].rank == 4),
        ("methods.LoRA.rank=4", lambda r: r.build()[0].rank == 4),
        ("methods.0.where=.*head", lambda r: r.build()[0].where == ".*head"),
        ("methods.adamw.lr.cosine.peak=1e-4", lambda r: r.build()[1].lr.peak == 1e-4),
        ("methods.adamw.lr=2e-3", lambda r: r.build()[1].lr == 2e-3),
        ("methods.1.weight_decay=0.5", lambda r: r.build()[1].weight_decay == 0.5),
    ],
)
def test_overrides(override: str, read: object) -> None:
    text = METHODS + "- lora: {rank: 8}\n- adamw: {lr: {cosine: {peak: 0.1}}}"
    assert read(Recipe.parse(text, [override]))
    assert read(Recipe.parse(text).with_(override))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps", "--set takes path=value, as in train.steps=50, not 'steps'."),
        ("=4", "--set takes path=value, as in train.steps=50, not '=4'."),
        ("train.step=4", "train has no option 'step' (did you mean 'steps'?)."),
        ("methods.lra.rank=4", "--set methods.lra.rank: the recipe has no method 'lra' (did you mean 'lora'?)."),
        ("model.size=4", "--set model.size: 'model' is 'mlp', which has nothing inside."),
        ("methods.lora.rank=[", "--set methods.lora.rank, line 1: this is not YAML (expected the node "
         "content, but found '<stream end>')."),
    ],
)  # fmt: skip
def test_bad_overrides(override: str, sentence: str) -> None:
    with pytest.raises(BadInput) as problem:
        Recipe.parse(METHODS + "- lora", [override])
    assert str(problem.value) == sentence


def test_an_override_of_a_method_that_is_written_as_a_list_is_refused() -> None:
    with pytest.raises(BadInput, match=r"the method \['adamw', \{'lr': 0.001\}\] is written as \{name: \{field: value"):
        Recipe.parse(METHODS + "- [adamw, {lr: 1e-3}]", ["methods.adamw.lr=0.1"])


def test_a_missing_file_and_bad_utf8(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^there is no recipe '.*nope\.yaml': give the path of a YAML file\.$"):
        Recipe.read(tmp_path / "nope.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(BadInput, match=r"cannot be read .*: give a YAML file in UTF-8\.$"):
        Recipe.read(tmp_path / "latin.yaml")


# -- trust ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "attack",
    [
        "methods: [!!python/object/apply:os.system ['touch {mark}']]",
        "methods: !!python/object/new:subprocess.Popen [[touch, '{mark}']]",
        "name: !!python/name:os.system",
        "methods: [{{os.system: {{command: 'touch {mark}'}}}}]",
        "methods: [{{subprocess.run: {{args: [touch, '{mark}']}}}}]",
        "methods: [\"__import__('os').system('touch {mark}')\"]",
        "methods: [{{lora: {{rank: \"__import__('os').system('touch {mark}')\"}}}}]",
        "methods: [{{lora: {{__class__: object}}}}]",
        "methods: [{{adamw: {{lr: {{os.system: {{command: 'touch {mark}'}}}}}}}}]",
        "methods: [{{tsla: {{__globals__: 1}}}}]",
        "methods: [plait.cli.main]",
        "methods: [sns]",
        "methods: [lora-forgets]",
    ],
)
def test_an_untrusted_recipe_cannot_run_code(attack: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "r.yaml").write_text(BASE + attack.format(mark=mark))
    with pytest.raises(BadInput):
        Recipe.read(tmp_path / "r.yaml")
    assert not mark.exists()


def test_a_bomb_of_references_is_refused() -> None:
    with pytest.raises(BadInput, match="references"):
        Recipe.parse("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(BadInput, match="nested more than 20 deep"):
        Recipe.parse(BASE + "methods: " + "[" * 20000 + "]" * 20000)


@pytest.mark.parametrize(
    ("methods", "told"),
    [("", "None"), ("methods: lora\n", "'lora'"), ("methods:\n- {}\n", "[{}]")],
)
def test_an_override_of_methods_that_are_no_list(methods: str, told: str) -> None:
    with pytest.raises(BadInput) as problem:
        Recipe.parse("model: mlp\ndata: wine\n" + methods, ["methods.lora.rank=4"])
    assert str(problem.value) == (
        f"--set methods.lora.rank: methods is {told}, no list of methods: write them in the recipe."
    )
