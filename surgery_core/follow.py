"""Where a module's tensors are, and moving another module to where they went."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from surgery_core.overlay import Overlay

Path = tuple[tuple[Mapping[str, object], str, object], ...]
"""The way from a module down to a parameter: each table, the name in it, and what was there."""

Anchor = tuple[Path, nn.Parameter, torch.device, torch.dtype]
"""A module's first floating-point parameter, how it is reached, where it is, and its dtype."""

Anchors = Mapping[str, Anchor | None]
"""By the FQN of the module's place; shared between variants, so never changed, only replaced."""


def _to(tensor: torch.Tensor, *, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def catch_up(module: nn.Module, moved: nn.Module, before: Anchor | None) -> Anchor | None:
    """Move `module` as `moved` was since its anchor was `before`; return the anchor now."""
    if isinstance(module, Overlay) and module.overlay_base is moved:
        module.take_over()
    now = anchor_of(moved)
    if before is not None and now is not None and before[2:] != now[2:]:
        # A dtype that did not change is not imposed: adapters may be kept in a wider one.
        dtype = now[3] if now[3] is not before[3] else None
        apply_own(module, moved, partial(_to, device=now[2], dtype=dtype))
    return now


def anchor_of(module: nn.Module) -> Anchor | None:
    """Return a module's anchor; None if it has no floating-point parameter."""
    for name, parameter in module._parameters.items():  # noqa: SLF001 (torch's registry)
        if parameter is not None and parameter.is_floating_point():
            step = (module._parameters, name, parameter)  # noqa: SLF001 (same)
            return (step,), parameter, parameter.device, parameter.dtype
    for name, child in module._modules.items():  # noqa: SLF001 (same)
        if child is not None and (found := anchor_of(child)) is not None:
            path, parameter, device, dtype = found
            return ((module._modules, name, child), *path), parameter, device, dtype  # noqa: SLF001 (same)
    return None


def is_at(anchor: Anchor | None) -> bool:
    """Tell whether the module of an anchor would give the same anchor now."""
    if anchor is None:
        return False
    path, parameter, device, dtype = anchor
    for table, name, held in path:
        if table.get(name) is not held:
            return False
    return parameter.dtype is dtype and parameter.device == device


def shares_tensors(module: nn.Module, original: nn.Module) -> bool:
    """Tell whether whatever moves a variant's module moves its original too."""
    return module._modules is original._modules and not original._parameters  # noqa: SLF001 (torch's registries)


def apply_own(
    module: nn.Module, other: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Apply `fn` to the tensors of the modules that `module` does not share with another."""
    shared = {id(found) for found in other.modules()}
    with torch.no_grad():
        for found in module.modules():
            if id(found) not in shared:
                found._apply(fn, recurse=False)  # type: ignore[no-untyped-call]  # noqa: SLF001 (how .to() itself does it)
