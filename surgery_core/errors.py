"""What can go wrong: one root, narrow leaves that also derive from the builtin a caller expects."""

from collections.abc import Iterable, Sequence

MAX_NAMED = 5
"""How many items an error message names before it says how many more there are."""


class SurgeryError(Exception):
    """Root of every error this package raises on purpose."""


class NoMatchError(SurgeryError, LookupError):
    """A selector matched nothing, or an exclusion excluded nothing.

    Attributes:
        selector: The selector as written.
        candidates: Closest FQNs, best first.
    """

    def __init__(self, message: str, *, selector: str, candidates: Sequence[str]) -> None:
        super().__init__(message)
        self.selector = selector
        self.candidates = tuple(candidates)


class SelectorError(SurgeryError, ValueError):
    """A selector is malformed."""


class ConflictError(SurgeryError, ValueError):
    """Two claims want the same module, or one wants a module inside the other's.

    Attributes:
        claims: `(operation name, fqn)` of both sides, for every conflict found.
    """

    def __init__(
        self, message: str, *, claims: Sequence[tuple[tuple[str, str], tuple[str, str]]]
    ) -> None:
        super().__init__(message)
        self.claims = tuple(claims)


class ContractError(SurgeryError, TypeError):
    """A module or a replacement is not what its operation needs or promised.

    Attributes:
        fqn: Where.
        expected: What the contract says.
        actual: What was found.
    """

    def __init__(self, message: str, *, fqn: str, expected: object, actual: object) -> None:
        super().__init__(message)
        self.fqn = fqn
        self.expected = expected
        self.actual = actual


class OptionsError(SurgeryError, ValueError):
    """The options of a rule or a configuration are invalid."""


class RecipeError(OptionsError):
    """A recipe cannot be read, or is none.

    Attributes:
        problems: Each on a line of its own, with file and line where they are known.
    """

    def __init__(self, message: str, *, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


class RecordError(SurgeryError, ValueError):
    """A record cannot be read, is damaged, or is of another model."""


class PreflightError(SurgeryError, RuntimeError):
    """A model is wrapped or placed in a way in which it cannot be worked on.

    Attributes:
        diagnostics: What was found, each with what to do.
    """

    def __init__(self, message: str, *, diagnostics: Sequence[object]) -> None:
        super().__init__(message)
        self.diagnostics = tuple(diagnostics)


class DriftError(SurgeryError, RuntimeError):
    """The model is not in the state a plan, a surgery or a swap state left it in.

    Attributes:
        fqns: The slots that hold something else, sorted.
    """

    def __init__(self, message: str, *, fqns: Sequence[str]) -> None:
        super().__init__(message)
        self.fqns = tuple(sorted(fqns))


class VariantError(SurgeryError, ValueError):
    """A named variant does not exist, exists already, or cannot take part in a transition."""


class PluginError(SurgeryError):
    """A plugin cannot be used.

    Attributes:
        plugin: Name under which the plugin was found or registered.
        distribution: `name version` of its distribution, or None when it has none.
    """

    def __init__(self, message: str, *, plugin: str, distribution: str | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin
        self.distribution = distribution


class UnknownOperationError(SurgeryError, LookupError):
    """No loaded plugin offers the operation a rule names."""


class StateError(SurgeryError, ValueError):
    """Tensors given for an adapter do not fit.

    Attributes:
        missing: Names expected and not given, sorted.
        unexpected: Names given and not expected, sorted.
        mismatched: `name: reason` of tensors that do not fit, sorted.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = tuple(sorted(missing))
        self.unexpected = tuple(sorted(unexpected))
        self.mismatched = tuple(sorted(mismatched))


class SurgeryWarning(UserWarning):
    """Something a user should know that does not stop the work."""


def listed(items: Iterable[object], *, most: int = MAX_NAMED) -> str:
    """Write items for a message: quoted, at most `most` of them, and how many more there are.

    Example:
        >>> listed(["b", "a"])
        "'b', 'a'"
        >>> listed(range(8), most=2)
        '0, 1 and 6 more'
    """
    shown = [repr(item) for item in items]
    if not shown:
        return "nothing"
    text = ", ".join(shown[:most])
    return text if len(shown) <= most else f"{text} and {len(shown) - most} more"


for _error in (
    SurgeryError,
    NoMatchError,
    SelectorError,
    ConflictError,
    ContractError,
    OptionsError,
    RecipeError,
    RecordError,
    PreflightError,
    DriftError,
    VariantError,
    PluginError,
    UnknownOperationError,
    StateError,
    SurgeryWarning,
):
    # Tracebacks then show the name a user imports: surgery_core.NoMatchError.
    _error.__module__ = "surgery_core"
del _error
