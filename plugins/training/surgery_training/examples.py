"""Examples of a file as tokens, with labels on what is to be answered alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from surgery_core import OptionsError, RecipeError, listed, read_text
from surgery_training.settings import Template

IGNORED = -100
"""The label of tokens that do not count towards the loss, as in torch."""

MOST_PROBLEMS = 20
"""How many lines of a file are complained about at once."""

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """One example, before it is text.

    Args:
        messages: Each with `role` and `content`; the last one is the assistant's.
        is_pair: It was written as `prompt` and `answer`.
        where: `file:line`, for messages.
    """

    messages: tuple[Mapping[str, str], ...]
    is_pair: bool
    where: str

    @property
    def answer(self) -> str:
        """What the assistant says at last."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One example as tokens.

    Args:
        input_ids: All of it.
        labels: As many: the token itself where it is of an answer, `IGNORED` elsewhere.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_labels(self) -> int:
        """How many tokens are to be predicted."""
        return sum(label != IGNORED for label in self.labels)


def read_dialogues(path: str) -> list[Dialogue]:
    """Read a file with an example on each line of JSON; blank lines are passed over.

    Args:
        path: The file, UTF-8.

    Raises:
        RecipeError: It cannot be read, has no examples, or has lines that are none, which are named.
    """
    try:
        text = read_text(path, encoding="utf-8-sig")
    except (OSError, ValueError) as err:
        msg = f"Examples {path!r} cannot be read: {err}. Pass a file with JSON on each line."
        raise RecipeError(msg) from err
    found, problems = [], []
    # Only ends of lines: text may have separators of other kinds.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_dialogue(line, f"{path}:{number}"))
        except ValueError as err:
            problems.append(f"{path}:{number}: {err}")
    if problems:
        more = len(problems) - MOST_PROBLEMS
        shown = [*problems[:MOST_PROBLEMS], *([f"{path}: and {more} more"] if more > 0 else [])]
        raise RecipeError("\n".join(shown), problems=shown)
    if not found:
        msg = f"Examples {path!r} are empty: expected JSON on each line. Pass another file."
        raise RecipeError(msg)
    return found


def _dialogue(line: str, where: str) -> Dialogue:
    try:
        data = json.loads(line)
    except RecursionError:
        msg = "no valid JSON: nested too deep"
        raise ValueError(msg) from None
    except ValueError as err:
        msg = f"no valid JSON: {err}"
        raise ValueError(msg) from err
    keys = sorted(data) if isinstance(data, dict) else data
    if keys == ["answer", "prompt"]:
        pair = [("user", data["prompt"]), ("assistant", data["answer"])]
        messages: Any = [{"role": role, "content": content} for role, content in pair]
    elif keys == ["messages"] and isinstance(data["messages"], list) and data["messages"]:
        messages = data["messages"]
    else:
        msg = f"expected prompt and answer, or messages, got {keys!r:.80}"
        raise ValueError(msg)
    for message in messages:
        _check_message(message)
    if messages[-1]["role"] != "assistant":
        msg = f"expected the last message to be the assistant's, got {messages[-1]['role']!r}'s"
        raise ValueError(msg)
    return Dialogue(messages=tuple(messages), is_pair="messages" not in data, where=where)


def _check_message(message: object) -> None:
    is_message = isinstance(message, dict) and sorted(message) == ["content", "role"]
    if not isinstance(message, dict) or not is_message:
        msg = f"expected messages with role and content, got {message!r:.80}"
        raise ValueError(msg)
    if not isinstance(message["content"], str) or message["role"] not in _ROLES:
        msg = f"expected text of one of {listed(_ROLES)}, got {message!r:.80}"
        raise ValueError(msg)
    if message["role"] == "assistant" and not message["content"].strip():
        msg = "expected an answer that is not empty"
        raise ValueError(msg)


class Encoder:
    """Makes tokens of dialogues; the tokens of a prompt are the same with and without its answer.

    Args:
        tokenizer: Of transformers.
        template: See `TrainingSettings`.

    Raises:
        OptionsError: The tokenizer has no chat template, or no token that ends a text.
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:  # noqa: ANN401 (of any class)
        if template == "chat" and tokenizer.chat_template is None:
            msg = "Tokenizer has no chat template: expected one for template 'chat'. Use 'plain'."
            raise OptionsError(msg)
        if template == "plain" and tokenizer.eos_token_id is None:
            msg = "Tokenizer has no token that ends a text: expected one for template 'plain'. Use 'chat'."
            raise OptionsError(msg)
        self.tokenizer = tokenizer
        self.template = template

    @property
    def pad(self) -> int:
        """A token to pad with; where it stands nobody looks."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens up to where the assistant is to answer."""
        if self.template == "plain":
            return self._opening(messages[0]["content"])
        return self._tokens(self._text(messages, is_open=True))

    def encode(self, dialogue: Dialogue) -> Tokens:
        """Return the tokens of an example, with labels on what the assistant says and how it ends.

        Raises:
            RecipeError: The example cannot be said in the template.
        """
        input_ids: list[int] = []
        labels: list[int] = []
        for tokens, is_answer in self._parts(dialogue):
            input_ids += tokens
            labels += tokens if is_answer else [IGNORED] * len(tokens)
        if not labels or labels[0] != IGNORED:
            msg = f"{dialogue.where}: expected a prompt of at least one token, got none"
            raise RecipeError(msg)
        return Tokens(input_ids=tuple(input_ids), labels=tuple(labels))

    def _parts(self, dialogue: Dialogue) -> Iterator[tuple[list[int], bool]]:
        if self.template == "plain":
            if not dialogue.is_pair:
                msg = f"{dialogue.where}: expected prompt and answer for template 'plain', got messages"
                raise RecipeError(msg)
            yield self._opening(dialogue.messages[0]["content"]), False
            yield [*self._tokens(dialogue.answer), self.tokenizer.eos_token_id], True
            return
        done = ""
        last = len(dialogue.messages) - 1
        for number, message in enumerate(dialogue.messages):
            if message["role"] != "assistant":
                continue
            before = self._text(dialogue.messages[:number], is_open=True)
            after = self._text(dialogue.messages[: number + 1], is_open=False)
            if not (before.startswith(done) and after.startswith(before)):
                msg = (
                    f"{dialogue.where}: the chat template does not say message {number} behind those "
                    "before it, so its tokens cannot be told apart. Use template 'plain'."
                )
                raise RecipeError(msg)
            yield self._tokens(before[len(done) :]), False
            answer = self._tokens(after[len(before) :])
            # What a template writes behind the end of a turn is not the assistant's to say.
            ends = [i for i, token in enumerate(answer) if token == self.tokenizer.eos_token_id]
            end = ends[-1] + 1 if ends else len(answer)
            yield answer[:end], True
            if number < last:
                yield answer[end:], False
            done = after

    def _text(self, messages: Sequence[Mapping[str, str]], *, is_open: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=is_open
        )
        return text

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def _opening(self, text: str) -> list[int]:
        tokens: list[int] = list(self.tokenizer(text).input_ids)
        # Some tokenizers end whatever they are given.
        return tokens[:-1] if tokens[-1:] == [self.tokenizer.eos_token_id] else tokens


def encode_all(
    encoder: Encoder,
    dialogues: Sequence[Dialogue],
    *,
    max_length: int,
    too_long: Literal["refuse", "truncate"],
) -> list[Tokens]:
    """Make tokens of every example.

    Args:
        encoder: How.
        dialogues: Of a file.
        max_length: Most tokens of an example.
        too_long: See `TrainingSettings`.

    Raises:
        RecipeError: Examples are too long, or cannot be said; they are named.
    """
    found, problems = [], []
    for dialogue in dialogues:
        tokens = encoder.encode(dialogue)
        num_tokens = len(tokens.input_ids)
        if num_tokens > max_length:
            tokens = Tokens(
                input_ids=tokens.input_ids[:max_length], labels=tokens.labels[:max_length]
            )
            if too_long == "refuse":
                what = f"expected at most {max_length} tokens (max_length), got {num_tokens}"
                problems.append(f"{dialogue.where}: {what}")
            elif not tokens.num_labels:
                what = f"the first {max_length} tokens (max_length) have nothing of the answer"
                problems.append(f"{dialogue.where}: {what}")
        found.append(tokens)
    if problems:
        fix = "Raise max_length, or leave them out" + (
            ", or say too_long: truncate." if too_long == "refuse" else "."
        )
        more = len(problems) - MOST_PROBLEMS
        shown = [*problems[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else []), fix]
        raise RecipeError("\n".join(shown), problems=shown)
    return found
