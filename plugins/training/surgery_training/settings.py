"""How to train: what a training file says, validated."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from surgery_core import load_settings

Template = Literal["chat", "plain"]
"""How an example becomes text: the tokenizer's chat template, or prompt and answer as they are."""

DType = Literal["float32", "bfloat16"]
"""What the base may be computed in."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataSettings(_Strict):
    """Files of examples, one a line of JSON: `prompt` and `answer`, or `messages`.

    Args:
        train: To learn from; relative to the training file.
        validation: To measure with meanwhile; same. None means that nothing is measured.
    """

    train: str
    validation: str | None = None


class TrainingSettings(_Strict):
    """How to train; the defaults are for a quick adapter of prompts and gates.

    Args:
        data: Files of examples.
        template: `"chat"`, the tokenizer's chat template; or `"plain"`, the prompt, the answer and
            the token that ends a text.
        tokenizer: Folder or identifier; None means where the model comes from. A path that begins
            with a dot is relative to the training file.
        max_length: Most tokens of an example.
        too_long: What becomes of a longer one: `"refuse"` is an error that names it, `"truncate"` cuts
            its end off.
        collator: `"padding"`, a row for each example, padded on the right; or `"packing"`, the
            examples of a batch behind one another in a single row, none of which sees another.
        batch_size: Examples for each forward, on each process.
        gradient_accumulation: Forwards for each step of the optimizer.
        learning_rate: Highest rate of what is no gate; 0.02 suits prompts and gates, 0.001 low-rank
            terms.
        gate_learning_rate: Highest rate of the gates; None means `learning_rate`.
        gate_pattern: What the last segment of a gate's name is like, as for files. Gates are not
            decayed, and their mean magnitude is recorded at each step.
        weight_decay: Of what is no gate, for each step and times the rate, as in AdamW.
        max_gradient_norm: Gradients are scaled down to this norm; 0 leaves them.
        warmup: Steps over which the rates rise, before they fall to zero at the last step.
        epochs: Passes over the examples; 1 if there are no `max_steps` either.
        max_steps: Steps of the optimizer; instead of `epochs`.
        evaluate_every: Steps between two measurements; one more is made after the last step.
        save_every: Steps between two checkpoints; one more is made after the last step.
        early_stopping: Stop after so many measurements in a row without a new lowest loss; None
            goes on to the end.
        keep: Which values are recorded: those of the `"best"` measurement, or the `"last"`. Without
            `data.validation` they are the last.
        seed: Of first values, dropout and the order of the examples.
        dtype: Of the base; None leaves it as it was saved. What is added keeps its own dtype, at
            least float32 unless the recipe says otherwise.
        gradient_checkpointing: Keep less for the backward, and compute it again there.
    """

    data: DataSettings
    template: Template = "chat"
    tokenizer: str | None = None
    max_length: int = Field(default=1024, ge=2)
    too_long: Literal["refuse", "truncate"] = "refuse"
    collator: Literal["padding", "packing"] = "padding"
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=0.02, gt=0)
    gate_learning_rate: float | None = Field(default=None, gt=0)
    gate_pattern: str = "*gate*"
    weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float = Field(default=1.0, ge=0)
    warmup: int = Field(default=5, ge=0)
    epochs: float | None = Field(default=None, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    evaluate_every: int = Field(default=25, ge=1)
    save_every: int = Field(default=25, ge=1)
    early_stopping: int | None = Field(default=None, ge=1)
    keep: Literal["best", "last"] = "best"
    seed: int = Field(default=0, ge=0, lt=2**32)
    dtype: DType | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            msg = "expected either epochs or max_steps, got both"
            raise ValueError(msg)
        if self.early_stopping is not None and self.data.validation is None:
            msg = "expected data.validation, by which early_stopping decides"
            raise ValueError(msg)
        return self


def load_training_settings(path: str | os.PathLike[str]) -> TrainingSettings:
    r"""Read a training file; the paths in it become absolute.

    Args:
        path: YAML, TOML or JSON.

    Raises:
        RecipeError: It cannot be read, or says something else; every problem is named with its line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "training.yaml"
        ...     _ = path.write_text("data: {train: train.jsonl}\nmax_steps: 75")
        ...     settings = load_training_settings(path)
        >>> settings.max_steps, Path(settings.data.train).is_absolute()
        (75, True)
    """
    found = load_settings(path, TrainingSettings)
    folder = Path(path).absolute().parent
    names = {"train": found.data.train, "validation": found.data.validation}
    data = {key: str(folder / name) for key, name in names.items() if name is not None}
    update: dict[str, object] = {"data": DataSettings(**data)}
    if found.tokenizer is not None and found.tokenizer.startswith("."):
        update["tokenizer"] = str(folder / found.tokenizer)
    return found.model_copy(update=update)
