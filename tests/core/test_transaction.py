"""A transaction writes everything or nothing, and can take it all back."""

import pytest
from torch import nn

from surgery_core import DriftError, SlotIndex, Transaction
from surgery_core.testing import InjectedError, assert_unchanged, failing_at, snapshot


def three():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))


def slot_of(model, fqn):
    return SlotIndex(model).site(fqn).slots[0]


def write_all(model, transaction):
    """Replace every layer and freeze its weight, in turns."""
    for number, layer in enumerate(list(model)):
        transaction.replace(slot_of(model, str(number)), layer, nn.ReLU())
        transaction.set_requires_grad(layer.weight, value=False)


def test_a_normal_exit_commits():
    model = three()
    old, new = model[1], nn.ReLU()
    slot = slot_of(model, "1")

    with Transaction() as transaction:
        transaction.replace(slot, old, new)
        transaction.set_requires_grad(old.weight, value=False)

    assert model[1] is new
    assert old.weight.requires_grad is False
    assert transaction.replaced == ((slot, old, new),)


@pytest.mark.parametrize("number", range(6))
def test_a_failure_at_any_write_rolls_back(number):
    model = three()
    before = snapshot(model)

    with (
        pytest.raises(InjectedError, match=rf"\AWrite {number} at "),
        Transaction(on_write=failing_at(number)) as transaction,
    ):
        write_all(model, transaction)

    assert_unchanged(before, model, subject="The transaction")
    assert transaction.replaced == ()


def test_an_error_of_the_body_rolls_back():
    model = three()
    before = snapshot(model)

    def body():
        with Transaction() as transaction:
            write_all(model, transaction)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()

    assert_unchanged(before, model, subject="The transaction")


def test_every_write_is_announced_before_it_happens():
    model = three()
    seen = []

    def on_write(number, target):
        seen.append((number, target, model[0], first.weight.requires_grad))

    first, slot = model[0], slot_of(model, "0")
    with Transaction(on_write=on_write) as transaction:
        transaction.replace(slot, first, nn.ReLU())
        transaction.set_requires_grad(first.weight, value=False)

    assert [entry[0] for entry in seen] == [0, 1]
    assert seen[0][1:] == (slot, first, True)
    assert seen[1][1] is first.weight
    assert seen[1][3] is True


def test_setting_requires_grad_to_what_it_is_writes_nothing():
    weight = nn.Linear(2, 2).weight

    with Transaction(on_write=failing_at(0)) as transaction:
        transaction.set_requires_grad(weight, value=True)

    assert weight.requires_grad is True


def test_a_transaction_goes_on_after_a_rollback():
    model = three()
    old, new = model[0], nn.ReLU()
    transaction = Transaction()
    transaction.replace(slot_of(model, "0"), old, nn.Tanh())

    transaction.rollback()
    transaction.replace(slot_of(model, "0"), old, new)

    assert model[0] is new


def test_undo_takes_everything_back():
    model = three()
    model[1].weight.requires_grad_(requires_grad=False)
    before = snapshot(model)
    with Transaction() as transaction:
        write_all(model, transaction)

    transaction.undo(subject="Model", fix="Fix it.")

    assert_unchanged(before, model, subject="Undo")


@pytest.mark.parametrize("number", range(6))
def test_a_failure_at_any_write_of_undo_changes_nothing(number):
    model = three()
    weights = [layer.weight for layer in model]
    with Transaction() as transaction:
        write_all(model, transaction)
    before = snapshot(model)

    with pytest.raises(InjectedError):
        transaction.undo(subject="Model", fix="Fix it.", on_write=failing_at(number))

    assert_unchanged(before, model, subject="Undo that failed")
    assert [weight.requires_grad for weight in weights] == [False, False, False]
    transaction.undo(subject="Model", fix="Fix it.", on_write=failing_at(6))
    assert [weight.requires_grad for weight in weights] == [True, True, True]


def test_undo_refuses_a_slot_that_holds_something_else():
    model = three()
    with Transaction() as transaction:
        write_all(model, transaction)
    model[1] = nn.Tanh()
    before = snapshot(model)

    with pytest.raises(DriftError) as caught:
        transaction.undo(subject="Model under test", fix="Put it back.")

    assert str(caught.value) == (
        "Model under test drifted at '1': expected the ReLU put there, got another Tanh. "
        "Put it back."
    )
    assert caught.value.fqns == ("1",)
    assert_unchanged(before, model, subject="Undo that found drift")


def test_a_slot_written_twice_is_undone_to_what_it_held_first():
    model = three()
    slot, first, second, third = slot_of(model, "0"), model[0], nn.ReLU(), nn.Tanh()
    with Transaction() as transaction:
        transaction.replace(slot, first, second)
        transaction.replace(slot, second, third)

    transaction.undo(subject="Model", fix="Fix it.")

    assert model[0] is first


def test_flags_reach_what_came_in_a_parameters_stead_and_pass_over_what_is_gone():
    """As where accelerate loads weights with each call, or a module lost its bias since."""
    there, gone, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    parameter = nn.Parameter(there.weight.detach().clone())
    gone.weight = None
    other.weight = parameter
    places = [(there, "weight"), (gone, "weight"), (gone, "never"), (other, "weight")]

    with Transaction() as transaction:
        transaction.set_requires_grad(parameter, value=False, places=places)

    assert not parameter.requires_grad
    assert not there.weight.requires_grad
    assert there.bias.requires_grad
    assert gone.weight is None
    transaction.undo(subject="The transaction", fix="Stop.")
    assert parameter.requires_grad
    assert there.weight.requires_grad
