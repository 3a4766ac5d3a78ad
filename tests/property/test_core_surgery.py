"""On any module tree: what is applied can be reverted to the same objects, and plans are pure."""

import torch
from core.trees import SIZE, disjoint, models, plan
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from surgery_core import PlanDocument, SlotIndex, fingerprint
from surgery_core.testing import (
    InjectedError,
    assert_unchanged,
    failing_at,
    same_tensor,
    snapshot,
)

X = torch.linspace(-1, 1, 2 * SIZE).unflatten(0, (2, SIZE))


def writes_of(drawn):
    return sum(len(claim.site.slots) for claim in drawn.claims)


@given(model=models(), data=st.data())
def test_revert_restores_every_object(model, data):
    before, expected = snapshot(model), model(X)
    drawn = plan(model, disjoint(data.draw, model))

    surgery = drawn.apply()
    assert same_tensor(surgery.model(X), expected)
    for claim in drawn.claims:
        for fqn in claim.site.fqns:
            assert surgery.model.get_submodule(fqn) is not claim.site.module

    assert surgery.revert() is model
    assert_unchanged(before, model, subject="Apply and revert")
    assert same_tensor(model(X), expected)


@given(model=models(), data=st.data())
def test_replacements_take_part_wherever_the_module_was_held(model, data):
    surgery = plan(model, disjoint(data.draw, model), value=1.0).apply()

    originals = {id(item.site.module) for item in surgery.replacements}
    replacements = {id(item.module) for item in surgery.replacements}
    assert not originals & set(reached(surgery.model, beyond=replacements))


def reached(module, *, beyond):
    """Yield the ids of what a module holds in any way, but not of what is inside `beyond`."""
    yield id(module)
    if id(module) not in beyond:
        held = [value for value in vars(module).values() if isinstance(value, list | dict)]
        values = [*vars(module).values(), *(item for value in held for item in items_of(value))]
        for child in values:
            if isinstance(child, nn.Module):
                yield from reached(child, beyond=beyond)


def items_of(held):
    return held.values() if isinstance(held, dict) else held


@given(model=models(), data=st.data())
def test_planning_is_pure_and_repeatable(model, data):
    fqns = disjoint(data.draw, model)
    before, random_state = snapshot(model), torch.get_rng_state()

    one, two = plan(model, fqns).document, plan(model, fqns).document

    assert one == two
    assert PlanDocument.from_json(one.to_json()) == one
    assert one.fingerprint == fingerprint(model)
    assert torch.equal(random_state, torch.get_rng_state())
    assert_unchanged(before, model, subject="Planning")


@given(model=models(), data=st.data())
def test_a_fault_at_any_write_leaves_no_trace(model, data):
    before = snapshot(model)
    drawn = plan(model, disjoint(data.draw, model))
    number = data.draw(st.integers(0, writes_of(drawn)))

    try:
        surgery = drawn.apply(on_write=failing_at(number))
    except InjectedError:
        assert number < writes_of(drawn)
        assert_unchanged(before, model, subject="Apply that failed")
        surgery = drawn.apply()
    applied = snapshot(surgery.model)

    try:
        surgery.revert(on_write=failing_at(number))
    except InjectedError:
        assert surgery.is_applied
        assert_unchanged(applied, surgery.model, subject="Revert that failed")
        surgery.revert()
    assert_unchanged(before, model, subject="Apply and revert after faults")


@given(model=models(), data=st.data())
def test_disjoint_plans_commute(model, data):
    first = disjoint(data.draw, model)
    second = disjoint(data.draw, model, taken=first)
    before = snapshot(model)
    plans = {"first": plan(model, first, value=0.5), "second": plan(model, second, value=-2.0)}
    roots = {name for name, fqns in {"first": first, "second": second}.items() if "" in fqns}

    outputs = []
    for order in (["first", "second"], ["second", "first"]):
        surgeries = {name: plans[name].apply() for name in order}
        # At most one of them replaced the root, and then the other one is empty.
        top = surgeries[next(iter(roots), "first")].model
        outputs.append((top(X), list(top.state_dict())))
        for name in data.draw(st.permutations(order)):
            surgeries[name].revert()
        assert_unchanged(before, model, subject="Two surgeries")

    (one, one_keys), (two, two_keys) = outputs
    assert same_tensor(one, two)
    assert one_keys == two_keys


@given(model=models(), data=st.data())
def test_any_alias_names_the_same_edit(model, data):
    index = SlotIndex(model)
    for fqn in disjoint(data.draw, model):
        site = index.site(fqn)
        alias = data.draw(st.sampled_from(site.fqns))

        by_fqn, by_alias = plan(model, [fqn]), plan(model, [alias])

        assert by_fqn.document == by_alias.document
        (edit,) = by_alias.document.edits
        assert (edit.fqn, *edit.aliases) == site.fqns


@given(model=models())
def test_the_index_has_every_fqn_of_torch(model):
    index = SlotIndex(model)

    named = dict(model.named_modules(remove_duplicate=False))
    assert list(index.modules) == list(named)
    for fqn, module in named.items():
        site = index.site(fqn)
        assert site.module is module
        assert fqn in site.fqns
        assert all(slot.get() is module for slot in site.slots)
        places = {(id(slot.container), slot.kind, slot.key, slot.attribute) for slot in site.slots}
        assert len(places) == len(site.slots)
