"""What compiled code is compared by: every result of a run, exactly or closely, and no trace left."""

import pytest
import torch
from core.toys import Net, example, session
from torch import nn

from surgery_core import Rule
from surgery_core.contract_compiled import differing, disturb_, results_of
from surgery_core.testing import TensorValue, assert_unchanged, snapshot


def test_a_run_gives_outputs_gradients_and_what_it_writes_and_leaves_no_trace():
    model = Net().train()
    before = snapshot(model)

    found = results_of(model, lambda: (model(example()), torch.tensor(3)))

    assert_unchanged(before, model, subject="A run that was looked at")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert TensorValue(torch.tensor(3)) == found["output 1"]
    assert (2, 4) == found["gradient of head.weight"].tensor.shape
    assert found["gradient of layers.0.norm.running_mean"] is None
    count = "layers.0.norm.num_batches_tracked"
    assert TensorValue(torch.tensor(1)) == found[f"{count} after the run"]
    assert 0 == model.state_dict()[count]


def test_a_run_without_gradients_has_none():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        found = results_of(model, lambda: (model(example()),))

    assert found["gradient of weight"] is None


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("actual", "is_exact", "is_close"),
    [
        (torch.ones(2), True, True),
        (ONE + 1e-6, False, True),
        (ONE + 1e-2, False, False),
        (ONE * torch.nan, False, False),
        (ONE.double(), False, False),
        (torch.ones(3), False, False),
        (None, False, False),
    ],
)
def test_results_are_equal_close_or_neither(actual, is_exact, is_close):
    expected = {"x": TensorValue(ONE)}
    found = {"x": None if actual is None else TensorValue(actual)}

    assert ([] if is_exact else ["x"]) == differing(expected, found)
    assert ([] if is_close else ["x"]) == differing(expected, found, is_exact=False)


def test_whole_numbers_are_never_close():
    one, two = ({"x": TensorValue(torch.tensor(n))} for n in (1_000_000, 1_000_001))

    assert ["x"] == differing(one, two, is_exact=False)


def test_a_result_that_only_one_run_has_differs():
    assert ["x"] == differing({"x": TensorValue(ONE)}, {})
    assert ["x"] == differing({}, {"x": TensorValue(ONE)}, is_exact=False)


def test_what_an_operation_added_is_moved_and_nothing_else():
    model = Net()
    surgery = session().plan(model, [Rule(operation="shift")]).apply()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    disturb_(surgery)

    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {f"{item.site.fqn}.shift" for item in surgery.replacements} == changed
