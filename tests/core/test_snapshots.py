"""A snapshot is equal to another exactly when nothing that a surgery must put back differs."""

import pytest
import torch
from core.toys import Net
from torch import nn

from surgery_core.testing import TensorValue, assert_unchanged, same_tensor, snapshot


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: setattr(m, "stem", nn.Linear(4, 4)), "modules: stem differs"),
        (lambda m: setattr(m, "extra", 1), "attributes: :extra is new"),
        (lambda m: delattr(m, "stem"), "modules: stem is gone"),
        (
            lambda m: m.head.weight.requires_grad_(requires_grad=False),
            "tensors: head.weight differs",
        ),
        (lambda m: m.head.weight.data.add_(1), "state: head.weight differs"),
        (lambda m: m.head.eval(), "modes: head differs"),
        (lambda m: m.head.register_forward_hook(print), "hooks: head:_forward_hooks differs"),
        (lambda m: m._modules.update(stem=m._modules.pop("stem")), "modules: order differs"),
        (lambda m: setattr(m, "held", [m.head]), "attributes: :held differs"),
    ],
)
def test_a_snapshot_tells_what_changed(change, expected):
    model = Net()
    model.held = [model.stem]
    before = snapshot(model)
    assert before == snapshot(model)

    change(model)

    assert expected in before.differences(snapshot(model))
    assert before != snapshot(model)


def test_what_changed_is_named():
    model = Net()
    before = snapshot(model)
    model.head.eval()

    with pytest.raises(AssertionError) as caught:
        assert_unchanged(before, model, subject="Evaluation")

    assert str(caught.value) == "Evaluation changed the model: 'modes: head differs'."


def test_a_snapshot_looks_into_extra_state():
    class Versioned(nn.Module):
        version = 1

        def get_extra_state(self):
            return {"version": self.version}

    model = Versioned()
    before = snapshot(model)
    model.version = 2

    assert "state: _extra_state differs" in before.differences(snapshot(model))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.zeros(2), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(1, 2), False),
        (torch.ones(2), torch.ones(2, device="meta"), False),
        (torch.ones(2, device="meta"), torch.zeros(2, device="meta"), True),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), True),
        (torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 1.0]), False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.tensor([True]), torch.tensor([False]), False),
    ],
)
def test_tensors_are_the_same_when_every_value_is(left, right, expected):
    assert same_tensor(left, right) is expected
    assert (TensorValue(left) == TensorValue(right)) is expected
    if expected:
        assert hash(TensorValue(left)) == hash(TensorValue(right))
    assert TensorValue(left) != left
