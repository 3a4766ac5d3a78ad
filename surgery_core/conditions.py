"""Conditions on a model with adapters that must hold before something is done with them."""

from collections.abc import Iterable, Mapping

from torch import nn

from surgery_core.errors import ContractError, OptionsError
from surgery_core.selection import Shareable
from surgery_core.slots import Slot, check_holds
from surgery_core.surgery import Replacement
from surgery_core.swap import SwapState


def require_changeable(modules: Mapping[str, nn.Module], *, what: str) -> None:
    """Refuse to change adapters of which something was computed that would stay as it is.

    Args:
        modules: Theirs by FQN.
        what: Begins the message, as in "Tensors of 'fr' cannot be loaded".

    Raises:
        ContractError: A module has a `change_problem`.
    """
    for fqn, module in modules.items():
        actual = module.change_problem() if isinstance(module, Shareable) else None
        if actual is not None:
            msg = f"{what}: {actual} at {fqn!r}. Call unmerge() first."
            raise ContractError(msg, fqn=fqn, expected="terms that are not merged", actual=actual)


def require_in_place(swap_state: SwapState, rules: Iterable[Replacement]) -> None:
    """Refuse a model in which a module that was put there, or its original, was exchanged.

    Args:
        swap_state: Of the adapters.
        rules: What rules have put in place.

    Raises:
        DriftError: All places are named.
    """
    placed = swap_state.originals()
    name = swap_state.active
    active = {} if name is None else swap_state.variant(name)
    expected: list[tuple[Slot, object]] = [
        (slot, item.module) for item in rules for slot in item.site.slots
    ]
    for fqn, site in swap_state.sites.items():
        for slot in site.slots:
            held = slot.get()
            is_ours = placed.get(id(held)) is site.module and active.get(fqn, held) is held
            expected.append((slot, held if is_ours else active.get(fqn, site.module)))
    check_holds(
        expected,
        subject="Model with adapters",
        fix="Put the module back. To resize embeddings or heads, revert first, and apply again.",
    )


def require_kind(value: object, kind: type | tuple[type, ...], *, what: str, fix: str) -> None:
    """Refuse an argument of another class.

    Args:
        value: What was given.
        kind: What it must be.
        what: How the message names the argument.
        fix: What it tells the user to do.

    Raises:
        OptionsError: It is of another class.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(each.__name__ for each in kinds)
        msg = f"{what} must be {names}, got {type(value).__name__}. {fix}"
        raise OptionsError(msg)
