"""Applying writes everything or nothing; reverting puts the same objects back."""

import copy
import pickle
import weakref

import pytest
import torch
from core.toys import Fresh, Gate, Gated, Net, Shift, Shifted, ToyOperation, Twice, example, session
from torch import nn

from surgery_core import (
    BoundRule,
    ContractError,
    DriftError,
    Effects,
    OfClass,
    Plan,
    Rule,
    SurgeryError,
    TensorSpec,
)
from surgery_core.testing import InjectedError, assert_unchanged, failing_at, same_tensor, snapshot


def bound(operation, select=None):
    return BoundRule(rule=Rule(operation=operation.name, select=select), operation=operation)


def plan_for(model, operation=None, select=None, **observers):
    return Plan.draft(model, [bound(operation or Gate(), select)], **observers)


class Bad(ToyOperation):
    """Builds whatever it is given."""

    name = "bad"

    def __init__(self, make, effects=None):
        self.make, self.effects = make, effects or Effects()

    def describe(self, _site, _options):
        return self.effects

    def build(self, site, _options):
        return self.make(site.module)


def refusal(operation, select=None):
    """Return the message of a plan that cannot be built, after a check that it changed nothing."""
    model = Net()
    plan, before = plan_for(model, operation, select), snapshot(model)
    with pytest.raises(ContractError) as caught:
        plan.apply()
    assert_unchanged(before, model, subject="An apply that failed")
    return str(caught.value)


def test_apply_reports_each_replacement():
    model = Net().eval()
    old = model.head

    surgery = plan_for(model, Shift(), "head").apply()

    (item,) = surgery.replacements
    assert surgery.is_applied
    assert surgery.model is model
    assert item.module is model.head
    assert item.site.module is old
    assert item.carry_over.fqn == "head"
    assert item.carry_over.training is False
    assert item.carry_over.dtypes == ("float32",)
    assert item.known_hooks == frozenset()


def test_ties_broken_are_reported_but_not_those_with_an_alias():
    model = Twice(Net())
    model.extra = nn.Linear(4, 2)
    model.extra.weight = model.first.head.weight

    surgery = plan_for(model, Fresh(), "first.head").apply()

    assert surgery.replacements[0].carry_over.ties_broken == ("extra.weight",)


def test_apply_and_revert_call_their_observers_once():
    seen = []
    plan = plan_for(
        Net(),
        on_applied=lambda surgery: seen.append(("applied", surgery, surgery.is_applied)),
        on_reverted=lambda surgery: seen.append(("reverted", surgery, surgery.is_applied)),
    )

    surgery = plan.apply()
    surgery.revert()

    assert seen == [("applied", surgery, True), ("reverted", surgery, False)]


def test_an_observer_that_fails_leaves_the_model_as_it_was():
    """The caller gets no surgery then, and could not revert."""
    model = Net()
    before = snapshot(model)

    def observer(_surgery):
        raise InjectedError

    with pytest.raises(InjectedError):
        plan_for(model, on_applied=observer).apply()

    assert_unchanged(before, model, subject="An apply whose observer failed")


def test_the_root_is_replaced_in_the_surgery():
    model = nn.Linear(4, 4)
    expected = model(example())

    surgery = plan_for(model).apply()

    assert isinstance(surgery.model, Gated)
    assert surgery.model.inner is model
    assert same_tensor(surgery.model(example()), expected)
    assert surgery.revert() is model
    assert surgery.model is model


def test_the_root_is_not_replaced_in_place():
    model = nn.Linear(4, 4)

    with pytest.raises(ContractError) as caught:
        plan_for(model).apply(in_place=True)

    assert str(caught.value) == (
        "Plan replaces the root module: expected modules inside it (in_place=True), got Linear "
        "itself. Use the `model` of the surgery returned."
    )
    assert isinstance(plan_for(Net(), select="head").apply(in_place=True).model.head, Gated)


def test_a_model_that_changed_after_planning_is_refused():
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    plan = plan_for(model)
    model[0].insert(1, nn.Identity())
    before = snapshot(model)

    with pytest.raises(DriftError) as caught:
        plan.apply()

    assert str(caught.value) == (
        "Model planned for drifted at '0.1': expected the Linear put there, got another Identity. "
        "Plan again."
    )
    assert_unchanged(before, model, subject="An apply that failed")


def test_modules_that_moved_with_their_parent_are_still_where_they_were_planned():
    model = Net()
    plan = plan_for(model, select="layers.1.up")
    block = model.layers[1]
    model.layers.insert(1, nn.Identity())

    plan.apply()

    assert isinstance(block.up, Gated)
    assert model.layers[2] is block


def test_a_plan_applies_once_and_again_after_revert():
    model = Net()
    plan = plan_for(model, select="head")
    surgery = plan.apply()

    with pytest.raises(DriftError) as caught:
        plan.apply()

    assert str(caught.value) == (
        "Model planned for drifted at 'head': expected the Linear put there, got another Gated. "
        "Plan again."
    )
    surgery.revert()
    again = plan.apply()
    assert again.model.head is not surgery.replacements[0].module


def test_a_surgery_is_reverted_once():
    surgery = plan_for(Net()).apply()
    surgery.revert()

    with pytest.raises(SurgeryError) as caught:
        surgery.revert()

    assert str(caught.value) == (
        "Surgery is reverted already: expected an applied surgery. Apply a plan again."
    )
    assert not surgery.is_applied


def test_a_build_that_changes_the_model_is_caught_before_the_first_write():
    model = Net()
    intruder = nn.Identity()

    def make(_module):
        model.stem = intruder
        return nn.Linear(4, 2)

    with pytest.raises(DriftError):
        Plan.draft(model, [bound(Bad(make), "head"), bound(Fresh(), "stem")]).apply()

    assert model.stem is intruder


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda module: module, "Linear(in_features=4, out_features=2, bias=True)"),
        (lambda _module: None, "None"),
    ],
)
def test_a_build_that_makes_no_new_module_is_refused(make, got):
    assert refusal(Bad(make), "head") == (
        "Operation 'bad' broke its contract at 'head': expected a new torch.nn.Module for each "
        f"site, got {got}."
    )


def test_one_replacement_for_two_sites_is_refused():
    only = nn.Linear(4, 4)

    assert refusal(Bad(lambda _: only), "layers.{..1}.up") == (
        "Operation 'bad' broke its contract at 'layers.1.up': expected a new torch.nn.Module for "
        "each site, got Linear(in_features=4, out_features=4, bias=True)."
    )


def test_state_dict_keys_that_were_not_declared_are_refused():
    assert refusal(Bad(Gated), "head") == (
        "Operation 'bad' broke its contract at 'head': expected state-dict keys added nothing and "
        "removed nothing, got added 'gate', 'inner.bias', 'inner.weight' and removed 'bias', "
        "'weight'. Make `describe` and `build` agree."
    )


@pytest.mark.parametrize(
    ("change", "declared"),
    [
        ({"shape": (3,)}, "shape=(3,), dtype='float32', trainable=True"),
        ({"dtype": "float16"}, "shape=(2,), dtype='float16', trainable=True"),
        ({"trainable": False}, "shape=(2,), dtype='float32', trainable=False"),
    ],
)
def test_tensors_other_than_declared_are_refused(change, declared):
    spec = TensorSpec(**{"name": "shift", "shape": (2,), "dtype": "float32", **change})

    assert refusal(Bad(Shifted, Effects(added=(spec,))), "head") == (
        "Operation 'bad' broke its contract at 'head': expected "
        f"TensorSpec(name='shift', {declared}), got "
        "TensorSpec(name='shift', shape=(2,), dtype='float32', trainable=True). "
        "Make `describe` and `build` agree."
    )


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_extra_state_declared_as_a_tensor_is_refused():
    spec = TensorSpec(name="_extra_state", shape=(), dtype="float32")

    message = refusal(Bad(lambda _: WithExtraState(4, 2), Effects(added=(spec,))), "head")

    assert message.endswith("trainable=True), got None. Make `describe` and `build` agree.")


def test_stacked_surgeries_are_reverted_last_first():
    model = Net()
    before = snapshot(model)
    first = plan_for(model, select="head").apply()
    second = plan_for(model, Gate(), "head.inner").apply()
    third = Plan.draft(model, [bound(OnGated(), "head")]).apply()
    stacked = snapshot(model)

    with pytest.raises(DriftError) as caught:
        first.revert()

    assert str(caught.value) == (
        "Model under surgery drifted at 'head': expected the Gated put there, got another Gated. "
        "Revert what was applied later first, or put the module named back."
    )
    assert first.is_applied
    assert_unchanged(stacked, model, subject="A revert out of order")
    for surgery in (third, second, first):
        surgery.revert()
    assert_unchanged(before, model, subject="Three surgeries")


class OnGated(Gate):
    def targets(self, _tree, _options):
        return OfClass(Gated)


def test_a_fault_of_a_model_with_aliases_and_holders_changes_nothing():
    model = Twice(Net())
    model.heads = [model.first.head]
    model.__dict__["shortcut"] = model.first.head
    before = snapshot(model)
    plan = plan_for(model, select="*.head")

    for number in range(3):
        with pytest.raises(InjectedError):
            plan.apply(on_write=failing_at(number))
        assert_unchanged(before, model, subject="An apply that failed")

    surgery = plan.apply(on_write=failing_at(3))
    assert model.second.head is model.heads[0] is model.shortcut
    surgery.revert()
    assert_unchanged(before, model, subject="Apply and revert")


def test_user_hooks_fire_as_often_on_shared_modules():
    model, calls = Net().eval(), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    plan = plan_for(model, Shift(), "head")

    surgery = plan.apply()
    model(example())
    surgery.revert()
    model(example())

    assert len(calls) == 2


def test_revert_leaves_no_reference_to_replacements_in_the_model():
    model = Net()
    surgery = plan_for(model).apply()
    replaced = [weakref.ref(item.module) for item in surgery.replacements]

    surgery.revert()
    del surgery

    assert [ref() for ref in replaced] == [None] * 8


def test_plans_of_other_models_do_not_interact():
    one, two = Net(), Net()
    first, second = session().plan(one, [Rule(operation="gate")]), plan_for(two, Shift())
    before = snapshot(two)

    surgery = first.apply()
    assert_unchanged(before, two, subject="Surgery on another model")
    second.apply()
    surgery.revert()

    assert not isinstance(one.head, Gated)
    assert hasattr(two.head, "shift")


def test_a_copy_of_the_applied_model_is_independent():
    model = Net().eval()
    surgery = plan_for(model).apply()
    twin = copy.deepcopy(model)

    with torch.no_grad():
        twin.head.gate.add_(1)
    surgery.revert()

    assert isinstance(twin.head, Gated)
    assert not same_tensor(twin(example()), model(example()))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "stem", nn.Linear(4, 4)),
        lambda m: m.layers.append(nn.Identity()),
        lambda m: m.layers.__delitem__(1),
        lambda m: m.double(),
    ],
    ids=["another", "one more", "one less", "another dtype"],
)
def test_a_plan_tells_whether_it_would_be_the_same_again(change):
    model = Net()
    plan = session().plan(model, [Rule(operation="gate", select="head")])
    with torch.no_grad():
        model.stem.weight.fill_(3)
    assert plan.sees_same_modules()

    change(model)

    assert not plan.sees_same_modules()


def test_a_reverted_model_is_copied_pickled_and_loaded_strictly():
    model = Net().eval()
    state, expected = model.state_dict(), model(example())
    surgery = session().plan(model, [Rule(operation="gate")]).apply()
    applied = surgery.model.state_dict()
    surgery.model.load_state_dict(applied, strict=True)
    surgery.revert()

    model.load_state_dict(state, strict=True)

    assert list(state) == list(model.state_dict())
    assert torch.equal(expected, copy.deepcopy(model)(example()))
    assert torch.equal(expected, pickle.loads(pickle.dumps(model))(example()))
