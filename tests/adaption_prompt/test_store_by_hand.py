"""What is not the store's stays, what people do by hand holds, and copies and threads work."""

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from support.stores import FakeHost, filled
from surgery_adaption_prompt.store import AdapterStore, StoreCounters

from surgery_core import OptionsError, VariantError


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path)


@pytest.fixture
def host():
    return FakeHost()


# -- adapters that are not the store's ------------------------------------------------------------


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


# -- by hand --------------------------------------------------------------------------------------


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
