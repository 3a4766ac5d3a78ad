"""Environment variables in recipes: `${env:NAME}` stays as it is until the value is used.

So recipes, plans and records hold the name; the value goes to the operation or the loader that needs
it, and errors and warnings from there are shown without it.
"""

import json
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import PurePath
from typing import Any, Self

from pydantic import ValidationError

from surgery_core.errors import RecipeError, SurgeryError

REFERENCE = re.compile(r"(\$+)\{env:([^{}]*)\}")
"""A name, or text that looks like one: dollar signs before it count half, and an odd one begins it."""

MIN_LENGTH = 4
"""Values that are shorter are hidden where they stand alone, not inside words."""

MIN_PART = 40
"""Characters at the beginning of a value that are hidden where a message cuts it off."""


class EnvironmentText(str):
    """Text with values of environment variables in it, which shows as it is written in a recipe.

    Args:
        parts: What it is made of: text, and names of variables, each with whether it is a name.
    """

    __slots__ = ("parts",)

    parts: tuple[tuple[str, bool], ...]

    def __new__(cls, parts: Sequence[tuple[str, bool]]) -> Self:
        """Read the variables; those that are not set are empty."""
        values = [os.environ.get(text, "") if is_name else text for text, is_name in parts]
        made = super().__new__(cls, "".join(values))
        made.parts = tuple(parts)
        return made

    def __repr__(self) -> str:
        return repr(self.written)

    @property
    def written(self) -> str:
        """The same with names for values; text that looks like a name is escaped."""
        runs = [
            (is_name, [text for text, _ in run]) for is_name, run in groupby(self.parts, _is_name)
        ]
        written = ""
        for number, (is_name, texts) in enumerate(runs):
            if is_name:
                written += "".join(f"${{env:{name}}}" for name in texts)
            else:
                is_last = number == len(runs) - 1
                written += _escaped("".join(texts), before_name=not is_last)
        return written


def joined(pieces: Sequence[str]) -> str:
    """Join text of which some has values of environment variables in it."""
    if not any(isinstance(piece, EnvironmentText) for piece in pieces):
        return "".join(pieces)
    parts = [
        piece.parts if isinstance(piece, EnvironmentText) else ((piece, False),) for piece in pieces
    ]
    return EnvironmentText([part for each in parts for part in each])


def as_written(value: Any) -> Any:  # noqa: ANN401 (plain data)
    """Return plain data with names for values of environment variables, and text escaped."""
    if isinstance(value, EnvironmentText):
        return value.written
    return mapped(value, _escaped)


def put_in(value: Any) -> Any:  # noqa: ANN401 (plain data)
    """Return what `as_written` was given, with the values that the variables have now.

    Raises:
        RecipeError: A variable is not set.
    """

    def read(found: re.Match[str]) -> str:
        dollars, name = found[1], found[2]
        if len(dollars) % 2 == 0:
            return "$" * (len(dollars) // 2) + f"{{env:{name}}}"
        if name not in os.environ:
            msg = f"Environment variable {name!r} is not set, and the recipe reads it. Set it."
            raise RecipeError(msg)
        return "$" * (len(dollars) // 2) + os.environ[name]

    return mapped(value, lambda text: REFERENCE.sub(read, text))


def names_in(value: Any) -> set[str]:  # noqa: ANN401 (plain data)
    """Return the names of the variables in what `as_written` returned."""
    found: set[str] = set()

    def noted(text: str) -> str:
        found.update(m[2] for m in REFERENCE.finditer(text) if len(m[1]) % 2)
        return text

    mapped(value, noted)
    return found


@contextmanager
def hidden(value: Any) -> Iterator[None]:  # noqa: ANN401 (plain data)
    """Have errors and warnings name the variables that are in plain data, instead of their values.

    The cause of an error is dropped where it has a value in it.
    """
    values = {os.environ[n]: f"${{env:{n}}}" for n in names_in(value) if os.environ.get(n)}
    if not values:
        yield
        return

    def hide(text: str) -> str:
        for replace in (_replaced, _replaced_cut):
            for secret in sorted(values, key=len, reverse=True):
                text = replace(text, secret, values[secret])
        return text

    problem: Exception
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Warning | str, *rest: Any, **named: Any) -> None:  # noqa: ANN401 (passed on)
            text = hide(str(message))
            before(message if text == str(message) else text, *rest, **named)

        warnings.showwarning = show
        try:
            yield
        except Exception as err:  # noqa: BLE001 (raised again below, without what led to it)
            problem = _without(err, hide)
        else:
            return
    raise problem


def _without(err: Exception, hide: Callable[[str], str]) -> Exception:
    """Return an error that says no values, and has no cause that does."""
    said = "".join(traceback.format_exception(err))
    if hide(said) == said and "input_value=" not in said:
        return err
    err.args = mapped(err.args, hide)
    vars(err).update(mapped(vars(err), hide))
    text = str(err)
    if isinstance(err, ValidationError):
        # It cuts values in the middle.
        problems = [(".".join(map(str, found["loc"])), found["msg"]) for found in err.errors()]
        text = "; ".join(f"{place}: {what}" for place, what in problems)
    if hide(text) != str(err):
        # Some classes make their text of what they hold.
        notes = getattr(err, "__notes__", ())
        err = SurgeryError(hide(text))
        for note in notes:
            err.add_note(note)
    err.__cause__ = err.__context__ = None
    return err


def _replaced(text: str, secret: str, name: str) -> str:
    """Put a name in the place of a value, however it is written."""
    for form in sorted(_forms(secret), key=len, reverse=True):
        if len(form) < MIN_LENGTH or (form != secret and "/" not in form):
            text = re.sub(rf"(?<![^\W_]){re.escape(form)}(?![^\W_])", lambda _: name, text)
        else:
            text = text.replace(form, name)
    return text


def _replaced_cut(text: str, secret: str, name: str) -> str:
    """Put a name in the place of a long value where a message cuts it off."""
    for form in sorted(_forms(secret), key=len, reverse=True):
        start = text.find(form[:MIN_PART]) if len(form) > MIN_PART else -1
        while start >= 0:
            pairs = enumerate(zip(text[start:], form, strict=False))
            end = start + next((i for i, (a, b) in pairs if a != b), len(text) - start)
            # What goes on in another way is another path that begins alike.
            if not re.match(r"[\w/-]", text[end:]):
                text = text[:start] + name + text[end:]
            start = text.find(form[:MIN_PART], start + 1)
    return text


def _forms(secret: str) -> set[str]:
    """Return how messages may write a value: as it is, quoted, or as one of its paths."""
    path = os.path.expanduser(secret)  # noqa: PTH111 (the other raises for unknown users)
    forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1]}
    if "/" in path:
        normal = os.path.normpath(path)
        forms |= {path, normal, os.path.realpath(path), re.sub(r"^(\.{0,2}/)+", "", normal)}
    return forms - {"", "."}


def mapped(value: Any, function: Callable[[str], str]) -> Any:  # noqa: ANN401 (plain data)
    """Apply a function to every text in lists, tuples and values of mappings."""
    if isinstance(value, EnvironmentText):
        return value.written
    if isinstance(value, str):
        return function(value)
    if isinstance(value, PurePath):
        return type(value)(function(str(value)))
    if isinstance(value, Mapping):
        return {key: mapped(each, function) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(each, function) for each in value)
    return value


def _escaped(text: str, *, before_name: bool = False) -> str:
    """Double the dollar signs of text that would begin a name."""
    end = r"|\Z" if before_name else ""
    return re.sub(rf"\$+(?=\{{env:[^{{}}]*\}}{end})", lambda found: 2 * found[0], text)


def _is_name(part: tuple[str, bool]) -> bool:
    return part[1]
