"""Files of settings: YAML, TOML or JSON, validated by a pydantic model, problems with file and line."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from surgery_core.documents import Document, Place, describe_place, read_document
from surgery_core.errors import RecipeError, listed
from surgery_core.recipe_document import EXPECTED, did_you_mean, what_is_wrong

SettingsT = TypeVar("SettingsT", bound=BaseModel)

_EXPECTED = {
    **EXPECTED,
    "model_attributes_type": "a mapping",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}
"""By pydantic's kind of error, in the words of recipes."""


def load_settings(path: str | os.PathLike[str], cls: type[SettingsT]) -> SettingsT:
    """Read a file of settings.

    Args:
        path: The file; its suffix says in which format.
        cls: What it must be: a pydantic model that forbids other keys. Its validators say what they
            expect with a `ValueError`.

    Raises:
        RecipeError: The file cannot be read, or is something else; every problem is named, with its
            line and, for a key that is unknown, the one that was probably meant.

    Example:
        >>> import tempfile
        >>> class Settings(BaseModel, extra="forbid"):
        ...     steps: int
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "settings.yaml"
        ...     _ = path.write_text("steps: 3")
        ...     load_settings(path, Settings)
        Settings(steps=3)
    """
    document = read_document(Path(path))
    try:
        return cls.model_validate(document.data)
    except ValidationError as err:
        problems = [_problem(document, cls, dict(found)) for found in err.errors()]
        raise RecipeError("\n".join(problems), problems=problems) from None


def _problem(document: Document, cls: type[BaseModel], error: Mapping[str, Any]) -> str:
    """Write one of pydantic's errors as a line."""
    place, kind = tuple(error["loc"]), error["type"]
    if kind == "extra_forbidden":
        known = [*_model_at(cls, place[:-1]).model_fields]
        hint = did_you_mean(str(place[-1]), known) or f": expected one of {listed(known, most=99)}"
        return f"{document.where(place)}: {_said(place[:-1])}unknown key {place[-1]!r}{hint}"
    if kind == "missing":
        what = f"expected {place[-1]!r}, got no such key"
        return f"{document.where(place[:-1])}: {_said(place[:-1])}{what}"
    what = what_is_wrong(error, _EXPECTED)
    return f"{document.where(place)}: {_said(place)}{what}"


def _said(place: Place) -> str:
    return f"{describe_place(place)}: " if place else ""


def _model_at(cls: type[BaseModel], place: Place) -> type[BaseModel]:
    """Return the model of a mapping inside the settings."""
    for step in place:
        inner = cls.model_fields[str(step)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        cls = inner
    return cls
