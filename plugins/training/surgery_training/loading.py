"""What a command works with: the model of a recipe or a record, the adapter, and the tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from surgery_core import OptionsError, Recipe, SurgeryError, listed
from surgery_core.cli_inputs import Target, read_target
from surgery_core.environment import hidden


def read_one(
    source: str, *, variables: Sequence[str] = (), model: str | None = None
) -> tuple[Target, str]:
    """Read a recipe or a record, and choose one of its models.

    Args:
        source: A recipe's file, a record, or a folder of records.
        variables: `name=value`, for a recipe.
        model: Its name, `name=source`, or the source where there is one model; may be left out there.

    Returns:
        What is worked on, and the name of the model.

    Raises:
        OptionsError: There are several models, and none was named.
    """
    target = read_target(source, variables=variables)
    names = list(target.recipe.models)
    name, sign, other = (model or "").partition("=")
    if model is not None and name not in names and len(names) == 1:
        name, sign, other = names[0], "=", model
    elif model is None and len(names) == 1:
        name = names[0]
    if name not in names:
        msg = (
            f"{source!r} has the models {listed(names)}: expected the name of one, got {model!r}. "
            "Pass --model."
        )
        raise OptionsError(msg)
    if sign:
        target = target.with_sources([f"{name}={other}"])
    return target, name


def with_active(recipe: Recipe, name: str, adapter: str | None) -> tuple[Recipe, str | None]:
    """Return a recipe in which one adapter of a model is the active one, and which that is.

    Args:
        recipe: What was asked for.
        name: Of the model.
        adapter: Of its adapter; None means the active one.

    Raises:
        OptionsError: There is no such adapter, or several are active.
    """
    part = recipe.models[name]
    chosen = part.selected if adapter is None else adapter
    if chosen is None:
        return recipe, None
    if not isinstance(chosen, str) or chosen not in part.adapters:
        msg = (
            f"Model {name!r} has the adapters {listed(part.adapters)}: expected the name of one, got "
            f"{chosen!r}. Pass --adapter."
        )
        raise OptionsError(msg)
    models = {**recipe.models, name: part.model_copy(update={"active": chosen})}
    return recipe.model_copy(update={"models": models}), chosen


def tokenizer_of(target: Target, name: str, other: str | None) -> Any:  # noqa: ANN401 (one of many classes)
    """Load the tokenizer that is beside a model, or another.

    Args:
        target: Says where the model is.
        name: Of the model.
        other: See `load_tokenizer`; None means the model's.

    Raises:
        OptionsError: There is none.
    """
    with hidden(target.recipe.models[name].source):
        return load_tokenizer(other or target.source(name))


def load_tokenizer(source: str) -> Any:  # noqa: ANN401 (one of many classes)
    """Load the tokenizer that is beside a model.

    Args:
        source: A folder, a GGUF file or an identifier on the hub.

    Raises:
        OptionsError: There is none.
    """
    path = Path(source)
    try:
        if path.suffix == ".gguf" and path.is_file():
            return AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
        return AutoTokenizer.from_pretrained(
            source, local_files_only=path.exists(), trust_remote_code=False
        )
    except Exception as err:
        # Whatever transformers raises; see the same in what loads models.
        first = str(err).strip().partition("\n")[0].rstrip(".")
        msg = (
            f"Tokenizer of {source!r} cannot be loaded: {first or type(err).__name__}. Name another "
            "source with tokenizer, or --tokenizer."
        )
        raise OptionsError(msg) from err


def cast_(model: nn.Module, dtype: torch.dtype) -> bool:
    """Give parameters of floating point another dtype; buffers, such as frequencies, keep theirs.

    Args:
        model: Before anything is added to it.
        dtype: Which.

    Returns:
        Whether that changed any.

    Raises:
        SurgeryError: Parameters are quantised.
    """
    others = [(name, p) for name, p in model.named_parameters() if p.dtype != dtype]
    quantised = [name for name, parameter in others if not parameter.is_floating_point()]
    if quantised:
        msg = (
            f"Base cannot be cast to {dtype}: expected parameters of floating point, got others at "
            f"{listed(quantised)}. Leave out dtype."
        )
        raise SurgeryError(msg)
    for _, parameter in others:
        parameter.data = parameter.data.to(dtype)
    return bool(others)
