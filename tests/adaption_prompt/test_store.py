"""`AdapterStore`: adapters on disk are loaded when asked for, and leave when room is short."""

import io
import os

import pytest
import torch
from support.folders import without_header
from support.stores import CONFIG, VALUES, FakeHost, filled, write
from surgery_adaption_prompt import AdaptionPromptConfig
from surgery_adaption_prompt.checkpoints import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from surgery_adaption_prompt.store import AdapterStore, StoreCounters, StoreError

from surgery_core import OptionsError, StateError, SurgeryError, VariantError


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path)


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
        (without_header(folder / "e") / CONFIG_FILE).write_text("{")

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
