"""Apply a plan and revert it: every replacement is built and checked before the first write."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import nn

from surgery_core.carry import (
    CarryOver,
    Owners,
    carry_over,
    hand_over,
    hook_ids,
    shares_children,
    tensor_owners,
)
from surgery_core.errors import ContractError, OptionsError, SurgeryError, listed
from surgery_core.follow import Stored
from surgery_core.operation import BoundRule, TensorSpec
from surgery_core.overlay import hand_down
from surgery_core.plan import Claim, PlanDocument, draft
from surgery_core.slots import RootCell, Site, SlotKind, check_holds, registered
from surgery_core.transaction import OnWrite, Transaction

_MAX_VALUES = 2**59
"""Of a tensor: torch counts bytes in 63 bits, and values may have 16."""

Observer = Callable[["Surgery"], None]
"""Told after the fact."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replacement:
    """What `build` made for one site, checked and ready to be put in place.

    Args:
        site: Where it goes.
        module: The replacement.
        carry_over: What it took over from the module it replaces.
        known_hooks: Ids of the hooks it had before it was put in place.
    """

    site: Site
    module: nn.Module
    carry_over: CarryOver
    known_hooks: frozenset[int]


class Plan:
    """A plan bound to a live model: nothing has been changed yet.

    Made by `Session.plan` or `Plan.draft`. Holds references to the modules it is about, so it is good for this
    process; `document` is the plan as data.

    Args:
        model: The model planned for.
        claims: What will be replaced.
        document: The same as plain data.
        on_applied: Told after the last write of `apply`; an error it raises rolls all back.
        on_reverted: Told after `Surgery.revert`.
    """

    def __init__(
        self,
        model: nn.Module,
        claims: list[Claim],
        document: PlanDocument,
        *,
        on_applied: Observer | None = None,
        on_reverted: Observer | None = None,
    ) -> None:
        self.model = model
        self.claims = tuple(claims)
        self.document = document
        self._on_applied = on_applied
        self._on_reverted = on_reverted
        self._seen: tuple[tuple[weakref.ref[nn.Module], list[torch.dtype]], ...] = ()

    @classmethod
    def draft(
        cls,
        model: nn.Module,
        rules: Sequence[BoundRule],
        *,
        originals: Mapping[int, nn.Module] | None = None,
        on_applied: Observer | None = None,
        on_reverted: Observer | None = None,
    ) -> "Plan":
        """Plan without a session, from operations at hand.

        Args:
            model: The model to plan for.
            rules: Rules with their operations.
            originals: Modules to look through; see `SwapState.originals`.
            on_applied: Told after `apply`.
            on_reverted: Told after `Surgery.revert`.

        Raises:
            SurgeryError: See `surgery_core.plan.draft`.
        """
        claims, document = draft(model, rules, originals=originals)
        plan = cls(model, claims, document, on_applied=on_applied, on_reverted=on_reverted)
        plan._seen = tuple(
            (weakref.ref(found), _dtypes(found)) for found in registered(model, originals=originals)
        )
        return plan

    def __str__(self) -> str:
        return self.document.render()

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy nobody is told, and it has other modules.
        return {**vars(self), "_on_applied": None, "_on_reverted": None, "_seen": ()}

    def sees_same_modules(self, *, originals: Mapping[int, nn.Module] | None = None) -> bool:
        """Tell whether the model has the very modules and dtypes it had when the plan was drafted.

        If so, drafting it again would claim the same; values and devices may have changed.

        Args:
            originals: Modules to look through; see `SwapState.originals`.
        """
        now = registered(self.model, originals=originals)
        if len(now) != len(self._seen):
            return False
        # A plain loop, since adapters are added by the thousand.
        for (reference, dtypes), found in zip(self._seen, now, strict=True):
            if reference() is not found or (found._parameters and dtypes != _dtypes(found)):  # noqa: SLF001 (torch's registry)
                return False
        return True

    def build(self) -> tuple[Replacement, ...]:
        """Build and check every replacement; the model is not changed.

        Raises:
            ContractError: A replacement does not keep what its operation declared.
            OptionsError: A tensor that is declared is larger than any can be.
        """
        owners = cache(partial(tensor_owners, self.model))
        seen: set[int] = set()
        # Servers load adapters in inference mode; what is made there could not be written, moved or
        # trained outside it.
        with torch.inference_mode(mode=False):
            return tuple(_build_one(claim, owners, seen) for claim in self.claims)

    def apply(self, *, on_write: OnWrite | None = None, in_place: bool = False) -> "Surgery":
        """Replace everything, or change nothing and raise.

        Args:
            on_write: Told of every write before it happens; an error it raises rolls all back.
            in_place: Refuse to replace the root, which a variable of the caller's holds.

        Returns:
            The applied surgery; its `model` is the model, or what replaced it at the root.

        Raises:
            DriftError: The model changed since the plan was made.
            ContractError: See `build`; or the root would be replaced `in_place`.
        """
        if in_place and any(not claim.site.fqn for claim in self.claims):
            msg = (
                "Plan replaces the root module: expected modules inside it (in_place=True), got "
                f"{type(self.model).__name__} itself. Use the `model` of the surgery returned."
            )
            raise ContractError(msg, fqn="", expected="a submodule", actual=type(self.model))
        self._check_holds()
        replacements = self.build()
        # `build` is plugin code: look again before the first write.
        self._check_holds()
        with Transaction(on_write=on_write) as transaction:
            for item in replacements:
                for slot in item.site.slots:
                    transaction.replace(slot, item.site.module, item.module)
            surgery = Surgery(self, replacements, transaction, self._on_reverted)
            # Inside the transaction: without a return the caller could not revert.
            if self._on_applied is not None:
                self._on_applied(surgery)
        return surgery

    def _check_holds(self) -> None:
        check_holds(
            [(slot, claim.site.module) for claim in self.claims for slot in claim.site.slots],
            subject="Model planned for",
            fix="Plan again.",
        )


class Surgery:
    """An applied plan: what was put where, and the way back.

    Invariant: after `revert` every slot holds the very object it held before `Plan.apply`.
    Surgeries stacked on one slot are reverted last first; another order is a `DriftError`.
    """

    def __init__(
        self,
        plan: Plan,
        replacements: tuple[Replacement, ...],
        transaction: Transaction,
        on_reverted: Observer | None,
    ) -> None:
        self.plan = plan
        self.replacements = replacements
        self.is_applied = True
        self._transaction = transaction
        self._on_reverted = on_reverted

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_on_reverted": None}

    @property
    def model(self) -> nn.Module:
        """The model now: the object planned for, or, while the root is replaced, its replacement."""
        for item in self.replacements if self.is_applied else ():
            for slot in item.site.slots:
                if slot.kind is SlotKind.ROOT and isinstance(slot.container, RootCell):
                    return slot.container.module
        return self.plan.model

    @contextmanager
    def paused(self) -> Iterator[nn.Module]:
        """Have the model as it was planned for, for a while; then the same replacements again.

        Raises:
            DriftError: See `revert`.
        """
        self._take_out()
        sites = {item.site.fqn: item.site for item in self.replacements}
        stored = Stored.at(sites, {item.site.fqn: item.module for item in self.replacements})
        try:
            yield self.plan.model
        finally:
            stored.followed(self.plan.model, sites)
            self._transaction.redo()
            for item in self.replacements:
                hand_over(item.site.module, item.module)

    def report(self) -> str:
        """Write what each replacement took over from its original, one line a module."""
        return "\n".join(item.carry_over.render() for item in self.replacements)

    def revert(self, *, on_write: OnWrite | None = None) -> nn.Module:
        """Put every original back, or change nothing and raise.

        Args:
            on_write: As for `Plan.apply`.

        Returns:
            The model as it was planned for: the same objects in the same places.

        Raises:
            DriftError: Somebody replaced a module that this surgery put in place.
            SurgeryError: It has been reverted already.
        """
        if not self.is_applied:
            msg = "Surgery is reverted already: expected an applied surgery. Apply a plan again."
            raise SurgeryError(msg)
        self._take_out(on_write=on_write)
        self.is_applied = False
        if self._on_reverted is not None:
            self._on_reverted(self)
        return self.plan.model

    def _take_out(self, *, on_write: OnWrite | None = None) -> None:
        """Put every original back, with what was changed in the module that stood for it."""
        subject = "Model under surgery"
        hand_down(((item.site.fqn, item.module) for item in self.replacements), subject=subject)
        self._transaction.undo(
            subject=subject,
            fix="Revert what was applied later first, or put the module named back.",
            on_write=on_write,
        )
        for item in self.replacements:
            hand_over(item.module, item.site.module, known=item.known_hooks)


def _build_one(claim: Claim, owners: Owners, seen: set[int]) -> Replacement:
    site = claim.site
    large = [spec.name for spec in claim.effects.added if prod(spec.shape) >= _MAX_VALUES]
    if large:
        msg = (
            f"Operation {claim.operation.name!r} asks for {listed(large)} at {site.fqn!r} with more "
            f"values than a tensor can have ({_MAX_VALUES:,}). Choose smaller sizes."
        )
        raise OptionsError(msg)
    new = claim.operation.build(site, claim.options)
    subject = f"Operation {claim.operation.name!r} broke its contract at {site.fqn!r}"
    if not isinstance(new, nn.Module) or new is site.module or id(new) in seen:
        msg = f"{subject}: expected a new torch.nn.Module for each site, got {new!r:.80}."
        raise ContractError(msg, fqn=site.fqn, expected=nn.Module, actual=type(new))
    seen.add(id(new))
    if claim.operation.keeps_children and not shares_children(site.module, new):
        msg = (
            f"{subject}: expected a module with the very table of children of the original, since "
            "the operation keeps children, got another. Let it have `_modules` of the original."
        )
        raise ContractError(msg, fqn=site.fqn, expected="shared children", actual=type(new))
    built, original = _state(new, site.module), _state(site.module, new)
    before, after = set(original), set(built)
    promised = {spec.name for spec in claim.effects.added}, set(claim.effects.removed)
    found = after - before, before - after
    if found != promised:
        msg = (
            f"{subject}: expected state-dict keys added {listed(sorted(promised[0]))} and removed "
            f"{listed(sorted(promised[1]))}, got added {listed(sorted(found[0]))} and removed "
            f"{listed(sorted(found[1]))}. Make `describe` and `build` agree."
        )
        raise ContractError(msg, fqn=site.fqn, expected=promised, actual=found)
    wrong = [spec for spec in claim.effects.added if not _fits(spec, built[spec.name])]
    if wrong:
        first, actual = wrong[0], _spec_of(wrong[0].name, built[wrong[0].name])
        msg = f"{subject}: expected {first}, got {actual}. Make `describe` and `build` agree."
        raise ContractError(msg, fqn=site.fqn, expected=first, actual=actual)
    _check_kept(claim, built, original, subject)
    report = carry_over(site.module, new, fqns=site.fqns, owners=owners)
    return Replacement(site=site, module=new, carry_over=report, known_hooks=hook_ids(new))


def _check_kept(
    claim: Claim, built: Mapping[str, object], original: Mapping[str, object], subject: str
) -> None:
    """Refuse a tensor under a key of the original that is neither like it nor as declared.

    Training flags of what is not declared may differ, as those of the base may by now.
    """
    declared = {spec.name: spec for spec in claim.effects.retyped}
    for name, spec in declared.items():
        old, new = original.get(name), built.get(name)
        is_there = isinstance(old, torch.Tensor) and old.shape == spec.shape
        if not (is_there and _fits(spec, new)) or new is old:
            actual = "the original's own" if is_there and new is old else _spec_of(name, new)
            msg = (
                f"{subject}: expected a copy of the original's as {spec}, got {actual}. Make "
                "`describe` and `build` agree."
            )
            raise ContractError(msg, fqn=claim.site.fqn, expected=spec, actual=actual)
    for name, new in built.items():
        old = original.get(name)
        if not isinstance(old, torch.Tensor) or name in declared:
            continue
        dtype = new.dtype if isinstance(new, torch.Tensor) else None
        if dtype is not old.dtype:
            msg = (
                f"{subject}: expected {name!r} of the original's {old.dtype}, got {dtype}. Declare "
                "it as `retyped` in `describe`."
            )
            raise ContractError(msg, fqn=claim.site.fqn, expected=old.dtype, actual=dtype)


def _state(module: nn.Module, other: nn.Module) -> dict[str, Any]:
    """Return a module's state dict, without children's entries if `other` has the very same ones."""
    found: dict[str, Any] = {}
    if shares_children(module, other) and _has_plain_state(module) and _has_plain_state(other):
        module._save_to_state_dict(found, "", keep_vars=True)  # noqa: SLF001 (torch's own step for one module)
    else:
        module.state_dict(destination=found, keep_vars=True)
    return found


def _has_plain_state(module: nn.Module) -> bool:
    """Tell whether a module's state dict is what it holds itself, and what its children do."""
    return (
        type(module).state_dict is nn.Module.state_dict
        and not module._state_dict_hooks  # noqa: SLF001 (torch's registry)
        and not module._state_dict_pre_hooks  # noqa: SLF001 (same)
    )


def _dtypes(module: nn.Module) -> list[torch.dtype]:
    return [p.dtype for p in module._parameters.values() if p is not None]  # noqa: SLF001 (torch's registry)


def _fits(spec: TensorSpec, value: object) -> bool:
    """Tell whether an entry of a state dict is what `_spec_of` would describe so."""
    return (
        isinstance(value, torch.Tensor)
        and value.shape == spec.shape
        and str(value.dtype) == f"torch.{spec.dtype}"
        and value.requires_grad is spec.trainable
    )


def _spec_of(name: str, value: object) -> TensorSpec | None:
    """Describe an entry of a state dict; None when it is extra state, which is no tensor."""
    return TensorSpec.of(name, value) if isinstance(value, torch.Tensor) else None
