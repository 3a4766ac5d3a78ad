"""The loss of answers: cross-entropy of the labelled tokens."""

import inspect
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from surgery_training.examples import IGNORED

KEPT = "logits_to_keep"
"""What transformers' models call the positions whose logits they are asked for."""


def takes_kept(model: nn.Module) -> bool:
    """Tell whether a model can be asked for the logits of some positions alone."""
    return KEPT in inspect.signature(model.forward).parameters


def answer_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, is_selective: bool
) -> tuple[Tensor, int]:
    """Return the cross-entropy of the labelled tokens, summed, and how many there are.

    Args:
        model: A causal language model of transformers.
        batch: As the collators make them: `labels` `(batch, length)` not shifted, and what the model
            takes.
        is_selective: The model is asked only for the logits that are needed; see `takes_kept`.

    Returns:
        The sum in nats, float32, a scalar; and the number of labels.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    # Position t predicts token t + 1.
    labels = batch["labels"][:, 1:]
    if is_selective:
        # Only columns in which some row has a label; the head is a large part of a small model.
        columns = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
        if not len(columns):
            # Some models cannot do with none, and others that train with this one may have some.
            columns = labels.new_zeros(1)
        labels = labels[:, columns]
        logits = model(**inputs, use_cache=False, **{KEPT: columns}).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    chosen = labels != IGNORED
    # float32, since sums over a vocabulary lose too much in bfloat16.
    total = cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum")
    return total, int(chosen.sum())
