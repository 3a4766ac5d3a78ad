"""Recipes say the same in every format, are refused with all that is wrong, and survive being written."""

import json
import math
from pathlib import Path

import pytest
from core.edits import recipe
from core.toys import Net, session
from pydantic import ValidationError

from surgery_core import (
    ConflictError,
    ContractError,
    ModelRecipe,
    NoMatchError,
    Recipe,
    Rule,
    dump_recipe,
    load_recipe,
)
from surgery_core.recipe import AdapterRecipe, RuleRecipe

YAML = """\
version: 1
variables: {length: 4}
models:
  chat:
    source: ./llama
    freeze: false
    rules:
      - operation: shift
        select: head
        expect: 1
    adapters:
      french: {operation: gate, options: {value: "${length}", scale: 1e-3, flags: [true, a$$b]}}
      formal:
        rules:
          - {operation: gate, select: "layers.{-2..}.up", optional: true}
          - {operation: shift, exclude: "regex:.*up$"}
    active: {french: 0.5, formal: -2}
  "code v2":
    adapters:
      rust: {operation: gate, source: ~/rust, options: {value: .inf}}
"""
TOML = """\
version = 1
variables = {length = 4}
[models.chat]
source = "./llama"
freeze = false
active = {french = 0.5, formal = -2}
[[models.chat.rules]]
operation = "shift"
select = "head"
expect = 1
[models.chat.adapters.french]
operation = "gate"
options = {value = "${length}", scale = 1e-3, flags = [true, "a$$b"]}
[[models.chat.adapters.formal.rules]]
operation = "gate"
select = "layers.{-2..}.up"
optional = true
[[models.chat.adapters.formal.rules]]
operation = "shift"
exclude = "regex:.*up$"
[models."code v2".adapters.rust]
operation = "gate"
source = "~/rust"
options.value = inf
"""
JSON = """\
{"version": 1, "variables": {"length": 4}, "models": {
  "chat": {
    "source": "./llama", "freeze": false,
    "rules": [{"operation": "shift", "select": "head", "expect": 1}],
    "adapters": {
      "french": {"operation": "gate",
                 "options": {"value": "${length}", "scale": 1e-3, "flags": [true, "a$$b"]}},
      "formal": {"rules": [
        {"operation": "gate", "select": "layers.{-2..}.up", "optional": true},
        {"operation": "shift", "exclude": "regex:.*up$"}]}},
    "active": {"french": 0.5, "formal": -2}},
  "code v2": {"adapters": {
    "rust": {"operation": "gate", "source": "~/rust", "options": {"value": Infinity}}}}}}
"""
EXPECTED = Recipe(
    models={
        "chat": ModelRecipe(
            source="./llama",
            freeze=False,
            rules=(RuleRecipe(operation="shift", select="head", expect=1),),
            adapters={
                "french": AdapterRecipe(
                    operation="gate", options={"value": 4, "scale": 0.001, "flags": [True, "a$b"]}
                ),
                "formal": AdapterRecipe(
                    rules=(
                        RuleRecipe(operation="gate", select="layers.{-2..}.up", optional=True),
                        RuleRecipe(operation="shift", exclude="regex:.*up$"),
                    )
                ),
            },
            active={"french": 0.5, "formal": -2.0},
        ),
        "code v2": ModelRecipe(
            adapters={
                "rust": AdapterRecipe(
                    operation="gate", source="~/rust", options={"value": math.inf}
                )
            }
        ),
    }
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that writes a recipe and loads it."""
    monkeypatch.chdir(tmp_path)

    def load_text(text, name="a.yaml", **variables):
        Path(name).write_text(text, encoding="utf-8")
        return load_recipe(name, variables=variables)

    return load_text


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.toml", TOML), ("a.json", JSON)])
def test_a_recipe_says_the_same_in_every_format(load, name, text):
    assert EXPECTED == load(text, name)


def test_recipes_differ_by_what_they_say(load):
    assert EXPECTED != load(YAML.replace("0.5", "0.25"))
    assert EXPECTED != load(YAML, length="5")
    assert EXPECTED != YAML
    assert load(YAML) != load(YAML.replace("freeze: false", "freeze: true"))


def test_what_is_left_out_has_defaults(load):
    found = load("models: {m: {adapters: {a: {operation: gate}}}}")

    assert 1 == found.version
    part = found.models["m"]
    assert (None, True, (), None) == (part.source, part.freeze, part.rules, part.active)
    adapter = part.adapters["a"]
    assert (None, None, {}, None, False) == (
        *(adapter.select, adapter.exclude, adapter.options, adapter.expect, adapter.optional),
    )


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        EXPECTED.version = 2


ADAPTERS = "models:\n  m:\n    adapters: {one: {operation: g}, two: {operation: g}}\n"


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        ("active: two", "two"),
        ("active: {two: 1}", {"two": 1.0}),
        ("active: {two: 0, one: -1}", None),
    ],
)
def test_one_or_several_may_be_active(load, active, expected):
    found = load(f"{ADAPTERS}    {active}").models["m"].selected

    assert (expected or {"two": 0.0, "one": -1.0}) == found


def test_a_single_adapter_is_active_and_without_adapters_none_is():
    assert "a" == ModelRecipe(adapters={"a": AdapterRecipe(operation="g")}).selected
    assert ModelRecipe(rules=(RuleRecipe(operation="g"),)).selected is None


@pytest.mark.parametrize(
    "name", ["a", "no", "llama-3.1", "French (formal)", "日本語", "[key]", "a="]
)
def test_other_names_are_fine(load, name):
    text = json.dumps({"models": {name: {"adapters": {name: {"operation": "g"}}}}})

    assert [name] == list(load(text, "a.json").models[name].adapters)


@pytest.mark.parametrize(
    "selector",
    ["", "a.b", "**.{0..3}.[ab]?", "regex:.*proj$", "class:no.such.module:Class", "class:a:B.C"],
)
def test_selectors_that_may_mean_something_are_not_looked_up(load, selector):
    """Classes are imported when a plan is made, not when a recipe is read."""
    found = load(
        f"models: {{m: {{rules: [{{operation: g, select: '{selector}'}}]}}}}".replace("\\", "")
    )

    assert selector == found.models["m"].rules[0].select


def test_several_selectors_are_kept_in_order(load):
    found = load("models: {m: {rules: [{operation: g, select: [b, 'a*'], exclude: [c]}]}}")

    rule = found.models["m"].rules[0]
    assert (("b", "a*"), ("c",)) == (rule.select, rule.exclude)
    assert Rule(operation="g", select=("b", "a*"), exclude=("c",)) == rule.rule()
    assert found == load(dump_recipe(found))
    assert found.models["m"] == ModelRecipe.model_validate(found.models["m"].model_dump())


def test_a_rule_is_what_its_recipe_says():
    found = RuleRecipe(
        operation="g", select="a", exclude="b", options={"x": 1}, expect=2, optional=True
    )

    options = {"y": 0, "x": 1}
    assert Rule(
        operation="g", select="a", exclude="b", options=options, expect=2, optional=True
    ) == found.rule(defaults={"x": 0, "y": 0})
    assert Rule(operation="h") == RuleRecipe(operation="h").rule()


def test_an_adapter_has_rules_also_where_it_is_one():
    several = (RuleRecipe(operation="g"), RuleRecipe(operation="h"))
    one = AdapterRecipe(operation="g", select="a", options={"x": [1]}, expect=0, source="s")

    assert several == AdapterRecipe(rules=several).all_rules
    assert (RuleRecipe(operation="g", select="a", options={"x": [1]}, expect=0),) == one.all_rules


NOTHING = {"operation": "gate", "select": "no.such"}


def test_what_matches_nothing_is_an_error_unless_it_is_optional():
    with pytest.raises(NoMatchError, match=r"selector 'no.such' matched none"):
        session().plan_recipe(Net(), recipe(rules=[NOTHING]))
    with pytest.raises(NoMatchError, match=r"selector 'no.such' matched none"):
        session().plan_recipe(Net(), recipe(adapters={"a": NOTHING}, active=None))

    part = recipe(rules=[{**NOTHING, "optional": True, "expect": 3}])
    assert () == session().plan_recipe(Net(), part).document.rules.edits


def test_an_exclusion_that_excludes_nothing_is_an_error_unless_it_is_optional():
    rule = {"operation": "shift", "select": "head", "exclude": "layers.*"}

    with pytest.raises(NoMatchError, match=r"exclude 'layers.\*' matched none"):
        session().plan_recipe(Net(), recipe(rules=[rule]))
    part = recipe(rules=[{**rule, "optional": True}])
    assert 1 == len(session().plan_recipe(Net(), part).document.rules.edits)


def test_an_optional_rule_that_matches_keeps_to_what_it_expects():
    rule = {"operation": "shift", "select": "head", "optional": True, "expect": 2}

    with pytest.raises(ContractError, match="expected 2 modules, got 1: 'head'"):
        session().plan_recipe(Net(), recipe(rules=[rule]))


def test_an_error_of_planning_says_where_in_the_recipe_it_comes_from(load):
    text = (
        "models:\n  m:\n    rules:\n      - operation: shift\n        select: head\n"
        "    adapters:\n      one:\n        operation: gate\n        select: head\n"
    )

    with pytest.raises(ConflictError) as caught:
        session().plan_recipe(Net(), load(text))

    assert ["a.yaml:7: models.m.adapters.one"] == caught.value.__notes__


def test_a_place_in_a_recipe_of_no_file_has_no_line():
    assert "models.m.rules[0]" == EXPECTED.where("models", "m", "rules", 0)
    assert "the recipe" == EXPECTED.where()


def test_paths_that_begin_with_a_dot_are_relative_to_the_recipe(load, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    found = load("models: {m: {rules: [{operation: g}]}}", "sub/a.yaml")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir("/")

    expected = {
        "./x": str(tmp_path / "sub" / "x"),
        "../x": str(tmp_path / "x"),
        ".": str(tmp_path / "sub"),
        "..": str(tmp_path),
        ".cache/x": str(tmp_path / "sub" / ".cache" / "x"),
        "~/x": "/home/me/x",
        "~": "/home/me",
        "~no_such_user/x": "~no_such_user/x",
        "x": "x",
        "org/model": "org/model",
        "package.module:factory": "package.module:factory",
        "/x": "/x",
        "": "",
    }
    assert expected == {source: found.resolved(source) for source in expected}


def test_paths_of_a_recipe_of_no_file_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert str(tmp_path / "x") == EXPECTED.resolved("./x")


DUMPED = """\
models:
  chat:
    source: ./llama
    freeze: false
    rules:
    - operation: shift
      select: head
      expect: 1
    adapters:
      french:
        operation: gate
        options:
          value: 4
          scale: 0.001
          flags:
          - true
          - a$$b
      formal:
        rules:
        - operation: gate
          select: layers.{-2..}.up
          optional: true
        - operation: shift
          exclude: regex:.*up$$
    active:
      french: 0.5
      formal: -2.0
  code v2:
    adapters:
      rust:
        operation: gate
        options:
          value: .inf
        source: ~/rust
"""


def test_a_recipe_is_written_with_variables_resolved_and_without_defaults(load):
    assert DUMPED == dump_recipe(load(YAML))
    assert DUMPED == dump_recipe(EXPECTED)


def test_what_was_written_reads_as_the_same_and_is_written_as_the_same(load):
    again = load(DUMPED)

    assert EXPECTED == again
    assert DUMPED == dump_recipe(again)


def test_defaults_that_were_spelled_out_are_not_written(load):
    text = "models: {m: {rules: [{operation: g, optional: false, options: {}}], freeze: true}}"

    assert "models:\n  m:\n    rules:\n    - operation: g\n" == dump_recipe(load(text))


def test_infinite_options_are_kept_in_json_too():
    assert (
        math.inf
        == EXPECTED.model_dump(mode="json")["models"]["code v2"]["adapters"]["rust"]["options"][
            "value"
        ]
    )
