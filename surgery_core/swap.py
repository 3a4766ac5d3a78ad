"""Named variants over one set of slots: which one is in the model, and where the others are kept."""

from collections.abc import Callable, Iterable, Iterator
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
from surgery_core.transaction import OnWrite, Transaction

Anchor = tuple[torch.device, torch.dtype]
"""Where the original at a site is, and in which dtype."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stored:
    """A variant outside the model, and where the originals were when it was stored."""

    modules: dict[str, nn.Module]
    anchors: dict[str, Anchor | None]


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
        self._store: dict[str, _Stored] = {}
        self._active: dict[str, nn.Module] = {}
        self._active_anchors: dict[str, Anchor | None] = {}
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
        del self._store[name]
        used = {fqn for kept in self.names for fqn in self.variant(kept)}
        self._sites = {fqn: site for fqn, site in self._sites.items() if fqn in used}

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
        wanted = self._store[target].modules if target is not None and is_enabled else {}
        # (place, what is there, what shall be there)
        moves = [
            (site, self._active.get(fqn, site.module), wanted.get(fqn, site.module))
            for fqn in {**self._active, **wanted}
            for site in (self._sites[fqn],)
        ]
        check_holds(
            {slot: old for site, old, _ in moves for slot in site.slots},
            subject="Model under variants",
            fix="Put the module named back before changing variants.",
        )
        self._follow_active()
        if target is not None and is_enabled:
            self._follow(target)
        with Transaction(on_write=self.on_write) as transaction:
            for site, old, new in moves:
                for slot in site.slots:
                    transaction.replace(slot, old, new)
        for _, old, new in moves:
            hand_over(old, new)
        if self.active is not None:
            self._store[self.active] = self._stored(self._active)
        if target is not None and is_enabled:
            del self._store[target]
        self._active, self._selected, self._is_enabled = wanted, target, is_enabled
        self._active_anchors = {fqn: _anchor(module) for fqn, module in wanted.items()}

    def _stored(self, modules: dict[str, nn.Module]) -> _Stored:
        return _Stored(
            modules=modules, anchors={fqn: _anchor(self._sites[fqn].module) for fqn in modules}
        )

    def _follow(self, name: str) -> None:
        """Move the tensors of a stored variant to where the originals went since it was stored."""
        stored = self._store[name]
        for fqn, module in stored.modules.items():
            original = self._sites[fqn].module
            stored.anchors[fqn] = _catch_up(module, original, stored.anchors[fqn])

    def _follow_active(self) -> None:
        """Move originals outside the model to where the active variant went since it was put there."""
        for fqn, module in self._active.items():
            original = self._sites[fqn].module
            self._active_anchors[fqn] = _catch_up(original, module, self._active_anchors[fqn])

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
        if not name or name in self.names:
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
    if before is not None and now is not None and before != now:
        # A dtype that did not change is not imposed: adapters may be kept in a wider one.
        dtype = now[1] if now[1] is not before[1] else None
        _apply_own(module, moved, partial(_to, device=now[0], dtype=dtype))
    return now


def _anchor(module: nn.Module) -> Anchor | None:
    """Return device and dtype of the first floating-point parameter of a module."""
    # By hand, not by parameters(): its generators cost more than all the rest of a switch.
    for parameter in module._parameters.values():  # noqa: SLF001 (torch's registry)
        if parameter is not None and parameter.is_floating_point():
            return parameter.device, parameter.dtype
    for child in module._modules.values():  # noqa: SLF001 (same)
        if child is not None and (found := _anchor(child)) is not None:
            return found
    return None


def _apply_own(
    module: nn.Module, other: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Apply `fn` to the tensors of the modules that `module` does not share with another."""
    shared = {id(found) for found in other.modules()}
    with torch.no_grad():
        for found in module.modules():
            if id(found) not in shared:
                found._apply(fn, recurse=False)  # type: ignore[no-untyped-call]  # noqa: SLF001 (how .to() itself does it)
