"""Modules trained whole beside the prompts, such as a classification head, as an operation."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery_core import (
    ContractError,
    Effects,
    NoMatchError,
    Operation,
    OptionsError,
    Selector,
    Site,
    Tree,
    Where,
    execution_device,
    is_sharded,
    listed,
)

NAME = "trainable_copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainableCopyOptions:
    """Which modules to copy.

    Args:
        modules: Last segments of their FQNs, for example `("score",)`; each must name a module.
        is_trainable: Whether the copies' parameters get gradients.
    """

    modules: tuple[str, ...]
    is_trainable: bool = True


class TrainableCopyOperation(Operation[TrainableCopyOptions]):
    """Replace modules by copies of their own, so that they can be trained and taken out again."""

    name = NAME
    summary = "A trainable copy of whole modules, such as a classification head."

    def parse_options(self, options: Mapping[str, Any]) -> TrainableCopyOptions:
        """Validate `modules`, a list of names, and `is_trainable`.

        Raises:
            OptionsError: An option is unknown or has the wrong type, or there is no name.
        """
        unknown = sorted(options.keys() - {"modules", "is_trainable"})
        modules, is_trainable = options.get("modules"), options.get("is_trainable", True)
        are_names = isinstance(modules, (list, tuple)) and all(
            isinstance(name, str) and name for name in modules
        )
        if unknown or not are_names or not modules or not isinstance(is_trainable, bool):
            msg = (
                f"Operation {NAME!r} has invalid options: expected modules, a list of names, and "
                f"is_trainable, true or false, got {dict(options)!r}. Fix the options."
            )
            raise OptionsError(msg)
        return TrainableCopyOptions(modules=tuple(modules), is_trainable=is_trainable)

    def options_schema(self) -> Mapping[str, Any]:
        """Return the JSON Schema of the options."""
        names = {"type": "array", "items": {"type": "string"}}
        return {
            "type": "object",
            "additionalProperties": False,
            "required": ["modules"],
            "properties": {"modules": names, "is_trainable": {"type": "boolean"}},
        }

    def targets(self, tree: Tree, options: TrainableCopyOptions) -> Selector:
        """Choose the modules of these names.

        Raises:
            NoMatchError: A name is no module's.
        """
        missing = [name for name in options.modules if not named(tree, [name])]
        if missing:
            msg = (
                f"Operation {NAME!r} found no module named {listed(missing)} among {len(tree)} "
                "submodules: expected the last segments of FQNs, such as 'score'. Fix the names."
            )
            raise NoMatchError(msg, selector=NAME, candidates=())
        chosen = named(tree, options.modules)
        return Where(lambda fqn, _: fqn in chosen, f"modules named {listed(options.modules)}")

    def describe(self, site: Site, options: TrainableCopyOptions) -> Effects:
        """Return that no key of the state dict changes.

        Raises:
            ContractError: The copy could not be trained, since accelerate would load the base's
                weights into it with each call, or since they are spread over processes.
        """
        if any(map(is_sharded, site.module.parameters())):
            expected, actual = "whole weights", "some that are spread over processes"
            msg = (
                f"Operation {NAME!r} cannot work at {site.fqn!r}: expected {expected}, got "
                f"{actual}. Choose modules that stay whole."
            )
            raise ContractError(msg, fqn=site.fqn, expected=expected, actual=actual)
        passing = any(parameter.is_meta for parameter in site.module.parameters())
        if options.is_trainable and passing and execution_device(site.module) is not None:
            expected, actual = "weights that stay", "some that accelerate loads with each call"
            msg = (
                f"Operation {NAME!r} cannot work at {site.fqn!r}: expected {expected}, got "
                f"{actual}. Give the module a device in the device map."
            )
            raise ContractError(msg, fqn=site.fqn, expected=expected, actual=actual)
        return Effects()

    def build(self, site: Site, options: TrainableCopyOptions) -> nn.Module:
        """Return a copy, trainable or frozen."""
        return copy.deepcopy(site.module).requires_grad_(options.is_trainable)


def named(tree: Tree, names: Sequence[str]) -> frozenset[str]:
    """Return the FQNs in a tree that end with one of some names."""
    return frozenset(fqn for fqn in tree if any(f".{fqn}".endswith(f".{name}") for name in names))
