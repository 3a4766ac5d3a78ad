"""Named variants over one set of slots: which one is in the model, and where the others are kept."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import nn

from surgery_core.carry import hand_over
from surgery_core.errors import DriftError, VariantError, listed
from surgery_core.slots import Site, check_holds
from surgery_core.surgery import Plan, Replacement
from surgery_core.transaction import Move, OnWrite, Transaction

Path = tuple[tuple[Mapping[str, object], str, object], ...]
"""The way from a module down to a parameter: each table, the name in it, and what was there."""

Anchor = tuple[Path, nn.Parameter, torch.device, torch.dtype]
"""A module's first floating-point parameter, how it is reached, where it is, and its dtype."""

Anchors = Mapping[str, Anchor | None]
"""By the FQN of the module's place; shared between variants, so never changed, only replaced."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stored:
    """A variant outside the model, and where the originals were when it was stored."""

    modules: dict[str, nn.Module]
    anchors: Anchors


class SwapState(nn.Module):
    """Keep named variants of some modules of one model; at most one of them is in the model.

    Invariant: the active variant is never in the store, so no state exists twice. A transition
    either happens whole or raises and leaves model and store as they were.

    Life cycle: `add` builds a variant from a plan and stores it; `set` selects one and, unless the
    state is disabled, puts it in the model; `disable` takes the active one out and stores it;
    `enable` puts the selected one back.

    Stored variants follow `.to()` and its kin: at once when this module is part of what is moved,
    otherwise when they are next put in the model, from what became of the originals. Originals that
    the active variant does not hold follow it when they are put back.

    A hook registered on a module of the active variant stays with that module, unless it shares the
    hook tables of its original: then it stays with the place.

    Args:
        model: The model whose modules are swapped; not owned, not registered.
        on_write: Told of every write to the model before it happens; an error it raises rolls back.
    """

    def __init__(self, model: nn.Module, *, on_write: OnWrite | None = None) -> None:
        super().__init__()
        # In a tuple, so that nn.Module does not register the model as a child a second time.
        self._model = (model,)
        self._sites: dict[str, Site] = {}
        self._num_uses: Counter[str] = Counter()
        self._store: dict[str, _Stored] = {}
        self._active: dict[str, nn.Module] = {}
        self._active_anchors: Anchors = {}
        self._selected: str | None = None
        self._is_enabled = True
        self.on_write = on_write

    @property
    def selected(self) -> str | None:
        """Name of the variant that is active, or would be if the state were enabled."""
        return self._selected

    @property
    def active(self) -> str | None:
        """Name of the variant that is in the model now; None when disabled or none is selected."""
        return self._selected if self._is_enabled else None

    @property
    def is_enabled(self) -> bool:
        """Whether the selected variant is in the model."""
        return self._is_enabled

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the variants outside the model, in order of their arrival there."""
        return tuple(self._store)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all variants, sorted."""
        return tuple(sorted({*self._store, *([self.active] if self.active else [])}))

    def variant(self, name: str) -> dict[str, nn.Module]:
        """Return the modules of a variant by the FQN of their place, wherever they are now.

        Raises:
            VariantError: There is no such variant.
        """
        self._require(name)
        return dict(self._active if name == self.active else self._store[name].modules)

    def originals(self) -> dict[int, nn.Module]:
        """Return what the modules of the active variant stand for, by their `id`.

        Planning with it sees the model as it is without the active variant.
        """
        return {id(module): self._sites[fqn].module for fqn, module in self._active.items()}

    def add(self, name: str, plan: Plan) -> None:
        """Build a variant from a plan and store it; which variant is active does not change.

        Args:
            name: Not taken yet.
            plan: For this model, drafted with `originals()`.

        Raises:
            VariantError: The name is taken or empty, the plan is for another model or its root, or
                a replacement takes in a module of the active variant.
            DriftError: An original at a site known already has been replaced.
            ContractError: A replacement does not keep what its operation declared.
        """
        self._require_free(name)
        self._check_plan(name, plan)
        replacements = plan.build()
        self._check_built(name, replacements)
        for item in replacements:
            self._sites.setdefault(item.site.fqn, item.site)
            self._num_uses[item.site.fqn] += 1
        self._store[name] = self._stored({item.site.fqn: item.module for item in replacements})

    def set(self, name: str) -> None:
        """Select a variant; unless disabled, put it in the place of the active one.

        Raises:
            VariantError: There is no such variant.
            DriftError: A slot holds something else than this state left there.
        """
        self._require(name)
        if name != self._selected:
            self._move(name, is_enabled=self._is_enabled)

    def enable(self) -> None:
        """Put the selected variant in the model; nothing happens if it is there.

        Raises:
            DriftError: See `set`.
        """
        if not self._is_enabled:
            self._move(self._selected, is_enabled=True)

    def disable(self) -> None:
        """Take the active variant out of the model; nothing happens if it is out.

        Raises:
            DriftError: See `set`.
        """
        if self._is_enabled:
            self._move(self._selected, is_enabled=False)

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Disable for a while; nested use restores what was before, also after an error."""
        was_enabled = self._is_enabled
        self.disable()
        try:
            yield self
        finally:
            if was_enabled:
                self.enable()

    def delete(self, name: str, *, then: str | None = None) -> None:
        """Forget a variant; if it is selected, select `then` in the same step.

        Raises:
            VariantError: `name` or `then` does not exist, or they are the same.
            DriftError: See `set`.
        """
        self._require(name)
        if then is not None:
            self._require(then)
        if then == name:
            msg = f"Variant {name!r} cannot be selected after its own deletion. Name another."
            raise VariantError(msg)
        if name == self._selected:
            self._move(then, is_enabled=self._is_enabled)
        for fqn in self._store.pop(name).modules:
            self._num_uses[fqn] -= 1
            if not self._num_uses[fqn]:
                del self._num_uses[fqn], self._sites[fqn]

    def rename(self, name: str, new_name: str) -> None:
        """Give a variant another name; the model is not touched.

        Raises:
            VariantError: `name` does not exist or `new_name` is taken.
        """
        self._require(name)
        self._require_free(new_name)
        if name in self._store:
            self._store = {
                new_name if key == name else key: value for key, value in self._store.items()
            }
        if name == self._selected:
            self._selected = new_name

    def _check_plan(self, name: str, plan: Plan) -> None:
        """Refuse a plan for something else than modules of this model as they are known here."""
        if plan.model is not self._model[0]:
            msg = f"Plan for variant {name!r} is for another model. Plan for the model of this swap state."
            raise VariantError(msg)
        if any(not claim.site.fqn for claim in plan.claims):
            msg = (
                f"Plan for variant {name!r} replaces the root module: expected modules inside it, "
                f"got {type(plan.model).__name__} itself. Narrow the selector."
            )
            raise VariantError(msg)
        moved = [
            claim.site.fqn
            for claim in plan.claims
            if (known := self._sites.get(claim.site.fqn)) is not None
            and known.module is not claim.site.module
        ]
        if moved:
            msg = (
                f"Model under variants drifted at {listed(sorted(moved))}: expected the module "
                "that the other variants stand for, got another. Put it back first."
            )
            raise DriftError(msg, fqns=moved)

    def _check_built(self, name: str, replacements: Iterable[Replacement]) -> None:
        """Refuse replacements that took in a module of the active variant, which leaves with it."""
        originals = self.originals()
        roots = (*self._model, *originals.values())
        # Where a table of children belongs to the base, the active module in it is exchanged later.
        live = {id(found._modules) for root in roots for found in root.modules()}  # noqa: SLF001 (torch's registry)
        for item in replacements:
            held = [child for child in _own_children(item.module, live) if id(child) in originals]
            if held:
                msg = (
                    f"Replacement for variant {name!r} at {item.site.fqn!r} holds a module of the "
                    f"active variant {self.active!r}: expected modules of the base, got "
                    f"{type(held[0]).__name__}. Disable the variants while adding this one."
                )
                raise VariantError(msg)

    def _move(self, target: str | None, *, is_enabled: bool) -> None:
        """Make `target` the selected variant, and active if `is_enabled`; the one transition."""
        entering = self._store[target].modules if target is not None and is_enabled else {}
        leaving, sites = self._active, self._sites
        # Plain loops, since a switch is done for every request: about two microseconds a module.
        moves: list[Move] = []
        for fqn, new in entering.items():
            site = sites[fqn]
            old = leaving.get(fqn, site.module)
            for slot in site.slots:
                moves.append((slot, old, new))  # noqa: PERF401 (same)
        for fqn, old in leaving.items():
            if fqn not in entering:
                moves += [(slot, old, sites[fqn].module) for slot in sites[fqn].slots]
        check_holds(
            [(slot, old) for slot, old, _ in moves],
            subject="Model under variants",
            fix="Put the module named back before changing variants.",
        )
        self._follow_active()
        anchors: Anchors = {}
        if target is not None and is_enabled:
            anchors = self._follow(target)
        with Transaction(on_write=self.on_write) as transaction:
            transaction.replace_all(moves)
        for _, old, new in moves:
            if new.training is not old.training or new._backward_hooks:  # noqa: SLF001 (when `hand_over` has anything to do)
                hand_over(old, new)
        if self.active is not None:
            self._store[self.active] = self._stored(leaving, anchors)
        if target is not None and is_enabled:
            del self._store[target]
        self._active, self._selected, self._is_enabled = entering, target, is_enabled
        self._active_anchors = {
            fqn: _anchor(module)
            for fqn, module in entering.items()
            if not _shares_tensors(module, sites[fqn].module)
        }

    def _stored(self, modules: dict[str, nn.Module], known: Anchors | None = None) -> _Stored:
        """Store modules, with anchors that are `known` to be right or computed now."""
        anchors = known or {}
        if anchors.keys() != modules.keys():
            anchors = {
                fqn: anchors[fqn] if fqn in anchors else _anchor(self._sites[fqn].module)
                for fqn in modules
            }
        return _Stored(modules=modules, anchors=anchors)

    def _follow(self, name: str) -> Anchors:
        """Move the tensors of a stored variant to where the originals went; return where that is."""
        stored = self._store[name]
        moved = [fqn for fqn, anchor in stored.anchors.items() if not _is_at(anchor)]
        if moved:
            anchors = dict(stored.anchors)
            for fqn in moved:
                original = self._sites[fqn].module
                anchors[fqn] = _catch_up(stored.modules[fqn], original, anchors[fqn])
            self._store[name] = _Stored(modules=stored.modules, anchors=anchors)
        return self._store[name].anchors

    def _follow_active(self) -> None:
        """Move originals outside the model to where the active variant went since it was put there."""
        moved = [fqn for fqn, anchor in self._active_anchors.items() if not _is_at(anchor)]
        if moved:
            anchors = dict(self._active_anchors)
            for fqn in moved:
                original = self._sites[fqn].module
                anchors[fqn] = _catch_up(original, self._active[fqn], anchors[fqn])
            self._active_anchors = anchors

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, stored in self._store.items():
            for fqn, module in stored.modules.items():
                _apply_own(module, self._sites[fqn].module, fn)
            self._store[name] = self._stored(stored.modules)
        return self

    def _require(self, name: str) -> None:
        if name not in self._store and name != self.active:
            msg = f"Variant {name!r} does not exist: expected one of {listed(self.names)}."
            raise VariantError(msg)

    def _require_free(self, name: str) -> None:
        if not name or name in self._store or name == self.active:
            reason = "is taken" if name else "is empty"
            msg = f"Variant name {name!r} {reason}: there are {listed(self.names)}. Choose another."
            raise VariantError(msg)


def _own_children(module: nn.Module, live: AbstractSet[int]) -> Iterator[nn.Module]:
    """Yield the children in tables that are not `live`, from a new module downwards."""
    if id(module._modules) in live:  # noqa: SLF001 (torch's registry)
        return
    for child in module.children():
        yield child
        yield from _own_children(child, live)


def _to(tensor: torch.Tensor, *, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def _catch_up(module: nn.Module, moved: nn.Module, before: Anchor | None) -> Anchor | None:
    """Move `module` as `moved` was since its anchor was `before`; return the anchor now."""
    now = _anchor(moved)
    if before is not None and now is not None and before[2:] != now[2:]:
        # A dtype that did not change is not imposed: adapters may be kept in a wider one.
        dtype = now[3] if now[3] is not before[3] else None
        _apply_own(module, moved, partial(_to, device=now[2], dtype=dtype))
    return now


def _anchor(module: nn.Module) -> Anchor | None:
    for name, parameter in module._parameters.items():  # noqa: SLF001 (torch's registry)
        if parameter is not None and parameter.is_floating_point():
            step = (module._parameters, name, parameter)  # noqa: SLF001 (same)
            return (step,), parameter, parameter.device, parameter.dtype
    for name, child in module._modules.items():  # noqa: SLF001 (same)
        if child is not None and (found := _anchor(child)) is not None:
            path, parameter, device, dtype = found
            return ((module._modules, name, child), *path), parameter, device, dtype  # noqa: SLF001 (same)
    return None


def _is_at(anchor: Anchor | None) -> bool:
    """Tell whether the module of an anchor would give the same anchor now."""
    if anchor is None:
        return False
    path, parameter, device, dtype = anchor
    for table, name, held in path:
        if table.get(name) is not held:
            return False
    return parameter.dtype is dtype and parameter.device == device


def _shares_tensors(module: nn.Module, original: nn.Module) -> bool:
    """Tell whether whatever moves a variant's module moves its original too."""
    return module._modules is original._modules and not original._parameters  # noqa: SLF001 (torch's registries)


def _apply_own(
    module: nn.Module, other: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Apply `fn` to the tensors of the modules that `module` does not share with another."""
    shared = {id(found) for found in other.modules()}
    with torch.no_grad():
        for found in module.modules():
            if id(found) not in shared:
                found._apply(fn, recurse=False)  # type: ignore[no-untyped-call]  # noqa: SLF001 (how .to() itself does it)
