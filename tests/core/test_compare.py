"""Differences of two recipes are their values by place; of two records, their tensors as well."""

import pytest
import torch
from core.edits import edited
from core.toys import Net, session

from surgery_core import Recipe, read_record
from surgery_core.compare import differences


def recipe_of(**models):
    return Recipe.model_validate({"models": models})


def rule(**parts):
    return {"operation": "gate", **parts}


def told(before, after, *records):
    """Return the differences as tuples."""
    found = differences(before, after, *records)
    return [(item.sign, item.place, item.before, item.after) for item in found]


def test_equal_recipes_do_not_differ():
    part = {"adapters": {"a": rule(options={"x": [1, {"y": "z"}]})}}

    assert [] == differences(recipe_of(m=part), recipe_of(m=part))


def test_a_default_that_is_spelled_out_is_no_difference():
    before = recipe_of(m={"rules": [rule()]})

    assert [] == differences(before, recipe_of(m={"rules": [rule(optional=False)], "freeze": True}))


def test_that_a_single_adapter_is_active_need_not_be_said():
    before = recipe_of(m={"adapters": {"a": rule()}})

    assert [] == differences(before, recipe_of(m={"adapters": {"a": rule()}, "active": "a"}))
    assert before == recipe_of(m={"adapters": {"a": rule()}})


def test_every_value_that_is_new_gone_or_another_is_told_by_its_place():
    before = recipe_of(
        m={
            "source": "a",
            "rules": [rule(select="head", options={"n": 1, "deep": {"x": [1, 2]}})],
            "adapters": {"one": rule(), "two": rule()},
            "active": "one",
        }
    )
    after = recipe_of(
        m={
            "freeze": False,
            "rules": [rule(select=["head", "stem"], options={"n": 1.5, "deep": {"x": [1, 3, 4]}})],
            "adapters": {"one": rule(), "3.0": rule()},
            "active": {"one": 0.5, "3.0": 1},
        }
    )

    assert [
        ("-", "models.m.source", "'a'", "-"),
        ("-", "models.m.rules[0].select", "'head'", "-"),
        ("~", "models.m.rules[0].options.n", "1", "1.5"),
        ("~", "models.m.rules[0].options.deep.x[1]", "2", "3"),
        ("-", "models.m.adapters.two.operation", "'gate'", "-"),
        ("-", "models.m.active", "'one'", "-"),
        ("+", "models.m.freeze", "-", "False"),
        ("+", "models.m.rules[0].select[0]", "-", "'head'"),
        ("+", "models.m.rules[0].select[1]", "-", "'stem'"),
        ("+", "models.m.rules[0].options.deep.x[2]", "-", "4"),
        ("+", "models.m.adapters.'3.0'.operation", "-", "'gate'"),
        ("+", "models.m.active.one", "-", "0.5"),
        ("+", "models.m.active.'3.0'", "-", "1.0"),
    ] == told(before, after)


def test_empty_values_are_values():
    before = recipe_of(m={"rules": [rule(options={"x": []})]})
    after = recipe_of(m={"rules": [rule(options={"x": {}})]})

    assert [("~", "models.m.rules[0].options.x", "[]", "{}")] == told(before, after)


def test_a_model_that_is_gone_is_gone_value_by_value():
    before = recipe_of(m={"rules": [rule()]}, n={"rules": [rule()]})
    after = recipe_of(n={"rules": [rule()]})

    expected = ("models.m.rules[0].operation", "'gate'", "-")
    assert [("-", *expected)] == told(before, after)
    assert [("+", expected[0], "-", "'gate'")] == told(after, before)


@pytest.fixture
def saved(tmp_path):
    """Return a function that applies a recipe, changes tensors, and reads its record."""

    def save(name, change=None, **changes):
        found = edited(Net().eval(), **changes)
        if change is not None:
            with torch.no_grad():
                change(found)
        session().save(found, tmp_path / name)
        return read_record(tmp_path / name)

    return save


def told_of(before, after, name="m"):
    recipes = [Recipe(models={name: record.recipe}) for record in (before, after)]
    return told(*recipes, {name: before}, {name: after})


def test_records_with_equal_tensors_do_not_differ(saved):
    assert [] == told_of(saved("one"), saved("two"))


def test_tensors_that_differ_are_told_by_their_norms_and_by_how_much(saved):
    def change(found):
        found.tensors("wide")["layers.1.up.gate"].fill_(3.0)
        found.tensors("rules")["head.shift"].copy_(torch.tensor([3.0, -4.0]))

    assert [
        ("~", "m: rules: head.shift", "norm 0", "norm 5, differs by at most 4.0e+00"),
        ("~", "m: wide: layers.1.up.gate", "norm 0", "norm 3, differs by at most 3.0e+00"),
    ] == told_of(saved("one"), saved("two", change))


def test_tensors_of_the_same_norm_still_differ(saved):
    def signed(value):
        return lambda found: found.tensors("narrow")["layers.0.up.gate"].fill_(value)

    assert [
        ("~", "m: narrow: layers.0.up.gate", "norm 2", "norm 2, differs by at most 4.0e+00")
    ] == told_of(saved("one", signed(2.0)), saved("two", signed(-2.0)))


def test_tensors_that_are_new_gone_or_of_another_shape_are_told(saved):
    gates = {"operation": "gate", "select": "layers.{0..1}.up"}
    before = saved("one", adapters={"a": gates}, active=None)
    after = saved("two", adapters={"a": {**gates, "select": "layers.{1..}.up"}}, active=None)
    before.state["a"]["layers.1.up.gate"] = torch.zeros(2, 3, dtype=torch.float64)

    assert [
        ("~", "models.m.adapters.a.select", "'layers.{0..1}.up'", "'layers.{1..}.up'"),
        ("-", "m: a: layers.0.up.gate", "[1] float32", "-"),
        ("~", "m: a: layers.1.up.gate", "[2, 3] float64", "[1] float32"),
        ("+", "m: a: layers.2.up.gate", "-", "[1] float32"),
    ] == told_of(before, after)


def test_tensors_are_compared_where_both_have_a_record_of_the_model(saved):
    record = saved("one")
    recipe = Recipe(models={"m": record.recipe})

    assert [] == told(recipe, recipe, {"m": record})
    assert [] == told(recipe, recipe, {"m": record}, {"n": record})


def test_tensors_without_values_and_integers_can_be_compared(saved):
    before, after = saved("one"), saved("two")
    before.state["wide"] |= {"a": torch.zeros(0), "b": torch.tensor([1, 2])}
    after.state["wide"] |= {"a": torch.zeros(0), "b": torch.tensor([1, 5])}

    assert [("~", "m: wide: b", "norm 2.236", "norm 5.099, differs by at most 3.0e+00")] == told_of(
        before, after
    )
