"""YAML, TOML and JSON files as plain data, with the line of every key for messages about it."""

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgery_core.errors import RecipeError, listed
from surgery_core.regular import read_text

Place = tuple[str | int, ...]
"""The way from the top of a document to a value: keys of mappings, and places in lists."""

Line = tuple[Path, int]
"""A file, and a line in it, the first being 1."""

MAX_VALUES = 100_000
"""More than any recipe has; aliases of aliases would grow without bound."""

MAX_DEPTH = 50
"""Deeper than any recipe; what works on a document may recurse."""

MAX_BITS = 64
"""Wider than any number in a recipe; Python refuses to write much wider ones in messages."""

SUFFIXES = (".yaml", ".yml", ".toml", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What a file says, and where.

    Args:
        path: The file.
        data: Mappings, lists, text, numbers, booleans and None.
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


def is_document(path: Path) -> bool:
    """Tell by its suffix whether a file has one of the formats."""
    return path.suffix.lower() in SUFFIXES


def read_document(path: Path) -> Document:
    """Read a file; its suffix says in which format.

    Raises:
        RecipeError: It cannot be read, is malformed, has a key twice, or has values of another kind,
            such as dates.
    """
    if not is_document(path):
        msg = (
            f"File {str(path)!r} has an unknown format: expected a suffix of {listed(SUFFIXES)}. "
            "Rename it."
        )
        raise RecipeError(msg)
    try:
        # Some editors begin a file with a byte-order mark.
        text = read_text(path, encoding="utf-8-sig")
    except (OSError, ValueError) as err:
        msg = f"File {str(path)!r} cannot be read: {err}. Pass a file of text."
        raise RecipeError(msg) from err
    try:
        document = _READERS[path.suffix.lower()](path, text)
        problems = list(_problems(document))
    except RecursionError:
        msg = f"{path}: values are nested deeper than {MAX_DEPTH}: expected at most that. Flatten them."
        raise RecipeError(msg) from None
    if problems:
        raise RecipeError("\n".join(problems), problems=problems)
    return document


def read_scalar(text: str) -> Any:  # noqa: ANN401 (plain data)
    """Read text from a command line as YAML reads a scalar: a number, true, false, null, or text.

    Text that YAML would read as a list, a mapping or an alias stays text, as patterns do; so does
    what is in quotes, without them.

    Raises:
        ValueError: Quotes are not closed, or there is something behind them.

    Example:
        >>> [read_scalar(text) for text in ("8", "1e-3", "true", "*.up", '"8"', "")]
        [8, 0.001, True, '*.up', '8', '']
    """
    if text[:1] in ('"', "'"):
        try:
            node = yaml.compose(text, Loader=_Loader)
        except (yaml.YAMLError, ArithmeticError, ValueError) as err:
            what = _said(err) if isinstance(err, yaml.MarkedYAMLError) else "no such character"
            raise ValueError(what) from err
        if not isinstance(node, yaml.ScalarNode):
            msg = "expected nothing behind the quotes"
            raise ValueError(msg)
        return node.value
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    try:
        # Nothing at all is text, too.
        return loader.construct_object(yaml.ScalarNode(tag, text)) if text else ""
    except (yaml.YAMLError, *_NO_VALUE):
        return text


def write_yaml(data: Mapping[str, Any]) -> str:
    """Write plain data as YAML that `read_document` reads as the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for two surprises: `1e-3` is a number, as in TOML and JSON, and dates are text."""


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that `_Loader` would take for a number, or for the end of a line."""


def _represented(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes some ends of lines as they are, and reads them as spaces.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represented)

_MAP, _SEQ, _FLOAT, _DATE, _MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "float", "timestamp", "merge")
)
_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != _DATE]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))
del _class

_NO_VALUE = (ArithmeticError, AttributeError, LookupError, ValueError)
"""What PyYAML raises for a scalar that is not what its tag says."""


def _said(err: yaml.MarkedYAMLError) -> str:
    """Return what an error of PyYAML's says, without its excerpts of the text."""
    return ", ".join(part for part in (err.context, err.problem) if part)


def _read_yaml(path: Path, text: str) -> Document:
    document, problems = _built(path, text)
    if problems:
        raise RecipeError("\n".join(problems), problems=problems)
    return document


def _built(path: Path, text: str) -> tuple[Document, list[str]]:
    """Return what YAML says, and what is wrong with it besides its syntax."""
    try:
        builder = _Builder(path, _Loader(text))
        document = builder.document()
    except yaml.reader.ReaderError as err:
        line = text.count("\n", 0, err.position) + 1
        msg = f"{path}:{line}: no valid YAML: character {text[err.position]!r}. Write it as an escape."
        raise RecipeError(msg) from err
    except yaml.MarkedYAMLError as err:
        where = f"{path}:{err.problem_mark.line + 1}" if err.problem_mark is not None else path
        msg = f"{where}: no valid YAML: {_said(err)}. Fix the line."
        raise RecipeError(msg) from err
    except RecipeError:
        raise
    except (ArithmeticError, ValueError) as err:
        # PyYAML looks for a character of any number after a backslash.
        msg = f"{path}: no valid YAML: an escape stands for no character. Fix the file."
        raise RecipeError(msg) from err
    # Aliases say the same again.
    return document, list(dict.fromkeys(builder.problems))


class _Builder:
    """Makes plain data of YAML nodes, and notes their lines and what is wrong with them."""

    def __init__(self, path: Path, loader: yaml.SafeLoader) -> None:
        self._path, self._loader = path, loader
        self._lines: dict[Place, Line] = {}
        self._count = 0
        self.problems: list[str] = []

    def document(self) -> Document:
        node = self._loader.get_single_node()
        data = None if node is None else self._value(node, (), 1)
        return Document(path=self._path, data=data, lines=self._lines)

    def _value(self, node: yaml.Node, place: Place, line: int) -> Any:  # noqa: ANN401 (plain data)
        self._count += 1
        if self._count > MAX_VALUES:
            msg = f"{self._path}: more than {MAX_VALUES:,} values: expected at most that. Split it."
            raise RecipeError(msg)
        if len(place) > MAX_DEPTH:
            raise RecursionError
        self._lines[place] = (self._path, line)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in (_MAP, _SEQ):
            self._note(node, f"no valid YAML: tag {node.tag!r} has no meaning here. Remove it.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place, line)
        return [self._value(each, (*place, i), _line(each)) for i, each in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, place: Place, line: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        own = [(key, value) for key, value in node.value if key.tag != _MERGE]
        # What is merged in goes behind the mapping's own keys, and behind what was merged before.
        for key_node, value_node in reversed(node.value):
            if key_node.tag == _MERGE:
                found |= self._merged_in(value_node, place, line)
        seen = set()
        for key_node, value_node in own:
            key = self._key(key_node)
            if key in seen:
                self._note(key_node, _twice(key))
            seen.add(key)
            found[key] = self._value(value_node, (*place, key), _line(key_node))
        return found

    def _merged_in(self, node: yaml.Node, place: Place, line: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            values = self._value(part, place, line)
            if isinstance(values, dict):
                found |= values
            else:
                self._note(node, f"'<<' merges mappings: expected one, got {values!r:.80}. Fix it.")
        return found

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            self._note(node, "key is a list or a mapping: expected text. Write text.")
            return ""
        key = self._scalar(node)
        if not isinstance(key, str):
            what = f"key {node.value!r} is no text: expected text, got {key!r}"
            self._note(node, f"{what}. Put it in quotes.")
        return str(key)

    def _scalar(self, node: yaml.ScalarNode) -> Any:  # noqa: ANN401 (plain data)
        try:
            return self._loader.construct_object(node)
        except _NO_VALUE:
            what = f"{node.value!r:.80} is no value of its type {node.tag.rpartition(':')[2]!r}"
            self._note(node, f"no valid YAML: {what}. Put it in quotes.")
            return None

    def _note(self, node: yaml.Node, what: str) -> None:
        self.problems.append(f"{self._path}:{_line(node)}: {what}")


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def _twice(key: str) -> str:
    return f"key {key!r} is there twice: expected it once. Remove one."


def _read_json(path: Path, text: str) -> Document:
    twice: list[str] = []

    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.extend(f"{path}: {_twice(key)}" for key in found if keys.count(key) > 1)
        return found

    try:
        data = json.loads(text, object_pairs_hook=without_doubles)
    except ValueError as err:
        line = f":{err.lineno}" if isinstance(err, json.JSONDecodeError) else ""
        what = err.msg if isinstance(err, json.JSONDecodeError) else err
        msg = f"{path}{line}: no valid JSON: {what}. Fix the {'line' if line else 'file'}."
        raise RecipeError(msg) from err
    try:
        # Most JSON is YAML, of which the lines are known, but for tabs.
        document, problems = _built(path, text.replace("\t", " "))
    except (RecipeError, RecursionError):
        document, problems = Document(path=path, data=None, lines={}), []
    if twice:
        twice = problems or twice
        raise RecipeError("\n".join(twice), problems=twice)
    return Document(path=path, data=data, lines=document.lines)


_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
_KEYS = rf"({_KEY}(?:[ \t]*\.[ \t]*{_KEY})*)"
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_KEY}[ \t]*\.[ \t]*){{{MAX_DEPTH + 1}}}")
"""Of which tomllib notes every beginning, as long as they are."""
_HEADER = re.compile(rf"[ \t]*(\[\[?)[ \t]*{_KEYS}")
_ASSIGNMENT = re.compile(rf"[ \t]*{_KEYS}[ \t]*=")
_TOKEN = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|"(?:\\.|[^"\\\n])*"'''
    r"""|'''.*?'{3,5}|'[^'\n]*'|\#[^\n]*|[\[\]{}\n]""",
    re.DOTALL,
)
"""Text, a comment, a bracket or the end of a line."""


def _read_toml(path: Path, text: str) -> Document:
    if _LONG_KEY.search(text):
        raise RecursionError
    try:
        data = tomllib.loads(text)
    except ValueError as err:
        found = re.search(r"\(at line (\d+), column \d+\)$", str(err))
        line = f":{found[1]}" if found else ""
        msg = f"{path}{line}: no valid TOML: {err}. Fix the {'line' if line else 'file'}."
        raise RecipeError(msg) from err
    lines: dict[Place, Line] = {(): (path, 1)}
    for place, number in _toml_lines(text):
        # Where a table is first mentioned.
        lines.setdefault(place, (path, number))
    return Document(path=path, data=data, lines=lines)


def _toml_lines(text: str) -> Iterator[tuple[Place, int]]:
    """Yield the lines of headers and keys; tomllib does not tell them."""
    prefix: Place = ()
    counts: dict[Place, int] = {}
    for number, line in _toml_statements(text):
        if header := _HEADER.match(line):
            *parents, last = _toml_keys(header[2])
            _check_depth(len(parents))
            prefix = ()
            for key in parents:
                prefix = (*prefix, key)
                yield prefix, number
                if prefix in counts:
                    # Tables inside an array of tables belong to its latest item.
                    prefix = (*prefix, counts[prefix])
            prefix = (*prefix, last)
            yield prefix, number
            if header[1] == "[[":
                counts[prefix] = counts.get(prefix, -1) + 1
                prefix = (*prefix, counts[prefix])
                yield prefix, number
        elif assignment := _ASSIGNMENT.match(line):
            keys = _toml_keys(assignment[1])
            _check_depth(len(prefix) + len(keys))
            yield from (((*prefix, *keys[:end]), number) for end in range(1, len(keys) + 1))


def _check_depth(depth: int) -> None:
    """Stop before places are made of it, whose sizes add up to its square."""
    if depth > MAX_DEPTH:
        raise RecursionError


def _toml_statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not inside a text or a list that began on another line."""
    lines = text.split("\n")
    number, depth = 1, 0
    yield number, lines[0]
    for token in _TOKEN.finditer(text):
        number += token[0].count("\n")
        if token[0] in ("[", "{"):
            depth += 1
        elif token[0] in ("]", "}"):
            depth -= 1
        elif token[0] == "\n" and not depth:
            yield number, lines[number - 1]


def _toml_keys(text: str) -> list[str]:
    """Split a dotted key as TOML does."""
    found: Any = tomllib.loads(f"{text} = 0")
    keys = []
    while isinstance(found, dict):
        ((key, found),) = found.items()
        keys.append(key)
    return keys


_READERS: Mapping[str, Callable[[Path, str], Document]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".toml": _read_toml,
    ".json": _read_json,
}


def _problems(document: Document) -> Iterator[str]:
    """Yield what is wrong with values, whatever the format."""
    todo: list[tuple[Place, Any]] = [((), document.data)]
    while todo:
        place, value = todo.pop()
        if len(place) > MAX_DEPTH:
            raise RecursionError
        if isinstance(value, dict):
            todo += [((*place, key), value[key]) for key in reversed(value)]
        elif isinstance(value, list):
            todo += [((*place, i), value[i]) for i in reversed(range(len(value)))]
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            where = f"{document.where(place)}: {describe_place(place)}"
            got = f"one of {value.bit_length()}"
            yield f"{where}: expected a whole number of at most {MAX_BITS} bits, got {got}. Change it."
        elif not isinstance(value, str | int | float | None) or value != value:  # noqa: PLR0124 (not a number)
            where = f"{document.where(place)}: {describe_place(place)}"
            yield f"{where}: expected text, a number, true, false or null, got {value!r:.80}. Put it in quotes."


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


_PLAIN = re.compile(r"[^\s.\[\]'\"]+")


def describe_place(place: Iterable[str | int]) -> str:
    """Write a place as people do; keys that would be read otherwise are in quotes.

    Example:
        >>> describe_place(("models", "chat", "rules", 0, "select"))
        'models.chat.rules[0].select'
        >>> describe_place(("models", "llama-3.1"))
        "models.'llama-3.1'"
    """
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            is_plain = step.isprintable() and _PLAIN.fullmatch(step)
            text += f".{step}" if is_plain else f".{step!r}"
    return text.removeprefix(".") or "the recipe"
