"""What a recipe's file says once the recipes it extends and its variables are put in their places."""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery_core.documents import (
    Document,
    Place,
    describe_place,
    merged,
    read_document,
    read_scalar,
)
from surgery_core.environment import EnvironmentText, joined, mapped
from surgery_core.errors import RecipeError, listed

_VARIABLE = re.compile(r"\$\$|\$\{([^{}]*)\}|\$\{")
_ENVIRONMENT = "env:"
_NAME = re.compile(r"(\$+\{env:[^{}]*\})")

MAX_EXTENDED = 50
"""More files than any recipe is made of; two that each extend the next twice would double them."""

MAX_TEXT = 1_000_000
"""More characters than the variables of any recipe put in; variables in variables multiply."""


def read_recipe_document(path: Path, variables: Mapping[str, str]) -> Document:
    """Read a file, lay it over those it extends, and put in the values of variables.

    Args:
        path: The file.
        variables: Values for variables that the file has, in place of its own.

    Returns:
        What is left: neither `extends` nor `variables`. Text with variables of the environment in it
        knows how it is written, and shows as that.

    Raises:
        RecipeError: A file cannot be read, or names no recipes to extend; or there are variables
            without a value, which are all named.
    """
    document = _extended(path, (), [])
    data = dict(document.data)
    substitution = _Substitution(document)
    substitution.define(data.pop("variables", None) or {}, variables)
    values = substitution.apply(data)
    if substitution.problems:
        raise RecipeError("\n".join(substitution.problems), problems=substitution.problems)
    return Document(path=path, data=values, lines=document.lines)


def escaped(value: Any) -> Any:  # noqa: ANN401 (plain data)
    """Return plain data that gives the same once variables are put in."""
    return mapped(value, lambda text: text.replace("$", "$$"))


def as_in_file(value: Any) -> Any:  # noqa: ANN401 (plain data)
    """Return what a recipe's fields hold as its file has it: escaped but for names of `${env:NAME}`."""

    def write(text: str) -> str:
        pieces = _NAME.split(text)
        return "".join(piece if i % 2 else escaped(piece) for i, piece in enumerate(pieces))

    return mapped(value, write)


def did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return a hint at what was probably meant, for the end of a message; nothing if that is unclear."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _extended(path: Path, chain: tuple[Path, ...], read: list[Path]) -> Document:
    if len(read) == MAX_EXTENDED:
        msg = (
            f"Recipe {str(read[0])!r} extends more than {MAX_EXTENDED} files, the next being "
            f"{str(path)!r}: expected fewer, each read as often as it is named. Put some together."
        )
        raise RecipeError(msg)
    read.append(path)
    document = read_document(path)
    resolved = path.resolve()
    if resolved in chain:
        msg = f"Recipe {str(path)!r} extends itself, through {listed(map(str, chain))}. Break it."
        raise RecipeError(msg)
    if not isinstance(document.data, dict):
        msg = f"{path}: no recipe: expected a mapping with models, got {document.data!r:.80}."
        raise RecipeError(msg)
    data = dict(document.data)
    extends = data.pop("extends", ())
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        if extends == ():
            return document
        where = document.where(("extends",))
        msg = f"{where}: extends: expected paths of recipes, got {extends!r:.80}."
        raise RecipeError(msg)
    found = Document(path=path, data={}, lines={})
    for name in names:
        # For unknown users, Path.expanduser raises.
        below_path = path.parent / os.path.expanduser(name)  # noqa: PTH111
        try:
            below = _extended(below_path, (*chain, resolved), read)
        except RecipeError as err:
            err.add_note(f"{document.where(('extends',))}: extends")
            raise
        _move_sources(below.data, Path(name).parent)
        found = merged(found, below)
    return merged(found, Document(path=path, data=data, lines=document.lines))


def _move_sources(data: Mapping[str, Any], folder: Path) -> None:
    """Have sources in a recipe of another folder begin there."""
    models = [model for model in _values_of(data.get("models")) if isinstance(model, dict)]
    adapters = [each for model in models for each in _values_of(model.get("adapters"))]
    for part in [*models, *adapters]:
        source = part.get("source") if isinstance(part, dict) else None
        if isinstance(source, str) and source.startswith("."):
            # A dollar sign would begin a variable.
            moved = f"{folder}/".replace("$", "$$") + source
            part["source"] = moved if moved.startswith((".", "~", "/")) else f"./{moved}"


def _values_of(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


class _Substitution:
    """Puts values in the place of variables, and notes what is wrong with either."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._values: dict[str, Any] = {}
        self._length = 0
        self.problems: list[str] = []

    def define(self, known: object, given: Mapping[str, str]) -> None:
        """Take over the variables of a recipe, with the values given in place of its own."""
        if not isinstance(known, dict):
            self._note(("variables",), f"expected names with values, got {known!r:.80}")
            return
        for name in sorted(given.keys() - known.keys()):
            hint = did_you_mean(name, known) or f": expected one of {listed(sorted(known))}"
            self.problems.append(f"{self._document.path}: no variable {name!r}{hint}")
        for name, own in known.items():
            place = ("variables", name)
            value = self._given(name, given[name]) if name in given else self.apply(own, place)
            if isinstance(value, dict | list):
                self._note(place, f"expected a single value, got {value!r:.80}")
            self._values[name] = value

    def _given(self, name: str, text: str) -> Any:  # noqa: ANN401 (plain data)
        try:
            return read_scalar(text)
        except ValueError as err:
            self.problems.append(f"variable {name!r} is no value: {err}, got {text!r}")
            return ""

    def apply(self, value: Any, place: Place = ()) -> Any:  # noqa: ANN401 (plain data)
        if isinstance(value, dict):
            return {key: self.apply(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.apply(item, (*place, i)) for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        whole = _VARIABLE.fullmatch(value)
        if whole and whole[1] is not None:
            # Alone, a variable keeps its type.
            return self._value(whole[1], place)
        pieces, end = [], 0
        for found in _VARIABLE.finditer(value):
            pieces += [value[end : found.start()], self._text(found, place)]
            end = found.end()
        return joined([*pieces, value[end:]])

    def _text(self, found: re.Match[str], place: Place) -> str:
        if found[1] is not None:
            value = self._value(found[1], place)
            # Text as it is, and other values as recipes write them.
            text = value if isinstance(value, str) else json.dumps(value)
            self._count(text, place)
            return text
        if found[0] == "${":
            self._note(place, "'${' begins a variable that does not end, and $$ is a dollar sign")
        return "$"

    def _count(self, text: str, place: Place) -> None:
        """Stop before variables have multiplied to more than there is memory for."""
        self._length += len(text)
        if self._length > MAX_TEXT:
            where = f"{self._document.where(place)}: {describe_place(place)}"
            msg = f"{where}: variables give more than {MAX_TEXT:,} characters. Use fewer."
            raise RecipeError(msg)

    def _value(self, name: str, place: Place) -> Any:  # noqa: ANN401 (plain data)
        if name in self._values:
            return self._values[name]
        variable = name.removeprefix(_ENVIRONMENT)
        if name != variable:
            if variable not in os.environ:
                self._note(place, f"no environment variable {variable!r}")
            return EnvironmentText([(variable, True)])
        hint = did_you_mean(name, self._values)
        before = " further up" if place[:1] == ("variables",) else ""
        self._note(place, f"no variable {name!r}{before}{hint or ', and $$ is a dollar sign'}")
        return ""

    def _note(self, place: Place, what: str) -> None:
        self.problems.append(f"{self._document.where(place)}: {describe_place(place)}: {what}")


EXPECTED: Mapping[str, str] = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "greater_than_equal": "at least {ge}",
}
"""By pydantic's kind of error, in the words of recipes."""


def what_is_wrong(error: Mapping[str, Any], expected: Mapping[str, str]) -> str:
    """Say one of pydantic's errors in words of our own, if there are some for its kind.

    Args:
        error: As `ValidationError.errors()` has it.
        expected: What is expected, by kind.
    """
    if error["type"] in expected:
        words = expected[error["type"]].format(**error.get("ctx", {}))
        return f"expected {words}, got {error['input']!r:.80}"
    found: str = error["msg"]
    return found.removeprefix("Value error, ")
