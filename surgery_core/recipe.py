"""The config file: several models, each with rules, several adapters, and which of them is active."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from surgery_core.documents import Document, Place, describe_place, merged, read_document
from surgery_core.errors import RecipeError, listed
from surgery_core.operation import Rule

VERSION = 1
"""Of the format of recipes."""

_VARIABLE = re.compile(r"\$\$|\$\{([^{}]*)\}")
_ENVIRONMENT = "env:"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RuleRecipe(_Strict):
    """One operation, where, and with which options; see `Rule`.

    Args:
        operation: Name of an operation that a plugin offers.
        select: Where the operation may look for its targets.
        exclude: What to leave out of it.
        options: Passed to the operation.
        expect: How many modules must be claimed.
        optional: The rule may claim nothing, and its exclusion exclude nothing.
    """

    operation: str
    select: str | None = None
    exclude: str | None = None
    options: dict[str, Any] = {}
    expect: int | None = Field(default=None, ge=0)
    optional: bool = False

    def rule(self, *, defaults: Mapping[str, Any] | None = None) -> Rule:
        """Return the rule this is; `defaults` are options that it does not give."""
        return Rule(
            operation=self.operation,
            select=self.select,
            exclude=self.exclude,
            options={**(defaults or {}), **self.options},
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

    operation: str | None = None
    select: str | None = None
    exclude: str | None = None
    options: dict[str, Any] = {}
    expect: int | None = Field(default=None, ge=0)
    optional: bool = False
    rules: tuple[RuleRecipe, ...] = Field(default=(), strict=False)
    source: str | None = None

    @model_validator(mode="after")
    def _is_one_or_several(self) -> Self:
        own = {"select", "exclude", "options", "expect", "optional"} & self.model_fields_set
        if (self.operation is None) == (not self.rules):
            msg = "expected either operation or rules"
            raise ValueError(msg)
        if self.rules and (own or self.source is not None):
            what = sorted(own | ({"source"} if self.source is not None else set()))
            msg = f"expected {listed(what)} in none of the adapters with several rules"
            raise ValueError(msg)
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

    source: str | None = None
    freeze: bool = True
    rules: tuple[RuleRecipe, ...] = Field(default=(), strict=False)
    adapters: dict[str, AdapterRecipe] = {}
    active: str | dict[str, float] | None = None

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Self:
        if not self.rules and not self.adapters:
            msg = "expected rules or adapters, got neither"
            raise ValueError(msg)
        names = [self.active] if isinstance(self.active, str) else list(self.active or {})
        unknown = sorted(set(names) - self.adapters.keys())
        if unknown:
            msg = f"active names {listed(unknown)}: expected some of {listed(self.adapters)}"
            raise ValueError(msg)
        if self.active is not None and not names:
            msg = "active names no adapter: expected one, or several with weights"
            raise ValueError(msg)
        if self.active is None and len(self.adapters) > 1:
            msg = f"expected active to say which of {listed(self.adapters)}"
            raise ValueError(msg)
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
    models: dict[str, ModelRecipe] = Field(min_length=1)
    _document: Document | None = PrivateAttr(default=None)

    def where(self, *place: str | int) -> str:
        """Return `file:line: place` of something in the recipe, for messages."""
        what = describe_place(place)
        return what if self._document is None else f"{self._document.where(place)}: {what}"

    def resolved(self, source: str) -> str:
        """Return a source with a path that begins with a dot or `~` made absolute."""
        if source.startswith("~"):
            return str(Path(source).expanduser())
        if source in (".", "..") or source.startswith(("./", "../")):
            folder = Path() if self._document is None else self._document.path.parent
            return str((folder / source).resolve())
        return source


def load_recipe(
    path: str | os.PathLike[str], *, variables: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe from YAML, TOML or JSON.

    `extends` names one or more recipes to lay this one over: mappings are merged, everything else is
    replaced. `variables` is a mapping of names to values; `${name}` stands for one, also inside
    text, `${env:NAME}` for an environment variable, and `$$` for a dollar sign.

    Args:
        path: The file.
        variables: Values for variables that the recipe has, in place of its own.

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
    document = _extended(Path(path), ())
    if not isinstance(document.data, dict):
        msg = f"{path}: no recipe: expected a mapping with models, got {document.data!r:.80}."
        raise RecipeError(msg)
    data = dict(document.data)
    known = data.pop("variables", {})
    substitution = _Substitution(document, _variables(document, known, variables or {}))
    values = substitution.apply(data)
    if substitution.problems:
        raise RecipeError("\n".join(substitution.problems), problems=substitution.problems)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as err:
        problems = [_problem(document, dict(found)) for found in err.errors()]
        msg = "\n".join(problems)
        raise RecipeError(msg, problems=problems) from None
    recipe._document = document  # noqa: SLF001 (its own)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML, with variables and `extends` resolved, and without defaults.

    Reading it gives an equal recipe, and writing that the same text.
    """
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    # A dollar sign would begin a variable.
    return yaml.safe_dump(_escaped(values), sort_keys=False, allow_unicode=True)


def recipe_schema(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON Schema of recipes.

    Args:
        options: Schemas of the options of operations, by the name of the operation.
    """
    schema = Recipe.model_json_schema()
    text = {"type": "string"}
    schema["properties"] |= {
        "extends": {"anyOf": [text, {"type": "array", "items": text}]},
        "variables": {"type": "object"},
    }
    for name in ("RuleRecipe", "AdapterRecipe"):
        definition = schema["$defs"][name]
        definition["properties"]["operation"] = {"enum": sorted(options)}
        definition["allOf"] = [
            {
                "if": {
                    "properties": {"operation": {"const": operation}},
                    "required": ["operation"],
                },
                # With a source, options may be left to what was saved.
                "then": {"properties": {"options": dict(found)}},
            }
            for operation, found in sorted(options.items())
        ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _extended(path: Path, chain: tuple[Path, ...]) -> Document:
    resolved = path.resolve()
    if resolved in chain:
        msg = f"Recipe {str(path)!r} extends itself, through {listed(map(str, chain))}. Break it."
        raise RecipeError(msg)
    document = read_document(path)
    if not isinstance(document.data, dict) or "extends" not in document.data:
        return document
    data = dict(document.data)
    extends = data.pop("extends")
    names = [extends] if isinstance(extends, str) else extends
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        msg = f"{document.where(('extends',))}: extends must name files, got {extends!r}."
        raise RecipeError(msg)
    found: Document | None = None
    for name in names:
        below = _extended(path.parent / name, (*chain, resolved))
        found = below if found is None else merged(found, below)
    own = Document(path=path, data=data, lines=document.lines)
    return own if found is None else merged(found, own)


def _variables(document: Document, known: object, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the variables; those given are read as YAML, as in the file."""
    if not isinstance(known, dict) or any(isinstance(v, dict | list) for v in known.values()):
        msg = f"{document.where(('variables',))}: variables must be names with values."
        raise RecipeError(msg)
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        msg = (
            f"{document.path}: no variable {listed(unknown)}: expected some of "
            f"{listed(sorted(known))}. Fix the name, or add it under variables."
        )
        raise RecipeError(msg)
    try:
        return {**known, **{name: yaml.safe_load(value) for name, value in given.items()}}
    except yaml.YAMLError as err:
        msg = f"Variable is no value: {err}. Put it in quotes."
        raise RecipeError(msg) from err


class _Substitution:
    """Puts values in the place of variables, and notes those that there are none for."""

    def __init__(self, document: Document, values: Mapping[str, Any]) -> None:
        self._document, self._values = document, values
        self.problems: list[str] = []

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
        return _VARIABLE.sub(
            lambda m: "$" if m[1] is None else str(self._value(m[1], place)), value
        )

    def _value(self, name: str, place: Place) -> Any:  # noqa: ANN401 (plain data)
        if name in self._values:
            return self._values[name]
        variable = name.removeprefix(_ENVIRONMENT)
        if name != variable and variable in os.environ:
            return os.environ[variable]
        what = "environment variable" if name != variable else "variable"
        hint = _did_you_mean(name, self._values)
        self.problems.append(f"{self._document.where(place)}: no {what} {variable!r}{hint}")
        return ""


def _escaped(value: Any) -> Any:  # noqa: ANN401 (plain data)
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def _problem(document: Document, error: Mapping[str, Any]) -> str:
    """Write one of pydantic's errors as a line."""
    place = tuple(error["loc"])
    # Pydantic adds which type of a union it tried.
    while place and place[-1] in ("str", "dict[str,float]"):
        place = place[:-1]
    kind = error["type"]
    if kind == "extra_forbidden":
        fields = _fields_at(place[:-1])
        hint = _did_you_mean(str(place[-1]), fields)
        what = f"unknown key {place[-1]!r}{hint or f': expected some of {listed(fields, most=9)}'}"
        return f"{document.where(place)}: {describe_place(place[:-1])}: {what}"
    if kind == "missing":
        what = f"expected {place[-1]!r}, got no such key"
        return f"{document.where(place[:-1])}: {describe_place(place[:-1])}: {what}"
    what = error["msg"].removeprefix("Value error, ")
    got = "" if kind == "value_error" else f", got {error['input']!r:.80}"
    return f"{document.where(place)}: {describe_place(place)}: {what}{got}"


def _fields_at(place: Place) -> Sequence[str]:
    """Return the keys that a mapping in a recipe may have."""
    models: tuple[type[BaseModel], ...] = (Recipe, ModelRecipe)
    if len(place) in (0, 2):
        fields = [*models[len(place) // 2].model_fields]
        return [*fields, "extends", "variables"] if not place else fields
    is_adapter = place[2] == "adapters" and len(place) == 4  # noqa: PLR2004 (models, name, adapters, name)
    return [*(AdapterRecipe if is_adapter else RuleRecipe).model_fields]


def _did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""
