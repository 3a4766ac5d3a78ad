"""Which variants the running thread or task uses, whatever others use on the same model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from math import isfinite
from threading import RLock
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from surgery_core.errors import ContractError, OptionsError, VariantError, listed
from surgery_core.operation import BASE, Operation, WeightedModule
from surgery_core.swap import SwapState, Variants

ChoiceT = TypeVar("ChoiceT")


class Shareable(nn.Module):
    """What a replacement derives from if other code may use other variants than it at its place.

    In every pass it looks whether `sharing` is in force, and whether that has `terms` then. If so, it
    computes what they say for the module that it stands for, in place of its own. Made by an
    operation that has `listener` and `shared`.
    """

    sharing: "Sharing | None" = None

    def sharing_problem(self) -> str | None:
        """Tell why other code would get this module's terms too now, though it uses others.

        Returns:
            What it is, as in "got a merged layer"; None if it would not.
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


_CURRENT: ContextVar[Mapping["Sharing", tuple[Selection, Mapping[int, Any]]]] = ContextVar(
    "surgery_core_sharing", default=MappingProxyType({})
)
"""By model; each thread and each asyncio task has its own."""


class Sharing:
    """Lets threads and tasks use different variants over one model.

    While somebody does, every module that a variant in use is for can be asked: where the active
    variant has no module, one that adds nothing is put in the original's place. Code that has not
    said what it uses gets the active variant, as ever. Copies and pickles of modules have none.

    Args:
        swap_state: Of the model.

    Attributes:
        lock: Held while variants are looked up, and by whoever changes them.
        is_in_force: Whether somebody uses something; modules look at it in every pass.
    """

    def __init__(self, swap_state: SwapState) -> None:
        self.lock = RLock()
        self.is_in_force = False
        self._swap_state = swap_state
        self._running: list[Selection] = []
        self._listeners: dict[str, tuple[nn.Module, nn.Module]] = {}

    def terms(self) -> Mapping[int, Any] | None:
        """Return what the running code gets: by the `id` of an original, what `shared` gave for it.

        Returns:
            None for the active variant; originals that are not in it stay as they are.
        """
        if torch.compiler.is_compiling():
            return _uncompiled_terms(self)  # type: ignore[no-any-return]  # undecorated
        found = _CURRENT.get().get(self)
        return None if found is None else found[1]

    def used(self) -> Selection | None:
        """Return the variants the running code uses; None for the active one."""
        found = _CURRENT.get().get(self)
        return None if found is None else found[0]

    def is_used(self, name: str) -> bool:
        """Tell whether some code uses a variant now."""
        return any(name in selection.names for selection in self._running)

    def attach(self, modules: Iterable[nn.Module]) -> None:
        """Let modules of a variant be asked for what threads use."""
        for module in modules:
            if isinstance(module, Shareable):
                # Not setattr, which takes as long as all the rest.
                vars(module)["sharing"] = self

    def require_shareable(self, name: str | None) -> None:
        """Refuse a variant to be active whose modules everybody else would get too.

        Args:
            name: Of the variant; None for none.

        Raises:
            ContractError: There is such a module.
        """
        found = {} if name is None else self._swap_state.variant(name)
        for fqn, module in found.items():
            if isinstance(module, Shareable):
                actual = module.sharing_problem()
            else:
                actual = type(module).__name__
            if actual is None:
                continue
            expected = "modules that can be shared"
            msg = (
                f"Variant {name!r} cannot be active while threads or rows have variants of their "
                f"own, which would get it too: expected {expected}, got {actual} at {fqn!r}. Make "
                "another one active."
            )
            raise ContractError(msg, fqn=fqn, expected=expected, actual=actual)

    @contextmanager
    def using(self, select: Callable[[], Selection]) -> Iterator[None]:
        """Use other variants than the active one, in this thread or task.

        Args:
            select: Looks them up; called while nobody changes the variants of the model.

        Raises:
            ContractError: The active variant, or one of these, cannot be used beside others.
        """
        with self.lock:
            selection = select()
            self.require_shareable(self._swap_state.active)
            terms = self._terms_of(selection)
            self._running.append(selection)
            try:
                self._listen()
            except BaseException:
                self._running.remove(selection)
                self.is_in_force = bool(self._running)
                raise
        token = _CURRENT.set({**_CURRENT.get(), self: (selection, terms)})
        try:
            yield
        finally:
            _CURRENT.reset(token)
            with self.lock:
                self._running.remove(selection)
                self._listen()

    def recompute_contexts(
        self,
        choice: Callable[[], ChoiceT],
        activated: Callable[[ChoiceT], AbstractContextManager[Any]],
        check: Callable[[], None] = lambda: None,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts for a checkpointed forward, and for doing it again with the same variants.

        Args:
            choice: Tells what is active.
            activated: Uses that.
            check: Raises if nothing can be used beside the active variant.
        """
        return nullcontext(), self._as_it_was(self.used(), choice(), choice, activated, check)

    @contextmanager
    def _as_it_was(
        self,
        used: Selection | None,
        chosen: ChoiceT,
        choice: Callable[[], ChoiceT],
        activated: Callable[[ChoiceT], AbstractContextManager[Any]],
        check: Callable[[], None],
    ) -> Iterator[None]:
        """Use what the running code used, or what was active if it used that."""

        def again() -> Selection:
            check()
            gone = sorted((used.names if used is not None else set()) - set(self._swap_state.names))
            if used is None or gone:
                msg = (
                    f"Adapter {listed(gone)} was deleted before the backward pass: expected what the "
                    "forward ran with, to compute it again. Delete it afterwards."
                )
                raise VariantError(msg)
            return used

        if used is None and self.used() is None and chosen == choice():
            yield
        else:
            with self.using(again) if used is not None else activated(chosen):
                yield

    def _terms_of(self, selection: Selection) -> dict[int, Any]:
        sites, found = self._swap_state.sites, {}
        for fqn, rows in selection.rows.items():
            are_equal = all(row == rows[0] for row in rows)
            chosen = rows[:1] if are_equal else rows
            found[id(sites[fqn].module)] = selection.operations[fqn].shared(sites[fqn], chosen)
        return found

    def _listen(self) -> None:
        """Put listeners where something that runs needs them, and nowhere else."""
        # First: listeners that cannot leave compute what the base does, and go with the next change.
        self.is_in_force = bool(self._running)
        makers = {
            fqn: operation
            for selection in self._running
            for fqn, operation in selection.operations.items()
        }
        sites = self._swap_state.sites
        for fqn, operation in makers.items():
            base = sites[fqn].module
            if fqn not in self._listeners or not _stands_for(*self._listeners[fqn], base):
                listener = operation.listener(sites[fqn])
                self.attach([listener])
                self._listeners[fqn] = base, listener
        self._swap_state.underlay({fqn: self._listeners[fqn][1] for fqn in makers})

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody, ()


def _stands_for(known: nn.Module, listener: nn.Module, base: nn.Module) -> bool:
    """Tell whether a listener is for a module, and has the parameters that are there now."""
    own, theirs = listener._parameters, base._parameters  # noqa: SLF001 (torch's registries)
    return known is base and all(own.get(name) is found for name, found in theirs.items())


def require_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names of adapters that there are not.

    Raises:
        VariantError: There are such names; all are named.
    """
    there = set(known)
    unknown = sorted(name for name in names if name not in there)
    if unknown:
        msg = f"Adapter {listed(unknown)} does not exist: expected some of {listed(sorted(there))}."
        raise VariantError(msg)


def weights_of(choice: str | Mapping[str, float]) -> dict[str, float]:
    """Return the weights of the variants that a choice stands for; none for `BASE`.

    Raises:
        OptionsError: A weight is no finite number.

    Example:
        >>> weights_of("fr"), weights_of({"fr": 1, "legal": 0.5}), weights_of(BASE)
        ({'fr': 1.0}, {'fr': 1.0, 'legal': 0.5}, {})
    """
    if isinstance(choice, str):
        return {} if choice == BASE else {choice: 1.0}
    bad = [
        f"{name!r}: {weight!r}"
        for name, weight in choice.items()
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight)
    ]
    if bad:
        msg = f"Weights of variants must be finite numbers, got {', '.join(bad)}. Fix them."
        raise OptionsError(msg)
    return {name: float(weight) for name, weight in choice.items()}


def repeats_of(batch: int, num_rows: int) -> int:
    """Return how many rows of a batch each row that was named stands for, in succession.

    Raises:
        OptionsError: The batch has another number of rows.

    Example:
        >>> repeats_of(6, 2)
        3
    """
    if batch % num_rows:
        msg = (
            f"Batch has {batch} rows: expected {num_rows}, one for each adapter name, or a multiple "
            "of that. Name one adapter for each row."
        )
        raise OptionsError(msg)
    return batch // num_rows


def rows_at(places: Sequence[int], place: int, repeats: int) -> slice | list[int]:
    """Return the rows of a batch at a place; a slice, which copies nothing, if they are neighbours.

    Args:
        places: Of the rows that were named; one of them is `place`.
        place: Any number.
        repeats: How many rows in succession each of those stands for.

    Example:
        >>> rows_at([0, 1, 1], 1, repeats=2), rows_at([1, 0, 1], 1, repeats=1)
        (slice(2, 6, None), [0, 2])
    """
    found = [row for row, at in enumerate(places) if at == place]
    if found[-1] - found[0] == len(found) - 1:
        return slice(found[0] * repeats, (found[-1] + 1) * repeats)
    return [row * repeats + again for row in found for again in range(repeats)]


@torch.compiler.disable(reason="it would not see which variants a thread uses")  # type: ignore[untyped-decorator,no-untyped-call]
def _uncompiled_terms(sharing: Sharing) -> Mapping[int, Any] | None:
    found = _CURRENT.get().get(sharing)
    return None if found is None else found[1]


def _nobody() -> None:
    """Stand for the sharing of a copied module: nobody uses others there."""
