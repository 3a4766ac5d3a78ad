"""Copies that stay under the base's keys in another dtype are declared, checked and kept."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from core.toys import Net, ToyOperation, example, session
from support.folders import as_two_files, change_text
from torch import nn

from surgery_core import (
    ContractError,
    Effects,
    ModelRecipe,
    PlanDocument,
    RecordError,
    Rule,
    TensorSpec,
    read_record,
    verify,
)
from surgery_core.record import RECORD_FILE, TENSORS_FILE
from surgery_core.testing import OperationContract, assert_unchanged, snapshot


class Wide(nn.Linear):
    """A copy of a Linear that keeps its weight in another dtype, and computes in the base's."""

    def __init__(self, base, dtype):
        super().__init__(1, 1, device="meta")
        self.in_features, self.out_features, self.bias = *base.weight.shape[::-1], base.bias
        self.base_dtype = base.weight.dtype
        self.weight = nn.Parameter(base.weight.detach().to(dtype, copy=True))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(self.base_dtype), self.bias)


class Widen(ToyOperation):
    """Train weights in float64."""

    name = "widen"

    def describe(self, site, _options):
        shape = tuple(site.module.weight.shape)
        return Effects(retyped=(TensorSpec(name="weight", shape=shape, dtype="float64"),))

    def build(self, site, _options):
        return Wide(site.module, torch.float64)


class ForgetsToSay(Widen):
    def describe(self, _site, _options):
        return Effects()


class SaysAnother(Widen):
    change = ()

    def describe(self, site, options):
        (spec,) = super().describe(site, options).retyped
        return Effects(retyped=(replace(spec, **dict(self.change)),))


class KeepsTheOriginal(Widen):
    def describe(self, site, options):
        (spec,) = super().describe(site, options).retyped
        return Effects(retyped=(replace(spec, dtype="float32"),))

    def build(self, site, _options):
        new = Wide(site.module, torch.float64)
        new.weight = site.module.weight
        return new


class Copies(KeepsTheOriginal):
    """A copy of the same dtype, which may be declared too."""

    def build(self, site, _options):
        return Wide(site.module, torch.float32)


HEAD = Rule(operation="widen", select="head")
RECIPE = {"adapters": {"w": {"operation": "widen", "select": "head"}}}


class TestWiden(OperationContract):
    """The suite."""

    def session(self):
        return session(Widen())

    def make_model(self):
        return Net()

    def rules(self):
        return [Rule(operation="widen")]

    def run(self, model):
        return model(example())


class ChangesValues(Widen):
    def build(self, site, options):
        new = super().build(site, options)
        with torch.no_grad():
            new.weight += 1e-12
        return new


def test_the_suite_finds_copies_of_other_values():
    contract = TestWiden()
    contract.session = lambda: session(ChangesValues())

    with pytest.raises(AssertionError, match=r"The value of 'stem.weight' changed"):
        contract.test_apply_has_the_declared_effects()


def refusal(operation):
    """Return the message with which a plan is refused, having changed nothing."""
    model = Net()
    before = snapshot(model)
    plan = session(operation).plan(model, [HEAD])
    with pytest.raises(ContractError) as caught:
        plan.apply()
    assert_unchanged(before, model, subject="A refused plan")
    return str(caught.value)


def test_another_dtype_has_to_be_declared():
    assert refusal(ForgetsToSay()) == (
        "Operation 'widen' broke its contract at 'head': expected 'weight' of the original's "
        "torch.float32, got torch.float64. Declare it as `retyped` in `describe`."
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dtype": "float16"}, "'weight', shape=(2, 4), dtype='float16', trainable=True"),
        ({"trainable": False}, "'weight', shape=(2, 4), dtype='float64', trainable=False"),
        ({"shape": (4, 2)}, "'weight', shape=(4, 2), dtype='float64', trainable=True"),
    ],
)
def test_copies_other_than_declared_are_refused(change, expected):
    operation = SaysAnother()
    operation.change = change

    assert refusal(operation) == (
        "Operation 'widen' broke its contract at 'head': expected a copy of the original's as "
        f"TensorSpec(name={expected}), got TensorSpec(name='weight', shape=(2, 4), "
        "dtype='float64', trainable=True). Make `describe` and `build` agree."
    )


def test_a_copy_of_what_is_not_there_is_refused():
    operation = SaysAnother()
    operation.change = {"name": "gate"}

    assert "as TensorSpec(name='gate', " in refusal(operation)
    assert "), got None. Make `describe` and `build` agree." in refusal(operation)


def test_the_original_itself_is_no_copy():
    assert "got the original's own. Make `describe`" in refusal(KeepsTheOriginal())


def test_copies_of_the_same_dtype_may_be_declared():
    surgery = session(Copies()).plan(Net(), [HEAD]).apply()

    assert "float32" == surgery.plan.document.edits[0].retyped[0].dtype


def test_the_plan_says_what_is_kept_in_another_dtype():
    document = session(Widen()).plan(Net(), [HEAD]).document

    assert document.render().splitlines()[2:] == [
        "head    Linear  widen      weight [2, 4] as float64",
        "Plan: 1 module replaced, 0 parameters added.",
    ]
    assert PlanDocument.from_json(document.to_json()) == document
    (edit,) = json.loads(document.to_json())["edits"]
    assert [{"name": "weight", "shape": [2, 4], "dtype": "float64", "trainable": True}] == edit[
        "retyped"
    ]


def test_the_plan_of_a_recipe_says_it_too():
    recipe = ModelRecipe.model_validate(RECIPE)
    document = session(Widen()).plan_recipe(Net(), recipe).document

    assert "weight [2, 4] as float64" in document.render()


def trained():
    """Return a model with a copy that was trained, and the values."""
    edited = session(Widen()).plan_recipe(make(), ModelRecipe.model_validate(RECIPE)).apply()
    with torch.no_grad():
        edited.model.head.weight += 1e-9
    return edited, edited.model.head.weight.detach().clone()


def make():
    torch.manual_seed(0)
    return Net().eval()


def test_a_record_has_the_copies_in_their_dtype(tmp_path):
    edited, expected = trained()
    assert {"head.weight"} == set(edited.tensors("w"))
    session(Widen()).save(edited, tmp_path)
    edited.revert()

    record = read_record(tmp_path)
    again = session(Widen()).load(edited.model, tmp_path, base_check="error")

    assert {"head.weight": torch.float64} == {k: t.dtype for k, t in record.state["w"].items()}
    assert "float64" == record.plans["w"].edits[0].retyped[0].dtype
    assert torch.equal(expected, again.model.head.weight)


def test_the_first_values_are_verified():
    edited = session(Widen()).plan_recipe(make(), ModelRecipe.model_validate(RECIPE)).apply()

    assert verify(edited, [example()]).is_ok


def test_records_of_version_1_have_no_such_copies(tmp_path):
    """They are read, and replayed where the operation has none either."""
    shift = {"adapters": {"s": {"operation": "shift", "select": "head"}}}
    edited = session().plan_recipe(make(), ModelRecipe.model_validate(shift)).apply()
    session().save(edited, tmp_path)

    def as_version_1(data):
        data["version"] = 1
        for plan in data["plans"].values():
            for edit in plan["edits"]:
                assert [] == edit.pop("retyped")

    change_text(tmp_path / TENSORS_FILE, RECORD_FILE, as_version_1)
    as_two_files(tmp_path)

    again = session().load(make(), tmp_path, base_check="error")

    assert read_record(tmp_path).plans["s"] == edited.plan.document.documents["s"]
    assert asdict(again.plan.document.documents["s"])["edits"][0]["retyped"] == ()


def test_a_record_of_this_version_says_which_there_are(tmp_path):
    edited, _ = trained()
    session(Widen()).save(edited, tmp_path)

    def without_copies(data):
        assert 2 == data["version"]
        del data["plans"]["w"]["edits"][0]["retyped"]

    change_text(tmp_path / TENSORS_FILE, RECORD_FILE, without_copies)

    with pytest.raises(RecordError, match=r"is damaged: .* got KeyError\('retyped'\)"):
        read_record(tmp_path)
