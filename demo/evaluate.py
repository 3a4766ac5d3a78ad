"""Measure a model on held-out examples: replies, exact match and mean loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from surgery_adaption_prompt import AdaptionPromptModel
from task import IGNORED, Example, chat_prompt, is_exact, training_batch
from torch import Tensor
from train import answer_loss
from transformers import (
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

MAX_NEW_TOKENS = 64
BATCH_SIZE = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a model did on some examples.

    Args:
        replies: One for each example.
        exact: How many say what the answer says.
        loss: Mean cross-entropy of the answers' tokens, in nats.
    """

    replies: tuple[str, ...]
    exact: int
    loss: float


class ClosingBrace(StoppingCriteria):
    """Stop a row where it closed the JSON object."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._closing = torch.tensor(
            [i for token, i in tokenizer.get_vocab().items() if "}" in token]
        )

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Return which rows are done, `(batch,)`."""
        del scores, kwargs
        return torch.isin(input_ids[:, -1], self._closing)


@torch.inference_mode()
def generate(
    model: AdaptionPromptModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]
) -> Tensor:
    """Reply to each sentence, greedily.

    Returns:
        New tokens, `(sentences, length)`, int64, padded on the right.
    """
    prompts = [chat_prompt(tokenizer, sentence) for sentence in sentences]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tokens = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([ClosingBrace(tokenizer)]),
    )
    return tokens[:, inputs["input_ids"].shape[1] :]


@torch.inference_mode()
def evaluate(
    model: AdaptionPromptModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Score:
    """Measure the model as it is now."""
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].sentence))
    replies = [""] * len(examples)
    loss, num_tokens = 0.0, 0
    for start in range(0, len(by_length), BATCH_SIZE):
        chosen = by_length[start : start + BATCH_SIZE]
        batch = [examples[index] for index in chosen]
        tokens = generate(model, tokenizer, [example.sentence for example in batch])
        for index, row in zip(chosen, tokens, strict=True):
            replies[index] = tokenizer.decode(row, skip_special_tokens=True)
        labelled = training_batch(tokenizer, batch)
        loss += answer_loss(model, labelled, "sum").item()
        num_tokens += int((labelled["labels"] != IGNORED).sum())
    exact = sum(
        is_exact(reply, example.answer) for reply, example in zip(replies, examples, strict=True)
    )
    return Score(replies=tuple(replies), exact=exact, loss=loss / num_tokens)
