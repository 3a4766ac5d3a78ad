"""The one file that knows transformers' `Trainer`: groups, losses, checkpoints of what was added."""

import dataclasses
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from surgery_core import (
    EditedModel,
    OptionsError,
    RecordError,
    pack_tensors,
    read_record,
    read_tensor_file,
    read_text,
    write_files,
)
from surgery_training.collators import Collator
from surgery_training.examples import IGNORED, Tokens
from surgery_training.history import GATE, LOSS, VALIDATION, History
from surgery_training.losses import answer_loss, takes_kept
from surgery_training.settings import TrainingSettings

STATE_FILE = "trainer_state.json"
BEST_FILE = "best.safetensors"
"""In a checkpoint: the values of the best measurement so far, by `adapter:fqn.name`."""

STAGING = ".staging"
"""Where a checkpoint is written; it has its name when it is complete."""

NUM_KEPT = 2
"""How many checkpoints are kept: the last one, and one in case that is damaged."""

SECOND_BETA = 0.98
"""Of Adam, as the trainings here are short: 0.999 would remember the first steps to the end."""


class Observer(Protocol):
    """Is told how a training goes on."""

    def on_step(self, step: int, total: int, loss: float) -> None:
        """Take note of a step of the optimizer, the first being 1."""

    def on_evaluate(self, step: int, total: int, loss: float) -> None:
        """Take note of a measurement after a step."""


def is_gate(name: str, pattern: str) -> bool:
    """Tell whether a parameter is a gate, by the last segment of its name.

    Example:
        >>> is_gate("layers.0.adaption_gate", "*gate*"), is_gate("gate_proj.lora_A", "*gate*")
        (True, False)
    """
    return fnmatchcase(name.rpartition(".")[2], pattern)


def evened(examples: Sequence[Tokens], size: int) -> list[Tokens]:
    """Return examples with as many without labels behind them as make whole batches of all.

    Processes that measure together need as many batches each; accelerate would repeat some examples.

    Args:
        examples: To measure with.
        size: Of a batch, times the number of processes.

    Example:
        >>> one = Tokens(input_ids=(5, 6), labels=(-100, 6))
        >>> [example.labels for example in evened([one], 2)]
        [(-100, 6), (-100, -100)]
    """
    missing = -len(examples) % size
    blanks = [
        Tokens(input_ids=example.input_ids, labels=(IGNORED,) * len(example.labels))
        for example in examples[:1]
    ]
    return [*examples, *blanks * missing]


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the last one at the end."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"\d+", _step(path))]
    return sorted(found, key=lambda path: int(_step(path)))


def _step(path: Path) -> str:
    return path.name.rpartition("-")[2]


def arguments(settings: TrainingSettings, folder: Path) -> TrainingArguments:
    """Return the settings as transformers knows them.

    Args:
        settings: How to train.
        folder: For checkpoints.
    """
    # 5.23 has another name for it, and is not silent about the old one.
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in fields else "gradient"
    checkpointing: dict[str, Any] = {
        f"{name}_checkpointing": settings.gradient_checkpointing,
        # The base is frozen, and what enters its layers gets no gradients: the other kind needs some.
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }
    epochs = settings.epochs if settings.epochs is not None else 1.0
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=SECOND_BETA,
        max_grad_norm=settings.max_gradient_norm,
        num_train_epochs=epochs,
        max_steps=settings.max_steps if settings.max_steps is not None else -1,
        logging_steps=1,
        # Whatever is not finite must be seen.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.data.validation is not None else "no",
        eval_steps=settings.evaluate_every,
        save_strategy="steps",
        save_steps=settings.save_every,
        seed=settings.seed,
        data_seed=settings.seed,
        # Said, or processes that train together on CPUs would not know of one another.
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **checkpointing,
    )


class AdapterTrainer(Trainer):
    """Trains what a recipe has added to a model, and keeps nothing else.

    A checkpoint is a record of what was added, beside what `Trainer` needs to go on: optimizer,
    scheduler, random numbers and its state. It is written under another name and renamed when it is
    complete, so a process may die at any moment. Tensors are read by safetensors, and what `Trainer`
    has pickled with `weights_only=True`.

    Args:
        edited: The model, with the recipe applied.
        settings: How to train.
        args: Same, as `arguments` gives them.
        collator: Makes batches.
        examples: To learn from.
        validation: To measure with; none are needed.
        names: What is trained: adapters, and `rules`.
        store: Writes a record to a folder.
        observer: Is told how it goes on.

    Raises:
        OptionsError: The launch shards the model (FSDP, DeepSpeed).

    Attributes:
        best: Copies of the values of the best measurement so far, by adapter; None without any.
    """

    # The loss is divided by the number of labels in all batches of a step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        edited: EditedModel,
        settings: TrainingSettings,
        args: TrainingArguments,
        *,
        collator: Collator,
        examples: Sequence[Tokens],
        validation: Sequence[Tokens],
        names: Sequence[str],
        store: Callable[[Path], None],
        observer: Observer,
    ) -> None:
        self.edited = edited
        self.settings = settings
        self.names = tuple(names)
        self.store = store
        self.observer = observer
        self.best: dict[str, dict[str, Tensor]] | None = None
        self.is_staging = False
        size = settings.batch_size * args.world_size if args.world_size > 1 else 1
        super().__init__(
            model=edited.model,
            args=args,
            data_collator=collator,
            train_dataset=examples,
            eval_dataset=evened(validation, size) or None,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            got = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            msg = (
                f"Training by {got} is not possible here: expected one process, or DDP, got a launch "
                "that shards the model, of which the first process alone would write checkpoints. "
                "Launch it with DDP, or shard the model in a script of your own."
            )
            raise OptionsError(msg)
        self.remove_callback(PrinterCallback)
        # Has labels counted, for the loss below; the model itself is not given their number.
        self.model_accepts_loss_kwargs = True
        self.is_selective = takes_kept(edited.model)

    @property
    def history(self) -> History:
        """What was logged so far."""
        return History.of_log(self.state.log_history)

    def gates(self) -> dict[str, Tensor]:
        """Return the gates that are trained, by name."""
        return {
            name: tensor
            for own in self.names
            for name, tensor in self.edited.tensors(own).items()
            if isinstance(tensor, nn.Parameter)
            and tensor.requires_grad
            and is_gate(name, self.settings.gate_pattern)
        }

    def is_over(self, checkpoint: Path) -> bool:
        """Tell whether a checkpoint is of the end of a training; it is then what there is."""
        state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        history = History.of_log(state.log_history)
        is_over = state.global_step >= state.max_steps or history.is_exhausted(
            self.settings.early_stopping
        )
        if is_over:
            self._load_from_checkpoint(str(checkpoint))
            self.state = state
        return bool(is_over)

    # What follows has the names and arguments of Trainer's own.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make an optimizer of the gates, which have a rate of their own, and of all else."""
        if self.optimizer is None:
            groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
            # By name: what wraps a model may have put other parameters in their places.
            whole = self._model if model is None else model
            for name, parameter in whole.named_parameters():
                if parameter.requires_grad:
                    groups[is_gate(name, self.settings.gate_pattern)].append(parameter)
            rate = self.settings.learning_rate
            gate_rate = self.settings.gate_learning_rate or rate
            options = {
                False: {"lr": rate, "weight_decay": self.settings.weight_decay},
                True: {"lr": gate_rate, "weight_decay": 0.0},
            }
            cls, defaults = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = cls(
                [{"params": groups[kind], **options[kind]} for kind in groups if groups[kind]],
                **defaults,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Have the rates rise in a straight line, and fall in one to zero; the first is not zero."""
        if self.lr_scheduler is None:
            warmup = self.settings.warmup

            def factor(step: int) -> float:
                risen = (step + 1) / (warmup + 1)
                return min(risen, max(0.0, 1 - step / num_training_steps))

            own = cast("torch.optim.Optimizer", self.optimizer if optimizer is None else optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(own, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 (Trainer's)
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the cross-entropy of the answers, over the number of labels in the whole step."""
        del return_outputs
        total, count = answer_loss(model, inputs, is_selective=self.is_selective)
        # Gradients are averaged over processes, and the number is of all of them.
        factor = self.accelerator.num_processes if num_items_in_batch is not None else 1
        return total * factor / (count if num_items_in_batch is None else num_items_in_batch)

    def evaluation_loop(
        self,
        dataloader: Any,  # noqa: ANN401 (Trainer's)
        description: str,
        prediction_loss_only: bool | None = None,  # noqa: FBT001 (Trainer's)
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure the mean loss of the labels; Trainer's would be a mean of the batches' means."""
        del description, prediction_loss_only, ignore_keys
        model = self._model
        was_training = model.training
        model.eval()
        loss, num_labels = 0.0, 0
        with torch.no_grad():
            for batch in dataloader:
                placed = self._prepare_inputs(batch)
                total, count = answer_loss(model, placed, is_selective=self.is_selective)
                loss += total.item()
                num_labels += count
        model.train(was_training)
        if self.accelerator.num_processes > 1:
            sums = torch.tensor([loss, num_labels], device=self.args.device)
            loss, num_labels = self.accelerator.reduce(sums, "sum").tolist()
        return EvalLoopOutput(
            predictions=np.empty(0),
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": loss / num_labels},
            num_samples=self.num_examples(dataloader),
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # noqa: ANN401 (Trainer's)
        """Measure, keep the best values, and stop when there was nothing better for too long."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        history = self.history
        if history.best is not None and history.best[0] == self.state.global_step:
            self.best = {
                name: {key: tensor.detach().clone() for key, tensor in tensors.items()}
                for name, tensors in self._tensors().items()
            }
        if history.is_exhausted(self.settings.early_stopping):
            self.control.should_training_stop = True
            # So that the end is one that can be gone back to.
            self.control.should_save = True
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the gates beside each loss, and refuse to go on when that is not finite."""
        step, total = self.state.global_step, self.state.max_steps
        if LOSS in logs:
            for name, gate in self.gates().items():
                logs[f"{GATE}{name}"] = gate.detach().abs().mean().item()
        super().log(logs, start_time)
        for key in {LOSS, VALIDATION} & logs.keys():
            if not torch.isfinite(torch.tensor(logs[key])):
                msg = (
                    f"Loss is not finite at step {step}: expected a number, got {logs[key]}. Lower "
                    "learning_rate, or gate_learning_rate."
                )
                raise OptionsError(msg)
        if not self.is_world_process_zero():
            return
        if LOSS in logs:
            self.observer.on_step(step, total, logs[LOSS])
        if VALIDATION in logs:
            self.observer.on_evaluate(step, total, logs[VALIDATION])

    def save_model(
        self,
        output_dir: str | None = None,
        _internal_call: bool = False,  # noqa: FBT001, FBT002 (Trainer's)
    ) -> None:
        """Write a record of what was added, and the best values so far; nothing of the base's."""
        if not self.args.should_save:
            return
        folder = self._folder if output_dir is None else Path(output_dir)
        self.store(folder)
        if self.best is not None:
            flat = {
                f"{name}:{key}": tensor
                for name, tensors in self.best.items()
                for key, tensor in tensors.items()
            }
            write_files(folder, {BEST_FILE: pack_tensors(flat, {})})

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ANN401 (Trainer's)
        folder = Path(super()._get_output_dir(trial))
        return str(folder / STAGING if self.is_staging else folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401 (Trainer's)
        folder = self._folder
        if self.is_world_process_zero():
            if (folder / STAGING).is_symlink():
                # Never written through.
                (folder / STAGING).unlink()
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.is_staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.is_staging = False
        # Every process has something to write.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            publish(folder / STAGING / f"checkpoint-{self.state.global_step}", folder)
            (folder / STAGING).rmdir()
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        del model
        folder = Path(resume_from_checkpoint)
        for name, tensors in read_record(folder).state.items():
            self.edited.load_(name, tensors)
        if (folder / BEST_FILE).is_file():
            best: dict[str, dict[str, Tensor]] = {name: {} for name in self.names}
            for key, tensor in read_tensor_file(folder / BEST_FILE).tensors.items():
                name, _, own = key.partition(":")
                best.setdefault(name, {})[own] = tensor
            self.best = best

    @property
    def _model(self) -> nn.Module:
        """The model, or what it was sharded to."""
        return cast("nn.Module", self.model)

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {name: self.edited.tensors(name) for name in self.names}


def publish(staged: Path, folder: Path) -> None:
    """Give a complete checkpoint its name, and remove those that are no longer needed.

    Args:
        staged: The checkpoint.
        folder: Where it goes.
    """
    for path in staged.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    target = folder / staged.name
    if target.exists():
        # Not the last one, or training would not have come here again.
        shutil.rmtree(target)
    staged.rename(target)
    for old in checkpoints_in(folder)[:-NUM_KEPT]:
        shutil.rmtree(old)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint in a folder; None if there is none.

    Raises:
        RecordError: It lacks something, or cannot be read.
    """
    found = checkpoints_in(folder)
    if not found:
        return None
    try:
        read_record(found[-1])
        json.loads(read_text(found[-1] / STATE_FILE))
    except (OSError, ValueError) as err:
        msg = f"Checkpoint {str(found[-1])!r} is damaged: {err} Remove it, to go on from another."
        raise RecordError(msg) from err
    return found[-1]


def accepts_checkpointing(model: nn.Module) -> bool:
    """Tell whether layers of a model can be computed again in the backward."""
    return bool(getattr(model, "supports_gradient_checkpointing", False)) and inspect.ismethod(
        getattr(model, "gradient_checkpointing_enable", None)
    )
