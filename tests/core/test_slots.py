"""Every place that holds a module is a slot: children, attributes, items, aliases and the root."""

from collections import OrderedDict

import pytest
from core.toys import Net, Twice
from torch import nn

from surgery_core import ContractError, DriftError, Site, SlotIndex
from surgery_core.slots import RootCell, Slot, SlotKind, check_holds


class Holder(nn.Module):
    """Holds its child `part` in every way a module can be held without being registered."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(2, 2)
        self.other = nn.ReLU()
        self.items = [self.other, self.part]
        self.by_name = {"part": self.part, 3: self.part, "text": "no module"}
        self.absent = None
        self.__dict__["shortcut"] = self.part


def places(site):
    return sorted((slot.fqn, slot.kind.value) for slot in site.slots)


def test_the_root_is_a_slot():
    model = nn.Linear(2, 2)

    site = SlotIndex(model).site("")

    assert site.module is model
    assert site.fqns == ("",)
    assert places(site) == [("", "root")]
    slot = site.slots[0]
    assert slot.get() is model
    new = nn.ReLU()
    slot.put(new)
    assert slot.get() is new
    assert isinstance(slot.container, RootCell)
    assert slot.container.module is new


def test_the_index_has_every_fqn_in_the_order_of_named_modules():
    model = Twice(Net())

    index = SlotIndex(model)

    expected = [fqn for fqn, _ in model.named_modules(remove_duplicate=False)]
    assert list(index.modules) == expected
    assert all(index.modules[fqn] is model.get_submodule(fqn) for fqn in expected)


def test_an_unknown_fqn_is_a_key_error():
    with pytest.raises(KeyError, match="nowhere"):
        SlotIndex(Net()).site("nowhere")


def test_one_module_under_two_names_in_one_parent_has_two_slots():
    model = nn.Module()
    model.first = model.second = nn.ReLU()

    site = SlotIndex(model).site("second")

    assert site.fqn == "first"
    assert site.fqns == ("first", "second")
    assert places(site) == [("first", "child"), ("second", "child")]


def test_one_module_in_two_parents_has_two_slots():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))

    site = SlotIndex(model).site("1.0")

    assert site.fqns == ("0.0", "1.0")
    assert places(site) == [("0.0", "child"), ("1.0", "child")]


def test_a_container_reached_twice_offers_each_place_once():
    model = Twice(nn.Sequential(nn.ReLU()))

    site = SlotIndex(model).site("second.0")

    assert site.fqns == ("first.0", "second.0")
    assert places(site) == [("first.0", "child")]


@pytest.mark.parametrize(
    "container",
    [
        nn.ModuleList([nn.ReLU()]),
        nn.Sequential(nn.ReLU()),
        nn.ModuleDict({"0": nn.ReLU()}),
    ],
)
def test_containers_of_torch_hold_children(container):
    site = SlotIndex(container).site("0")
    new = nn.Tanh()

    (slot,) = site.slots
    slot.put(new)

    assert slot.kind is SlotKind.CHILD
    assert container["0" if isinstance(container, nn.ModuleDict) else 0] is new
    assert len(container) == 1


def test_children_that_are_none_are_no_modules():
    model = nn.Module()
    model.register_module("empty", None)

    assert list(SlotIndex(model).modules) == [""]


def test_plain_attributes_lists_and_dictionaries_are_slots():
    model = Holder()

    site = SlotIndex(model).site("part")

    assert places(site) == [
        ("by_name['part']", "item"),
        ("by_name[3]", "item"),
        ("items[1]", "item"),
        ("part", "child"),
        ("shortcut", "attribute"),
    ]


@pytest.mark.parametrize("place", ["", "0"])
def test_a_module_that_a_tuple_holds_too_is_refused(place):
    """Replacing it would leave the original in the tuple, and nobody would be told."""
    holder = Holder()
    holder.pair = (holder.part, 1)
    model = nn.Sequential(holder) if place else holder
    prefix = f"{place}." if place else ""
    index = SlotIndex(model)

    with pytest.raises(ContractError) as caught:
        index.site(f"{prefix}part")

    assert str(caught.value) == (
        f"Module at '{prefix}part' cannot be replaced everywhere: expected places that can be "
        f"written to, got the tuple '{prefix}pair', which holds it too. Make it a list."
    )
    assert index.site(f"{prefix}other").module is holder.other


def test_writing_to_all_slots_replaces_the_module_everywhere():
    model = Holder()
    old, new = model.part, nn.Linear(2, 2)

    for slot in SlotIndex(model).site("part").slots:
        assert slot.get() is old
        slot.put(new)

    assert model.part is new
    assert model.shortcut is new
    assert model.items == [model.other, new]
    assert model.by_name == {"part": new, 3: new, "text": "no module"}


def test_holders_below_the_root_are_named_from_the_root():
    model = nn.Sequential(Holder())

    fqns = [slot.fqn for slot in SlotIndex(model).site("0.part").slots]

    assert fqns == ["0.part", "0.items[1]", "0.by_name['part']", "0.by_name[3]", "0.shortcut"]


def test_a_holder_of_a_module_outside_the_tree_is_no_slot():
    model = nn.ReLU()
    model.__dict__["friend"] = nn.Tanh()

    assert list(SlotIndex(model).modules) == [""]


def test_a_module_that_refers_to_itself_has_no_slot_for_it():
    model = nn.Sequential(nn.ReLU())
    model[0].__dict__["me"] = model[0]

    assert places(SlotIndex(model).site("0")) == [("0", "child")]


def test_a_reference_to_the_parent_is_a_slot_of_the_parent():
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    model[0][0].__dict__["parent"] = model[0]

    assert places(SlotIndex(model).site("0")) == [("0", "child"), ("0.0.parent", "attribute")]


def test_a_slot_is_looked_up_again_after_a_module_list_changed():
    model = nn.Sequential(OrderedDict(layers=nn.ModuleList([nn.ReLU(), nn.Tanh()])))
    (slot,) = SlotIndex(model).site("layers.0").slots
    inserted = nn.Sigmoid()

    model.layers.insert(0, inserted)

    assert slot.get() is inserted
    slot.put(nn.Identity())
    assert isinstance(model.layers[0], nn.Identity)


def test_a_slot_whose_place_is_gone_holds_none():
    model = Holder()
    slots = SlotIndex(model).site("part").slots

    del model.part
    del model.__dict__["shortcut"]
    del model.by_name
    model.items.clear()

    assert [slot.get() for slot in slots] == [None] * 5


def test_a_cycle_is_refused():
    model = nn.Sequential(nn.Sequential())
    model[0].add_module("up", model)

    with pytest.raises(ContractError) as caught:
        SlotIndex(model)

    assert str(caught.value) == (
        "Module tree has a cycle at '0.up': expected a tree, got a module that contains itself. "
        "Break the cycle before planning."
    )
    assert caught.value.fqn == "0.up"
    assert (caught.value.expected, caught.value.actual) == ("a tree", "a cycle")


def test_originals_are_shown_instead_of_what_stands_for_them():
    original = nn.Sequential(nn.ReLU())
    stand_in = nn.Sequential(nn.Tanh(), nn.Tanh())
    model = nn.Sequential(stand_in)

    index = SlotIndex(model, originals={id(stand_in): original})

    assert list(index.modules) == ["", "0", "0.0"]
    assert index.site("0").module is original
    assert places(index.site("0")) == [("0", "child")]
    assert index.site("0").slots[0].get() is stand_in


def test_holding_what_is_expected_is_no_drift():
    model = nn.Sequential(nn.ReLU())
    (slot,) = SlotIndex(model).site("0").slots

    check_holds([(slot, model[0])], subject="Model", fix="Fix it.")


def test_drift_names_every_slot():
    model = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
    expected = {SlotIndex(model).site(fqn).slots[0]: model[int(fqn)] for fqn in ("2", "1", "0")}
    model[2], model[0] = nn.Tanh(), nn.Tanh()

    with pytest.raises(DriftError) as caught:
        check_holds(expected.items(), subject="Model", fix="Fix it.")

    assert str(caught.value) == (
        "Model drifted at '0', '2': expected the ReLU put there, got another Tanh. Fix it."
    )
    assert caught.value.fqns == ("0", "2")


def test_slots_and_sites_are_compared_by_identity():
    model = nn.Sequential(nn.ReLU())
    one, two = SlotIndex(model).site("0"), SlotIndex(model).site("0")

    assert isinstance(one, Site)
    assert one != two
    assert isinstance(one.slots[0], Slot)
    assert one.slots[0] != two.slots[0]
