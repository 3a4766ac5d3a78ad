"""Batches of examples: padded, or packed into one row; and whether a model keeps packed ones apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery_core import OptionsError
from surgery_training.examples import IGNORED, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingCollator:
    """A row for each example, padded on the right to the longest.

    Args:
        pad: The token to pad with.
    """

    pad: int

    def __call__(self, examples: Sequence[Tokens]) -> dict[str, Tensor]:
        """Return a batch.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each `(batch, length)`, int64; labels are not
            shifted.

        Example:
            >>> short = Tokens(input_ids=(5, 6), labels=(-100, 6))
            >>> long = Tokens(input_ids=(7, 8, 9), labels=(-100, 8, 9))
            >>> PaddingCollator(pad=0)([short, long])["labels"].tolist()
            [[-100, 6, -100], [-100, 8, 9]]
        """
        length = max(len(example.input_ids) for example in examples)
        shape = (len(examples), length)
        batch = {
            "input_ids": torch.full(shape, self.pad),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for row, example in enumerate(examples):
            end = len(example.input_ids)
            batch["input_ids"][row, :end] = torch.tensor(example.input_ids)
            batch["attention_mask"][row, :end] = 1
            batch["labels"][row, :end] = torch.tensor(example.labels)
        return batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingCollator:
    """The examples of a batch behind one another in one row, without padding.

    Positions begin anew with each example and there is no attention mask: that is what transformers
    tells packed examples by, and makes a mask that keeps them apart.
    """

    def __call__(self, examples: Sequence[Tokens]) -> dict[str, Tensor]:
        """Return a batch.

        Returns:
            `input_ids`, `position_ids` and `labels`, each `(1, length)`, int64; labels are not
            shifted, and the first token of an example has none.

        Example:
            >>> short = Tokens(input_ids=(5, 6), labels=(-100, 6))
            >>> long = Tokens(input_ids=(7, 8, 9), labels=(-100, 8, 9))
            >>> PackingCollator()([short, long])["position_ids"].tolist()
            [[0, 1, 0, 1, 2]]
        """
        return {
            "input_ids": torch.tensor([[i for one in examples for i in one.input_ids]]),
            "position_ids": torch.tensor([[i for one in examples for i in range(len(one.labels))]]),
            "labels": torch.tensor([[i for one in examples for i in one.labels]]),
        }


Collator = PaddingCollator | PackingCollator


@torch.no_grad()
def check_packing(model: nn.Module, first: Tokens, second: Tokens) -> None:
    """Refuse a model in which a packed example sees the one before it.

    The first of two is replaced by other tokens, which must make no difference to the second.

    Args:
        model: A causal language model of transformers; its mode is kept.
        first: An example.
        second: Another.

    Raises:
        OptionsError: It makes one.
    """
    fill = next(i for i in (0, 1) if set(first.input_ids) != {i})
    other = Tokens(input_ids=(fill,) * len(first.input_ids), labels=first.labels)
    start = len(first.input_ids)
    was_training = model.training
    model.eval()
    try:
        one, two = (
            _logits(model, PackingCollator()([before, second])) for before in (first, other)
        )
    finally:
        model.train(was_training)
    one, two = one[:, start:], two[:, start:]
    # What attention leaves out is exactly zero; some kernels may still sum in another order.
    if not torch.allclose(one, two, rtol=0.0, atol=1e-4 * float(one.abs().max())):
        difference = float((one - two).abs().max())
        msg = (
            f"Model {type(model).__name__} does not keep packed examples apart: expected the logits "
            f"of one not to depend on the one before it, got a difference of {difference:.3g}. Use "
            "collator 'padding'."
        )
        raise OptionsError(msg)


def _logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    device = next((parameter.device for parameter in model.parameters()), None)
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float()
