"""How well a model does on a set, by torchmetrics and scikit-learn; model and random state are left as found."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plait.batch import Batch, weighted_sum
from plait.method import Misfit, Now, Predictor
from plait.tasks.base import Data, Metrics

Call = Callable[[nn.Module, Any], Any]


@contextlib.contextmanager
def judging(model: nn.Module) -> Iterator[torch.device]:
    """Put a model in evaluation mode, without gradients; then give back every module's mode and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield device
    finally:
        for module, mode in modes:
            module.training = mode


def batches(data: Data, size: int, device: torch.device) -> Iterator[Batch]:
    """Yield the examples of a set in batches, those of like length together, which wastes least on padding."""
    lengths: Tensor | None = getattr(data, "lengths", None)
    order = torch.arange(len(data)) if lengths is None else torch.argsort(lengths, stable=True)
    for rows in torch.split(order, size):
        yield data.batch(rows).to(device)


def classification(call: Call, misfit: Misfit, classes: int, size: int = 64) -> Metrics:
    """Return metrics of a classifier: loss, accuracy, macro_f1, calibration_error (15 bins, L1)."""

    def metrics(model: nn.Module, data: Data, predictor: Predictor | None = None) -> dict[str, float]:
        from torchmetrics.functional import classification as measure

        total, mass, probabilities, targets, now = 0.0, 0.0, [], [], Now(call=call)
        with judging(model) as device:
            for batch in batches(data, size, device):
                now.batch = batch
                if predictor is None:
                    output = call(model, batch.inputs)
                    loss, likely = misfit(output, batch.target, now), torch.softmax(output.float(), -1)
                else:
                    likely = predictor(model, batch.inputs, now).float()
                    chosen = likely.gather(-1, batch.target[:, None]).squeeze(-1)
                    loss = -chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log()
                total, mass = total + float(weighted_sum(loss, batch.weight)), mass + float(batch.mass())
                probabilities.append(likely.cpu())
                targets.append(batch.target.cpu())
        given: tuple[Tensor, Tensor, int] = (torch.cat(probabilities), torch.cat(targets), classes)
        return {
            "loss": total / mass,
            "accuracy": float(measure.multiclass_accuracy(*given, average="micro")),
            "macro_f1": float(measure.multiclass_f1_score(*given, average="macro")),
            "calibration_error": float(measure.multiclass_calibration_error(*given, n_bins=15, norm="l1")),
        }

    return metrics


def language(call: Call, misfit: Misfit, size: int = 8) -> Metrics:
    """Return metrics of a language model: loss, the mean over the tokens that count, and perplexity = exp(loss)."""

    def metrics(model: nn.Module, data: Data, predictor: Predictor | None = None) -> dict[str, float]:
        total, mass, now = 0.0, 0.0, Now(call=call)
        with judging(model) as device:
            for batch in batches(data, size, device):
                now.batch = batch
                if predictor is None:
                    loss = misfit(call(model, batch.inputs), batch.target, now)
                else:
                    likely = predictor(model, batch.inputs, now).float()
                    loss = misfit(likely.clamp_min(torch.finfo(likely.dtype).tiny).log(), batch.target, now)
                total, mass = total + float(weighted_sum(loss, batch.weight)), mass + float(batch.mass())
        loss_per_token = total / mass
        return {"loss": loss_per_token, "perplexity": math.exp(min(loss_per_token, 700.0))}

    return metrics


def regression(call: Call, misfit: Misfit, centre: float, scale: float, size: int = 256) -> Metrics:
    """Return metrics of a regression: loss on the standardized target; mae, rmse and r2 in the target's own units."""

    def metrics(model: nn.Module, data: Data, predictor: Predictor | None = None) -> dict[str, float]:
        import numpy
        from sklearn import metrics as measure

        total, mass, values, targets, now = 0.0, 0.0, [], [], Now(call=call)
        with judging(model) as device:
            for batch in batches(data, size, device):
                now.batch = batch
                output = call(model, batch.inputs) if predictor is None else predictor(model, batch.inputs, now)
                loss = misfit(output, batch.target, now)
                total, mass = total + float(weighted_sum(loss, batch.weight)), mass + float(batch.mass())
                values.append(output.reshape(batch.target.shape).double().cpu() * scale + centre)
                targets.append(batch.target.double().cpu() * scale + centre)
        truth, guess = torch.cat(targets).numpy(), torch.cat(values).numpy()
        if not numpy.isfinite(guess).all():
            return {"loss": math.nan, "mae": math.nan, "rmse": math.nan, "r2": math.nan}
        return {
            "loss": total / mass,
            "mae": float(measure.mean_absolute_error(truth, guess)),
            "rmse": float(measure.root_mean_squared_error(truth, guess)),
            "r2": float(measure.r2_score(truth, guess)) if len(truth) > 1 else math.nan,
        }

    return metrics
