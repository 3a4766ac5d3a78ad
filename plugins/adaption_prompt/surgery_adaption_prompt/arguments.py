"""Refusals of arguments of the wrong type, which say what to pass."""

import os
from collections.abc import Mapping, Sequence
from typing import get_args

from torch import nn

from surgery_adaption_prompt.base_check import BaseCheck
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_core import ContractError, OptionsError, VariantError


def check_model(model: object) -> None:
    """Refuse what is not a model.

    Raises:
        ContractError: It is not a `torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        actual = type(model)
        msg = (
            f"model is {model!r:.80}: expected a model of transformers, got {actual.__name__}. Load "
            "it with AutoModelForCausalLM.from_pretrained first."
        )
        raise ContractError(msg, fqn="", expected="a torch.nn.Module", actual=actual)


def check_config(config: object, *, name: str) -> None:
    """Refuse what is not our configuration, PEFT's of the same name included.

    Args:
        config: What was given.
        name: The adapter's.

    Raises:
        OptionsError: It is something else.
    """
    if isinstance(config, AdaptionPromptConfig):
        return
    cls = type(config)
    if isinstance(config, Mapping):
        fix = (
            "Pass one configuration, and the adapter's name after it; several go to "
            "AdaptionPromptModel(model, configs, adapter_name)."
        )
    else:
        fix = "Make one with the same arguments: AdaptionPromptConfig(adapter_len=..., adapter_layers=...)."
    msg = (
        f"Configuration of adapter {name!r} is a {cls.__module__}.{cls.__qualname__}: expected "
        f"surgery_adaption_prompt.AdaptionPromptConfig. {fix}"
    )
    raise OptionsError(msg)


def check_configs(configs: object) -> None:
    """Refuse what is not configurations by adapter name.

    Raises:
        OptionsError: It is something else, or one of them is.
    """
    if not isinstance(configs, Mapping):
        msg = (
            f"configs is a {type(configs).__name__}: expected configurations by adapter name. Write "
            "AdaptionPromptModel(model, {'default': config}, 'default'), or get_peft_model(model, "
            "config)."
        )
        raise OptionsError(msg)
    for name, config in configs.items():
        check_adapter_name(name)
        check_config(config, name=name)


def check_adapter_name(name: object) -> None:
    """Refuse what is not the name of one adapter.

    Raises:
        VariantError: It is not text.
    """
    if not isinstance(name, str):
        msg = f"Adapter name is {name!r}: expected text. Pass the name of one adapter, such as 'default'."
        raise VariantError(msg)


def check_adapter_names(names: object, *, what: str) -> None:
    """Refuse what is not a list of names.

    Args:
        names: What was given.
        what: Name of the argument.

    Raises:
        OptionsError: It is not a list.
        VariantError: One of them is not text.
    """
    if isinstance(names, str | bytes) or not isinstance(names, Sequence | Mapping):
        msg = f"{what} is {names!r:.80}: expected a list of adapter names. Write ['default'], for example."
        raise OptionsError(msg)
    for name in names:
        check_adapter_name(name)


def check_weights(weights: object) -> None:
    """Refuse what is not a list; what is in it is for `Composition` to refuse.

    Raises:
        OptionsError: It is something else.
    """
    if isinstance(weights, str | bytes) or not isinstance(weights, Sequence):
        msg = (
            f"weights is {weights!r:.80}: expected a list with a number for each adapter. Pass one."
        )
        raise OptionsError(msg)


def check_state(state: object) -> None:
    """Refuse what is not tensors by name, or None.

    Raises:
        OptionsError: It is something else.
    """
    if state is not None and not isinstance(state, Mapping):
        msg = f"state is a {type(state).__name__}: expected tensors by 'fqn.name'. Pass a mapping."
        raise OptionsError(msg)


def check_path(path: object, *, what: str) -> None:
    """Refuse what is not a path.

    Args:
        path: What was given.
        what: Name of the argument.

    Raises:
        OptionsError: It is neither text nor an `os.PathLike`.
    """
    if not isinstance(path, str | os.PathLike) or path == "":
        msg = f"{what} is {path!r:.80}: expected the path of a folder. Pass text or a pathlib.Path."
        raise OptionsError(msg)


def check_base_check(value: object) -> None:
    """Refuse what does not say what to do with another base.

    Raises:
        OptionsError: It is not one of the words there are.
    """
    if value not in get_args(BaseCheck):
        words = ", ".join(map(repr, get_args(BaseCheck)))
        msg = f"base_check is {value!r:.80}: expected one of {words}. Fix the word."
        raise OptionsError(msg)
