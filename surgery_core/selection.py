"""Modules that rows and threads can share, and what rows of a batch get of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from surgery_core.errors import ContractError, OptionsError
from surgery_core.operation import BASE, Operation, WeightedModule
from surgery_core.swap import Variants


class Shareable(nn.Module):
    """What a replacement derives from if other code may use other variants than it at its place.

    In every pass it looks whether `sharing` is in force, and whether that has `terms` then. If so,
    it computes what they say for the module that it stands for, in place of its own. Made by an
    operation that has `listener` and `shared`.
    """

    sharing: Any = None
    """The `Sharing` of the model, or None."""

    needs_batch_axis: ClassVar[bool] = False
    """Whether it gives each row its own by the first axis of its input, and asks `axis_problem`."""

    def sharing_problem(self) -> str | None:
        """Tell why other code would get this module's terms too now, though it uses others.

        Returns:
            What it is, as in "got a merged layer"; None if it would not.
        """
        return None

    def change_problem(self) -> str | None:
        """Tell why the base still has what this module adds, whatever becomes of it.

        Returns:
            What it is, as in "its terms are in the weight of the base"; None if it has not.
        """
        return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """Variants that were looked up, for rows of a batch.

    Args:
        names: Theirs.
        rows: By FQN, for each row the modules of the variants that it gets.
        operations: By FQN, what made those modules.
    """

    names: frozenset[str]
    rows: Mapping[str, Sequence[Sequence[WeightedModule]]]
    operations: Mapping[str, Operation[Any]]


def select(choices: Sequence[Mapping[str, float]], variants: Variants) -> Selection:
    """Look up what some rows get.

    Args:
        choices: For each row, weights of variants by name; none for the base. One stands for a whole
            batch, of any size.
        variants: All that are named.

    Raises:
        OptionsError: There is no choice.
        ContractError: A module cannot be used beside others, or two operations are at one place.
    """
    if not choices:
        msg = f"Selection has no rows: expected a name or {BASE!r} for each row, got none."
        raise OptionsError(msg)
    names = sorted({name for weights in choices for name in weights})
    operations: dict[str, Operation[Any]] = {}
    for name in names:
        for fqn, (operation, module) in variants[name].items():
            _check_place(name, fqn, (operation, module), operations.setdefault(fqn, operation))
    # One object for each variant and weight, which is how rows that get the same are found.
    known: dict[tuple[str, float, str], WeightedModule] = {}

    def entry(name: str, weight: float, fqn: str) -> WeightedModule:
        module = variants[name][fqn][1]
        new = WeightedModule(name=name, weight=weight, module=module)
        return known.setdefault((name, weight, fqn), new)

    return Selection(
        names=frozenset(names),
        rows={
            fqn: [
                [
                    entry(name, weights[name], fqn)
                    for name in sorted(weights)
                    if fqn in variants[name]
                ]
                for weights in choices
            ]
            for fqn in sorted(operations)
        },
        operations=operations,
    )


def _check_place(
    name: str, fqn: str, made: tuple[Operation[Any], nn.Module], known: Operation[Any]
) -> None:
    operation, module = made
    if known.name != operation.name:
        expected = f"modules of {known.name!r} at {fqn!r}"
        actual = f"one of {operation.name!r}"
    elif not isinstance(module, Shareable):
        expected = f"modules that can be shared at {fqn!r}"
        actual = f"{type(module).__name__}, made by {operation.name!r}"
    else:
        return
    msg = (
        f"Variant {name!r} cannot be used beside others: expected {expected}, got {actual}. "
        "Make it the active one."
    )
    raise ContractError(msg, fqn=fqn, expected=expected, actual=actual)
