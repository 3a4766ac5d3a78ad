"""What a plugin offers by name, and the rules that name it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from surgery_core.errors import ContractError, listed
from surgery_core.selectors import Selector, Tree
from surgery_core.slots import Site

OptionsT = TypeVar("OptionsT")

BASE = "__base__"
"""In the place of a variant's name: none, so the model without any."""

Selectors = Selector | str | Sequence[Selector | str]
"""A selector, as an object or as text, or several of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor that an edit brings.

    Args:
        name: Key relative to the site, for example `adaption_gate`.
        shape: Sizes of its axes.
        dtype: Name without the `torch.` prefix, for example `float32`.
        trainable: Whether it is created with `requires_grad`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "TensorSpec":
        """Describe a tensor.

        Example:
            >>> str(TensorSpec.of("gate", torch.zeros(1)))
            "TensorSpec(name='gate', shape=(1,), dtype='float32', trainable=False)"
        """
        return cls(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            trainable=tensor.requires_grad,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What an edit does to the state dict below its site; every other key stays.

    Args:
        added: Tensors that appear.
        removed: Keys, relative to the site, that disappear.
        retyped: Tensors that stay under their key, with another dtype or training flag, as copies of
            the module's own; a copy of the same dtype may be named, one of another dtype must be.
    """

    added: tuple[TensorSpec, ...] = ()
    removed: tuple[str, ...] = ()
    retyped: tuple[TensorSpec, ...] = ()


class Operation(ABC, Generic[OptionsT]):
    """What a plugin offers by name: how to choose modules, and what to put in their place.

    Planning calls `parse_options`, `targets` and `describe`, which must not change the model, draw
    random numbers or allocate parameters. Applying calls `build`, for every site, before the first
    write.
    """

    name: str
    """Unique among the loaded plugins; how rules name the operation."""

    summary: str
    """One line for `surgery plugins`."""

    keeps_children: bool = False
    """Whether a replacement has the original's very table of children, `_modules`.

    Then other rules may claim modules inside: what is put there is in both.
    """

    @abstractmethod
    def parse_options(self, options: Mapping[str, Any]) -> OptionsT:
        """Validate what a rule gives.

        Raises:
            OptionsError: An option is unknown, missing or out of range.
        """

    @abstractmethod
    def targets(self, tree: Tree, options: OptionsT) -> Selector:
        """Return which modules to work on, among those the rule selects.

        Args:
            tree: The modules that the rule's selector chose, or all.
            options: What `parse_options` gave.

        Raises:
            SurgeryError: The tree has nothing this operation could work on.
        """

    @abstractmethod
    def describe(self, site: Site, options: OptionsT) -> Effects:
        """Return what the edit would do to the state dict.

        Raises:
            ContractError: The module at this site does not suit the operation.
        """

    @abstractmethod
    def build(self, site: Site, options: OptionsT) -> nn.Module:
        """Return the replacement, without changing `site.module` or anything that holds it.

        Raises:
            SurgeryError: It cannot be built; nothing has been written then.
        """

    def options_schema(self) -> Mapping[str, Any]:
        """Return the JSON Schema of the options, for `surgery schema`; any object if not overridden.

        It stands inside another schema, so it must not refer to definitions of its own.
        """
        return {"type": "object"}

    def compose(self, variants: Sequence["WeightedVariant"]) -> "Composed":
        """Return what puts several variants of this operation in a model at once.

        Args:
            variants: At least one, all made by this operation.

        Raises:
            ContractError: They cannot be active together; always, if not overridden.
        """
        msg = (
            f"Operation {self.name!r} cannot have {listed([v.name for v in variants])} active "
            "together: expected a single variant. Make one of them the active one."
        )
        raise ContractError(msg, fqn="", expected="one variant", actual=len(variants))

    def probing(self, options: OptionsT) -> AbstractContextManager[object]:
        """Return what to enter around a call that verifies a model; nothing, if not overridden.

        For operations whose modules need more than the model's own inputs, as features that they are
        handed beside them; it must be the same each time.

        Args:
            options: What `parse_options` gave.
        """
        del options
        return nullcontext()

    def listener(self, site: Site) -> nn.Module:
        """Return a module that computes what the original does until the running code uses others.

        Called while some thread or row uses variants of its own, for places where the active variant
        has no module. Returns a `Shareable` with no parameters but the original's.

        Raises:
            ContractError: Variants of this operation cannot be used beside others; always, if not
                overridden.
        """
        raise self._not_shared(site)

    def shared(self, site: Site, rows: "Sequence[Sequence[WeightedModule]]") -> Any:  # noqa: ANN401 (between an operation and its modules)
        """Return what the operation's modules use at a site, in place of their own parameters.

        Args:
            site: Where.
            rows: For each row of the batch, the modules it gets, which may be none. Rows that get the
                same have the same objects. A single row stands for a whole batch, of any size.

        Raises:
            ContractError: Variants of this operation cannot be used beside others; always, if not
                overridden.
        """
        del rows
        raise self._not_shared(site)

    def _not_shared(self, site: Site) -> ContractError:
        expected, actual = "an operation whose variants can be used beside others", self.name
        msg = (
            f"Variants of operation {self.name!r} cannot be used by row or by thread at "
            f"{site.fqn!r}: expected {expected}. Make one of them the active one."
        )
        return ContractError(msg, fqn=site.fqn, expected=expected, actual=actual)

    def read_saved(
        self, source: str, model: nn.Module, options: Mapping[str, Any]
    ) -> "Saved | None":
        """Read a variant in a format of the operation's own; None if it does not know the source.

        Args:
            source: A folder or a file.
            model: What it is for; not changed.
            options: What the user says of it, which the format may not.

        Raises:
            SurgeryError: It is damaged, or not for the model.
        """
        del source, model, options
        return None

    def write_saved(
        self, folder: str, options: Mapping[str, Any], modules: Mapping[str, nn.Module]
    ) -> None:
        """Write a variant in the operation's own format, whole or not at all.

        Args:
            folder: Made if it is not there.
            options: Of the variant.
            modules: Its modules by FQN.

        Raises:
            ContractError: The operation has no such format; always, if not overridden.
        """
        msg = (
            f"Operation {self.name!r} has no format of its own to write to {folder!r}: expected "
            "one. Keep the record."
        )
        raise ContractError(msg, fqn="", expected="a format", actual=len(modules) + len(options))


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A variant that was read from where an operation keeps it.

    Args:
        options: Complete, those that the user gave included.
        state: Its tensors by `fqn.name`.
    """

    options: Mapping[str, Any]
    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightedVariant:
    """A variant to be active beside others.

    Args:
        name: Its name.
        weight: Factor on what it adds, dimensionless.
        modules: Its modules by FQN.
    """

    name: str
    weight: float
    modules: Mapping[str, nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightedModule:
    """A module of a variant that a row of a batch gets.

    Args:
        name: Of the variant.
        weight: Factor on what it adds, dimensionless.
        module: Has the parameters.
    """

    name: str
    weight: float
    module: nn.Module


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Composed:
    """How several variants are in a model at once.

    Args:
        rule: Builds the modules that stand for all of them.
        loans: The parameters those have in common with the variants'; see `SwapState.add`.
    """

    rule: "BoundRule"
    loans: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of a recipe: an operation, where, and with which options.

    Args:
        operation: Name of an operation that a plugin offers.
        select: Where the operation may look for its targets; None means everywhere. Of several
            selectors each must match something, unless the rule is `optional`.
        exclude: What to leave out of it; each must exclude something, unless `optional`.
        options: Passed to the operation, which refuses the ones it does not know.
        expect: How many modules the rule must claim; None means at least one.
        optional: Allow the rule to claim nothing.

    Example:
        >>> Rule(operation="adaption_prompt", options={"adapter_len": 10}).expect is None
        True
    """

    operation: str
    select: Selectors | None = None
    exclude: Selectors | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    expect: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundRule:
    """A rule with the operation its name stands for."""

    rule: Rule
    operation: Operation[Any]
