"""Train the active adapter: only its prompts and gates, each with a rate of its own."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from surgery_adaption_prompt import AdaptionPromptModel
from task import IGNORED, Example, training_batch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How to train.

    Args:
        steps: Number of optimizer steps.
        batch_size: Examples per step.
        gate_rate: Learning rate of the gates. They start at zero, and so does the gradient of the
            prompts: the gates have to open before the prompts can learn.
        prompt_rate: Learning rate of the prompts.
        warmup: Steps over which both rates rise.
        seed: For the order of the examples.
    """

    steps: int = 75
    batch_size: int = 8
    gate_rate: float = 0.02
    prompt_rate: float = 0.02
    warmup: int = 5
    seed: int = 0


def answer_loss(model: AdaptionPromptModel, batch: dict[str, Tensor], reduction: str) -> Tensor:
    """Return the cross-entropy of the answers' tokens, in nats.

    Args:
        model: The model.
        batch: See `training_batch`.
        reduction: As in torch.
    """
    # Answers are at the end of every row: the head runs only from the longest one's beginning on,
    # and one position earlier, which predicts its first token.
    labelled = (batch["labels"] != IGNORED).any(dim=0)
    kept = int(labelled.sum()) + 1
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=kept,
        use_cache=False,
    ).logits
    targets = batch["labels"][:, 1 - kept :]
    chosen = targets != IGNORED
    return cross_entropy(logits[:, :-1][chosen].float(), targets[chosen], reduction=reduction)


def train(
    model: AdaptionPromptModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: TrainingOptions,
    *,
    on_step: Callable[[float], None],
) -> None:
    """Train the active adapter in place.

    Args:
        model: The model; what requires no gradient stays as it is.
        tokenizer: Its tokenizer.
        examples: To learn from.
        options: How.
        on_step: Told the loss of each step.
    """
    gates, prompts = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (gates if name.endswith("gate") else prompts).append(parameter)
    optimizer = torch.optim.Adam(
        [
            {"params": gates, "lr": options.gate_rate},
            {"params": prompts, "lr": options.prompt_rate},
        ],
        betas=(0.9, 0.98),
    )
    # Up in a straight line, then down in one to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / options.warmup, 1 - step / options.steps),
    )
    model.train()
    batches = _batches(examples, options)
    for _ in range(options.steps):
        loss = answer_loss(model, training_batch(tokenizer, next(batches)), "mean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*gates, *prompts], 1.0)
        optimizer.step()
        schedule.step()
        on_step(loss.item())
    model.eval()


def _batches(examples: Sequence[Example], options: TrainingOptions) -> Iterator[Sequence[Example]]:
    """Yield batches without end: every epoch in a new order, neighbours of about one length."""
    rng = random.Random(options.seed)  # noqa: S311 (nothing here is secret)
    size = options.batch_size
    # Sorted within a few batches at a time: little padding, and batches that still vary.
    window = 8 * size
    while True:
        order = rng.sample(list(examples), len(examples))
        batches = []
        for start in range(0, len(order) - size + 1, window):
            near = sorted(order[start : start + window], key=lambda example: len(example.sentence))
            batches += [near[at : at + size] for at in range(0, len(near) - size + 1, size)]
        rng.shuffle(batches)
        yield from batches
