"""What is refused before anything is done: exchanged modules, and arguments of other kinds."""

import pytest
import torch
from core.edits import recipe
from core.shared_toys import OffsetOperation
from core.toys import Net, example, session
from torch import nn

from surgery_core import DriftError, OptionsError, StateError, SurgeryError, VariantError, verify

ONE = {"operation": "offset", "select": "layers.0.up", "options": {"value": 0.5}}
HEAD = {"operation": "offset", "select": "head", "options": {"value": -1.0}}


@pytest.fixture
def known():
    return session(OffsetOperation())


@pytest.fixture
def edited(known):
    made = recipe(rules=None, adapters={"a": ONE, "b": HEAD, "c": HEAD}, active="b")
    return known.plan_recipe(Net().eval(), made).apply()


@pytest.mark.parametrize(
    "call",
    [
        lambda edited, *_: edited.set_active("b"),
        lambda edited, *_: edited.set_active("a"),
        lambda edited, *_: edited.set_active({"a": 1.0}),
        lambda edited, *_: edited.activated("a").__enter__(),
        lambda edited, known, path: known.save(edited, path),
        lambda edited, known, path: known.export(edited, "b", path),
        lambda edited, *_: edited.revert(),
    ],
    ids=["same", "other", "several", "activated", "save", "export", "revert"],
)
@pytest.mark.parametrize("way", ["set", "table"])
def test_a_module_that_somebody_exchanged_is_noticed(edited, known, tmp_path, call, way):
    """As when embeddings are resized: the model computes without the adapter."""
    model, new = edited.model, nn.Linear(8, 12)
    placed = model.head
    if way == "set":
        model.head = new
    else:
        model._modules["head"] = new
    with pytest.raises(DriftError, match="drifted at 'head'") as caught:
        call(edited, known, tmp_path)
    assert ("head",) == caught.value.fqns
    assert new is model.head
    assert not list(tmp_path.iterdir())
    assert not edited.sharing.is_in_force

    model.head = placed
    with edited.activated("c"):
        edited.model(example())
    edited.revert()


def test_an_original_that_is_not_in_use_is_looked_at_too(edited):
    edited.model.layers[0].up = nn.Linear(2, 2)
    with pytest.raises(DriftError, match=r"Model with adapters drifted at 'layers\.0\.up'"):
        edited.set_active("c")


CHOICES = [None, 3, ["a", "b"], ("a",), {"a"}, {1: 2.0}, {"a": "x"}, {"a": None}, b"a", {}]


@pytest.mark.parametrize("choice", CHOICES, ids=repr)
def test_choices_of_other_kinds_are_refused(edited, choice):
    with pytest.raises(OptionsError, match=r"Give|Fix|Name"):
        edited.set_active(choice)
    assert "b" == edited.active


@pytest.mark.parametrize("choice", [None, 3, [["a"]], [None], {1: 1.0}, {"a"}, []], ids=repr)
def test_rows_of_other_kinds_are_refused(edited, choice):
    with pytest.raises(OptionsError), edited.activated(choice):
        pytest.fail("never entered")
    assert not edited.sharing.is_in_force


def test_a_list_is_for_rows():
    with pytest.raises(OptionsError) as caught:
        session(OffsetOperation()).plan_recipe(
            Net(), recipe(rules=None, adapters={"a": ONE}, active=None)
        ).apply().set_active(["a"])
    assert str(caught.value) == (
        "A choice of adapters is a name, or a mapping of names to weights such as "
        '{"a": 1.0, "b": 0.5}, got [\'a\']. Give either; a list is for the rows of a batch, in '
        "activated()."
    )


@pytest.mark.parametrize("name", [None, 3, ["a"], {}], ids=repr)
@pytest.mark.parametrize("method", ["variant", "tensors"])
def test_names_of_other_kinds_do_not_exist(edited, method, name):
    with pytest.raises(VariantError, match="does not exist: expected one of 'a', 'b', 'c'"):
        getattr(edited, method)(name)


@pytest.mark.parametrize("state", [None, 3, [1], {"head.offset": None}], ids=repr)
def test_states_of_other_kinds_are_refused(edited, state):
    before = {key: tensor.clone() for key, tensor in edited.tensors("b").items()}
    with pytest.raises(StateError, match="expected tensors by name"):
        edited.load_("b", state)
    assert all(torch.equal(before[key], tensor) for key, tensor in edited.tensors("b").items())


def test_one_name_is_not_read_as_letters(edited):
    assert edited.added_parameters("b") == edited.added_parameters(["b"])


@pytest.mark.parametrize(
    "call",
    [
        lambda known, _: known.plan(None, []),
        lambda known, _: known.plan(Net(), "offset"),
        lambda known, _: known.plan(Net(), ["offset"]),
        lambda known, _: known.plan_recipe(None, recipe()),
        lambda known, _: known.plan_recipe(Net(), {"adapters": {"a": ONE}}),
        lambda known, _: known.save(Net(), "x"),
        lambda known, _: known.export(Net(), "a", "x"),
        lambda known, _: known.load(None, "x"),
        lambda known, _: type(known)(OffsetOperation),
        lambda _, edited: verify(edited.model),
        lambda _, edited: verify(edited, tiers=5),
        lambda _, edited: edited.add_to_optimizer([]),
    ],
)
def test_arguments_of_other_kinds_are_refused(known, edited, call):
    with pytest.raises(SurgeryError, match="must be"):
        call(known, edited)
