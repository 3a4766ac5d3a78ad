"""Named variants over one set of slots: which one is in the model, and where the others are kept."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import chain
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn

from surgery_core.carry import hand_over, shares_children
from surgery_core.errors import ContractError, DriftError, VariantError, listed
from surgery_core.follow import (
    SUBJECT,
    Anchors,
    Stored,
    anchor_of,
    apply_own,
    catch_up,
    is_at,
    shares_tensors,
)
from surgery_core.operation import Operation
from surgery_core.overlay import hand_down, take_over
from surgery_core.sharded import is_held_together, is_one_of_several, is_sharded_at
from surgery_core.slots import Site, check_holds
from surgery_core.surgery import Plan, Replacement
from surgery_core.tensors import owned_tensors
from surgery_core.transaction import GONE, Move, OnWrite, Transaction

Variants = Mapping[str, Mapping[str, tuple[Operation[Any], nn.Module]]]
"""By the name of a variant and the FQN: the operation that made a module, and the module."""

Loans = Mapping[str, Mapping[str, str]]
"""By the name of a variant that lends: names of parameters in the borrower, and in the lender."""


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

    A variant may borrow parameters of others (`add` with `loans`): while it is active, its lenders
    are lent, not stored. Where the active variant has no module, `underlay` may put another than the
    original.

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
        self._store: dict[str, Stored] = {}
        self._loans: dict[str, Loans] = {}
        self._lent: dict[str, dict[str, nn.Module]] = {}
        self._floor: dict[str, nn.Module] = {}
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
    def lent(self) -> tuple[str, ...]:
        """Names of the variants whose parameters the active variant has borrowed."""
        return tuple(self._lent)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all variants, sorted."""
        return tuple(sorted({*self._store, *self._lent, *([self.active] if self.active else [])}))

    def variant(self, name: str) -> dict[str, nn.Module]:
        """Return the modules of a variant by the FQN of their place, wherever they are now.

        Raises:
            VariantError: There is no such variant.
        """
        self._require(name)
        if name in self._lent:
            self._settle()
            return dict(self._lent[name])
        return dict(self._active if name == self.active else self._store[name].modules)

    def caught_up(self, name: str) -> dict[str, nn.Module]:
        """Return the modules of a variant after they followed the model, to be used where they are.

        Raises:
            VariantError: There is no such variant.
        """
        if name in self._store:
            self._hand_down()
            self._store[name] = self._store[name].followed(self._model[0], self._sites)
        return self.variant(name)

    @property
    def sites(self) -> Mapping[str, Site]:
        """Places of all variants by FQN, with what was there before; read-only."""
        return MappingProxyType(self._sites)

    def originals(self) -> dict[int, nn.Module]:
        """Return what the modules put in the model stand for, by their `id`.

        Planning with it sees the model as it is without them.
        """
        placed = {**self._floor, **self._active}
        return {id(module): self._sites[fqn].module for fqn, module in placed.items()}

    def add(self, name: str, plan: Plan, *, loans: Loans | None = None) -> None:
        """Build a variant from a plan and store it; which variant is active does not change.

        Args:
            name: Not taken yet.
            plan: For this model, drafted with `originals()`.
            loans: Parameters that the variant's modules have in common with those of other variants
                at the same FQN. It has them while it is active, and gives them back when it leaves.

        Raises:
            VariantError: The name is taken or empty, the plan is for another model or its root, a
                replacement takes in a module of the active variant, or a lender does not exist.
            DriftError: An original at a site known already has been replaced.
            ContractError: A replacement does not keep what its operation declared.
        """
        self._require_free(name)
        for lender in loans or {}:
            self._require(lender)
        self._check_plan(name, plan)
        replacements = plan.build()
        self._check_built(name, replacements)
        for item in replacements:
            self._sites.setdefault(item.site.fqn, item.site)
            self._num_uses[item.site.fqn] += 1
        self._store[name] = Stored.at(
            self._sites, {item.site.fqn: item.module for item in replacements}
        )
        if loans:
            self._loans[name] = loans

    def set(self, name: str) -> None:
        """Select a variant; unless disabled, put it in the place of the active one.

        Raises:
            VariantError: There is no such variant.
            DriftError: A slot holds something else than this state left there.
            ContractError: The model was sharded when another was active, and this one has trainable
                parameters.
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

    def underlay(self, modules: Mapping[str, nn.Module]) -> None:
        """Put modules where the active variant has none; an empty mapping puts the originals there.

        Args:
            modules: By FQN, each of a place of some variant.

        Raises:
            VariantError: No variant has such a place.
            DriftError: See `set`.
        """
        unknown = sorted(modules.keys() - self._sites.keys())
        if unknown:
            msg = f"Underlay has modules for {listed(unknown)}: expected places of variants."
            raise VariantError(msg)
        moves = self._moves(self._active, modules)
        # The active variant stays where it is.
        hand_down(self._floor.items(), subject=SUBJECT)
        take_over(modules.items(), model=self._model[0], subject=SUBJECT)
        with self._writing(moves) as transaction:
            transaction.note(vars(self), {"_floor": dict(modules)})

    def delete(self, name: str, *, then: str | None = None) -> None:
        """Forget a variant; if it is selected, select `then` in the same step.

        Raises:
            VariantError: `name` or `then` does not exist, or they are the same, or `name` lends to
                another variant.
            DriftError: See `set`.
        """
        self._require(name)
        if then is not None:
            self._require(then)
        if then == name:
            msg = f"Variant {name!r} cannot be selected after its own deletion. Name another."
            raise VariantError(msg)
        self._require_no_loan(name)
        if name == self._selected:
            self._move(then, is_enabled=self._is_enabled)
        # Without those that are not used any more.
        num_uses = self._num_uses - Counter(self._store[name].modules.keys())
        vars(self).update(
            _store={key: stored for key, stored in self._store.items() if key != name},
            _loans={key: loans for key, loans in self._loans.items() if key != name},
            _sites={fqn: site for fqn, site in self._sites.items() if fqn in num_uses},
            _num_uses=num_uses,
        )

    def rename(self, name: str, new_name: str) -> None:
        """Give a variant another name; the model is not touched.

        Raises:
            VariantError: `name` does not exist or lends to another variant, or `new_name` is taken.
        """
        self._require(name)
        self._require_free(new_name)
        self._require_no_loan(name)
        self._store = {new_name if key == name else key: at for key, at in self._store.items()}
        if name in self._loans:
            self._loans[new_name] = self._loans.pop(name)
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
        # With the original's own table of children a module has whatever that has.
        suspects = [
            item for item in replacements if not shares_children(item.site.module, item.module)
        ]
        if not suspects:
            return
        # Where a table of children belongs to the base, the active module in it is exchanged later.
        live = {id(found._modules) for root in roots for found in root.modules()}  # noqa: SLF001 (torch's registry)
        for item in suspects:
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
        active, store, leaving = self.active, self._store, self._active
        entered = target if is_enabled else None
        lenders = self._loans.get(entered, {}) if entered is not None else {}
        taken = [] if entered is None else [entered, *lenders]
        self._settle()
        returned = {name: Stored.at(self._sites, modules) for name, modules in self._lent.items()}
        if active is not None and active in lenders:
            returned[active] = Stored.at(self._sites, leaving)
        found = {name: returned[name] if name in returned else store[name] for name in taken}
        entering = found[entered].modules if entered is not None else {}
        if entered is not None:
            self._check_sharding(entered, entering, is_loan=bool(lenders) or bool(self._lent))
        moves = self._moves(entering, self._floor)
        self._hand_down()
        self._follow_active()
        found = {
            name: stored.followed(self._model[0], self._sites) for name, stored in found.items()
        }
        # Also if what follows fails: they have moved.
        store.update((name, stored) for name, stored in found.items() if name in store)
        for lender, names in lenders.items():
            _share(found[lender].modules, entering, names)
        with self._writing(moves) as transaction:
            known = found[entered].anchors if entered is not None else None
            if active is not None and active not in lenders:
                returned[active] = Stored.at(self._sites, leaving, known)
            transaction.note(store, {**returned, **dict.fromkeys(taken, GONE)})
            state = {
                "_lent": {name: found[name].modules for name in lenders},
                "_active": entering,
                "_active_anchors": {
                    fqn: anchor_of(module)
                    for fqn, module in entering.items()
                    if not shares_tensors(module, self._sites[fqn].module)
                },
                "_selected": target,
                "_is_enabled": is_enabled,
            }
            transaction.note(vars(self), state)

    def _check_sharding(
        self, name: str, entering: Mapping[str, nn.Module], *, is_loan: bool
    ) -> None:
        """Refuse parameters that would neither be gathered for a pass nor reduced after it."""
        if not is_one_of_several():
            return
        for fqn, module in entering.items():
            if not is_sharded_at(self._model[0], fqn):
                continue
            own = owned_tensors(self._sites[fqn].module, module).values()
            if is_loan and any(map(is_held_together, own)):
                actual = "some that were sharded in another"
                fix = "Stay with what was active when the model was sharded."
            elif any(tensor.requires_grad and not is_held_together(tensor) for tensor in own):
                actual = "trainable ones that each process has for itself"
                fix = "Make it active before the model is sharded, or freeze its parameters."
            else:
                continue
            msg = (
                f"Variant {name!r} cannot enter a sharded model at {fqn!r}: expected parameters "
                f"that were sharded with it, or frozen ones, got {actual}. {fix}"
            )
            raise ContractError(msg, fqn=fqn, expected="sharded or frozen", actual=actual)

    def _moves(
        self, entering: Mapping[str, nn.Module], floor: Mapping[str, nn.Module]
    ) -> list[Move]:
        """Return the writes that put a variant over an underlay, after checking what is there now."""
        sites, before, after = self._sites, self._active, entering
        if self._floor:
            before = {**self._floor, **before}
        if floor:
            after = {**floor, **after}
        # Plain loops, since a switch is done for every request: about two microseconds a module.
        moves: list[Move] = []
        for fqn, new in after.items():
            site = sites[fqn]
            old = before.get(fqn, site.module)
            for slot in site.slots:
                moves.append((slot, old, new))  # noqa: PERF401 (same)
        for fqn, old in before.items():
            if fqn not in after:
                moves += [(slot, old, sites[fqn].module) for slot in sites[fqn].slots]
        check_holds(
            [(slot, old) for slot, old, _ in moves],
            subject=SUBJECT,
            fix="Put the module named back before changing variants.",
        )
        return moves

    @contextmanager
    def _writing(self, moves: list[Move]) -> Iterator[Transaction]:
        """Write to the model, and note what it has then; all of it or nothing."""
        for _, old, new in moves:
            if new.training is not old.training or new._backward_hooks:  # noqa: SLF001 (when `hand_over` has anything to do)
                hand_over(old, new)
        with Transaction(on_write=self.on_write) as transaction:
            transaction.replace_all(moves)
            yield transaction

    def _hand_down(self) -> None:
        """Let originals have what was changed in the modules that stand for them."""
        hand_down(chain(self._active.items(), self._floor.items()), subject=SUBJECT)

    def _settle(self) -> None:
        """Let the lent variants have the very parameters that the active variant has now."""
        for lender, modules in self._lent.items():
            names = self._loans[self._selected or ""][lender]
            _share(self._active, modules, {theirs: own for own, theirs in names.items()})

    def _follow_active(self) -> None:
        """Move originals outside the model to where the active variant went since it was put there."""
        moved = [fqn for fqn, anchor in self._active_anchors.items() if not is_at(anchor)]
        if moved:
            anchors = dict(self._active_anchors)
            for fqn in moved:
                original = self._sites[fqn].module
                anchors[fqn] = catch_up(original, self._active[fqn], anchors[fqn])
            self._active_anchors = anchors

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._settle()
        for name, stored in self._store.items():
            for fqn, module in stored.modules.items():
                apply_own(module, self._sites[fqn].module, fn)
            self._store[name] = Stored.at(self._sites, stored.modules)
        return self

    def _require(self, name: str) -> None:
        if name not in self._store and name not in self._lent and name != self.active:
            msg = f"Variant {name!r} does not exist: expected one of {listed(self.names)}."
            raise VariantError(msg)

    def _require_free(self, name: str) -> None:
        if not name or name in self._store or name in self._lent or name == self.active:
            reason = "is taken" if name else "is empty"
            msg = f"Variant name {name!r} {reason}: there are {listed(self.names)}. Choose another."
            raise VariantError(msg)

    def _require_no_loan(self, name: str) -> None:
        borrowers = sorted(other for other, loans in self._loans.items() if name in loans)
        if borrowers:
            msg = (
                f"Variant {name!r} lends parameters to {listed(borrowers)}: expected one that lends "
                "to none. Delete what borrows first."
            )
            raise VariantError(msg)


def _share(
    given: Mapping[str, nn.Module], to: Mapping[str, nn.Module], names: Mapping[str, str]
) -> None:
    """Let modules have parameters of others at the same FQN: `names` are theirs, and those given."""
    for fqn in given.keys() & to.keys():
        source, own = given[fqn]._parameters, to[fqn]._parameters  # noqa: SLF001 (torch's registry)
        for name, other in names.items():
            # Modules of several operations have parameters of several names.
            if name in own and other in source and own[name] is not source[other]:
                own[name] = source[other]


def _own_children(module: nn.Module, live: AbstractSet[int]) -> Iterator[nn.Module]:
    """Yield the children in tables that are not `live`, from a new module downwards."""
    if id(module._modules) in live:  # noqa: SLF001 (torch's registry)
        return
    for child in module.children():
        yield child
        yield from _own_children(child, live)
