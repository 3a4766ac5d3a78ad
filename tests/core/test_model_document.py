"""What a model would become is a table in which equal edits share a line, and plain data."""

import json

from core.edits import planned
from core.toys import Net, Twice, session

from surgery_core import Edit, ModelDocument, ModelRecipe, PlanDocument, TensorSpec


def edit(fqn, *, operation="gate", module="torch.nn.Linear", size=1, aliases=()):
    added = (TensorSpec(name="gate", shape=(size,), dtype="float32"),)
    return Edit(
        rule=0,
        operation=operation,
        fqn=fqn,
        aliases=aliases,
        module=module,
        added=added,
        removed=(),
    )


def plan_of(*edits):
    return PlanDocument(fingerprint="f", edits=tuple(edits))


def modules_of(*edits):
    """Return the column of modules of a table with these edits."""
    document = ModelDocument(rules=plan_of(*edits), adapters={}, active=None)
    head, _, *lines, _ = document.render().splitlines()
    start, end = head.index("modules"), head.index("class")
    return [line[start:end].strip() for line in lines]


def test_a_plan_with_rules_and_adapters_is_a_table():
    assert planned(
        adapters={"shift": {"operation": "shift", "select": "stem"}}, active=None
    ).document.render() == (
        "what     operation  modules  class   adds to each\n"
        "-------  ---------  -------  ------  -----------------\n"
        "rules    shift      head     Linear  shift [2] float32\n"
        "shift *  shift      stem     Linear  shift [4] float32\n"
        "* is active\n"
        "Plan: 2 modules replaced, 6 parameters added, 6 of them in the model at once."
    )


def test_what_is_in_the_model_at_once_is_the_rules_and_what_is_active():
    parts = {"a": plan_of(edit("x", size=10)), "b": plan_of(edit("x", size=200))}
    rules = plan_of(edit("y", size=3000))

    def last(active):
        found = ModelDocument(rules=rules, adapters=parts, active=active).render()
        return found.splitlines()[-1].partition(", ")[2]

    assert "3,210 parameters added, 3,010 of them in the model at once." == last("a")
    assert "3,210 parameters added, 3,210 of them in the model at once." == last({"a": 1, "b": 2})
    assert "3,210 parameters added, 3,000 of them in the model at once." == last(None)


def test_one_module_of_one_plan_is_said_so():
    document = ModelDocument(rules=None, adapters={"a": plan_of(edit("x"))}, active="a")

    assert "Plan: 1 module replaced, 1 parameters added." == document.render().splitlines()[-1]
    assert "a *" == document.render().splitlines()[2].partition("  ")[0]


def test_edits_that_differ_in_numbers_share_a_line():
    assert ["layers.{0..2}.up (3)"] == modules_of(*(edit(f"layers.{i}.up") for i in (0, 2, 1)))
    assert ["a.{0..1}.b.{3..4} (4)"] == modules_of(
        *(edit(f"a.{i}.b.{j}") for i in range(2) for j in (3, 4))
    )
    assert ["a.0.b.{3..9} (2)"] == modules_of(edit("a.0.b.3"), edit("a.0.b.9"))


def test_edits_that_differ_in_more_have_lines_of_their_own():
    assert ["a.0", "a.1", "b.1", "a.2", "(root)", "a1"] == modules_of(
        edit("a.0"),
        edit("a.1", size=2),
        edit("b.1"),
        edit("a.2", module="torch.nn.Conv1d"),
        edit(""),
        edit("a1"),
    )
    assert ["a.0", "a.1"] == modules_of(edit("a.0"), edit("a.1", operation="shift"))


def test_a_number_is_a_whole_segment():
    assert ["layer1.0", "layer2.0", "1a.{0..1} (2)"] == modules_of(
        edit("layer1.0"), edit("layer2.0"), edit("1a.0"), edit("1a.1")
    )


def test_an_adapter_that_does_nothing_has_a_line_that_says_so():
    document = ModelDocument(rules=plan_of(), adapters={"a": plan_of()}, active="a")

    assert (
        "what   operation  modules  class  adds to each\n"
        "-----  ---------  -------  -----  ------------\n"
        "rules  -          none     -      -\n"
        "a *    -          none     -      -\n"
        "* is active\n"
        "Plan: 0 modules replaced, 0 parameters added, 0 of them in the model at once."
    ) == document.render()


def test_aliases_are_one_edit():
    part = ModelRecipe.model_validate({"rules": [{"operation": "shift", "select": "**.head"}]})

    document = session().plan_recipe(Twice(Net()), part).document

    assert 1 == document.num_edits
    assert "first.head" in document.render()


def test_a_document_is_plain_data():
    found = planned().document

    data = json.loads(json.dumps(found.to_mapping()))
    assert found.rules == PlanDocument.from_mapping(data["rules"])
    assert dict(found.adapters) == {
        name: PlanDocument.from_mapping(part) for name, part in data["adapters"].items()
    }
    assert "wide" == data["active"]
    assert ["rules", "wide", "narrow", "shift"] == list(found.documents)
    assert 1 + 3 + 1 + 2 == found.num_edits


def test_weights_and_their_absence_are_plain_data():
    parts = {"a": plan_of(edit("x"))}

    def active(choice):
        return ModelDocument(rules=None, adapters=parts, active=choice).to_mapping()["active"]

    assert {"a": 0.5} == active({"a": 0.5})
    assert active(None) is None
