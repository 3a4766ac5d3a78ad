"""A transition that cannot happen whole does not happen: names, drift, and faults at every write."""

import copy

import pytest
from core.toys import Net, ToyOperation, session
from core.variants import gate_values, gates, plan, state_of, three_variants
from torch import nn

from surgery_core import DriftError, Effects, Exact, Rule, Session, VariantError, hookimpl
from surgery_core.testing import InjectedError, assert_unchanged, failing_at, snapshot


@pytest.mark.parametrize(
    ("transition", "message"),
    [
        (lambda swap: swap.set("z"), "Variant 'z' does not exist: expected one of 'a', 'b', 'c'."),
        (
            lambda swap: swap.variant("z"),
            "Variant 'z' does not exist: expected one of 'a', 'b', 'c'.",
        ),
        (
            lambda swap: swap.delete("z"),
            "Variant 'z' does not exist: expected one of 'a', 'b', 'c'.",
        ),
        (
            lambda swap: swap.delete("a", then="z"),
            "Variant 'z' does not exist: expected one of 'a', 'b', 'c'.",
        ),
        (
            lambda swap: swap.delete("a", then="a"),
            "Variant 'a' cannot be selected after its own deletion. Name another.",
        ),
        (
            lambda swap: swap.rename("z", "y"),
            "Variant 'z' does not exist: expected one of 'a', 'b', 'c'.",
        ),
        (
            lambda swap: swap.rename("a", "b"),
            "Variant name 'b' is taken: there are 'a', 'b', 'c'. Choose another.",
        ),
        (
            lambda swap: swap.rename("b", ""),
            "Variant name '' is empty: there are 'a', 'b', 'c'. Choose another.",
        ),
        (
            lambda swap: swap.add("a", None),
            "Variant name 'a' is taken: there are 'a', 'b', 'c'. Choose another.",
        ),
        (
            lambda swap: swap.add("new", session().plan(Net(), [gates("head")])),
            "Plan for variant 'new' is for another model. Plan for the model of this swap state.",
        ),
        (
            lambda swap: swap.add("new", plan(swap, swap._model[0], gates("", anything=True))),
            "Plan for variant 'new' replaces the root module: expected modules inside it, got Net "
            "itself. Narrow the selector.",
        ),
    ],
)
def test_impossible_transitions_are_refused_and_change_nothing(transition, message):
    model, swap = three_variants()
    swap.set("a")
    before, state = snapshot(model), state_of(swap)

    with pytest.raises(VariantError) as caught:
        transition(swap)

    assert str(caught.value) == message
    assert_unchanged(before, model, subject="A transition that failed")
    assert state_of(swap) == state


def test_a_plan_that_does_not_look_through_the_active_variant_is_refused():
    model, swap = three_variants()
    swap.set("a")

    with pytest.raises(DriftError) as caught:
        swap.add("d", session().plan(model, [gates("head", anything=True)]))

    assert str(caught.value) == (
        "Model under variants drifted at 'head': expected the module that the other variants "
        "stand for, got another. Put it back first."
    )
    assert caught.value.fqns == ("head",)
    assert swap.names == ("a", "b", "c")


TRANSITIONS = {
    "set": lambda swap: swap.set("b"),
    "set around": lambda swap: swap.set("c"),
    "disable": lambda swap: swap.disable(),
    "delete": lambda swap: swap.delete("a"),
    "delete then": lambda swap: swap.delete("a", then="b"),
}


@pytest.mark.parametrize("name", TRANSITIONS)
def test_drift_stops_every_transition_that_would_write_there(name):
    model, swap = three_variants()
    swap.set("a")
    put = model.head
    model.head = nn.Identity()
    before, state = snapshot(model), state_of(swap)

    with pytest.raises(DriftError) as caught:
        TRANSITIONS[name](swap)

    assert str(caught.value) == (
        "Model under variants drifted at 'head': expected the Gated put there, got another "
        "Identity. Put the module named back before changing variants."
    )
    assert_unchanged(before, model, subject="A transition that found drift")
    assert state_of(swap) == state
    model.head = put
    TRANSITIONS[name](swap)


@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_fault_at_any_write_changes_neither_model_nor_store(name):
    model, swap = three_variants()
    swap.set("a")
    before, state = snapshot(model), state_of(swap)

    for number in range(99):
        swap.on_write = failing_at(number)
        try:
            TRANSITIONS[name](swap)
        except InjectedError:
            assert_unchanged(before, model, subject=f"{name} that failed at write {number}")
            assert state_of(swap) == state
        else:
            break

    assert number >= 2
    assert swap.active != "a"


def test_a_fault_in_enable_leaves_the_state_disabled():
    model, swap = three_variants()
    swap.set("a")
    swap.disable()
    before, state = snapshot(model), state_of(swap)
    swap.on_write = failing_at(1)

    with pytest.raises(InjectedError):
        swap.enable()

    assert_unchanged(before, model, subject="enable that failed")
    assert state_of(swap) == state


class Copy(ToyOperation):
    """Replace a block by one that holds the same children."""

    name = "copy"
    known = frozenset({"shared"})

    def targets(self, _tree, _options):
        return Exact("layers.0")

    def describe(self, _site, _options):
        return Effects()

    def build(self, site, options):
        copied = copy.copy(site.module)
        if not options.get("shared"):
            vars(copied)["_modules"] = dict(site.module._modules)
        return copied


class CopyPlugin:
    @hookimpl
    def surgery_operations(self):
        return [Copy()]


def test_a_replacement_that_took_in_an_active_module_is_refused():
    """It would keep that module in the model after its variant has left."""
    model, swap = three_variants()
    swap.set("a")
    before, state = snapshot(model), state_of(swap)
    copied = Session([CopyPlugin()], discover=False).plan(
        model, [Rule(operation="copy")], beneath=swap
    )

    with pytest.raises(VariantError) as caught:
        swap.add("d", copied)

    assert str(caught.value) == (
        "Replacement for variant 'd' at 'layers.0' holds a module of the active variant 'a': "
        "expected modules of the base, got Gated. Disable the variants while adding this one."
    )
    assert_unchanged(before, model, subject="add")
    assert state == state_of(swap)
    swap.disable()
    swap.add("d", copied)


def test_a_replacement_that_shares_the_bases_table_of_children_may_be_added():
    """What leaves the original's table leaves the replacement's, which is the same."""
    model, swap = three_variants()
    swap.set("a")
    rule = Rule(operation="copy", options={"shared": True})
    copied = Session([CopyPlugin()], discover=False).plan(model, [rule], beneath=swap)

    swap.add("d", copied)
    swap.set("d")

    assert gate_values(model) == {}
