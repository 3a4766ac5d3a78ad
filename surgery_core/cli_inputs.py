"""What the command line is given: options, variables, models, recipes and records."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery_core.documents import SUFFIXES
from surgery_core.errors import OptionsError
from surgery_core.recipe import ModelRecipe, Recipe, load_recipe
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
            raise OptionsError(msg)
        return self.recipe.resolved(source)


def is_recipe(source: str) -> bool:
    """Tell whether a source is a recipe's file, by its suffix."""
    return Path(source).suffix in SUFFIXES


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
    records: dict[str, Record] = {}
    if is_recipe(source):
        recipe = load_recipe(source, variables=pairs(variables, "Variable"))
    else:
        folders = [
            path for path in sorted(Path(source).glob("*")) if (path / RECORD_FILE).is_file()
        ]
        if (Path(source) / RECORD_FILE).is_file() or not folders:
            records["model"] = read_record(source)
        else:
            records = {path.name: read_record(path) for path in folders}
        recipe = Recipe(models={name: record.recipe for name, record in records.items()})
    return Target(recipe=with_sources(recipe, models), records=records)


def with_sources(recipe: Recipe, models: Sequence[str]) -> Recipe:
    """Return a recipe whose models have the sources given."""
    parts: dict[str, ModelRecipe] = dict(recipe.models)
    for text in models:
        name, sign, source = text.partition("=")
        if not sign and len(parts) == 1:
            name, source = next(iter(parts)), text
        if name not in parts or not source:
            msg = f"Model {text!r} is malformed: expected name=source, names being {sorted(parts)}."
            raise OptionsError(msg)
        parts[name] = parts[name].model_copy(update={"source": source})
    return recipe.model_copy(update={"models": parts})


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
        except ValueError:
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
