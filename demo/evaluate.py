"""Measure a model on held-out examples: replies, exact match and mean loss."""

import itertools
from collections.abc import Callable, Iterator, Sequence
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

Prompt = Callable[[PreTrainedTokenizerBase, str], str]
"""Makes a chat of a sentence, up to where the model is to reply."""


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
    model: AdaptionPromptModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    adapter_names: Sequence[str] | None = None,
    prompt: Prompt = chat_prompt,
) -> Tensor:
    """Reply to each sentence, greedily.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        sentences: What to reply to.
        adapter_names: One for each sentence; None for the active adapter.
        prompt: Makes a chat of a sentence.

    Returns:
        New tokens, `(sentences, length)`, int64, padded on the right.
    """
    prompts = [prompt(tokenizer, sentence) for sentence in sentences]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tokens = model.generate(
        **inputs,
        adapter_names=adapter_names,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([ClosingBrace(tokenizer)]),
    )
    return tokens[:, inputs["input_ids"].shape[1] :]


def batches(sentences: Sequence[str]) -> Iterator[list[int]]:
    """Yield the indices of sentences of about one length, until all are in a batch."""
    by_length = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    for start in range(0, len(by_length), BATCH_SIZE):
        yield by_length[start : start + BATCH_SIZE]


def without_end(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a reply up to the one that ends it, which also pads it."""
    kept: list[int] = list(
        itertools.takewhile(lambda token: token != tokenizer.eos_token_id, tokens.tolist())
    )
    return kept


def generate_all(
    model: AdaptionPromptModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    adapter_names: Sequence[str] | None = None,
    prompt: Prompt = chat_prompt,
) -> list[list[int]]:
    """Reply to sentences as `generate` does, in batches.

    Returns:
        The tokens of each reply without the one that ends it, in the order of the sentences.
    """
    replies: list[list[int]] = [[] for _ in sentences]
    for chosen in batches(sentences):
        names = None if adapter_names is None else [adapter_names[index] for index in chosen]
        tokens = generate(
            model,
            tokenizer,
            [sentences[index] for index in chosen],
            adapter_names=names,
            prompt=prompt,
        )
        for index, row in zip(chosen, tokens, strict=True):
            replies[index] = without_end(row, tokenizer)
    return replies


@torch.inference_mode()
def evaluate(
    model: AdaptionPromptModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Score:
    """Measure the model as it is now."""
    sentences = [example.sentence for example in examples]
    replies = tokenizer.batch_decode(
        generate_all(model, tokenizer, sentences), skip_special_tokens=True
    )
    loss, num_tokens = 0.0, 0
    for chosen in batches(sentences):
        labelled = training_batch(tokenizer, [examples[index] for index in chosen])
        loss += answer_loss(model, labelled, "sum").item()
        num_tokens += int((labelled["labels"] != IGNORED).sum())
    exact = sum(
        is_exact(reply, example.answer) for reply, example in zip(replies, examples, strict=True)
    )
    return Score(replies=tuple(replies), exact=exact, loss=loss / num_tokens)
