"""Try and measure: answers to prompts, and how near they come to those of examples."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery_core import OptionsError
from surgery_training.collators import PaddingCollator
from surgery_training.examples import Dialogue, Encoder, Tokens
from surgery_training.losses import answer_loss, takes_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How a model did on examples.

    Args:
        loss: Mean cross-entropy of the answers' tokens, in nats.
        exact: How many replies are the answer, spaces around them aside.
        total: Of how many examples.
        replies: One for each example.
    """

    loss: float
    exact: int
    total: int
    replies: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@torch.inference_mode()
def answers(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[str]:
    """Answer prompts, the most probable token at a time.

    Args:
        model: Of transformers, with a method `generate`.
        encoder: Whose tokenizer writes the answers.
        prompts: Tokens of each.
        max_new_tokens: Most tokens of an answer.
        batch_size: How many at a time.

    Returns:
        The answers, in the order of the prompts, without what ends them.

    Raises:
        OptionsError: The model cannot generate.
    """
    generate = getattr(model, "generate", None)
    if generate is None:
        msg = f"Model {type(model).__name__} cannot generate: expected a model of transformers. Pass one."
        raise OptionsError(msg)
    found = [""] * len(prompts)
    for chosen in _by_length(list(map(len, prompts)), batch_size):
        length = max(len(prompts[index]) for index in chosen)
        # Padded on the left, so that all answers begin at the same place.
        input_ids = torch.full((len(chosen), length), encoder.pad)
        mask = torch.zeros_like(input_ids)
        for row, index in enumerate(chosen):
            start = length - len(prompts[index])
            input_ids[row, start:] = torch.tensor(prompts[index])
            mask[row, start:] = 1
        device = _device(model)
        tokens: Tensor = generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=encoder.pad,
        )
        texts = encoder.tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            found[index] = text
    return found


@torch.inference_mode()
def score(
    model: nn.Module,
    encoder: Encoder,
    dialogues: Sequence[Dialogue],
    examples: Sequence[Tokens],
    *,
    batch_size: int = 8,
) -> Score:
    """Measure a model on examples.

    Args:
        model: In evaluation mode.
        encoder: Made the examples.
        dialogues: What is asked, and the answer that is expected at last.
        examples: The same as tokens.
        batch_size: How many at a time.
    """
    prompts = [encoder.prompt(dialogue.messages[:-1]) for dialogue in dialogues]
    # As long as the longest answer, and a bit, so that whatever is longer is no exact match.
    longest = max(
        len(example.input_ids) - len(prompt)
        for example, prompt in zip(examples, prompts, strict=True)
    )
    replies = answers(
        model, encoder, prompts, max_new_tokens=max(longest, 1) + 8, batch_size=batch_size
    )
    loss, num_labels = 0.0, 0
    collator = PaddingCollator(pad=encoder.pad)
    for chosen in _by_length([len(example.input_ids) for example in examples], batch_size):
        batch = collator([examples[index] for index in chosen])
        placed = {name: value.to(_device(model)) for name, value in batch.items()}
        total, count = answer_loss(model, placed, is_selective=takes_kept(model))
        loss += total.item()
        num_labels += count
    exact = sum(
        reply.strip() == dialogue.answer.strip()
        for reply, dialogue in zip(replies, dialogues, strict=True)
    )
    return Score(loss=loss / num_labels, exact=exact, total=len(dialogues), replies=tuple(replies))


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of things of about one length, until all are in a batch."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
