"""The names of the adapters whose tensors are in a state dict, as a tensor in it."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery_core import StateError, listed


def encoded(names: Sequence[str]) -> Tensor:
    """Return names as bytes, which every format for tensors takes.

    Example:
        >>> decoded(encoded(["fr", "legal"]))
        ['fr', 'legal']
    """
    return torch.tensor(list(json.dumps(list(names)).encode()), dtype=torch.uint8)


def decoded(state: object) -> list[str]:
    """Return the names in what `encoded` gave, also after a cast or an average of equal ones.

    Raises:
        StateError: It is something else.
    """
    try:
        found = json.loads(bytes(state.double().round().to(torch.uint8).tolist()))  # type: ignore[attr-defined]  # any object may come
    except (AttributeError, RuntimeError, ValueError) as err:
        msg = f"State dict does not say which adapters it is of: {err}. Take '_extra_state' out of it."
        raise StateError(msg) from err
    return [str(name) for name in found] if isinstance(found, list) else []


def check_same_names(given: Sequence[str], own: Sequence[str]) -> None:
    """Refuse a state dict of other adapters than those in the model: their keys are the same.

    Raises:
        StateError: Both have adapters, and not the same.
    """
    if given and own and sorted(given) != sorted(own):
        msg = (
            f"State dict was taken while {listed(sorted(given))} was active: it cannot be loaded while "
            f"{listed(sorted(own))} is, whose tensors have the same keys. Call set_adapter first; or, "
            "if these values are meant for it, take '_extra_state' out of the state dict."
        )
        raise StateError(msg, mismatched=sorted(given))
