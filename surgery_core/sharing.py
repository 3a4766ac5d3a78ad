"""Which variants the running thread or task uses, whatever others use on the same model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from threading import RLock, Thread, current_thread, main_thread
from threading import enumerate as live_threads
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from surgery_core.batches import BatchWatch
from surgery_core.errors import ContractError, VariantError, listed
from surgery_core.selection import Selection, Shareable
from surgery_core.swap import SwapState

ChoiceT = TypeVar("ChoiceT")

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]
"""For a checkpointed forward, and for doing it again."""


@dataclass(slots=True, eq=False)
class _Use:
    """A block of `using` that some code is in.

    Args:
        selection: What it uses.
        terms: See `Sharing.terms`.
        thread: That entered the block.
        before: Threads that were alive then.
        is_recomputed: Whether a forward is computed again, with what it had, disabled by now or not.
    """

    selection: Selection
    terms: Mapping[int, Any]
    thread: Thread
    before: frozenset[Thread]
    is_recomputed: bool


_CURRENT: ContextVar[Mapping["Sharing", _Use]] = ContextVar(
    "surgery_core_sharing", default=MappingProxyType({})
)
"""By model; each thread and each asyncio task has its own."""

_RECOMPUTING: ContextVar[bool] = ContextVar("surgery_core_recomputing", default=False)

_NOTHING = Selection(names=frozenset(), rows=MappingProxyType({}), operations=MappingProxyType({}))


@dataclass(slots=True, eq=False)
class _Hold:
    """A block in which the active variant is out of the model.

    Args:
        has_disabled: Whether its end puts it back.
        is_for_all: Whether the base computes in blocks of `using` too.
    """

    has_disabled: bool
    is_for_all: bool


class Sharing:
    """Per-thread and per-row adapters on one model.

    While some code is in a block of `using`, every module that an adapter in use is for can be asked:
    where the active variant has no module, one that adds nothing is put in the original's place.

    - Disabling is for the whole model, and wins: the base computes in every block too.
    - Code outside of all blocks gets the active variant, if it runs in the main thread, or in the
      thread of every block that is open. Any other thread may work for a block, which it does not
      inherit: it is refused until it enters one. So is a thread that was started in a block, also
      after that.

    Copies and pickles of modules have no sharing.

    Args:
        swap_state: Of the model.

    Attributes:
        lock: Held while variants are looked up, and by whoever changes them.
        is_in_use: Whether some code is in a block.
    """

    def __init__(self, swap_state: SwapState) -> None:
        self.lock = RLock()
        self.is_in_use = False
        self._swap_state = swap_state
        self._running: list[_Use] = []
        self._started_inside: list[Thread] = []
        self._is_off = False
        self._holds: list[_Hold] = []
        self._batches = BatchWatch(swap_state._model[0])  # noqa: SLF001 (the model that both are for)
        self._listeners: dict[str, tuple[nn.Module, nn.Module]] = {}

    @property
    def is_in_force(self) -> bool:
        """Whether modules must ask for `terms`; they look at it in every pass.

        That is while some code is in a block, and as long as a thread lives that was started in one.
        """
        if self.is_in_use or not self._started_inside or torch.compiler.is_compiling():
            return self.is_in_use
        return any(thread.is_alive() for thread in self._started_inside)

    def terms(self) -> Mapping[int, Any] | None:
        """Return what the running code gets: by the `id` of an original, what `shared` gave for it.

        Returns:
            None for the active variant; originals that are not in it stay as they are.

        Raises:
            VariantError: The thread is in no block, and may work for code that is in one.
        """
        if torch.compiler.is_compiling():
            return _uncompiled_terms(self)  # type: ignore[no-any-return]  # undecorated
        return self._found_terms()

    def _found_terms(self) -> Mapping[int, Any] | None:
        use = _CURRENT.get().get(self)
        if use is None:
            if not self._is_disabled():
                self._check_thread()
            return None
        return use.terms if self._counts(use) else {}

    def used(self) -> Selection | None:
        """Return the variants the running code uses; None for the active one."""
        use = _CURRENT.get().get(self)
        if use is None:
            return None
        return use.selection if self._counts(use) else _NOTHING

    def _counts(self, use: _Use) -> bool:
        return use.is_recomputed or not self._is_disabled()

    def _is_disabled(self) -> bool:
        """Tell whether the base computes for everybody."""
        if self._swap_state.is_enabled:
            return False
        return self._is_off or any(hold.is_for_all for hold in self._holds)

    def _check_thread(self) -> None:
        """Refuse the active variant to a thread that may work for code that uses another."""
        thread = current_thread()
        if thread in self._started_inside:
            when = "was started inside `activated(...)`"
        elif thread is not main_thread() and any(use.thread is not thread for use in self._running):
            when = "runs the model while another thread is inside `activated(...)`"
        else:
            return
        msg = (
            f"Thread {thread.name!r} {when}, and has not entered it: it might get another adapter "
            "than the code it works for. Enter activated(...) in this thread, with the adapter that "
            "it shall use."
        )
        raise VariantError(msg)

    def axis_problem(self, fqn: str, x: Tensor, num_rows: int) -> str | None:
        """Tell why the first axis of a layer's input is not the batch of the running pass, or may not be.

        Args:
            fqn: Of the layer, whose listener has `needs_batch_axis`.
            x: What it got.
            num_rows: That were named.

        Returns:
            What is wrong; None if the axis is the batch.
        """
        return self._batches.problem(fqn, x, num_rows, self._base_alone)

    def _base_alone(self, function: Callable[[], Any]) -> Any:  # noqa: ANN401 (whatever it returns)
        use = _Use(_NOTHING, {}, current_thread(), before=frozenset(), is_recomputed=True)
        token = _CURRENT.set({**_CURRENT.get(), self: use})
        try:
            return function()
        finally:
            _CURRENT.reset(token)

    def is_used(self, name: str) -> bool:
        """Tell whether some code uses a variant now."""
        return any(name in use.selection.names for use in self._running)

    def require_unused(self, names: Iterable[str]) -> None:
        """Refuse to take away variants that some code uses.

        Raises:
            VariantError: Some are used; all are named.
        """
        used = sorted(name for name in names if self.is_used(name))
        if used:
            msg = (
                f"Adapter {listed(used)} is in use by a thread or task inside `activated(...)`. Wait "
                "until that block exits."
            )
            raise VariantError(msg)

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
            use = _Use(
                selection=selection,
                terms=self._terms_of(selection),
                thread=current_thread(),
                before=frozenset(live_threads()),
                is_recomputed=_RECOMPUTING.get(),
            )
            self._running.append(use)
            try:
                self._listen()
            except BaseException:
                self._running.remove(use)
                self.is_in_use = bool(self._running)
                raise
        token = _CURRENT.set({**_CURRENT.get(), self: use})
        try:
            yield
        finally:
            _CURRENT.reset(token)
            with self.lock:
                self._running.remove(use)
                self._started_inside = [
                    thread
                    for thread in live_threads()
                    if thread in self._started_inside or thread not in use.before
                ]
                self._listen()

    def disable(self) -> None:
        """Have the base compute in every thread and row, until `enable`."""
        with self.lock:
            self._swap_state.disable()
            self._is_off = True

    def enable(self) -> None:
        """Put the selected variant back in the model, and let threads and rows have theirs."""
        with self.lock:
            self._swap_state.enable()
            self._is_off = False

    @contextmanager
    def disabled(self, enable: Callable[[], None], *, for_all: bool = True) -> Iterator[None]:
        """Have the active variant out of the model until all such blocks have ended, in any thread.

        Args:
            enable: Puts it back, if it was in the model.
            for_all: Have the base compute in blocks of `using` too.
        """
        with self.lock:
            hold = _Hold(self._swap_state.is_enabled, for_all)
            self._swap_state.disable()
            self._holds.append(hold)
        try:
            yield
        finally:
            with self.lock:
                # Other threads may have entered theirs, and not left it yet.
                later = self._holds[self._holds.index(hold) + 1 :]
                self._holds.remove(hold)
                if hold.has_disabled and later:
                    later[0].has_disabled = True
                elif hold.has_disabled:
                    enable()

    def recompute_contexts(
        self,
        choice: Callable[[], ChoiceT],
        activated: Callable[[ChoiceT], AbstractContextManager[Any]],
        check: Callable[[], None] = lambda: None,
    ) -> Contexts:
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

        if used is None and not self.is_in_use and chosen == choice():
            yield
            return
        token = _RECOMPUTING.set(True)
        try:
            with self.using(again) if used is not None else activated(chosen):
                yield
        finally:
            _RECOMPUTING.reset(token)

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
        self.is_in_use = bool(self._running)
        makers = {
            fqn: operation
            for use in self._running
            for fqn, operation in use.selection.operations.items()
        }
        sites = self._swap_state.sites
        for fqn, operation in makers.items():
            base = sites[fqn].module
            if fqn not in self._listeners or not _stands_for(*self._listeners[fqn], base):
                listener = operation.listener(sites[fqn])
                self.attach([listener])
                self._listeners[fqn] = base, listener
        self._swap_state.underlay({fqn: self._listeners[fqn][1] for fqn in makers})
        self._batches.watch(
            {
                fqn
                for use in self._running
                for fqn, rows in use.selection.rows.items()
                if any(row != rows[0] for row in rows)
                and cast("Shareable", self._listeners[fqn][1]).needs_batch_axis
            }
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody, ()


def _stands_for(known: nn.Module, listener: nn.Module, base: nn.Module) -> bool:
    """Tell whether a listener is for a module, and has the parameters that are there now."""
    own, theirs = listener._parameters, base._parameters  # noqa: SLF001 (torch's registries)
    return known is base and all(own.get(name) is found for name, found in theirs.items())


@torch.compiler.disable(reason="it would not see which variants a thread uses")  # type: ignore[untyped-decorator,no-untyped-call]
def _uncompiled_terms(sharing: Sharing) -> Mapping[int, Any] | None:
    return sharing._found_terms()  # noqa: SLF001 (undecorated)


def _nobody() -> None:
    """Stand for the sharing of a copied module: nobody uses others there."""
