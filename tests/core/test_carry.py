"""A replacement takes over hooks and mode, says which ties it breaks, and hands hooks back."""

import copy

import pytest
import torch
from core.toys import Gated
from torch import nn

from surgery_core import ContractError
from surgery_core.carry import HOOK_TABLES, carry_over, hand_over, hook_ids, tensor_owners


def carry(old, new, *, fqns=("a",), owners=None):
    return carry_over(old, new, fqns=fqns, owners=lambda: owners or {})


def noop(*_):
    return None


def test_every_hook_table_of_torch_is_known():
    """Fails when torch adds a table, or drops one."""
    state = vars(nn.Module())
    tables = {name for name, value in state.items() if "hook" in name and isinstance(value, dict)}

    assert set(HOOK_TABLES) == tables


def test_without_hooks_nothing_but_the_tables_is_shared():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)

    report = carry(old, new)

    assert report.fqn == "a"
    assert report.hooks == "none"
    assert all(vars(new)[table] is vars(old)[table] for table in HOOK_TABLES)


def test_hooks_go_over_by_sharing_their_tables():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    handle = old.register_forward_hook(noop)

    report = carry(old, new)

    assert report.hooks == "shared"
    assert list(new._forward_hooks) == [handle.id]
    handle.remove()
    assert not new._forward_hooks


def test_tables_shared_already_stay_shared():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    old.register_forward_hook(noop)
    vars(new).update({table: vars(old)[table] for table in HOOK_TABLES})

    assert carry(old, new).hooks == "shared"
    assert len(old._forward_hooks) == 1


def test_hooks_stay_on_an_original_that_the_replacement_holds():
    old = nn.Linear(2, 2)
    old.register_forward_hook(noop)
    new = Gated(old)

    assert carry(old, new).hooks == "kept"
    assert not new._forward_hooks
    assert len(old._forward_hooks) == 1


def test_hooks_of_both_are_merged_those_of_the_model_first():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    own = new.register_forward_hook(noop)
    users = old.register_forward_hook(noop)

    report = carry(old, new)

    assert report.hooks == "merged"
    assert list(new._forward_hooks) == [users.id, own.id]
    assert list(old._forward_hooks) == [users.id]


def test_hooks_of_the_replacement_alone_stay_its_own():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    own = new.register_forward_hook(noop)

    assert carry(old, new).hooks == "none"
    assert list(new._forward_hooks) == [own.id]
    assert not old._forward_hooks


def test_the_kind_of_backward_hooks_goes_over():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    old.register_full_backward_hook(noop)

    carry(old, new)

    assert new._is_full_backward_hook is True


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_goes_to_modules_of_the_replacement_alone(training):
    old = nn.Sequential(nn.Dropout(), nn.Dropout()).train(training)
    old[0].train(not training)
    new = nn.Sequential(old[0], nn.Dropout().train(not training)).train(not training)

    report = carry(old, new)

    assert report.training is training
    assert [module.training for module in new.modules()] == [training, not training, training]


def test_added_dtypes_are_reported():
    new = Gated(nn.Linear(2, 2))
    new.register_buffer("count", torch.zeros((), dtype=torch.int64))
    old = new.inner

    assert carry(old, new).dtypes == ("float32", "int64")
    assert carry(nn.Linear(2, 2), nn.ReLU()).dtypes == ()


def test_another_device_is_refused():
    with pytest.raises(ContractError) as caught:
        carry(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))

    assert str(caught.value) == (
        "Replacement Linear is on another device at 'a': expected 'cpu', got 'meta'. "
        "Create its tensors on the device of the module it replaces."
    )
    assert caught.value.fqn == "a"
    assert caught.value.expected == {torch.device("cpu")}
    assert caught.value.actual == {torch.device("meta")}


def test_any_device_suits_a_module_without_tensors():
    assert carry(nn.ReLU(), nn.Linear(2, 2, device="meta")).dtypes == ("float32",)


def test_ties_with_the_rest_of_the_model_are_reported():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["ab"].weight = model["a"].weight
    owners = tensor_owners(model)

    broken = carry(model["a"], nn.Linear(2, 2), owners=owners).ties_broken
    kept = carry(model["a"], Gated(model["a"]), owners=owners).ties_broken
    untied = carry(model["c"], nn.Linear(2, 2), fqns=("c",), owners=owners).ties_broken

    assert broken == ("ab.weight",)
    assert kept == ()
    assert untied == ()


def test_an_alias_that_is_replaced_too_is_no_broken_tie():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model["b"] = model["a"]

    report = carry(model["a"], nn.Linear(2, 2), fqns=("a", "b"), owners=tensor_owners(model))

    assert report.ties_broken == ()


def test_the_root_breaks_no_tie():
    model = nn.Linear(2, 2)

    report = carry(model, nn.Linear(2, 2), fqns=("",), owners=tensor_owners(model))

    assert report.ties_broken == ()


def test_owners_are_named_by_every_fqn():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2)})
    model["b"] = model["a"]

    owners = tensor_owners(model)

    assert owners[id(model["a"].weight)] == ["a.weight", "b.weight"]
    assert owners[id(model["a"].running_mean)] == ["a.running_mean", "b.running_mean"]


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_changed_is_handed_over(training):
    outgoing = Gated(nn.Linear(2, 2)).train(training)
    incoming = nn.Sequential(nn.Dropout()).train(not training)

    hand_over(outgoing, incoming)

    assert [module.training for module in incoming.modules()] == [training, training]


def test_a_mode_that_did_not_change_leaves_mixed_modes_alone():
    outgoing, incoming = nn.ReLU(), nn.Sequential(nn.Dropout().eval(), nn.Dropout())

    hand_over(outgoing, incoming)

    assert [module.training for module in incoming.modules()] == [True, False, True]


def test_modules_of_both_keep_their_mode():
    inner = nn.Dropout()
    outgoing, incoming = nn.Sequential(inner).eval(), nn.Sequential(inner, nn.Dropout()).train()
    inner.train()

    hand_over(outgoing, incoming)

    assert [module.training for module in incoming.modules()] == [False, True, False]


def test_hooks_registered_meanwhile_are_handed_over():
    old = nn.Linear(2, 2)
    new = Gated(old)
    own = new.register_forward_hook(noop)
    known = hook_ids(new)
    later = new.register_forward_hook(noop, with_kwargs=True)
    new.register_full_backward_hook(noop)

    hand_over(new, old, known=known)

    assert own.id in known
    assert list(old._forward_hooks) == [later.id]
    assert list(old._forward_hooks_with_kwargs) == [later.id]
    assert len(old._backward_hooks) == 1
    assert old._is_full_backward_hook is True


def test_shared_tables_are_not_copied_onto_themselves():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    carry(old, new)
    known = hook_ids(new)
    handle = new.register_forward_hook(noop)

    hand_over(new, old, known=known)

    assert list(old._forward_hooks) == [handle.id]


def test_a_backward_hook_that_stays_behind_leaves_no_trace():
    """The original can take backward hooks of the other kind afterwards."""
    old = nn.Linear(2, 2)
    new = Gated(old)
    new.register_full_backward_hook(noop)

    hand_over(new, old, known=hook_ids(new))

    assert old._is_full_backward_hook is None


def test_the_report_says_what_was_added_dropped_and_broken():
    old, new = nn.Linear(2, 2), nn.Identity()
    old.note = "mine"
    new.scale = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    new.shift = nn.Parameter(torch.zeros(2), requires_grad=False)
    owners = {id(old.weight): ["a.weight", "b.weight"]}

    report = carry(old, new, owners=owners)

    assert report.num_trainable == 3
    assert report.attributes_dropped == ("in_features", "note", "out_features")
    assert report.render() == (
        "a: hooks none, train, 3 trainable, float32/float64 on cpu, dropped attributes "
        "'in_features', 'note', 'out_features', broke ties with 'b.weight'"
    )


def test_the_report_on_a_root_that_adds_nothing_is_short():
    report = carry(nn.ReLU(), nn.Tanh().eval(), fqns=("",))

    assert report.render() == (
        "(root): hooks none, train, 0 trainable, nothing on no device, dropped attributes 'inplace'"
    )


def test_a_copy_shares_the_hooks_it_was_copied_with():
    """`copy.deepcopy` of the original brings copies of its hooks; a handle must reach both."""
    model = nn.Sequential(nn.Linear(2, 2))
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    old, new = model[0], copy.deepcopy(model[0])

    report = carry_over(old, new, fqns=["0"], owners=dict)

    assert "shared" == report.hooks
    handle.remove()
    new(torch.ones(1, 2))
    assert [] == calls
