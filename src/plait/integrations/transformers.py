"""plait's methods inside transformers' Trainer: `Trainer(..., methods=[LoRA(rank=8), PiSSA(), MaxSup()])`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from plait.batch import IGNORE, Batch, weighted_sum
from plait.engine import Engine, check, optimizer_for, prepared, rows_of_batch
from plait.errors import BadInput
from plait.layers import evaluating
from plait.loss.base import cross_entropy, squared_error
from plait.math.logits import dense
from plait.measure.base import observe
from plait.method import Ask, Method, Now
from plait.rates import multiply_rates
from plait.tensors import read_tensors, write_tensors
from plait.train import oracle

MEMORY = "plait-memory.safetensors"
SEVERAL = "multi_label_classification"
UNSHIFTED = ("XLNetLMHeadModel", "XLMWithLMHeadModel")
"""Language models whose labels stand at the place of their token already."""


@dataclass(frozen=True)
class MicroBatches(Batch):
    """A batch that arrives in parts of different lengths, as the Trainer collates them."""

    parts: tuple[Batch, ...] = ()

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> MicroBatches:
        """Return the parts as one batch; index and weight run over all of them, inputs stay apart."""
        index, weight = torch.cat([p.index for p in parts]), torch.cat([p.weight for p in parts])
        return cls([p.inputs for p in parts], index, index, weight, tuple(parts))

    def split(self, parts: int) -> Iterator[Batch]:
        """Yield the parts as they came."""
        yield from self.parts

    def mass(self) -> Tensor:
        """Return the mass of all parts."""
        return torch.stack([part.mass() for part in self.parts]).sum()


def predicts_next(model: nn.Module) -> bool:
    """Say whether a model's class shifts its labels, so that each token predicts the one after it."""
    name = type(model).__name__
    return name not in UNSHIFTED and ("ForCausalLM" in name or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def untied(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model, with a copy of each tensor that methods let layers share: transformers saves no ties
    but those of its own.
    """
    state, seen = model.state_dict(), set()
    own = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in state.items():
        if tensor.data_ptr() in seen and name not in own:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return state


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer that takes `methods`, each acting at its place; everything else is as it was.

    A batch's labels are the targets. For a causal language model they are shifted here, once; the loss is the one that
    the model would take of them. Gradient accumulation gives exactly the gradient of the whole batch, also for methods
    that ask the gradient oracle several times.

    Raises BadInput, before any training, for methods that cannot work on this model or together.
    """

    def __init__(self, model: nn.Module, *rest: Any, methods: Sequence[Method] = (), **options: Any) -> None:
        check(model, methods)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise BadInput(
                f"{type(model).__name__} has an encoder and a decoder, which plait's Trainer cannot feed: use another."
            )
        self.methods = list(methods)
        for m in self.methods:
            m.parametrize(model)
        self.now = Now()
        self.measures: dict[str, list[dict[str, Any]]] = {}
        self._starts: list[Callable[[nn.Module, Now], None]] = [m.initialize for m in self.methods]
        self._forwards: list[Callable[[nn.Module, Now], None]] = [m.forward for m in self.methods]
        self._held: list[Batch] = []
        self._seen = 0
        super().__init__(model, *rest, **options)
        for m in self.methods:
            if type(m).examples is not Method.examples or type(m).batch_size is not Method.batch_size:
                raise BadInput(
                    f"{type(m).__name__} chooses examples, which the Trainer does itself: use plait.train for it."
                )
            if m.remembers:
                raise BadInput(
                    f"{type(m).__name__} remembers each example, and the Trainer does not say which a batch holds: "
                    "use plait.train for it."
                )
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            what = "label_smoothing_factor" if self.args.label_smoothing_factor else "compute_loss_func"
            raise BadInput(
                f"{what} would replace the loss that methods change: leave it out, and give a method of the loss such "
                "as LabelSmoothing."
            )
        if self.args.max_grad_norm and any(type(m).gradient is not Method.gradient for m in self.methods):
            self.args.max_grad_norm = 0.0  # a Clip method says where among the others clipping happens
        self.add_callback(_Constrain(self))

    # -- what stands before the first step ---------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer of the recipe's step method, or the Trainer's own if there is none."""
        if any(type(m).optimizer is not Method.optimizer for m in self.methods):
            self.optimizer = optimizer_for(self.methods, self.model)
            return self.optimizer
        made: torch.optim.Optimizer = super().create_optimizer()
        multiply_rates(made, self.methods, self.model)
        return made

    def _inner_training_loop(self, *positional: Any, **named: Any) -> Any:
        resumed = named.get("resume_from_checkpoint") or (positional[2] if len(positional) > 2 else None)
        if size := named.get("batch_size", positional[0] if positional else None):
            self._train_batch_size = size  # for the starts too, after a larger batch took too much memory
        self._begin(resumed)
        result = super()._inner_training_loop(*positional, **named)
        observe(self.model, self.methods, self.now, self.measures)
        return result

    def _begin(self, resumed: str | None) -> None:
        engine = self.engine = Engine(seed=self.args.seed, accelerator=self.accelerator, methods=self.methods)
        now = self.now
        now.call = engine.call
        now.generator = torch.Generator().manual_seed(self.args.seed)
        now.calibration = self._calibration
        if self.eval_dataset is not None:
            now.evaluate, now.validate = self._evaluated, self._validated
        now.misfit = self._misfit
        for m in self.methods:
            now.misfit = m.loss(now.misfit)
        ask: Ask = oracle(engine, now.misfit, self.methods, 1)
        now.ask = ask
        if resumed is None:
            self._once(self._starts)
        elif (Path(resumed) / MEMORY).exists():
            for name, tensor in read_tensors(Path(resumed) / MEMORY).items():
                method, _, key = name.partition("\n")
                now.memory.setdefault(method, {})[key] = tensor
            now.generator.set_state(now.memory.pop("generator")["state"])
        self._starts.clear()
        self._once(self._forwards)
        for m in self.methods:
            ask = m.gradient(ask)
        self._ask = ask

    def _once(self, places: list[Callable[[nn.Module, Now], None]]) -> None:
        """Run what no later `train()` runs again, nor one that begins anew with a smaller batch: they go on."""
        while places:
            places[0](self.model, self.now)
            places.pop(0)

    @torch.no_grad()
    def _evaluated(self, model: nn.Module) -> float:
        """Return the mean misfit of a model, the one that is trained or a copy, on the evaluation set."""
        sums = torch.zeros(2, dtype=torch.float64)
        with evaluating(model):
            for inputs in self.get_eval_dataloader():
                batch = self._batch(inputs)
                misfit = self._misfit(self.now.call(model, batch.inputs), batch.target, self.now)
                sums += torch.stack([weighted_sum(misfit, batch.weight), batch.mass()]).double().cpu()
        total, mass = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()
        return float(total / max(mass, 1e-12))

    def _validated(self, model: nn.Module, number: int | None) -> Tensor:
        """Return the mean misfit of a model on one batch of the evaluation set, or on all, to be differentiated."""
        loader = self.get_eval_dataloader()
        order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(self.args.seed))
        rows = rows_of_batch(order, number, self.args.eval_batch_size)
        batch = self._batch(loader.collate_fn([loader.dataset[int(row)] for row in rows]))
        with evaluating(model):
            misfit = self._misfit(self.now.call(model, batch.inputs), batch.target, self.now)
        mean: Tensor = weighted_sum(misfit, batch.weight) / batch.mass().clamp_min(1e-12)
        return mean

    def _calibration(self, count: int) -> Iterator[Batch]:
        with torch.random.fork_rng(devices=[]):
            loader = self.get_train_dataloader()
            for number, inputs in enumerate(loader):
                if number == count:
                    return
                yield self._batch(inputs)

    def _batch(self, inputs: dict[str, Any]) -> Batch:
        inputs = dict(self._prepare_inputs(inputs))
        if "labels" not in inputs:
            raise BadInput("the batches have no 'labels', which are the targets: add them in the data or the collator.")
        labels = inputs.pop("labels")
        if labels.dim() == 2 and predicts_next(self.accelerator.unwrap_model(self.model)):
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1)
        index = torch.arange(self._seen, self._seen + len(labels), device=labels.device)
        return Batch.of(inputs, labels, index)

    def _misfit(self, output: Any, target: Tensor, now: Now) -> Tensor:
        """Return the misfit that transformers would take: of numbers, of one class, or of several classes at once."""
        output = output.get("logits", output) if isinstance(output, Mapping) else output
        kind = getattr(getattr(self.model, "config", None), "problem_type", None)
        tokens = target.dim() > 1 and not target.is_floating_point()
        if kind == "single_label_classification" or (kind is None and tokens):
            return cross_entropy(output, target, now)
        logits: Tensor = dense(output)
        if kind is None and logits.dim() == 2:
            kind = "regression" if logits.shape[-1] == 1 else SEVERAL if target.is_floating_point() else None
        if kind == "regression":
            squares = squared_error(logits, target.to(logits.dtype), now)
            return squares / max(logits[0].numel(), 1)
        if kind == SEVERAL:
            each: Tensor = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
            return each.mean(-1)
        return cross_entropy(output, target, now)

    # -- the step ----------------------------------------------------------------------------------------------------
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Hold micro-batches back until the batch is whole, then ask for its gradient."""
        batch = self._batch(inputs)
        self._seen += len(batch)
        self._held.append(batch)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=batch.weight.device)
        now, held, self._held = self.now, self._held, []
        now.step, now.steps, now.epoch = self.state.global_step, self.state.max_steps, int(self.state.epoch or 0)
        with prepared(model, getattr(self.optimizer, "optimizer", self.optimizer), self.methods, now):
            changed = []
            for part in held:
                for m in self.methods:
                    part = m.batch(part, now)
                changed.append(part)
            now.batch = MicroBatches.join(changed) if len(changed) > 1 else changed[0]
            now.objective = self._ask(model, now)
        return now.objective

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the plain mean misfit, for evaluation."""
        batch = self._batch(inputs)
        outputs = model(**batch.inputs)
        loss = self._misfit(outputs, batch.target, self.now).sum() / batch.mass().clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    # -- what stands after -------------------------------------------------------------------------------------------
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, untied(self.model) if state_dict is None else state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        memory = {f"{name}\n{key}": t for name, held in self.now.memory.items() for key, t in held.items()}
        if self.args.should_save:
            write_tensors(folder / MEMORY, memory | {"generator\nstate": self.now.generator.get_state()})

    def finish(self) -> nn.Module:
        """Apply what the methods do after training (fold, prune, merge) and return the plain model.

        A model with soft prompts, or with adapters that act on outputs (Compacter), keeps them and its other adapters:
        no weight can hold them.
        """
        from plait.parametrize.base import stack
        from plait.parametrize.folding import fold
        from plait.parametrize.prompt import soft_prompts

        model: nn.Module = self.accelerator.unwrap_model(self.model)
        for m in self.methods:
            model = m.finish(model, self.now)
        bent = any(not part.linear for layer in model.modules() for part in stack(layer))
        return model if bent or any(True for _ in soft_prompts(model)) else fold(model)


class _Constrain(transformers.TrainerCallback):  # type: ignore[misc]
    """Restores what must hold after each step, and counts it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *given: Any, **named: Any) -> None:
        """Run the constrain place."""
        now = self.trainer.now
        for m in self.trainer.methods:
            m.constrain(self.trainer.accelerator.unwrap_model(self.trainer.model), now)
        now.step += 1


__all__ = ["MicroBatches", "Trainer"]
