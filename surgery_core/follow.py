"""Where a module's tensors are, and moving another module to where they went."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import nn

from surgery_core.overlay import Overlay, take_over
from surgery_core.sharded import reshard_
from surgery_core.slots import Site

SUBJECT = "Model under variants"
"""How errors name a model whose modules are exchanged."""

Path = tuple[tuple[Mapping[str, object], str, object], ...]
"""The way from a module down to a parameter: each table, the name in it, and what was there."""

Anchor = tuple[Path, nn.Parameter, torch.device, torch.dtype]
"""A module's first floating-point parameter, how it is reached, where it is, and its dtype."""

Anchors = Mapping[str, Anchor | None]
"""By the FQN of the module's place; shared between variants, so never changed, only replaced."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """Modules outside the model, and where their originals were when they were stored.

    Args:
        modules: By the FQN of their place.
        anchors: Of the originals.
    """

    modules: dict[str, nn.Module]
    anchors: Anchors

    @classmethod
    def at(
        cls, sites: Mapping[str, Site], modules: dict[str, nn.Module], known: Anchors | None = None
    ) -> Self:
        """Store modules, with anchors that are `known` to be right or computed now."""
        anchors = known or {}
        if anchors.keys() != modules.keys():
            anchors = {
                fqn: anchors[fqn] if fqn in anchors else anchor_of(sites[fqn].module)
                for fqn in modules
            }
        return cls(modules=modules, anchors=anchors)

    def followed(self, model: nn.Module, sites: Mapping[str, Site]) -> Self:
        """Give the modules what became of the originals: parameters, device and dtype."""
        take_over(self.modules.items(), model=model, subject=SUBJECT)
        moved = [fqn for fqn, anchor in self.anchors.items() if not is_at(anchor)]
        if not moved:
            return self
        reshard_(model)  # an anchor may be of what was gathered for one pass
        anchors = dict(self.anchors)
        for fqn in moved:
            anchors[fqn] = catch_up(self.modules[fqn], sites[fqn].module, anchors[fqn])
        return type(self)(modules=self.modules, anchors=anchors)


def _to(tensor: torch.Tensor, *, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def catch_up(module: nn.Module, moved: nn.Module, before: Anchor | None) -> Anchor | None:
    """Move `module` as `moved` was since its anchor was `before`; return the anchor now."""
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
    if module._modules is not original._modules:  # noqa: SLF001 (torch's registries)
        return False
    if isinstance(module, Overlay):
        here = module._parameters  # noqa: SLF001 (same)
        return all(here.get(name) is own for name, own in original._parameters.items())  # noqa: SLF001 (same)
    return not original._parameters  # noqa: SLF001 (same)


def apply_own(
    module: nn.Module, other: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Apply `fn` to the tensors of a module, and of those inside it, that another does not have."""
    shared = {id(found) for found in other.modules()}
    tensors = {id(found) for found in (*other.parameters(), *other.buffers())}
    with torch.no_grad():
        for found in module.modules():
            if id(found) in shared:
                continue
            own = {
                name: p
                for name, p in found._parameters.items()  # noqa: SLF001 (torch's registry)
                if p is not None and id(p) not in tensors
            }
            if len(own) == len(found._parameters):  # noqa: SLF001 (same)
                found._apply(fn, recurse=False)  # type: ignore[no-untyped-call]  # noqa: SLF001 (how .to() itself does it)
            elif own:
                # What the other has too moves with it, and must stay the same object.
                alone = nn.Module()
                alone._parameters.update(own)  # noqa: SLF001 (same)
                alone._apply(fn)  # type: ignore[no-untyped-call]  # noqa: SLF001 (same)
                found._parameters.update(alone._parameters)  # noqa: SLF001 (same)
