"""Which adapters the running thread or task uses, whatever others use on the same model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from types import MappingProxyType

from surgery_adaption_prompt.architectures import architecture_of
from surgery_adaption_prompt.attention import AdaptedAttention, compose
from surgery_adaption_prompt.rows import SharedTerms
from surgery_adaption_prompt.selection import Selected
from surgery_core import SwapState

_CURRENT: ContextVar[Mapping["AdapterSharing", tuple[Selected, SharedTerms]]] = ContextVar(
    "surgery_adaption_prompt", default=MappingProxyType({})
)
"""By model; each thread and each asyncio task has its own."""


class AdapterSharing:
    """Lets threads and tasks use different adapters over one model.

    While somebody does, every attention module that an adapter in use is for can be asked for its
    terms: where the active adapter has no module, one without parameters is put in the original's
    place. Code that has not said what it uses gets the active adapter, as ever.

    Args:
        swap_state: Of the model.
    """

    def __init__(self, swap_state: SwapState) -> None:
        self.lock = RLock()
        self.is_in_force = False
        self.epoch = 0
        self._swap_state = swap_state
        self._running: list[Selected] = []
        self._listeners: dict[str, AdaptedAttention] = {}

    def terms(self) -> SharedTerms | None:
        """Return what the running code gets; None for the active adapter's."""
        found = _CURRENT.get().get(self)
        return None if found is None else found[1]

    def used(self) -> Selected | None:
        """Return the adapters the running code uses; None for the active one."""
        found = _CURRENT.get().get(self)
        return None if found is None else found[0]

    def is_used(self, adapter_name: str) -> bool:
        """Tell whether some code uses an adapter now."""
        return any(adapter_name in selected.names for selected in self._running)

    @contextmanager
    def using(self, select: Callable[[], Selected]) -> Iterator[None]:
        """Use other adapters than the active one, in this thread or task.

        Args:
            select: Looks them up; called while nobody changes the adapters of the model.
        """
        with self.lock:
            selected = select()
            self._running.append(selected)
            try:
                self._listen()
            except BaseException:
                self._running.remove(selected)
                self.is_in_force = bool(self._running)
                raise
        token = _CURRENT.set({**_CURRENT.get(), self: (selected, selected.terms())})
        try:
            yield
        finally:
            _CURRENT.reset(token)
            with self.lock:
                self._running.remove(selected)
                self._listen()

    def _listen(self) -> None:
        """Put listeners where something that runs needs them, and nowhere else."""
        # First: listeners that cannot leave compute what the base does, and go with the next change.
        self.is_in_force = bool(self._running)
        fqns = {fqn for selected in self._running for fqn in selected.rows}
        known = self._swap_state.sites
        for fqn in fqns:
            base = known[fqn].module
            listener = self._listeners.get(fqn)
            if listener is None or listener.base_attention is not base:
                listener = compose(base, architecture_of(base, fqn=fqn), [], {})
                listener.sharing = self
                self._listeners[fqn] = listener
        self._swap_state.underlay({fqn: self._listeners[fqn] for fqn in fqns})
