"""The config file: several models, each with rules, several adapters, and which of them is active."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from surgery_core.documents import Document, Place, describe_place, write_yaml
from surgery_core.environment import REFERENCE, as_written, names_in, put_in
from surgery_core.errors import OptionsError, RecipeError, listed
from surgery_core.names import can_name_folder, name_problem
from surgery_core.operation import BASE, Rule
from surgery_core.recipe_document import (
    EXPECTED,
    as_in_file,
    did_you_mean,
    read_recipe_document,
    what_is_wrong,
)
from surgery_core.selectors import parse_selector

VERSION = 1
"""Of the format of recipes."""

_TAKEN = {"rules": "the model's rules", BASE: "the model without an adapter"}
"""Names that no adapter can have, and what they stand for."""


def _checked_name(name: str) -> str:
    if not can_name_folder(name):
        msg = (
            "expected a name that a folder can have: not empty, without '/', '\\', ':', control "
            "characters and a dot at its beginning"
        )
        raise ValueError(msg)
    if (problem := name_problem(name)) is not None:
        msg = f"name cannot be saved: {problem}. Choose another"
        raise ValueError(msg)
    return name


def _checked_adapter_name(name: str) -> str:
    if name in _TAKEN:
        msg = f"expected another name: this one stands for {_TAKEN[name]}"
        raise ValueError(msg)
    return _checked_name(name)


def _checked_selectors(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return _checked_selector(value)
    texts = (
        [text for text in value if isinstance(text, str)] if isinstance(value, list | tuple) else []
    )
    if not isinstance(value, list | tuple) or not texts or len(texts) < len(value):
        msg = f"expected a selector or several, as text, got {value!r:.80}"
        raise ValueError(msg)
    return tuple(map(_checked_selector, texts))


def _checked_plain(text: str) -> str:
    """Refuse variables of the environment where plans and records show what a value stands for."""
    if REFERENCE.search(text):
        msg = (
            f"expected no variable of the environment here, got {text!r:.80}: plans and records show "
            "this. Name a variable of the recipe, and give its value with --var"
        )
        raise ValueError(msg)
    return text


def _checked_selector(text: str) -> str:
    _checked_plain(text)
    kind, _, rest = text.partition(":")
    if kind == "class":
        # Whether there is such a class shows when it is imported, not before.
        module, _, name = rest.partition(":")
        if not (module and name):
            msg = f"Selector {text!r} is malformed. Write 'class:package.module:ClassName'."
            raise ValueError(msg)
        return text
    try:
        parse_selector(text)
    except (OverflowError, RecursionError) as err:
        msg = f"Selector {text!r:.80} is malformed: {err}."
        raise ValueError(msg) from err
    return text


def _checked_source(source: str) -> str:
    if "\0" in source:
        msg = f"expected a source without null characters, got {source!r:.80}"
        raise ValueError(msg)
    return source


_Name = Annotated[str, AfterValidator(_checked_name)]
_AdapterName = Annotated[str, AfterValidator(_checked_adapter_name)]
_Plain = Annotated[str, AfterValidator(_checked_plain)]
_Source = Annotated[str, AfterValidator(_checked_source)]
# Of a union, pydantic would say what is wrong with each of its parts.
_Selectors = Annotated[
    str | tuple[str, ...], WrapValidator(lambda value, _handler: _checked_selectors(value))
]
_Choice = Annotated[
    Annotated[_Plain, Tag("one")] | Annotated[dict[str, float], Tag("several")],
    # Problems are then those of the one that is meant.
    Discriminator(lambda value: "several" if isinstance(value, dict) else "one"),
]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        # Options may be infinite; otherwise null would be written.
        ser_json_inf_nan="constants",
    )


def _refuse(model: BaseModel, problems: Sequence[tuple[Place, str]]) -> None:
    """Raise what is wrong with the parts of a model as taken together, if anything is."""
    if problems:
        details = [
            InitErrorDetails(
                type=PydanticCustomError("recipe", "{what}", {"what": what}), loc=place, input=None
            )
            for place, what in problems
        ]
        raise ValidationError.from_exception_data(type(model).__name__, details)


def _twins(names: Iterable[str], place: Place) -> list[tuple[Place, str]]:
    """Return what is wrong with names that a disk may take for the same."""
    known = list(names)
    found = ((name, name_problem(name, known[:at])) for at, name in enumerate(known))
    return [
        ((*place, name), f"name cannot be saved: {problem}. Choose another")
        for name, problem in found
        if problem is not None
    ]


class RuleRecipe(_Strict):
    """One operation, where, and with which options; see `Rule`.

    Args:
        operation: Name of an operation that a plugin offers.
        select: Where the operation may look for its targets: a selector, or several.
        exclude: What to leave out of it; same.
        options: Passed to the operation.
        expect: How many modules must be claimed.
        optional: The rule may claim nothing, and its exclusion exclude nothing.
    """

    operation: _Plain
    select: _Selectors | None = None
    exclude: _Selectors | None = None
    options: dict[str, Any] = {}
    expect: int | None = Field(default=None, ge=0)
    optional: bool = False

    def rule(self, *, defaults: Mapping[str, Any] | None = None) -> Rule:
        """Return the rule this is; `defaults` are options that it does not give.

        Raises:
            RecipeError: A variable of the environment that the options name is not set.
        """
        return Rule(
            operation=self.operation,
            select=self.select,
            exclude=self.exclude,
            options={**(defaults or {}), **put_in(self.options)},
            expect=self.expect,
            optional=self.optional,
        )


class AdapterRecipe(_Strict):
    """One named variant of a model: a rule, or several, and perhaps what was saved of it.

    Args:
        operation: As for a rule; instead of `rules`.
        select: Same.
        exclude: Same.
        options: Same.
        expect: Same.
        optional: Same.
        rules: Several rules that make up the adapter together.
        source: A saved adapter, which the operation reads; its options need not be said again. A
            path that begins with a dot is relative to the recipe.
    """

    operation: _Plain | None = None
    select: _Selectors | None = None
    exclude: _Selectors | None = None
    options: dict[str, Any] = {}
    expect: int | None = Field(default=None, ge=0)
    optional: bool = False
    rules: tuple[RuleRecipe, ...] = Field(default=(), strict=False)
    source: _Source | None = None

    @model_validator(mode="after")
    def _is_one_or_several(self) -> Self:
        problems: list[tuple[Place, str]] = []
        if (self.operation is None) == (not self.rules):
            got = "both" if self.rules else "neither"
            problems.append(((), f"expected either operation or rules, got {got}"))
        elif self.rules:
            problems += [
                ((name,), f"expected no {name} beside rules")
                for name, field in AdapterRecipe.model_fields.items()
                if name != "rules" and getattr(self, name) != field.default
            ]
        _refuse(self, problems)
        return self

    @property
    def all_rules(self) -> tuple[RuleRecipe, ...]:
        """The rules, also where there is one."""
        if self.operation is None:
            return self.rules
        values = self.model_dump(exclude={"rules", "source"}, exclude_unset=True)
        return (RuleRecipe(**values),)


class ModelRecipe(_Strict):
    """What is done to one model.

    Args:
        source: The model: a folder, a file or an identifier that a plugin reads, or
            `package.module:factory`. A path that begins with a dot is relative to the recipe.
        freeze: The model's own parameters get no gradients while the recipe is applied.
        rules: Applied for good, in order.
        adapters: Variants by name, of which one, or a composition, is in the model.
        active: Which one; or several with weights. May be left out where there is one.
    """

    source: _Source | None = None
    freeze: bool = True
    rules: tuple[RuleRecipe, ...] = Field(default=(), strict=False)
    adapters: dict[_AdapterName, AdapterRecipe] = {}
    active: _Choice | None = None

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Self:
        problems: list[tuple[Place, str]] = []
        if not self.rules and not self.adapters:
            problems.append(((), "expected rules or adapters, got neither"))
        names = [self.active] if isinstance(self.active, str) else list(self.active or {})
        problems += _twins(self.adapters, ("adapters",))
        for name in names:
            if name not in self.adapters:
                hint = did_you_mean(name, self.adapters)
                known = f"expected one of {listed(self.adapters)}"
                problems.append((("active",), f"no adapter {name!r}{hint or f': {known}'}"))
        if self.active is None and len(self.adapters) > 1:
            what = f"expected active to say which of {listed(self.adapters)}"
            problems.append((("adapters",), what))
        elif self.active is not None and not names:
            problems.append((("active",), "expected an adapter, or several with weights, got none"))
        _refuse(self, problems)
        return self

    @property
    def selected(self) -> str | dict[str, float] | None:
        """Which adapter is active; None where there are none."""
        return self.active if self.active is not None else next(iter(self.adapters), None)


class Recipe(_Strict):
    """A recipe: what is done to which models.

    Args:
        version: Of the format.
        models: By a name of your own.

    Example:
        >>> rule = {"operation": "low_rank", "select": "**.q_proj"}
        >>> Recipe.model_validate({"models": {"chat": {"rules": [rule]}}}).models["chat"].freeze
        True
    """

    version: int = Field(default=VERSION, ge=1, le=VERSION)
    models: dict[_Name, ModelRecipe] = Field(min_length=1)
    _document: Document | None = PrivateAttr(default=None)
    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _has_no_twins(self) -> Self:
        _refuse(self, _twins(self.models, ("models",)))
        return self

    def __eq__(self, other: object) -> bool:
        # Not of which file it was read.
        if not isinstance(other, Recipe):
            return NotImplemented
        return (self.version, self.models) == (other.version, other.models)

    __hash__ = None  # type: ignore[assignment]  # as mappings, of which it is made

    def where(self, *place: str | int) -> str:
        """Return `file:line: place` of something in the recipe, for messages."""
        return _said_at(self._document, place)

    def source(self, name: str) -> str:
        """Return where a model comes from, as the recipe says it.

        Raises:
            OptionsError: Nobody said.
        """
        source = self.models[name].source
        if source is None:
            msg = (
                f"Model {name!r} has no source: expected one in the recipe, or --model "
                f"{name}=source. Add it."
            )
            err = OptionsError(msg)
            err.add_note(self.where("models", name))
            raise err
        return source

    def resolved(self, source: str) -> str:
        """Return a source to load from: paths that begin with a dot or `~` made absolute.

        Raises:
            RecipeError: A variable of the environment that it names is not set.
        """
        value: str = put_in(source)
        if value.startswith("."):
            return str((self._folder / value).resolve())
        return os.path.expanduser(value)  # noqa: PTH111 (the other raises for unknown users)

    def recorded(self, source: str) -> str:
        """Return a source to show and to keep: the same, with variables of the environment named."""
        resolved = self.resolved(source)
        if not names_in(source):
            return str(as_written(resolved))
        if put_in(source).startswith("."):
            return f"{as_written(str(self._folder.resolve()))}/{source}"
        return os.path.expanduser(source)  # noqa: PTH111 (same)


def load_recipe(
    path: str | os.PathLike[str], *, variables: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe from YAML, TOML or JSON.

    `extends` names one or more recipes to lay this one over, as paths from its own folder: mappings
    are merged, everything else is replaced. `variables` is a mapping of names to values; `${name}`
    stands for one, also inside text and in variables further down, and `$$` for a dollar sign.
    `${env:NAME}` stands for the text of an environment variable, in a source or in options; the recipe
    keeps the name, and the value is read when it is used.

    Args:
        path: The file.
        variables: Values for variables that the recipe has, in place of its own; see `read_scalar`.

    Raises:
        RecipeError: The file cannot be read, or is no recipe; every problem is named, with its
            line and, for a key that is unknown, the one that was probably meant.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "recipe.yaml"
        ...     _ = path.write_text("models: {chat: {rules: [{operation: low_rank}]}}")
        ...     load_recipe(path).models["chat"].rules[0].operation
        'low_rank'
    """
    document = read_recipe_document(Path(path), variables or {})
    return parse_recipe(document.data, document)


def parse_recipe(data: object, document: Document | None = None) -> Recipe:
    """Make a recipe of plain data, in which there are no variables but those of the environment.

    Args:
        data: What a recipe is, as mappings, lists and scalars.
        document: Where it was read, for messages.

    Raises:
        RecipeError: It is none; every problem is named.
    """
    try:
        recipe = Recipe.model_validate(data if document is None else as_written(data))
    except ValidationError as err:
        problems = [_problem(document, dict(found)) for found in err.errors()]
        raise RecipeError("\n".join(problems), problems=problems) from None
    if document is not None:
        recipe._document = document  # noqa: SLF001 (its own)
        # Whatever the working directory is later.
        recipe._folder = document.path.absolute().parent  # noqa: SLF001 (same)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML, with variables and `extends` resolved, and without defaults.

    Variables of the environment are named. Reading it gives an equal recipe, and writing that the
    same text.
    """
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    # A dollar sign would begin a variable.
    return write_yaml(as_in_file(values))


_EXPECTED = {
    **EXPECTED,
    "tuple_type": "a list",
    "too_short": "at least one",
    "less_than_equal": "at most {le}, the latest that this surgery-core knows",
}
"""By pydantic's kind of error, in the words of recipes."""


def _said_at(document: Document | None, place: Place, *, line_of: Place | None = None) -> str:
    """Write a place, behind the line of it, or of another, if there is a document."""
    what = describe_place(place)
    return what if document is None else f"{document.where(line_of or place)}: {what}"


def _problem(document: Document | None, error: Mapping[str, Any]) -> str:
    """Write one of pydantic's errors as a line."""
    place, kind = tuple(error["loc"]), error["type"]
    # Pydantic adds which part of a union it tried, and that a key is meant.
    if place[2:3] == ("active",):
        place = (*place[:3], *place[4:])
    elif place[-1:] == ("[key]",) and kind == "value_error":
        place = place[:-1]
    if kind == "extra_forbidden":
        fields = _fields_at(place[:-1])
        hint = did_you_mean(str(place[-1]), fields)
        what = f"unknown key {place[-1]!r}{hint or f': expected one of {listed(fields, most=9)}'}"
        return f"{_said_at(document, place[:-1], line_of=place)}: {what}"
    if kind == "missing":
        what = f"expected {place[-1]!r}, got no such key"
        return f"{_said_at(document, place[:-1])}: {what}"
    what = what_is_wrong(error, _EXPECTED)
    return f"{_said_at(document, place)}: {what}"


def _fields_at(place: Place) -> Sequence[str]:
    """Return the keys that a mapping in a recipe may have."""
    models: tuple[type[BaseModel], ...] = (Recipe, ModelRecipe)
    if len(place) in (0, 2):
        fields = [*models[len(place) // 2].model_fields]
        return [*fields, "extends", "variables"] if not place else fields
    is_adapter = place[2] == "adapters" and len(place) == 4  # noqa: PLR2004 (models, name, adapters, name)
    return [*(AdapterRecipe if is_adapter else RuleRecipe).model_fields]
