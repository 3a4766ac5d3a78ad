"""What the command line is given: options, variables, models, recipes and records."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery_core.documents import SUFFIXES, is_document
from surgery_core.errors import OptionsError, listed
from surgery_core.recipe import ModelRecipe, Recipe, load_recipe, parse_recipe
from surgery_core.record import RECORD_FILE, Record, read_record
from surgery_core.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a command works on: a recipe with its models, or a record of one.

    Args:
        recipe: What is asked for.
        records: Records by model, where there are any.
    """

    recipe: Recipe
    records: dict[str, Record]

    def source(self, name: str) -> str:
        """Return where a model comes from.

        Raises:
            OptionsError: Nobody said.
        """
        source = self.recipe.models[name].source
        if source is None:
            msg = (
                f"Model {name!r} has no source: expected one in the recipe, or --model "
                f"{name}=source. Add it."
            )
            err = OptionsError(msg)
            err.add_note(self.recipe.where("models", name))
            raise err
        return self.recipe.resolved(source)


def is_recipe(source: str) -> bool:
    """Tell whether a source is a recipe's file, by its suffix."""
    return is_document(Path(source))


def record_folders(source: str) -> dict[str, Path]:
    """Return the folders with a record in a folder, by their names, sorted."""
    paths = sorted(Path(source).glob("*/" + RECORD_FILE))
    return {path.parent.name: path.parent for path in paths if path.parent.name[0] != "."}


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
        return Target(recipe=with_sources(recipe, models), records={})
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
    if (Path(source) / RECORD_FILE).is_file() or not folders:
        folders = {ONLY_MODEL: Path(source)}
    records = {name: read_record(folder) for name, folder in folders.items()}
    recipe = parse_recipe({"models": {name: record.recipe for name, record in records.items()}})
    return Target(recipe=with_sources(recipe, models), records=records)


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
                update = {"source": target.recipe.resolved(part.source)}
                models[name] = part.model_copy(update=update)
        return Target(recipe=Recipe(models=models), records={})
    return target


def with_sources(recipe: Recipe, models: Sequence[str]) -> Recipe:
    """Return a recipe whose models have the sources given, as seen from the working directory."""
    parts: dict[str, ModelRecipe] = dict(recipe.models)
    for text in models:
        name, sign, source = text.partition("=")
        if not sign and len(parts) == 1:
            name, source = next(iter(parts)), text
        if name not in parts or not source:
            msg = (
                f"Model {text!r} is malformed: expected name=source, the name being one of "
                f"{listed(parts)}."
            )
            raise OptionsError(msg)
        parts[name] = parts[name].model_copy(update={"source": absolute(source)})
    return recipe.model_copy(update={"models": parts})


def absolute(source: str) -> str:
    """Return a source as it is, or as an absolute path if it is one from the working directory."""
    path = Path(source)
    return str(path.resolve()) if source.startswith(".") or path.exists() else source


def load_model(session: Session, source: str, *, weights: bool) -> nn.Module:
    """Build the model a source names.

    Args:
        session: Its plugins are asked for sources that are not `package.module:factory`.
        source: What the user wrote.
        weights: With them; otherwise the model may be on the meta device.

    Raises:
        OptionsError: Nobody knows the source.
    """
    model: object
    if ":" in source and not Path(source).exists():
        module_name, _, name = source.partition(":")
        try:
            model = getattr(importlib.import_module(module_name), name)()
        except (ImportError, AttributeError, TypeError, ValueError) as err:
            msg = f"Source {source!r} cannot be imported: {err}. Write package.module:factory."
            raise OptionsError(msg) from err
    elif weights:
        model = session.plugins.load_model(source)
    else:
        model = session.plugins.load_skeleton(source)
    if not isinstance(model, nn.Module):
        msg = (
            f"Source {source!r} gives no model: expected package.module:factory, or a folder that "
            f"an installed plugin can read, got {model!r}. See `surgery plugins`."
        )
        raise OptionsError(msg)
    return model


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
