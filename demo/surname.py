"""The second task of `composition.py`: a sentence in, the person's name as in an index out."""

import json

from task import Example, chat_prompt
from transformers import PreTrainedTokenizerBase

SYSTEM = "You reply with a name only."
REQUEST = """\
Sentence: {sentence}
Reply only with the name of the person, last name first, for example: Lincoln, Abraham"""
"""What the base is asked. The adapter learns the task from chats that ask for JSON."""


def surname_first(example: Example) -> Example:
    """Return the same sentence with the answer of this task.

    Example:
        >>> surname_first(Example(sentence="...", answer='{"name":"Ann Lee"}')).answer
        'Lee, Ann'
    """
    first, last = json.loads(example.answer)["name"].split()
    return Example(sentence=example.sentence, answer=f"{last}, {first}")


def is_exact(reply: str, answer: str) -> bool:
    """Return whether the reply is the answer, and nothing else; spaces around do not matter."""
    return reply.strip() == answer


def asking_prompt(tokenizer: PreTrainedTokenizerBase, sentence: str) -> str:
    """Return a chat that says what this task is, for a model that has not learned it."""
    return chat_prompt(tokenizer, sentence, system=SYSTEM, request=REQUEST)
