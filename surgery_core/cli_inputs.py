"""What the command line is given: options, variables, models, recipes and records."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from surgery_core.documents import SUFFIXES, is_document
from surgery_core.environment import as_written, hidden
from surgery_core.errors import OptionsError, listed
from surgery_core.recipe import Recipe, load_recipe, parse_recipe
from surgery_core.record import Record, is_record, read_record
from surgery_core.session import Session
from surgery_core.sources import check_allowed, load_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a command works on: a recipe with its models, or a record of one.

    Args:
        recipe: What is asked for.
        records: Records by model, where there are any.
        typed: Models whose source is not that of a file, but was given on the command line.
    """

    recipe: Recipe
    records: dict[str, Record]
    typed: frozenset[str] = frozenset()

    def source(self, name: str) -> str:
        """Return where a model comes from.

        Raises:
            OptionsError: Nobody said.
        """
        return self.recipe.resolved(self.recipe.source(name))

    def shown(self, name: str) -> str:
        """Return the same for people, with variables of the environment named."""
        return self.recipe.recorded(self.recipe.source(name))

    def with_sources(self, models: Sequence[str]) -> "Target":
        """Return the same with the sources of models that were given on the command line."""
        names = frozenset(sources_of(self.recipe, models))
        return replace(self, recipe=with_sources(self.recipe, models), typed=self.typed | names)

    def check_allowed(self, session: Session, name: str) -> None:
        """Refuse a source that is code, if only a file asks for it and the session does not allow it.

        Raises:
            OptionsError: It is one.
        """
        with hidden(self.recipe.source(name)):
            check_allowed(self.source(name), asked_by=self._asked_by(session, name))

    def load(self, session: Session, name: str, *, weights: bool) -> nn.Module:
        """Load a model.

        Raises:
            OptionsError: See `load_source`.
        """
        asked_by = self._asked_by(session, name)
        with hidden(self.recipe.source(name)):
            source = self.source(name)
            return load_source(session.plugins, source, weights=weights, asked_by=asked_by)

    def _asked_by(self, session: Session, name: str) -> str | None:
        if session.allow_code or name in self.typed:
            return None
        if name in self.records:
            return f"Record {str(self.records[name].folder)!r}"
        return self.recipe.where("models", name, "source")


def is_recipe(source: str) -> bool:
    """Tell whether a source is a recipe's file, by its suffix."""
    return is_document(Path(source))


def record_folders(source: str) -> dict[str, Path]:
    """Return the folders with a record in a folder, by their names, sorted."""
    found = sorted(path for path in Path(source).glob("*/") if is_record(path))
    return {path.name: path for path in found if not path.name.startswith(".")}


def read_target(
    source: str, *, variables: Sequence[str] = (), models: Sequence[str] = ()
) -> Target:
    """Read a recipe, a record, or a folder with a record for each model.

    Args:
        source: A file or a folder.
        variables: `name=value`, for a recipe.
        models: `name=source`, or a source where there is one model: what to work on instead.

    Raises:
        SurgeryError: It is none of these, or damaged.
    """
    if is_recipe(source):
        recipe = load_recipe(source, variables=pairs(variables, "Variable"))
        return Target(recipe=recipe, records={}).with_sources(models)
    if Path(source).is_file():
        msg = (
            f"Source {source!r} is neither a recipe nor a record: expected a folder, or a file with "
            f"a suffix of {listed(SUFFIXES)}."
        )
        raise OptionsError(msg)
    if variables:
        msg = f"Variables are for recipes: expected none for the record {source!r}. Leave them out."
        raise OptionsError(msg)
    folders = record_folders(source)
    if is_record(source) or not folders:
        folders = {ONLY_MODEL: Path(source)}
    records = {name: read_record(folder) for name, folder in folders.items()}
    recipe = parse_recipe({"models": {name: record.recipe for name, record in records.items()}})
    return Target(recipe=recipe, records=records).with_sources(models)


ONLY_MODEL = "model"
"""Name of a record's model, which has none of its own."""


def aligned(target: Target, other: Target) -> Target:
    """Return a target whose models have the names and sources that they have in a record.

    Args:
        target: What is compared.
        other: With what; another kind, or `target` is returned as it is.
    """
    models = dict(target.recipe.models)
    if target.records and not other.records:
        # Only what is in a recipe has a name.
        names = list(other.recipe.models)
        if list(models) != [ONLY_MODEL] or len(names) != 1:
            return target
        records = {names[0]: target.records[ONLY_MODEL]}
        recipe = Recipe(models={names[0]: models[ONLY_MODEL]})
        return Target(recipe=recipe, records=records)
    if other.records and not target.records:
        for name, part in models.items():
            if part.source is not None:
                update = {"source": target.recipe.recorded(part.source)}
                models[name] = part.model_copy(update=update)
        return Target(recipe=Recipe(models=models), records={})
    return target


def with_sources(recipe: Recipe, models: Sequence[str]) -> Recipe:
    """Return a recipe whose models have the sources given, as seen from the working directory."""
    sources = sources_of(recipe, models)
    parts = {
        name: part.model_copy(update={"source": sources[name]}) if name in sources else part
        for name, part in recipe.models.items()
    }
    return recipe.model_copy(update={"models": parts})


def sources_of(recipe: Recipe, models: Sequence[str]) -> dict[str, str]:
    """Read `name=source`, or a source where there is one model.

    Raises:
        OptionsError: A text is neither.
    """
    found = {}
    for text in models:
        name, sign, source = text.partition("=")
        if not sign and len(recipe.models) == 1:
            name, source = next(iter(recipe.models)), text
        if name not in recipe.models or not source:
            msg = (
                f"Model {text!r} is malformed: expected name=source, the name being one of "
                f"{listed(recipe.models)}."
            )
            raise OptionsError(msg)
        found[name] = str(as_written(absolute(source)))
    return found


def absolute(source: str) -> str:
    """Return a source as it is, or as an absolute path if it is one from the working directory."""
    path = Path(source)
    return str(path.resolve()) if source.startswith(".") or path.exists() else source


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` options, the values as JSON where they are."""
    options: dict[str, Any] = {}
    for key, value in pairs(texts, "Option").items():
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError):
            options[key] = value
    return options


def pairs(texts: Sequence[str], what: str) -> dict[str, str]:
    """Split `key=value` texts."""
    found = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign:
            msg = f"{what} {text!r} is malformed: expected key=value."
            raise OptionsError(msg)
        found[key] = value
    return found
