"""Train a method on examples, and measure it; the same steps and batches for every method."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tasks import Example
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ARROW, END = " =>", "\n"
IGNORED = -100
"""The label of tokens that do not count, as in torch."""
EVALUATED_AT_ONCE = 30
WARMUP = 5

Encode = Callable[[str], list[int]]
"""The tokens of a text, nothing added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples as tensors, padded on the left.

    Args:
        inputs: `input_ids` and `attention_mask`, `(batch, length)`, int64.
        targets: What the last positions but one should be followed by, `(batch, targets)`, int64;
            what is no answer is `IGNORED`.
    """

    inputs: dict[str, Tensor]
    targets: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a model did on some examples.

    Args:
        exact: How many answers are right.
        loss: Mean cross-entropy of the answers' tokens, in nats.
    """

    exact: int
    loss: float


def batch_of(encode: Encode, examples: Sequence[Example], shown: Sequence[Example] = ()) -> Batch:
    """Return examples, each with others that are shown before it, as tensors."""
    before = "".join(f"{e.source}{ARROW} {e.target}{END}" for e in shown)
    # An answer is encoded alone, so that it has the same tokens whatever stands before it.
    rows = [
        (encode(f"{before}{e.source}{ARROW}"), [*encode(f" {e.target}"), *encode(END)])
        for e in examples
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    num_targets = max(len(answer) for _, answer in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full((len(rows), num_targets), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        input_ids[row, -len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        attention_mask[row, -len(prompt) - len(answer) :] = 1
        targets[row, -len(answer) :] = torch.tensor(answer)
    return Batch(inputs={"input_ids": input_ids, "attention_mask": attention_mask}, targets=targets)


def target_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits that predict the targets, `(batch, targets, vocabulary)`."""
    # The head runs only where answers are, and one position earlier, which predicts their first.
    kept = batch.targets.shape[1] + 1
    logits: Tensor = model(**batch.inputs, logits_to_keep=kept, use_cache=False).logits
    return logits[:, :-1]


@torch.inference_mode()
def score(
    model: nn.Module,
    encode: Encode,
    examples: Sequence[Example],
    shown: Sequence[Example] = (),
) -> Score:
    """Measure exact match under greedy decoding, and the loss, in one pass.

    Greedy decoding gives exactly the right tokens if and only if each of them is the most likely
    one after those before it, which one pass over the right answer tells: nothing is generated.
    """
    exact, loss, num_tokens = 0, 0.0, 0
    for start in range(0, len(examples), EVALUATED_AT_ONCE):
        batch = batch_of(encode, examples[start : start + EVALUATED_AT_ONCE], shown)
        logits, counts = target_logits(model, batch), batch.targets != IGNORED
        found, expected = logits[counts], batch.targets[counts]
        loss += cross_entropy(found, expected, reduction="sum").item()
        num_tokens += len(expected)
        is_right = (logits.argmax(dim=-1) == batch.targets) | ~counts
        exact += int(is_right.all(dim=1).sum())
    return Score(exact=exact, loss=loss / num_tokens)


def train(
    model: nn.Module,
    encode: Encode,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
) -> list[float]:
    """Train what requires gradients, in place.

    Adam, betas 0.9 and 0.98, no weight decay; one rate for everything, which rises over `WARMUP`
    steps and then falls to zero, both in straight lines; gradients clipped to norm 1.

    Returns:
        The loss of each step's batch before that step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - step / steps)
    )
    losses = []
    batches = _batches(examples, batch_size, seed)
    model.train()
    for _ in range(steps):
        batch = batch_of(encode, next(batches))
        counts = batch.targets != IGNORED
        loss = cross_entropy(target_logits(model, batch)[counts], batch.targets[counts])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def _batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches without end, every epoch in an order of its own."""
    rng = random.Random(seed)  # noqa: S311 (nothing here is secret)
    while True:
        order = rng.sample(list(examples), len(examples))
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]
