"""`AdapterStore`: an adapter that was saved anew is loaded again, once it is free."""

import os
from dataclasses import replace

import pytest
import torch
from support.families import build, open_gates_, tokens
from support.stores import VALUES, FakeHost, filled, write
from surgery_adaption_prompt import AdapterStore, AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.checkpoints import WEIGHTS_FILE
from surgery_adaption_prompt.store import StoreError

from surgery_core import StateError, SurgeryError

CONFIG = AdaptionPromptConfig(adapter_len=2, adapter_layers=2, gate="head")
IDS = tokens(2, 6)


def saved(folder, seed, **fields):
    """Save an adapter `a`, and return what a model that has only it computes."""
    model = AdaptionPromptModel(build(), {"a": replace(CONFIG, **fields)}, "a").eval()
    open_gates_(model.adapter_modules("a"), seed=seed, size=1.0 + seed)
    model.save_pretrained(folder)
    return logits(model)


def serving(folder):
    store = AdapterStore(folder)
    return AdaptionPromptModel(build(), {"own": CONFIG}, "own", store=store).eval()


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits


def by_row(model):
    return logits(model, adapter_names=["a", "a"])


def by_set(model):
    model.set_adapter("a")
    found = logits(model)
    model.set_adapter("own")
    return found


def by_context(model):
    with model.activated("a"):
        return logits(model)


def by_buffers(model):
    with model.fixed_rows(2, adapter_len=3) as rows:
        rows.assign(["a"])
        return logits(model)


@pytest.mark.parametrize("ask", [by_row, by_set, by_context, by_buffers])
@pytest.mark.parametrize("fields", [{}, {"adapter_len": 3}, {"gate_activation": "tanh"}])
def test_what_is_saved_anew_is_loaded_again(ask, fields, tmp_path):
    first = saved(tmp_path, 0)
    model = serving(tmp_path)
    assert torch.allclose(first, ask(model), atol=1e-5)
    second = saved(tmp_path, 1, **fields)
    assert not torch.allclose(first, second, atol=1e-2)

    assert torch.allclose(second, ask(model), atol=1e-5)
    assert (0, 2, 1) == (
        model.store.counters.hits,
        model.store.counters.misses,
        model.store.counters.evictions,
    )
    assert torch.allclose(second, ask(model), atol=1e-5)
    assert 1 == model.store.counters.hits


def test_what_is_in_use_stays_until_it_is_free(tmp_path):
    first = saved(tmp_path, 0)
    model = serving(tmp_path)
    model.set_adapter("a")
    second = saved(tmp_path, 1)

    model.set_adapter("a")
    assert torch.allclose(first, logits(model), atol=1e-5)
    with model.activated("a"):
        model.set_adapter("own")
        assert torch.allclose(first, by_row(model), atol=1e-5)
    assert torch.allclose(second, by_row(model), atol=1e-5)


def test_what_cannot_be_read_anew_leaves_the_old_in_place(tmp_path):
    first = saved(tmp_path, 0)
    model = serving(tmp_path)
    by_row(model)
    (tmp_path / "a" / WEIGHTS_FILE).write_bytes(b"damaged")

    with pytest.raises(SurgeryError, match="no readable"):
        by_row(model)

    assert "a" in model.peft_config
    model.store = None
    assert torch.allclose(first, by_row(model), atol=1e-5)


def test_a_folder_that_is_gone_is_served_on(tmp_path):
    first = saved(tmp_path, 0)
    model = serving(tmp_path)
    by_row(model)
    (tmp_path / "a").rename(tmp_path / ".gone")

    assert torch.allclose(first, by_row(model), atol=1e-5)


@pytest.fixture
def host():
    return FakeHost()


def touched(folder, name):
    """Save an adapter again, with the same size and, as coarse clocks have it, the same time."""
    file = folder / name / WEIGHTS_FILE
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    write(folder, name)
    os.utime(file, ns=times)


def test_a_rename_alone_tells(tmp_path, host):
    """Two saves within one tick of the clock have the same size and time."""
    store = AdapterStore(filled(tmp_path))
    store.ensure(host, ["a"])
    touched(tmp_path, "a")
    store.ensure(host, ["a"])

    assert [("load", "a", "warn"), ("delete", "a"), ("load", "a", "warn")] == host.calls


def test_leased_and_pinned_ones(tmp_path, host):
    """A pinned one is loaded again, and stays; a leased one waits."""
    store = AdapterStore(filled(tmp_path), pinned=["b"])
    with store.lease(host, ["a", "b"]):
        touched(tmp_path, "a")
        touched(tmp_path, "b")
        store.ensure(host, ["a", "b"])
        assert 2 == len(host.calls)
    store.ensure(host, ["a", "b"])

    assert 6 == len(host.calls)
    assert ("a", "b") == store.loaded


def test_room_is_made_for_what_grew_and_refused_before_anything_is_evicted(
    tmp_path, host, monkeypatch
):
    store = AdapterStore(filled(tmp_path), max_bytes=4 * 6)
    store.ensure(host, ["a", "b"])
    before = list(host.calls)
    monkeypatch.setitem(VALUES, "a", 7)
    write(tmp_path, "a")
    with pytest.raises(StoreError, match="has no room for 'a'"):
        store.ensure(host, ["a"])
    assert before == host.calls

    monkeypatch.setitem(VALUES, "a", 5)
    write(tmp_path, "a")
    store.ensure(host, ["a"])

    assert ("a",) == store.loaded


def test_a_failing_load_of_what_was_saved_anew_leaves_it_out(tmp_path, host):
    store = AdapterStore(filled(tmp_path))
    store.ensure(host, ["a"])
    touched(tmp_path, "a")
    host.broken.add("a")

    with pytest.raises(StateError, match="a does not fit"):
        store.ensure(host, ["a"])

    assert () == store.loaded
    host.broken.clear()
    store.ensure(host, ["a"])
    assert ("a",) == store.loaded
