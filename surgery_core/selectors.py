"""Which submodules: immutable, pure selectors over the FQNs and modules of a tree."""

import difflib
import fnmatch
import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from surgery_core.errors import SelectorError

Tree = Mapping[str, nn.Module]
"""Modules by FQN, in the order of `named_modules()`; every alias has an entry of its own."""


class Selector(ABC):
    """A pure choice of FQNs from a tree; combine with `&`, `|` and `~`."""

    @abstractmethod
    def select(self, tree: Tree) -> frozenset[str]:
        """Return the FQNs chosen; the tree is not changed."""

    def __and__(self, other: "Selector") -> "Selector":
        return _Combined(self, other, "&")

    def __or__(self, other: "Selector") -> "Selector":
        return _Combined(self, other, "|")

    def __invert__(self) -> "Selector":
        return _Inverted(self)


@dataclass(frozen=True)
class Exact(Selector):
    """The module at one FQN.

    Example:
        >>> sorted(Exact("0").select(dict(nn.Sequential(nn.ReLU()).named_modules())))
        ['0']
    """

    fqn: str

    def select(self, tree: Tree) -> frozenset[str]:
        """Return the FQN when the tree has it."""
        return frozenset({self.fqn} & tree.keys())

    def __str__(self) -> str:
        return self.fqn


_RANGE = re.compile(r"\{(-?\d+)?\.\.(-?\d+)?\}")


@dataclass(frozen=True)
class Glob(Selector):
    """FQNs by segments: `*` is one segment, `**` any number, `{a..b}` a range of numbers.

    Ranges include both ends; a missing end is open and a negative one counts from the last
    numbered sibling, so `{-8..}` is the last eight. Within a segment `*`, `?` and `[...]` work as in
    a shell, and never cross a dot: `layers.1.*` does not touch `layers.10`.

    Example:
        >>> tree = dict(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()).named_modules())
        >>> sorted(Glob("{-2..}").select(tree))
        ['1', '2']
    """

    pattern: str

    def __post_init__(self) -> None:
        leftover = _RANGE.sub("", self.pattern)
        if "{" in leftover or "}" in leftover:
            msg = (
                f"Selector {self.pattern!r} is malformed: expected ranges as {{a..b}}, "
                f"got {leftover!r} besides them. Write for example 'layers.{{-8..}}.self_attn'."
            )
            raise SelectorError(msg)

    def select(self, tree: Tree) -> frozenset[str]:
        """Return the FQNs that the whole pattern matches."""
        segments = _split(self.pattern)
        siblings = _numbered_siblings(tree)
        return frozenset(
            fqn for fqn in tree if fqn and _matches(segments, fqn.split("."), (), siblings)
        )

    def __str__(self) -> str:
        return self.pattern


@dataclass(frozen=True)
class Regex(Selector):
    """FQNs that a regular expression matches in full."""

    pattern: str

    def __post_init__(self) -> None:
        try:
            # What Python will read in another way one day, such as `[[`, is refused as well.
            with warnings.catch_warnings(action="error", category=FutureWarning):
                re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError, FutureWarning) as err:
            msg = f"Selector 'regex:{self.pattern}' is malformed: {err}."
            raise SelectorError(msg) from None

    def select(self, tree: Tree) -> frozenset[str]:
        """Return the FQNs matched in full."""
        compiled = re.compile(self.pattern)
        return frozenset(fqn for fqn in tree if compiled.fullmatch(fqn))

    def __str__(self) -> str:
        return f"regex:{self.pattern}"


@dataclass(frozen=True)
class OfClass(Selector):
    """Modules of a class.

    A subclass counts only while it keeps the `forward` of the class: one that overrides it computes
    something else, and is matched only when asked for.

    Args:
        cls: The class.
        exact: Match no subclass at all.
        overridden: Match subclasses that override `forward` too.
    """

    cls: type[nn.Module]
    exact: bool = False
    overridden: bool = False

    def select(self, tree: Tree) -> frozenset[str]:
        """Return the FQNs of the modules of the class."""
        return frozenset(fqn for fqn, module in tree.items() if self._accepts(type(module)))

    def _accepts(self, found: type[nn.Module]) -> bool:
        if self.exact or found is self.cls:
            return found is self.cls
        return issubclass(found, self.cls) and (
            self.overridden or found.forward is self.cls.forward
        )

    def __str__(self) -> str:
        return f"class:{self.cls.__module__}:{self.cls.__qualname__}"


@dataclass(frozen=True)
class Where(Selector):
    """Modules that a pure predicate `(fqn, module) -> bool` accepts.

    Args:
        predicate: Must not change the module.
        description: How plans and errors name this selector.
    """

    predicate: Callable[[str, nn.Module], bool]
    description: str = "where(...)"

    def select(self, tree: Tree) -> frozenset[str]:
        """Return the FQNs the predicate accepts."""
        return frozenset(fqn for fqn, module in tree.items() if self.predicate(fqn, module))

    def __str__(self) -> str:
        return self.description


@dataclass(frozen=True)
class _Combined(Selector):
    left: Selector
    right: Selector
    sign: str

    def select(self, tree: Tree) -> frozenset[str]:
        left, right = self.left.select(tree), self.right.select(tree)
        return left & right if self.sign == "&" else left | right

    def __str__(self) -> str:
        return f"({self.left} {self.sign} {self.right})"


@dataclass(frozen=True)
class _Inverted(Selector):
    inner: Selector

    def select(self, tree: Tree) -> frozenset[str]:
        return frozenset(tree.keys() - self.inner.select(tree))

    def __str__(self) -> str:
        return f"~{self.inner}"


def parse_selector(text: str) -> Selector:
    """Read a selector as written in a recipe or on the command line.

    `regex:...` is a full-match regular expression, `class:module:Name` a class, text with `*`, `?`,
    `[` or `{` a glob over segments, and all else one exact FQN.

    Raises:
        SelectorError: The text is malformed, or names no class of a module that is imported; none
            is imported for it.

    Example:
        >>> parse_selector("model.layers.{-8..}.self_attn")
        Glob(pattern='model.layers.{-8..}.self_attn')
        >>> str(parse_selector("class:torch.nn:Linear"))
        'class:torch.nn.modules.linear:Linear'
    """
    prefix, _, rest = text.partition(":")
    if prefix == "regex":
        return Regex(rest)
    if prefix == "class":
        return OfClass(_known_class(rest))
    return Glob(text) if set(text) & set("*?[{}") else Exact(text)


def closest(text: str, tree: Tree, *, most: int = 3) -> list[str]:
    """Return the FQNs most like `text`, best first, at most `most` of them."""
    names = [fqn for fqn in tree if fqn]
    if not set(text) & set("*?[{}"):
        found = difflib.get_close_matches(text, names, n=most, cutoff=0.6)
        if found:
            return found
    # Compare wildcards against names as a person reads them: by what is spelled out.
    literal = re.sub(r"[*?]+|\[.*?\]|" + _RANGE.pattern, "0", text.removeprefix("regex:"))
    return difflib.get_close_matches(literal, names, n=most, cutoff=0.4)


def _known_class(path: str) -> type[nn.Module]:
    """Return a class of a module that is imported, as all are that a model is made of.

    Text of somebody else's must not import others, since that runs their code.
    """
    module_name, _, name = path.partition(":")
    if module_name not in sys.modules:
        msg = (
            f"Selector 'class:{path}' names a class of {module_name!r}, which is not imported: "
            "expected a module that the model is made of. Write 'class:package.module:ClassName', "
            "or import it first."
        )
        raise SelectorError(msg)
    # Not by getattr: some packages import a module of theirs for each name they are asked for.
    found = vars(sys.modules[module_name]).get(name)
    if found is None:
        msg = (
            f"Selector 'class:{path}' names no class: module {module_name!r} has no attribute "
            f"{name!r}. Write 'class:package.module:ClassName'."
        )
        raise SelectorError(msg)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        msg = f"Selector 'class:{path}' names {found!r}: expected a subclass of torch.nn.Module."
        raise SelectorError(msg)
    return found


def _split(pattern: str) -> list[str]:
    """Split at dots that are not inside a range."""
    return re.split(r"\.(?![^{]*\})", pattern)


def _numbered_siblings(tree: Tree) -> dict[tuple[str, ...], list[int]]:
    siblings: dict[tuple[str, ...], set[int]] = {}
    for fqn in tree:
        parts = fqn.split(".")
        # Every segment: the tree offered to an operation may hold `layers.0.attn` alone.
        for i, part in enumerate(parts):
            if part.isdecimal():
                siblings.setdefault(tuple(parts[:i]), set()).add(int(part))
    return {parent: sorted(numbers) for parent, numbers in siblings.items()}


def _matches(
    segments: list[str],
    parts: list[str],
    prefix: tuple[str, ...],
    siblings: Mapping[tuple[str, ...], list[int]],
) -> bool:
    if not segments:
        return not parts
    head, rest = segments[0], segments[1:]
    if head == "**":
        return any(
            _matches(rest, parts[i:], (*prefix, *parts[:i]), siblings)
            for i in range(len(parts) + 1)
        )
    if not parts or not _segment_matches(head, parts[0], siblings.get(prefix, [])):
        return False
    return _matches(rest, parts[1:], (*prefix, parts[0]), siblings)


def _segment_matches(segment: str, part: str, numbers: list[int]) -> bool:
    found = _RANGE.fullmatch(segment)
    if found is None:
        return fnmatch.fnmatchcase(part, segment)
    if not part.isdecimal():
        return False
    low, high = (_bound(end, numbers) for end in found.groups())
    return (low is None or int(part) >= low) and (high is None or int(part) <= high)


def _bound(end: str | None, numbers: list[int]) -> int | None:
    if end is None:
        return None
    value = int(end)
    if value >= 0:
        return value
    # A count beyond the first sibling is below them all, as in a slice: from there is everything,
    # up to there is nothing.
    return numbers[value] if -value <= len(numbers) else -1
