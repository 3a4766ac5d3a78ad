"""`AdapterStore`: adapters on disk are loaded when asked for, and leave when room is short."""

import copy
import io
import json
import os
import pickle
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.checkpoints import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from surgery_adaption_prompt.store import AdapterStore, StoreCounters, StoreError

from surgery_core import OptionsError, StateError, SurgeryError, VariantError
from surgery_core.testing import snapshot

CONFIG = AdaptionPromptConfig(adapter_len=1, adapter_layers=1)
VALUES = {name: number for number, name in enumerate("abcdef", start=1)}
"""How many values each adapter has; on disk and in float32, four bytes each."""


class FakeHost:
    """Has adapters and computes nothing; what takes four bytes on disk takes `width` here."""

    def __init__(self):
        self.peft_config = {}
        self.used, self.broken, self.wide = set(), set(), set()
        self.calls = []
        self.width = 4
        self.is_entered = False

    def load_adapter(self, model_id, adapter_name, *, is_trainable=False, base_check="warn"):
        assert not self.is_entered, "two threads at once"
        self.is_entered = True
        time.sleep(0)
        assert adapter_name not in self.peft_config
        assert adapter_name == Path(model_id).name
        assert not is_trainable
        self.is_entered = False
        if adapter_name in self.broken:
            msg = f"{adapter_name} does not fit"
            raise StateError(msg)
        self.calls.append(("load", adapter_name, base_check))
        self.add(adapter_name)

    def add(self, name):
        """Add an adapter, by hand where the store does not call it."""
        self.peft_config[name] = copy.copy(CONFIG)

    def delete_adapter(self, name):
        self.calls.append(("delete", name))
        del self.peft_config[name]

    def adapter_bytes(self, name):
        return (8 if name in self.wide else self.width) * VALUES[name]

    def is_in_use(self, name):
        return name in self.used


def write(folder, name):
    """Write an adapter as `save_pretrained` does."""
    save_adapter(folder / name, CONFIG, {"l.adaption_prompt": torch.zeros(1, VALUES[name], 1)})


@pytest.fixture
def folder(tmp_path):
    for name in VALUES:
        write(tmp_path, name)
    return tmp_path


@pytest.fixture
def host():
    return FakeHost()


# -- on disk --------------------------------------------------------------------------------------


def test_names_are_those_of_folders_with_an_adapter_sorted(folder):
    (folder / "no adapter").mkdir()
    (folder / "file").write_text("")
    write(folder, "c")
    (folder / "c").rename(folder / ".hidden")
    store = AdapterStore(folder)

    assert ("a", "b", "d", "e", "f") == store.names()
    assert all(name in store for name in store.names())
    for name in (
        "c",
        "no adapter",
        "file",
        ".hidden",
        "",
        ".",
        "..",
        "../a",
        "a/",
        "a\0",
        "a" * 999,
    ):
        assert name not in store
    assert 1 not in store


def test_adapters_may_come_and_go_on_disk(folder):
    store = AdapterStore(folder)
    (folder / "a").rename(folder / "z")

    assert ("b", "c", "d", "e", "f", "z") == store.names()


def test_listing_opens_no_file(folder, monkeypatch):
    opened = []
    for module, name in ((io, "open"), (os, "open")):
        monkeypatch.setattr(module, name, lambda *args, **_: opened.append(args))
    monkeypatch.setattr("builtins.open", lambda *args, **_: opened.append(args))

    assert tuple(VALUES) == AdapterStore(folder).names()
    assert [] == opened


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"folder": "nowhere"},
            SurgeryError,
            "AdapterStore has no folder 'nowhere': expected one that holds a subfolder for each "
            "adapter. Make it, or write adapters to it with save_pretrained.",
        ),
        (
            {"max_bytes": -1},
            OptionsError,
            "max_bytes must be a number of bytes, an integer of at least 0, or None, got -1.",
        ),
        (
            {"max_bytes": True},
            OptionsError,
            "max_bytes must be a number of bytes, an integer of at least 0, or None, got True.",
        ),
        (
            {"pinned": ["../a"]},
            VariantError,
            "Adapter name '../a' cannot name a folder: expected one without separators that does "
            "not begin with a dot. Choose another.",
        ),
        (
            {"pinned": ["a", "x"]},
            VariantError,
            "Store '.' has no adapter 'x': expected subfolders of these names with "
            "adapter_config.json, as save_pretrained writes them. Fix the names, or save the "
            "adapters there.",
        ),
    ],
)
def test_a_store_that_cannot_be_is_refused(folder, monkeypatch, options, kind, message):
    monkeypatch.chdir(folder)

    with pytest.raises(kind) as caught:
        AdapterStore(**{"folder": ".", **options})

    assert message == str(caught.value)


# -- loading and evicting -------------------------------------------------------------------------


def test_what_is_missing_is_loaded_and_what_is_there_is_not(folder, host):
    store = AdapterStore(folder, base_check="error")

    store.ensure(host, ["b", "a", "b"])
    store.ensure(host, ["a", "c"])

    assert [("load", name, "error") for name in "bac"] == host.calls
    assert ("b", "a", "c") == store.loaded
    assert store.counters == StoreCounters(
        hits=1, misses=3, evictions=0, num_loaded=3, num_bytes=4 * (1 + 2 + 3)
    )


def test_those_least_recently_asked_for_make_room(folder, host):
    store = AdapterStore(folder, max_bytes=4 * 8)
    store.ensure(host, ["a", "b", "c"])
    store.ensure(host, ["a"])

    store.ensure(host, ["d"])

    assert [("delete", "b"), ("load", "d", "warn")] == host.calls[-2:]
    assert ("c", "a", "d") == store.loaded
    store.ensure(host, ["b"])
    assert ("a", "d", "b") == store.loaded
    assert store.counters == StoreCounters(
        hits=1, misses=5, evictions=2, num_loaded=3, num_bytes=4 * 7
    )


def test_no_more_are_evicted_than_must_be(folder, host):
    store = AdapterStore(folder, max_bytes=4 * 10)
    store.ensure(host, ["a", "b", "c", "d"])

    store.ensure(host, ["d", "e"])

    assert ("d", "e") == store.loaded
    store.ensure(host, ["a"])
    assert ("d", "e", "a") == store.loaded


def test_what_must_stay_stays_and_is_named(folder, host):
    store = AdapterStore(folder, max_bytes=4 * 15, pinned=["a"])
    store.ensure(host, "abcde")
    host.used.add("b")
    host.add("x")
    before = dict(host.peft_config)

    with store.lease(host, ["c"]), pytest.raises(StoreError) as caught:
        store.ensure(host, ["d", "f", "x"])

    assert str(caught.value) == (
        f"Store {str(folder)!r} has no room for 'd', 'f', 'x': expected at most 60 bytes, got 64, "
        "24 of them to be loaded and 40 that stay (pinned: 'a'; in use: 'b'; asked for now: 'd'; "
        "leased: 'c'). Ask for fewer at a time, unpin some, let the use of some end, or raise "
        "max_bytes."
    )
    assert (64, 60) == (caught.value.num_bytes, caught.value.max_bytes)
    assert isinstance(caught.value, MemoryError)
    assert before == host.peft_config
    assert ("a", "b", "d", "e", "c") == store.loaded
    assert store.counters == StoreCounters(
        hits=1, misses=5, evictions=0, num_loaded=5, num_bytes=60
    )
    store.unpin("a")
    store.ensure(host, ["d", "f"])
    assert ("b", "c", "d", "f") == store.loaded


def test_more_than_the_whole_budget_is_refused(folder, host):
    with pytest.raises(StoreError) as caught:
        AdapterStore(folder, max_bytes=3).ensure(host, ["a"])

    assert str(caught.value) == (
        f"Store {str(folder)!r} has no room for 'a': expected at most 3 bytes, got 4, 4 of them to "
        "be loaded and 0 that stay (nothing). Ask for fewer at a time, unpin some, let the use of "
        "some end, or raise max_bytes."
    )


def test_several_that_do_not_fit_together_evict_nothing(folder, host):
    store = AdapterStore(folder, max_bytes=4 * 7)
    store.ensure(host, ["e"])

    with pytest.raises(StoreError, match="got 36, 36 of them to be loaded"):
        store.ensure(host, ["c", "f"])

    assert ("e",) == store.loaded
    assert [("load", "e", "warn")] == host.calls


def test_unknown_adapters_are_all_named_and_nothing_is_loaded(folder, host):
    with pytest.raises(VariantError) as caught:
        AdapterStore(folder).ensure(host, ["a", "y", "x"])

    assert str(caught.value) == (
        f"Store {str(folder)!r} has no adapter 'x', 'y': expected subfolders of these names with "
        "adapter_config.json, as save_pretrained writes them. Fix the names, or save the adapters "
        "there."
    )
    assert [] == host.calls


@pytest.mark.parametrize("damage", ["truncate", "remove", "config"])
def test_a_damaged_folder_is_found_before_anything_changes(folder, host, damage):
    store = AdapterStore(folder, max_bytes=4 * 6)
    store.ensure(host, ["a", "b", "c"])
    before = dict(host.peft_config)
    weights = folder / "e" / WEIGHTS_FILE
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / "e" / CONFIG_FILE).write_text("{")

    with pytest.raises(SurgeryError) as caught:
        store.ensure(host, ["a", "e"])

    name = CONFIG_FILE if damage == "config" else WEIGHTS_FILE
    assert str(caught.value) == (
        f"Adapter folder {str(folder / 'e')!r} has no readable {name}: {caught.value.__cause__}. "
        "Pass a folder that save_pretrained wrote."
    )
    assert before == host.peft_config
    assert ("a", "b", "c") == store.loaded


def test_a_failing_load_takes_back_those_before_it(folder, host):
    store = AdapterStore(folder, max_bytes=4 * 9)
    store.ensure(host, ["b", "c"])
    host.broken.add("d")

    with pytest.raises(StateError, match="d does not fit"):
        store.ensure(host, ["a", "d"])

    assert ("c",) == store.loaded
    assert ["c"] == list(host.peft_config)
    assert store.counters == StoreCounters(
        hits=0, misses=2, evictions=1, num_loaded=1, num_bytes=12
    )
    host.broken.clear()
    store.ensure(host, ["b", "a"])
    assert ("c", "b", "a") == store.loaded


def test_what_turns_out_larger_than_its_file_evicts_more(folder, host):
    """The file says four bytes a value; in this model it is eight."""
    host.width = 8
    store = AdapterStore(folder, max_bytes=8 * 5)
    store.ensure(host, ["a", "b"])

    store.ensure(host, ["d"])

    assert ("d",) == store.loaded
    assert 32 == store.counters.num_bytes


def test_what_turns_out_larger_than_the_budget_is_taken_back(folder, host):
    host.width = 8
    store = AdapterStore(folder, max_bytes=20)

    with pytest.raises(StoreError) as caught:
        store.ensure(host, ["c"])

    assert str(caught.value) == (
        f"Store {str(folder)!r} has no room for 'c': expected at most 20 bytes, got 24, 0 of them "
        "to be loaded and 24 that stay (asked for now: 'c'). Ask for fewer at a time, unpin some, "
        "let the use of some end, or raise max_bytes."
    )
    assert {} == host.peft_config
    assert () == store.loaded


def test_a_model_that_moved_to_a_wider_dtype_is_counted_anew(folder, host):
    store = AdapterStore(folder, max_bytes=40)
    store.ensure(host, ["a", "b", "c"])

    host.width = 8

    assert 48 == store.counters.num_bytes
    store.ensure(host, ["d"])
    assert ("d",) == store.loaded
    assert 32 == store.counters.num_bytes


@pytest.mark.parametrize("name", ["a", "c"])
def test_a_move_that_has_reached_some_adapters_is_noticed(folder, host, name):
    """Where the base alone moves, adapters follow when they are next put in the model."""
    store = AdapterStore(folder)
    store.ensure(host, ["a", "b", "c"])

    host.wide |= {name, "b"}

    assert 4 * (6 + 2 + VALUES[name]) == store.counters.num_bytes


def expected_bytes(folder, *, config=CONFIG, **tensors):
    """Return what a store takes an adapter of these tensors for."""
    save_adapter(folder / "f", config, {f"l.{name}": value for name, value in tensors.items()})
    with pytest.raises(StoreError) as caught:
        AdapterStore(folder, max_bytes=0).ensure(FakeHost(), ["f"])
    return caught.value.num_bytes


def test_sizes_are_known_from_header_and_configuration(folder):
    prompt, gate = torch.zeros(1, 3, 5), torch.zeros(4)
    half = AdaptionPromptConfig(adapter_len=1, adapter_layers=1, dtype="float16")

    assert 4 * 19 == expected_bytes(folder, adaption_prompt=prompt, adaption_gate=gate)
    assert 4 * 15 == expected_bytes(folder, adaption_prompt=prompt.bfloat16())
    assert 8 * 15 == expected_bytes(folder, adaption_prompt=prompt.double())
    assert 2 * 15 == expected_bytes(folder, adaption_prompt=prompt, config=half)
    assert 2 * 15 + 4 * 4 == expected_bytes(
        folder, adaption_prompt=prompt, weight=gate, config=half
    )


def test_a_pickle_counts_as_large_as_its_file(folder):
    (folder / "f" / WEIGHTS_FILE).unlink()
    path = folder / "f" / "adapter_model.bin"
    torch.save({"base_model.model.l.adaption_prompt": torch.zeros(1, 9, 1)}, path)

    with pytest.raises(StoreError) as caught:
        AdapterStore(folder, max_bytes=0).ensure(FakeHost(), ["f"])

    assert path.stat().st_size == caught.value.num_bytes


# -- adapters that are not the store's -------------------------------------------------------------


def test_adapters_added_by_hand_are_present_and_stay(folder, host):
    host.add("a")
    host.add("elsewhere")
    store = AdapterStore(folder, max_bytes=4 * 2)

    store.ensure(host, ["a", "b", "elsewhere"])
    store.clear()

    assert ["a", "elsewhere"] == list(host.peft_config)
    assert store.counters == StoreCounters(hits=0, misses=1, evictions=1, num_loaded=0, num_bytes=0)


@pytest.mark.parametrize("change", ["delete", "delete and add", "hotswap", "rename"])
def test_what_changed_by_hand_is_no_longer_the_stores(folder, host, change):
    store = AdapterStore(folder)
    store.ensure(host, ["a", "b"])
    config = host.peft_config.pop("a")
    if change in ("delete and add", "hotswap"):
        host.add("a")
    elif change == "rename":
        host.peft_config["z"] = config
    kept = {name: value for name, value in host.peft_config.items() if name != "b"}

    assert ("b",) == store.loaded
    assert 8 == store.counters.num_bytes
    store.clear()
    assert kept == host.peft_config
    store.ensure(host, ["a"])
    assert (change in ("delete", "rename")) == (store.loaded == ("a",))


def test_room_of_what_was_deleted_by_hand_is_used_again(folder, host):
    store = AdapterStore(folder, max_bytes=4 * 6, pinned=["d"])
    store.ensure(host, ["b", "d"])
    host.delete_adapter("d")

    store.ensure(host, ["c"])

    assert ("b", "c") == store.loaded


def test_one_store_serves_one_model(folder, host):
    store = AdapterStore(folder)
    store.ensure(host, ["a"])
    other = FakeHost()

    with pytest.raises(OptionsError) as caught:
        store.ensure(other, ["a"])

    assert str(caught.value) == (
        f"AdapterStore {str(folder)!r} serves another model: expected the FakeHost it loaded "
        "adapters into first, got another FakeHost. Make a store for each model."
    )
    assert {} == other.peft_config


def test_a_store_outlives_its_model(folder):
    store = AdapterStore(folder)
    store.ensure(FakeHost(), ["a"])

    assert () == store.loaded
    assert () == store.clear()
    assert 0 == store.counters.num_bytes
    store.ensure(host := FakeHost(), ["a"])
    assert ["a"] == list(host.peft_config)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_store_stay_a_pair(folder, host, copied):
    store = AdapterStore(folder, max_bytes=4 * 3, pinned=["a"])
    with store.lease(host, ["a", "b"]):
        new_host, new_store = copied((host, store))

    assert () == new_store.loaded
    new_store.ensure(new_host, ["a"])
    assert ("b", "a") == new_store.loaded
    new_store.evict("b")
    assert ["a"] == list(new_host.peft_config)
    assert ("a", "b") == store.loaded


# -- by hand ---------------------------------------------------------------------------------------


def test_evicting_and_clearing_by_hand(folder, host):
    store = AdapterStore(folder)
    store.ensure(host, "abcde")
    store.pin("b")
    store.pin("b")
    host.used.add("d")

    store.evict("a")
    with store.lease(host, ["e"]):
        assert ("b", "d", "e") == store.clear()

    assert ["b", "d", "e"] == list(host.peft_config)
    assert 2 == store.counters.evictions
    host.used.clear()
    assert ("b",) == store.clear()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda store: store.evict("a"),
            "Adapter 'a' cannot be evicted: expected one that is neither pinned nor leased nor in "
            "use, got one that is pinned. Unpin it, or let its use end.",
        ),
        (
            lambda store: store.evict("b"),
            "Adapter 'b' cannot be evicted: expected one that is neither pinned nor leased nor in "
            "use, got one that is in use. Unpin it, or let its use end.",
        ),
        (
            lambda store: store.evict("c"),
            "Adapter 'c' cannot be evicted: expected one that this store loaded, of 'a', 'b'. "
            "Delete others with the model's delete_adapter.",
        ),
        (
            lambda store: store.unpin("b"),
            "Adapter 'b' is not pinned: expected one of 'a'. Fix the name.",
        ),
    ],
)
def test_what_cannot_be_done_by_hand_is_refused(folder, host, call, message):
    store = AdapterStore(folder, pinned=["a"])
    store.ensure(host, ["a", "b"])
    host.used.add("b")
    host.add("c")

    with pytest.raises(VariantError) as caught:
        call(store)

    assert message == str(caught.value)
    assert ["a", "b", "c"] == list(host.peft_config)


def test_nothing_can_be_evicted_before_the_first_load(folder):
    with pytest.raises(VariantError) as caught:
        AdapterStore(folder).evict("a")

    assert str(caught.value) == (
        "Adapter 'a' cannot be evicted: expected one that this store loaded, of nothing. Delete "
        "others with the model's delete_adapter."
    )


def test_leases_nest_and_end_after_an_error(folder, host):
    store = AdapterStore(folder)
    with suppress(ZeroDivisionError), store.lease(host, ["a"]):
        with store.lease(host, ["a", "b"]):
            pass
        assert ("a",) == store.clear()
        raise ZeroDivisionError

    assert () == store.clear()


def test_threads_get_what_they_lease(folder, host):
    store = AdapterStore(folder, max_bytes=4 * 6 * 4)

    def work(seed):
        for step in range(40):
            name = "abcdef"[(seed * 5 + step * (seed + 1)) % 6]
            with store.lease(host, [name]):
                time.sleep(0)
                assert name in host.peft_config
                assert store.counters.num_bytes <= 4 * 6 * 4

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result()

    counters = store.counters
    assert 4 * 40 == counters.hits + counters.misses
    assert counters.misses - counters.evictions == counters.num_loaded == len(host.peft_config)


# -- a random walk ---------------------------------------------------------------------------------

names = st.sampled_from(list(VALUES))


class StoreMachine(RuleBasedStateMachine):
    """Everything that can happen to a store, against a list of names and plain sums."""

    @initialize(budget=st.none() | st.integers(0, 4 * 14))
    def start(self, budget):
        self.files = tempfile.TemporaryDirectory()
        self.folder = Path(self.files.name)
        for name in VALUES:
            write(self.folder, name)
        self.budget = budget
        self.host = FakeHost()
        self.store = AdapterStore(self.folder, max_bytes=budget)
        self.order, self.by_hand = [], set()
        self.pinned, self.damaged = set(), set()
        self.hits = self.misses = self.evictions = 0

    def teardown(self):
        self.files.cleanup()

    def take(self, wanted, extra):
        """Evict for so many more bytes, the oldest first; tell whether it is enough."""
        stay = {*wanted, *self.pinned, *self.host.used}
        victims = [name for name in self.order if name not in stay]
        used = extra + sum(self.host.adapter_bytes(name) for name in self.order)
        gone = []
        while self.budget is not None and used > self.budget:
            if not victims:
                return None
            used -= self.host.adapter_bytes(victims[0])
            gone.append(victims.pop(0))
        return gone

    def evicts(self, gone):
        self.order = [name for name in self.order if name not in gone]
        self.evictions += len(gone)

    def expected(self, wanted):
        """Do to the plain lists what asking for these does; return the error to expect."""
        missing = [name for name in wanted if name not in {*self.order, *self.by_hand}]
        hits = [name for name in wanted if name in self.order]
        if self.damaged & set(missing):
            return SurgeryError
        if missing and self.take(wanted, sum(4 * VALUES[name] for name in missing)) is None:
            return StoreError
        steps = [(name, 4 * VALUES[name]) for name in missing]
        for name, extra in [*steps, (None, 0)] if steps else []:
            gone = self.take(wanted, extra)
            self.evicts(gone or [])
            if gone is None or name in self.host.broken:
                self.order = [other for other in self.order if other not in missing]
                return StoreError if gone is None else StateError
            self.order += [name] if name else []
        asked = [name for name in wanted if name in self.order]
        self.order = [name for name in self.order if name not in asked] + asked
        self.hits += len(hits)
        self.misses += len(missing)
        return None

    @rule(wanted=st.lists(names, max_size=4, unique=True))
    def ensure(self, wanted):
        protected = {*wanted, *self.pinned, *self.host.used, *self.by_hand} & {
            *self.host.peft_config
        }
        self.host.calls.clear()
        error = self.expected(wanted)
        if error is not None:
            with pytest.raises(error):
                self.store.ensure(self.host, wanted)
        else:
            self.store.ensure(self.host, wanted)
            assert {*wanted} <= {*self.host.peft_config}
            if any(call[0] == "load" for call in self.host.calls) and self.budget is not None:
                assert self.store.counters.num_bytes <= self.budget
        deleted = {call[1] for call in self.host.calls if call[0] == "delete"}
        assert not deleted & protected

    @rule(name=names)
    def evict(self, name):
        if name in self.order and name not in {*self.pinned, *self.host.used}:
            self.store.evict(name)
            self.evicts([name])
        else:
            with pytest.raises(VariantError, match="cannot be evicted"):
                self.store.evict(name)

    @rule()
    def clear(self):
        stay = [name for name in self.order if name in {*self.pinned, *self.host.used}]
        assert tuple(sorted(stay)) == self.store.clear()
        self.evicts([name for name in self.order if name not in stay])

    @rule(name=names)
    def pin_or_unpin(self, name):
        (self.store.unpin if name in self.pinned else self.store.pin)(name)
        self.pinned ^= {name}

    @rule(name=names)
    def use_or_stop_using(self, name):
        self.host.used ^= {name} & ({*self.host.peft_config} | self.host.used)

    @rule(name=names)
    def break_or_mend_loading(self, name):
        self.host.broken ^= {name}

    @rule(name=names)
    def damage_or_repair_the_file(self, name):
        path = self.folder / name / WEIGHTS_FILE
        if name in self.damaged:
            write(self.folder, name)
        else:
            path.write_bytes(path.read_bytes()[:-2])
        self.damaged ^= {name}

    @rule(name=names)
    def add_or_hotswap_by_hand(self, name):
        self.host.add(name)
        self.order = [other for other in self.order if other != name]
        self.by_hand.add(name)

    @rule(name=names)
    def delete_by_hand(self, name):
        self.host.peft_config.pop(name, None)
        self.host.used.discard(name)
        self.order = [other for other in self.order if other != name]
        self.by_hand.discard(name)

    @rule(width=st.sampled_from([2, 4, 8]))
    def move_to_another_dtype(self, width):
        self.host.width = width

    @invariant()
    def everything_is_where_it_should_be(self):
        assert tuple(self.order) == self.store.loaded
        assert {*self.order, *self.by_hand} == {*self.host.peft_config}
        assert not {*self.order} & self.by_hand
        assert self.store.counters == StoreCounters(
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
            num_loaded=len(self.order),
            num_bytes=sum(self.host.adapter_bytes(name) for name in self.order),
        )


TestStore = StoreMachine.TestCase
TestStore.pytestmark = [pytest.mark.slow]


# -- with a model ----------------------------------------------------------------------------------


CONFIGS = {
    "main": AdaptionPromptConfig(adapter_len=1, adapter_layers=1),
    "heads": AdaptionPromptConfig(adapter_len=2, adapter_layers=2, gate="head"),
    "half": AdaptionPromptConfig(adapter_len=3, adapter_layers=3, dtype="bfloat16"),
}
IDS = tokens()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def saved(tmp_path):
    """Return a folder of adapters whose gates are open, and the logits with each."""
    model = AdaptionPromptModel(build(), CONFIGS, "main")
    expected = {}
    for seed, name in enumerate(CONFIGS):
        open_gates_(model.adapter_modules(name), seed=seed)
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    return tmp_path, expected


@pytest.fixture
def model():
    return AdaptionPromptModel(build(), {"own": CONFIG}, "own")


def test_adapters_of_a_store_compute_what_they_did_when_saved(saved, model):
    folder, expected = saved
    store = AdapterStore(folder, base_check="error")

    store.ensure(model, CONFIGS)
    for name in ("half", "main", "heads", "half"):
        model.set_adapter(name)
        store.clear()
        assert (name,) == store.loaded
        assert torch.equal(expected[name], logits(model))
        store.ensure(model, CONFIGS)

    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_size_told_from_the_file_is_that_in_the_model(saved, model, name):
    folder, _ = saved
    with pytest.raises(StoreError) as caught:
        AdapterStore(folder, max_bytes=0).ensure(model, [name])

    store = AdapterStore(folder, max_bytes=caught.value.num_bytes)
    store.ensure(model, [name])

    assert caught.value.num_bytes == store.counters.num_bytes == model.adapter_bytes(name)


def test_the_active_adapter_stays_and_the_others_take_turns(saved, model):
    folder, expected = saved
    # The two largest together.
    size = 4 * 2 * (2 * 24 + 4) + 2 * 3 * (3 * 24 + 1)
    store = AdapterStore(folder, max_bytes=size)
    for name in ("main", "heads", "half", "heads", "main"):
        store.ensure(model, [name])
        model.set_adapter(name)
        assert torch.equal(expected[name], logits(model))
        assert store.counters.num_bytes <= size


def test_a_folder_for_another_model_leaves_the_model_as_it_was(saved, model):
    folder, _ = saved
    config = json.loads((folder / "half" / CONFIG_FILE).read_text())
    (folder / "half" / CONFIG_FILE).write_text(json.dumps({**config, "adapter_layers": 2}))
    before = snapshot(model.model)

    with pytest.raises(StateError, match="State does not fit the adapter"):
        AdapterStore(folder).ensure(model, ["main", "heads", "half"])

    assert before == snapshot(model.model)
    assert ["own"] == list(model.peft_config)
    assert ("own",) == model.swap_state.names


def test_adapters_swapped_or_renamed_become_the_models_own(saved, model):
    folder, _ = saved
    store = AdapterStore(folder)
    store.ensure(model, CONFIGS)

    model.hotswap_adapter(folder / "main", "main")
    model.rename_adapter("heads", "new")
    store.clear()

    assert {"own", "main", "new"} == set(model.peft_config)


def test_a_model_without_adapters_gets_its_first_from_the_store(saved, model):
    folder, expected = saved
    model.delete_adapter("own")
    AdapterStore(folder).ensure(model, ["heads"])

    assert torch.equal(expected["heads"], logits(model))
    model.unload()
