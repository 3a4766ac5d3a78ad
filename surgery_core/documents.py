"""YAML, TOML and JSON files as plain data, with the line of every key for messages about it."""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgery_core.errors import RecipeError, listed

Place = tuple[str | int, ...]
"""The way from the top of a document to a value: keys of mappings, and places in lists."""

Line = tuple[Path, int]
"""A file, and a line in it, the first being 1."""

MAX_VALUES = 100_000
"""More than any recipe has; aliases of aliases would grow without bound."""

SUFFIXES = (".yaml", ".yml", ".toml", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What a file says, and where.

    Args:
        path: The file.
        data: Mappings, lists and scalars.
        lines: Where each value begins, as far as the format tells.
    """

    path: Path
    data: Any
    lines: Mapping[Place, Line]

    def where(self, place: Place) -> str:
        """Return `file:line` of a value, or of the innermost value around it that has a line."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.lines:
                path, line = self.lines[place[:end]]
                return f"{path}:{line}"
        return str(self.path)


def read_document(path: Path) -> Document:
    """Read a file; its suffix says in which format.

    Raises:
        RecipeError: It cannot be read, is malformed, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        msg = f"Recipe {str(path)!r} cannot be read: {err}. Pass a file of text."
        raise RecipeError(msg) from err
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path, text)
    if path.suffix == ".toml":
        return _read_toml(path, text)
    if path.suffix == ".json":
        return _read_json(path, text)
    msg = f"Recipe {str(path)!r} has an unknown format: expected a suffix of {listed(SUFFIXES)}."
    raise RecipeError(msg)


def _read_yaml(path: Path, text: str) -> Document:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()  # type: ignore[no-untyped-call]
        lines: dict[Place, Line] = {}
        data = None if node is None else _Builder(path, loader, lines).build(node, ())
    except yaml.MarkedYAMLError as err:
        line = f":{err.problem_mark.line + 1}" if err.problem_mark is not None else ""
        msg = f"{path}{line}: no valid YAML: {err.problem}. Fix the line."
        raise RecipeError(msg) from err
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        msg = f"{path}: no valid YAML: {err}. Fix the file."
        raise RecipeError(msg) from err
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]
    return Document(path=path, data=data, lines=lines)


class _Builder:
    """Makes plain data of YAML nodes, and notes their lines."""

    def __init__(self, path: Path, loader: yaml.SafeLoader, lines: dict[Place, Line]) -> None:
        self._path, self._loader, self._lines = path, loader, lines
        self._count = 0

    def build(self, node: yaml.Node, place: Place) -> Any:  # noqa: ANN401 (plain data)
        self._count += 1
        if self._count > MAX_VALUES:
            msg = f"{self._path}: more than {MAX_VALUES:,} values: expected a recipe. Split it."
            raise RecipeError(msg)
        self._lines.setdefault(place, (self._path, node.start_mark.line + 1))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*place, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self._loader.construct_object(node)  # type: ignore[no-untyped-call]
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._loader.construct_object(key_node)  # type: ignore[no-untyped-call]
            if not isinstance(key, str):
                msg = (
                    f"{self._path}:{line}: key {key_node.value!r} is no text: expected text, got "
                    f"{key!r}. Put it in quotes."
                )
                raise RecipeError(msg)
            if key in found:
                _raise_twice(f"{self._path}:{line}", key)
            self._lines[*place, key] = (self._path, line)
            found[key] = self.build(value_node, (*place, key))
        return found


def _read_json(path: Path, text: str) -> Document:
    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            _raise_twice(str(path), next(key for key in keys if keys.count(key) > 1))
        return found

    try:
        data = json.loads(text, object_pairs_hook=without_doubles)
    except json.JSONDecodeError as err:
        msg = f"{path}:{err.lineno}: no valid JSON: {err.msg}. Fix the line."
        raise RecipeError(msg) from err
    except RecursionError as err:
        msg = f"{path}: no valid JSON: {err}. Fix the file."
        raise RecipeError(msg) from err
    try:
        # Most JSON is YAML, of which the lines are known.
        lines = _read_yaml(path, text).lines
    except RecipeError:
        lines = {}
    return Document(path=path, data=data, lines=lines)


_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*\]\]?\s*(?:\#.*)?$")
_ASSIGNMENT = re.compile(rf"\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*=")


def _read_toml(path: Path, text: str) -> Document:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        found = re.search(r"line (\d+)", str(err))
        line = f":{found[1]}" if found else ""
        msg = f"{path}{line}: no valid TOML: {err}. Fix the line."
        raise RecipeError(msg) from err
    lines = {place: (path, line) for place, line in _toml_lines(text)}
    return Document(path=path, data=data, lines={(): (path, 1), **lines})


def _toml_lines(text: str) -> Iterator[tuple[Place, int]]:
    """Yield the lines of headers and keys; tomllib does not tell them."""
    prefix: Place = ()
    counts: dict[Place, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            prefix = _toml_keys(header[2])
            # Tables inside an array of tables belong to its latest item.
            for end in range(1, len(prefix)):
                if prefix[:end] in counts:
                    prefix = (*prefix[:end], counts[prefix[:end]], *prefix[end:])
            if header[1] == "[[":
                counts[prefix] = counts.get(prefix, -1) + 1
                prefix = (*prefix, counts[prefix])
            yield prefix, number
        elif assignment := _ASSIGNMENT.match(line):
            keys = _toml_keys(assignment[1])
            yield from ((prefix + keys[:end], number) for end in range(1, len(keys) + 1))


def _toml_keys(text: str) -> Place:
    """Split a dotted key as TOML does."""
    found: Any = tomllib.loads(f"{text} = 0")
    keys: list[str | int] = []
    while isinstance(found, dict):
        ((key, found),) = found.items()
        keys.append(key)
    return tuple(keys)


def _raise_twice(where: str, key: str) -> None:
    msg = f"{where}: key {key!r} is there twice: expected it once. Remove one."
    raise RecipeError(msg)


def merged(base: Document, over: Document) -> Document:
    """Lay one document over another: mappings are merged, everything else is replaced."""
    lines: dict[Place, Line] = dict(base.lines)

    def merge(low: Any, high: Any, place: Place) -> Any:  # noqa: ANN401 (plain data)
        if not (isinstance(low, dict) and isinstance(high, dict)):
            for known in [known for known in lines if known[: len(place)] == place]:
                del lines[known]
            return high
        return {
            **low,
            **{
                key: merge(low[key], value, (*place, key)) if key in low else value
                for key, value in high.items()
            },
        }

    data = merge(base.data, over.data, ())
    return Document(path=over.path, data=data, lines={**lines, **over.lines})


def describe_place(place: Iterable[str | int]) -> str:
    """Write a place as people do.

    Example:
        >>> describe_place(("models", "chat", "rules", 0, "select"))
        'models.chat.rules[0].select'
    """
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".") or "the recipe"
