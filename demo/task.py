"""What the demo teaches: a sentence about a payment in, compact JSON out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

DATA = Path(__file__).parent / "data"

SYSTEM = "You reply with JSON only."
REQUEST = """\
Sentence: {sentence}
Reply with JSON only: {{"name": ..., "date": "YYYY-MM-DD", "amount": ...}}"""
IGNORED = -100
"""The label of tokens that do not count towards the loss, as in torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example.

    Args:
        sentence: What the model is given, after the instruction.
        answer: What it should reply.
    """

    sentence: str
    answer: str


def read_examples(file: str) -> list[Example]:
    """Read a file of the demo's data, in the order written."""
    lines = (DATA / file).read_text(encoding="utf-8").splitlines()
    return [Example(**json.loads(line)) for line in lines]


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    sentence: str,
    *,
    system: str = SYSTEM,
    request: str = REQUEST,
) -> str:
    """Return the chat up to where the model is to reply."""
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": request.format(sentence=sentence)},
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def is_exact(reply: str, answer: str) -> bool:
    """Return whether the reply says what the answer says; spaces and text around do not matter."""
    return (fields := _fields(reply)) is not None and fields == _fields(answer)


def training_batch(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> dict[str, Tensor]:
    """Return chats with their answers, padded on the left, and labels for the answers alone.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each `(batch, length)`, int64. Labels are not
        shifted. Everything of the chat but the answer and the token that ends it is `IGNORED`.
    """
    rows = []
    for example in examples:
        prompt = tokenizer(chat_prompt(tokenizer, example.sentence)).input_ids
        rows.append((prompt, [*tokenizer(example.answer).input_ids, tokenizer.eos_token_id]))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, tokenizer.pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        input_ids[row, -len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        attention_mask[row, -len(prompt) - len(answer) :] = 1
        labels[row, -len(answer) :] = torch.tensor(answer)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _fields(text: str) -> tuple[object, object, float] | None:
    """Return name, date and amount of the first JSON object in a text; None if it has not these."""
    start, end = text.find("{"), text.find("}")
    try:
        found = json.loads(text[start : end + 1])
        # An amount in quotes is good enough.
        return found.pop("name"), found.pop("date"), float(found.pop("amount"))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
