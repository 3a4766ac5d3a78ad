"""Variants: at most one is in the model, it is never in the store, and moves are whole or nothing."""

import copy
import pickle

import pytest
import torch
from core.toys import Gated, Net, Twice, example
from core.variants import gate_values, gates, plan, state_of, three_variants
from torch import nn

from surgery_core import SwapState
from surgery_core.testing import InjectedError, assert_unchanged, failing_at, same_tensor, snapshot


def test_a_new_state_has_nothing():
    swap = SwapState(Net())

    assert state_of(swap) == (None, None, True, (), ())
    assert swap.originals() == {}
    assert list(swap.state_dict()) == []
    assert list(swap.modules()) == [swap]


def test_add_stores_without_touching_the_model():
    model = Net().eval()
    before = snapshot(model)

    _, swap = three_variants(model)

    assert_unchanged(before, model, subject="add")
    assert state_of(swap) == (None, None, True, ("a", "b", "c"), ("a", "b", "c"))


def test_set_puts_a_variant_in_the_model_and_takes_it_out_of_the_store():
    model, swap = three_variants()

    swap.set("a")
    assert gate_values(model) == {"layers.0.up": 1.0, "head": 1.0}
    assert state_of(swap) == ("a", "a", True, ("b", "c"), ("a", "b", "c"))

    swap.set("b")
    assert gate_values(model) == {"stem": 2.0, "head": 2.0}
    assert swap.stored == ("c", "a")

    swap.set("c")
    assert gate_values(model) == {"layers.0": 3.0}
    assert swap.stored == ("a", "b")


def test_setting_the_selected_variant_again_writes_nothing():
    model, swap = three_variants()
    swap.set("a")
    before = snapshot(model)
    swap.on_write = failing_at(0)

    swap.set("a")

    assert_unchanged(before, model, subject="set")


def test_a_variant_comes_back_as_the_same_objects():
    model, swap = three_variants()
    swap.set("a")
    head = model.head
    before = snapshot(model)

    swap.set("c")
    swap.set("b")
    swap.set("a")

    assert model.head is head
    assert_unchanged(before, model, subject="A round of variants")


def test_disable_restores_the_base_model_and_enable_the_variant():
    model = Net().eval()
    base = snapshot(model)
    _, swap = three_variants(model)
    swap.set("b")
    active = snapshot(model)

    swap.disable()
    assert_unchanged(base, model, subject="disable")
    assert state_of(swap) == ("b", None, False, ("a", "c", "b"), ("a", "b", "c"))

    swap.enable()
    assert_unchanged(active, model, subject="enable")
    assert state_of(swap) == ("b", "b", True, ("a", "c"), ("a", "b", "c"))


def test_enable_and_disable_are_idempotent():
    model, swap = three_variants()
    swap.set("a")

    swap.enable()
    assert swap.active == "a"
    swap.disable()
    swap.disable()
    assert gate_values(model) == {}
    swap.enable()
    swap.enable()

    assert gate_values(model) == {"layers.0.up": 1.0, "head": 1.0}


def test_a_variant_set_while_disabled_waits_for_enable():
    model, swap = three_variants()
    swap.disable()

    swap.set("b")
    assert (swap.selected, swap.active) == ("b", None)
    assert gate_values(model) == {}
    swap.set("a")
    swap.enable()

    assert gate_values(model) == {"layers.0.up": 1.0, "head": 1.0}


def test_enable_without_a_selection_puts_nothing_in_the_model():
    model, swap = three_variants()

    swap.disable()
    swap.enable()

    assert state_of(swap) == (None, None, True, ("a", "b", "c"), ("a", "b", "c"))
    assert gate_values(model) == {}


def test_disabled_blocks_nest():
    model, swap = three_variants()
    swap.set("a")

    with swap.disabled() as outer:
        assert outer is swap
        with swap.disabled():
            assert gate_values(model) == {}
        assert gate_values(model) == {}
        assert not swap.is_enabled

    assert gate_values(model) == {"layers.0.up": 1.0, "head": 1.0}


def test_a_disabled_block_enables_again_after_an_error():
    _, swap = three_variants()
    swap.set("a")

    with pytest.raises(InjectedError), swap.disabled():
        raise InjectedError

    assert swap.active == "a"


def test_a_disabled_block_leaves_a_disabled_state_disabled():
    _, swap = three_variants()
    swap.disable()

    with swap.disabled():
        pass

    assert not swap.is_enabled


def test_delete_forgets_a_stored_variant():
    model, swap = three_variants()
    swap.set("a")

    swap.delete("b")

    assert swap.names == ("a", "c")
    assert gate_values(model) == {"layers.0.up": 1.0, "head": 1.0}


def test_deleting_the_active_variant_restores_the_base_model():
    model = Net().eval()
    before = snapshot(model)
    _, swap = three_variants(model)
    swap.set("a")

    swap.delete("a")

    assert_unchanged(before, model, subject="delete")
    assert state_of(swap) == (None, None, True, ("b", "c"), ("b", "c"))


def test_deleting_the_active_variant_can_select_another_in_one_step():
    model, swap = three_variants()
    swap.set("a")

    swap.delete("a", then="b")

    assert gate_values(model) == {"stem": 2.0, "head": 2.0}
    assert state_of(swap) == ("b", "b", True, ("c",), ("b", "c"))


def test_deleting_the_selected_variant_while_disabled_selects_another():
    model, swap = three_variants()
    swap.set("a")
    swap.disable()

    swap.delete("a", then="c")
    assert gate_values(model) == {}
    assert state_of(swap) == ("c", None, False, ("b", "c"), ("b", "c"))
    swap.delete("c")
    assert swap.selected is None
    swap.enable()

    assert gate_values(model) == {}


def test_deleting_another_than_the_selected_variant_selects_nothing():
    _, swap = three_variants()
    swap.set("a")

    swap.delete("b", then="c")

    assert swap.active == "a"


def test_a_site_without_variants_is_free_for_another_module():
    model, swap = three_variants()
    for name in "abc":
        swap.delete(name)
    model.head = nn.Linear(4, 2)

    swap.add("new", plan(swap, model, gates("head", 5.0)))
    swap.set("new")

    assert gate_values(model) == {"head": 5.0}


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("enabled", [True, False])
def test_rename_touches_the_name_alone(name, enabled):
    model, swap = three_variants()
    swap.set("a")
    if not enabled:
        swap.disable()
    before, order = snapshot(model), swap.stored

    swap.rename(name, "z")

    assert_unchanged(before, model, subject="rename")
    assert swap.selected == ("z" if name == "a" else "a")
    assert swap.stored == tuple("z" if kept == name else kept for kept in order)
    assert set(swap.names) == {"a", "b", "c", "z"} - {name}
    swap.enable()
    swap.set("z")
    assert swap.active == "z"


def test_variants_are_found_wherever_they_are():
    model, swap = three_variants()
    stored = swap.variant("a")

    swap.set("a")

    assert swap.variant("a") == stored == {"layers.0.up": model.layers[0].up, "head": model.head}
    assert list(swap.variant("c")) == ["layers.0"]
    assert swap.originals() == {
        id(model.head): model.head.inner,
        id(model.layers[0].up): model.layers[0].up.inner,
    }


def test_aliases_swap_together():
    model = Twice(Net().eval())
    swap = SwapState(model)
    swap.add("one", plan(swap, model, gates("second.head", 1.0)))
    swap.add("two", plan(swap, model, gates("first", 2.0, anything=True)))

    swap.set("one")
    assert model.first.head is model.second.head
    assert isinstance(model.first.head, Gated)
    swap.set("two")

    assert model.first is model.second
    assert isinstance(model.first, Gated)
    assert isinstance(model.first.inner.head, nn.Linear)


def test_a_plain_list_swaps_too():
    model = Net().eval()
    model.chosen = [model.head]
    swap = SwapState(model)
    swap.add("a", plan(swap, model, gates("head", 1.0)))
    head = model.head

    swap.set("a")
    assert model.chosen[0] is model.head is swap.variant("a")["head"]
    swap.disable()
    assert model.chosen[0] is model.head is head


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_state_together_keeps_working(twin_of):
    model, swap = three_variants()
    swap.set("a")
    before = snapshot(model)
    expected = {}
    for name in "abc":
        swap.set(name)
        expected[name] = model(example())
    swap.set("a")

    twin_model, twin = twin_of((model, swap))

    for name in "cab":
        twin.set(name)
        assert same_tensor(twin_model(example()), expected[name])
    twin.disable()
    assert gate_values(twin_model) == {}
    assert_unchanged(before, model, subject="A twin")
    assert swap.active == "a"


def test_gradients_reach_the_active_variant_alone():
    model, swap = three_variants()
    swap.set("a")

    model(example()).sum().backward()

    assert model.head.gate.grad is not None
    assert swap.variant("b")["head"].gate.grad is None
    assert torch.isfinite(model.head.gate.grad).all()
