"""Which of thousands of adapters in folders are in a model, within how many bytes."""

import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_adaption_prompt.arguments import check_adapter_name, check_base_check, check_path
from surgery_adaption_prompt.base_check import BaseCheck
from surgery_adaption_prompt.checkpoints import CONFIG_FILE, expected_bytes, folder_stamp
from surgery_adaption_prompt.folders import check_name
from surgery_adaption_prompt.store_host import Host
from surgery_core import OptionsError, SurgeryError, VariantError, listed


class StoreError(SurgeryError, MemoryError):
    """Adapters do not fit in the bytes a store may use.

    Attributes:
        num_bytes: What they would take, with the adapters that cannot be evicted for them.
        max_bytes: What the store may use.
    """

    def __init__(self, message: str, *, num_bytes: int, max_bytes: int) -> None:
        super().__init__(message)
        self.num_bytes, self.max_bytes = num_bytes, max_bytes


# Tracebacks then show the name a user imports.
StoreError.__module__ = "surgery_adaption_prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounters:
    """What a store has done so far, and what it has loaded now.

    Args:
        hits: Adapters asked for that the store had loaded already; calls that raised do not count.
        misses: Adapters asked for that it loaded.
        evictions: Adapters it took out of the model again, by `evict` and `clear` too.
        num_loaded: Adapters in the model that it loaded.
        num_bytes: What they take.
    """

    hits: int
    misses: int
    evictions: int
    num_loaded: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """An adapter this store loaded; it is still the store's while the host has the same object.

    Args:
        config: That object.
        num_bytes: What it takes; in proportion to what was expected of its file, so to its dtype.
        expected: Of the file.
        stamp: Of its files when it was loaded.
    """

    config: object
    num_bytes: int
    expected: int
    stamp: tuple[object, ...]


class AdapterStore:
    """Adapters in the subfolders of a folder, loaded into a model when they are asked for.

    A subfolder is what `save_pretrained` writes for an adapter of its name. What is not loaded takes
    no memory; what is loaded is frozen, so evicting it loses nothing. Where there is a budget, those
    least recently asked for make room. An adapter that was saved anew since it was loaded is loaded
    again when it is next asked for, unless it is in use or leased: then it stays as it is until it is
    asked for when it is free.

    Invariant: after every call that loaded, what this store loaded takes at most `max_bytes`. Never
    evicted are adapters that are pinned, leased or in use, and those the store did not load: added
    by hand, or given other values since (`hotswap_adapter`) or another name.

    Life cycle: the first `ensure` binds the store to its model, which it does not keep alive; for
    another model there is another store. Calls from several threads are served one at a time. A
    copy or pickle of model and store together stays a pair; leases are not copied.

    Args:
        folder: Holds one subfolder for each adapter; adapters may come and go in it at any time.
        max_bytes: What the parameters of loaded adapters may take, in bytes; None for any number.
            Their sizes are noted at load. After a move of the model to another dtype they are noted
            again at the next call that loads, which evicts what has become too much.
        pinned: Names of adapters that stay once they are loaded.
        base_check: What to do if an adapter was trained for another base; see `check_base`.

    Raises:
        SurgeryError: There is no such folder.
        OptionsError: `max_bytes` is no number of bytes.
        VariantError: A pinned adapter is not in the folder.

    Example:
        >>> import tempfile
        >>> from surgery_adaption_prompt.checkpoints import save_adapter
        >>> from surgery_adaption_prompt.config import AdaptionPromptConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = AdaptionPromptConfig(adapter_len=1, adapter_layers=1)
        ...     save_adapter(f"{folder}/french", config, {})
        ...     store = AdapterStore(folder, max_bytes=1_000_000)
        ...     store.names(), "french" in store, "../french" in store
        (('french',), True, False)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        pinned: Iterable[str] = (),
        base_check: BaseCheck = "warn",
    ) -> None:
        check_path(folder, what="folder")
        check_base_check(base_check)
        if isinstance(pinned, str):
            msg = f"pinned is {pinned!r}: expected a list of adapter names. Write [{pinned!r}]."
            raise OptionsError(msg)
        self._folder = Path(folder)
        if not self._folder.is_dir():
            msg = (
                f"AdapterStore has no folder {os.fspath(folder)!r}: expected one that holds a "
                "subfolder for each adapter. Make it, or write adapters to it with save_pretrained."
            )
            raise SurgeryError(msg)
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 0):
            msg = (
                f"max_bytes must be a number of bytes, an integer of at least 0, or None, got "
                f"{max_bytes!r}."
            )
            raise OptionsError(msg)
        self._max_bytes = max_bytes
        self._base_check: BaseCheck = base_check
        # Least recently asked for first.
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        # Asked for since sizes were looked at, or in use then.
        self._asked: set[str] = set()
        self._pinned: set[str] = set()
        self._leases: Counter[str] = Counter()
        self._hits = self._misses = self._evictions = 0
        self._lock = threading.RLock()
        self._host: weakref.ref[Host] | None = None
        for name in pinned:
            self.pin(name)

    def names(self) -> tuple[str, ...]:
        """Return the names of the adapters in the folder, sorted; no file is opened."""
        with os.scandir(self._folder) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.name in self))

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        try:
            check_name(name)
        except VariantError:
            return False
        # No Path objects: ten thousand names are listed.
        path = f"{self._folder}{os.sep}{name}{os.sep}{CONFIG_FILE}"
        return os.path.isfile(path)  # noqa: PTH113 (same)

    def ensure(self, host: Host, names: Collection[str]) -> None:
        """Have all of these adapters in the model, or raise and have added none.

        Adapters that the model has from elsewhere under these names are left alone, and are neither
        hits nor misses. Those that were saved anew are evicted and loaded again. The folders of the others are checked, headers of the tensors included,
        before anything changes. Then they are loaded one by one, each after as many others have been
        evicted as it needs room.

        After an error nothing was evicted either, unless it came from a load (an adapter for another
        model, damaged behind its header, or larger in the model than on disk): those evicted for it
        are loaded again when they are next asked for.

        Args:
            host: The model.
            names: Of adapters in the folder, or that the model has.

        Raises:
            VariantError: A name is no folder's, or not that of an adapter.
            StoreError: They do not fit, with what cannot be evicted.
            OptionsError: The store serves another model.
            SurgeryError: A folder cannot be read, or does not fit the model.
        """
        wanted = dict.fromkeys(names)
        with self._lock:
            self._bind(host)
            present = host.peft_config
            stale = [name for name in wanted if self._is_stale(host, name)]
            missing = [name for name in wanted if name not in present or name in stale]
            hits = [n for n in wanted if n not in stale and self._has_loaded(host, n)]
            if missing:
                self._load_all(host, missing, wanted, stale=stale)
            for name in wanted:
                if name in self._loaded:
                    self._loaded.move_to_end(name)
                    self._asked.add(name)
            self._hits += len(hits)
            self._misses += len(missing)

    @contextmanager
    def lease(self, host: Host, names: Collection[str]) -> Iterator[None]:
        """Do as `ensure`, and keep these adapters for a while; the safe way with several threads.

        Between `ensure` and the computation another thread's call may evict them again.

        Args:
            host: The model.
            names: Of adapters in the folder, or that the model has.

        Raises:
            SurgeryError: See `ensure`.
        """
        leased = tuple(dict.fromkeys(names))
        with self._lock:
            self.ensure(host, leased)
            self._leases.update(leased)
        try:
            yield
        finally:
            with self._lock:
                self._leases.subtract(leased)
                self._leases = +self._leases

    def pin(self, name: str) -> None:
        """Keep an adapter in the model once it is loaded; harmless when it is pinned.

        Raises:
            VariantError: It is not in the folder.
        """
        with self._lock:
            self._require_folders([name])
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again.

        Raises:
            VariantError: It is not pinned.
        """
        with self._lock:
            if name not in self._pinned:
                msg = (
                    f"Adapter {name!r} is not pinned: expected one of "
                    f"{listed(sorted(self._pinned))}. Fix the name."
                )
                raise VariantError(msg)
            self._pinned.remove(name)

    def evict(self, name: str) -> None:
        """Take an adapter out of the model.

        Raises:
            VariantError: The store has not loaded it, or it is pinned, leased or in use.
        """
        with self._lock:
            host = self._refresh()
            if host is None or name not in self._loaded:
                own = sorted(self._loaded) if host is not None else []
                msg = (
                    f"Adapter {name!r} cannot be evicted: expected one that this store loaded, of "
                    f"{listed(own)}. Delete others with the model's delete_adapter."
                )
                raise VariantError(msg)
            reason = self._reason_to_stay(host, name)
            if reason is not None:
                msg = (
                    f"Adapter {name!r} cannot be evicted: expected one that is neither pinned nor "
                    f"leased nor in use, got one that is {reason}. Unpin it, or let its use end."
                )
                raise VariantError(msg)
            self._evict(host, name)

    def clear(self) -> tuple[str, ...]:
        """Evict every adapter that may be; return the names of those that stay, sorted."""
        with self._lock:
            host = self._refresh()
            if host is None:
                return ()
            for name in list(self._loaded):
                if self._reason_to_stay(host, name) is None:
                    self._evict(host, name)
            return tuple(sorted(self._loaded))

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adapters this store has in the model, least recently asked for first."""
        with self._lock:
            return () if self._refresh() is None else tuple(self._loaded)

    @property
    def counters(self) -> StoreCounters:
        """What this store has done, and what it has loaded."""
        with self._lock:
            is_bound = self._refresh() is not None
            return StoreCounters(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                num_loaded=len(self._loaded) if is_bound else 0,
                num_bytes=self._num_bytes() if is_bound else 0,
            )

    def _load_all(
        self,
        host: Host,
        missing: Collection[str],
        wanted: Collection[str],
        *,
        stale: Collection[str],
    ) -> None:
        """Load adapters that the host has not got, or has as they were before, all or none."""
        folders = self._require_folders(missing)
        # Before they are read: what is saved meanwhile is loaded the next time.
        stamps = {name: self._stamp(name) for name in folders}
        sizes = {name: expected_bytes(folder) for name, folder in folders.items()}
        self._refresh()
        freed = sum(self._loaded[name].num_bytes for name in stale)
        self._victims(host, sum(sizes.values()) - freed, wanted)
        for name in stale:
            self._evict(host, name)
        added: list[str] = []
        try:
            for name, folder in folders.items():
                self._make_room(host, sizes[name], wanted)
                host.add_from_folder(folder, name, is_trainable=False, base_check=self._base_check)
                added.append(name)
                self._note(host, name, sizes[name], stamps[name])
            # It may be more than was expected of the files.
            self._make_room(host, 0, wanted)
        except BaseException:
            for name in reversed(added):
                host.delete_adapter(name)
            raise

    def _make_room(self, host: Host, num_bytes: int, wanted: Collection[str]) -> None:
        for name in self._victims(host, num_bytes, wanted):
            self._evict(host, name)

    def _victims(self, host: Host, num_bytes: int, wanted: Collection[str]) -> list[str]:
        """Return which adapters to evict for so many more bytes; nothing is changed.

        Raises:
            StoreError: That would not be enough.
        """
        if self._max_bytes is None:
            return []
        total = num_bytes + self._num_bytes()
        victims: list[str] = []
        staying: dict[str, list[str]] = {}
        for name, loaded in self._loaded.items():
            if total <= self._max_bytes:
                break
            reason = "asked for now" if name in wanted else self._reason_to_stay(host, name)
            if reason is None:
                victims.append(name)
                total -= loaded.num_bytes
            else:
                staying.setdefault(reason, []).append(name)
        if total > self._max_bytes:
            stay = "; ".join(f"{why}: {listed(sorted(who))}" for why, who in staying.items())
            msg = (
                f"Store {os.fspath(self._folder)!r} has no room for {listed(sorted(wanted))}: "
                f"expected at most {self._max_bytes:,d} bytes, got {total:,d}, {num_bytes:,d} of "
                f"them to be loaded and {total - num_bytes:,d} that stay ({stay or 'nothing'}). "
                "Ask for fewer at a time, unpin some, let the use of some end, or raise max_bytes."
            )
            raise StoreError(msg, num_bytes=total, max_bytes=self._max_bytes)
        return victims

    def _note(self, host: Host, name: str, expected: int, stamp: tuple[object, ...]) -> None:
        """Note an adapter as loaded by this store, as it is now."""
        num_bytes = host.adapter_bytes(name)
        self._loaded[name] = _Loaded(host.peft_config[name], num_bytes, expected, stamp)

    def _stamp(self, name: str) -> tuple[object, ...]:
        # No Path objects: an adapter is asked for with each request.
        return folder_stamp(f"{self._folder}{os.sep}{name}")

    def _is_stale(self, host: Host, name: str) -> bool:
        """Tell whether an adapter was saved anew since it was loaded, and may be exchanged now.

        One whose folder is gone is served on.
        """
        if not self._has_loaded(host, name) or name in self._leases or host.is_in_use(name):
            return False
        return name in self and self._stamp(name) != self._loaded[name].stamp

    def _evict(self, host: Host, name: str) -> None:
        host.delete_adapter(name)
        del self._loaded[name]
        self._evictions += 1

    def _reason_to_stay(self, host: Host, name: str) -> str | None:
        if name in self._pinned:
            return "pinned"
        if name in self._leases:
            return "leased"
        return "in use" if host.is_in_use(name) else None

    def _num_bytes(self) -> int:
        return sum(loaded.num_bytes for loaded in self._loaded.values())

    def _bind(self, host: Host) -> None:
        """Bind the store to a model.

        Raises:
            OptionsError: It is bound to another, which is still there.
        """
        bound = None if self._host is None else self._host()
        if bound is None:
            self._host = weakref.ref(host)
        elif bound is not host:
            msg = (
                f"AdapterStore {os.fspath(self._folder)!r} serves another model: expected the "
                f"{type(bound).__name__} it loaded adapters into first, got another "
                f"{type(host).__name__}. Make a store for each model."
            )
            raise OptionsError(msg)

    def _has_loaded(self, host: Host, name: str) -> bool:
        """Tell whether the host has an adapter as this store loaded it."""
        loaded = self._loaded.get(name)
        return loaded is not None and host.peft_config.get(name) is loaded.config

    def _refresh(self) -> Host | None:
        """Forget what is no longer as this store loaded it; note sizes again if they changed."""
        host = None if self._host is None else self._host()
        if host is None:
            return None
        for name in [name for name in self._loaded if not self._has_loaded(host, name)]:
            del self._loaded[name]
        # Sizes change when the model moves to another dtype: all those of one dtype at once, or each
        # when it is next put in the model, before which it is asked for. So the ones asked for and
        # one of each dtype tell, without asking thousands.
        self._asked &= self._loaded.keys()
        by_dtype = {at.num_bytes / max(1, at.expected): name for name, at in self._loaded.items()}
        some = {*self._asked, *by_dtype.values()}
        if any(host.adapter_bytes(name) != self._loaded[name].num_bytes for name in some):
            for name, loaded in list(self._loaded.items()):
                self._note(host, name, loaded.expected, loaded.stamp)
        # What is in use may be taken out, and put back when the base has moved.
        self._asked = {name for name in self._asked if host.is_in_use(name)}
        return host

    def _require_folders(self, names: Iterable[str]) -> dict[str, Path]:
        """Return the folders of adapters by name.

        Raises:
            VariantError: A name is no folder's, or not that of an adapter.
        """
        folders: dict[str, Path] = {}
        for name in names:
            check_adapter_name(name)
            check_name(name)
            folders[name] = self._folder / name
        unknown = [name for name in folders if name not in self]
        if unknown:
            msg = (
                f"Store {os.fspath(self._folder)!r} has no adapter {listed(sorted(unknown))}: "
                f"expected subfolders of these names with {CONFIG_FILE}, as save_pretrained writes "
                "them. Fix the names, or save the adapters there."
            )
            raise VariantError(msg)
        return folders

    def __getstate__(self) -> dict[str, Any]:
        own = {"_host": None, "_lock": None, "_leases": Counter[str]()}
        with self._lock:
            return {**vars(self), **own, "_loaded": OrderedDict(self._loaded)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())
