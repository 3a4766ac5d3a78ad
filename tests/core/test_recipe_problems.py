"""Whatever is wrong with a recipe is said at once, with file, line, place and what was meant."""

import json
from pathlib import Path

import pytest
from core.edits import RECIPE, recipe

from surgery_core import Recipe, RecipeError, load_recipe
from surgery_core.recipe import parse_recipe


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that writes a recipe and loads it."""
    monkeypatch.chdir(tmp_path)

    def load_text(text, name="a.yaml", **variables):
        Path(name).write_text(text, encoding="utf-8")
        return load_recipe(name, variables=variables)

    return load_text


@pytest.fixture
def problems(load):
    """Return a function that returns what is wrong with a recipe, line by line."""

    def problems_of(text, name="a.yaml", **variables):
        with pytest.raises(RecipeError) as caught:
            load(text, name, **variables)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return list(caught.value.problems)

    return problems_of


WRONG = """\
version: 2
modles: {}
models:
  a:
    frieze: true
    rules: {operation: gate}
    active: 5
  b:
    source: 5
    freeze: 1
    rules:
      - operation: 7
        selct: x
      - gate
      - {select: x, expect: -1, optional: "yes", options: []}
  c:
    adapters:
      one: {operation: gate, wieght: 1, expect: 1.5}
      two: {zzz: 1}
    active: {one: x, two: .inf}
  d: 5
"""


def test_everything_that_is_wrong_is_named_with_its_line(problems):
    assert [
        "a.yaml:1: version: expected at most 1, the latest that this surgery-core knows, got 2",
        "a.yaml:5: models.a: unknown key 'frieze': did you mean 'freeze'?",
        "a.yaml:6: models.a.rules: expected a list, got {'operation': 'gate'}",
        "a.yaml:7: models.a.active: expected text, got 5",
        "a.yaml:9: models.b.source: expected text, got 5",
        "a.yaml:10: models.b.freeze: expected true or false, got 1",
        "a.yaml:12: models.b.rules[0].operation: expected text, got 7",
        "a.yaml:13: models.b.rules[0]: unknown key 'selct': did you mean 'select'?",
        "a.yaml:14: models.b.rules[1]: expected a mapping, got 'gate'",
        "a.yaml:15: models.b.rules[2]: expected 'operation', got no such key",
        "a.yaml:15: models.b.rules[2].options: expected a mapping, got []",
        "a.yaml:15: models.b.rules[2].expect: expected at least 0, got -1",
        "a.yaml:15: models.b.rules[2].optional: expected true or false, got 'yes'",
        "a.yaml:18: models.c.adapters.one.expect: expected a whole number, got 1.5",
        "a.yaml:18: models.c.adapters.one: unknown key 'wieght': expected one of 'operation', "
        "'select', 'exclude', 'options', 'expect', 'optional', 'rules', 'source'",
        "a.yaml:19: models.c.adapters.two: unknown key 'zzz': expected one of 'operation', "
        "'select', 'exclude', 'options', 'expect', 'optional', 'rules', 'source'",
        "a.yaml:20: models.c.active.one: expected a number, got 'x'",
        "a.yaml:20: models.c.active.two: expected a finite number, got inf",
        "a.yaml:21: models.d: expected a mapping, got 5",
        "a.yaml:2: the recipe: unknown key 'modles': did you mean 'models'?",
    ] == sorted(problems(WRONG), key=lambda line: ("modles" in line, int(line.split(":")[1])))


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.toml", "[models.m]\n[[models.m.rules]]\noperation = 'g'\nopton = 1\n", 4),
        ("a.json", '{"models": {"m": {"rules": [{"operation": "g",\n"opton": 1}]}}}', 2),
    ],
)
def test_the_line_is_known_in_other_formats_too(problems, name, text, line):
    expected = f"{name}:{line}: models.m.rules[0]: unknown key 'opton': did you mean 'options'?"
    assert [expected] == problems(text, name)


def test_the_line_is_that_of_the_recipe_below_where_that_is_wrong(problems):
    Path("base.toml").write_text("\n[models.m]\nfrieze = true\n", encoding="utf-8")

    assert [
        "base.toml:3: models.m: unknown key 'frieze': did you mean 'freeze'?",
        "a.yaml:2: models.m.active: expected text, got 5",
    ] == sorted(problems("extends: base.toml\nmodels: {m: {active: 5}}"), reverse=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: {}", "a.yaml:1: models: expected at least one, got {}"),
        ("version: 1", "a.yaml:1: the recipe: expected 'models', got no such key"),
        ("models: [a]", "a.yaml:1: models: expected a mapping, got ['a']"),
        ("models: {m: {}}", "a.yaml:1: models.m: expected rules or adapters, got neither"),
        (
            "version: 0\nmodels: {m: {rules: [{operation: g}]}}",
            "a.yaml:1: version: expected at least 1, got 0",
        ),
        (
            "version: '1'\nmodels: {m: {rules: [{operation: g}]}}",
            "a.yaml:1: version: expected a whole number, got '1'",
        ),
        (
            "models: {m: {rules: [{operation: g}]}}\nrules: []",
            "a.yaml:2: the recipe: unknown key 'rules': expected one of 'version', 'models', "
            "'extends', 'variables'",
        ),
    ],
)
def test_a_recipe_must_have_models_with_something_to_do(problems, text, expected):
    assert [expected] == problems(text)


ADAPTERS = "models:\n  m:\n    adapters: {one: {operation: g}, two: {operation: g}}\n"


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        ("", ["a.yaml:3: models.m.adapters: expected active to say which of 'one', 'two'"]),
        (
            "    active: three",
            ["a.yaml:4: models.m.active: no adapter 'three': expected one of 'one', 'two'"],
        ),
        (
            "\n    active: {tow: 1, one: 2, three: 3}",
            [
                "a.yaml:5: models.m.active: no adapter 'tow': did you mean 'two'?",
                "a.yaml:5: models.m.active: no adapter 'three': expected one of 'one', 'two'",
            ],
        ),
        (
            "    active: {}",
            ["a.yaml:4: models.m.active: expected an adapter, or several with weights, got none"],
        ),
        ("    active: [one]", ["a.yaml:4: models.m.active: expected text, got ['one']"]),
        ("    active: true", ["a.yaml:4: models.m.active: expected text, got True"]),
        (
            "    active:\n      one: 1\n      two: null",
            ["a.yaml:6: models.m.active.two: expected a number, got None"],
        ),
    ],
)
def test_active_names_adapters_of_the_model(problems, active, expected):
    assert expected == problems(ADAPTERS + active)


def test_a_model_without_adapters_has_none_to_be_active(problems):
    text = "models: {m: {rules: [{operation: g}], active: a}}"

    assert ["a.yaml:1: models.m.active: no adapter 'a': expected one of nothing"] == problems(text)


def test_an_adapter_is_one_operation_or_several_rules(problems):
    assert [
        "a.yaml:4: models.m.adapters.neither: expected either operation or rules, got neither",
        "a.yaml:5: models.m.adapters.str: expected either operation or rules, got neither",
        "a.yaml:6: models.m.adapters.both: expected either operation or rules, got both",
        "a.yaml:8: models.m.adapters.more.options: expected no options beside rules",
        "a.yaml:9: models.m.adapters.more.optional: expected no optional beside rules",
        "a.yaml:10: models.m.adapters.more.source: expected no source beside rules",
    ] == problems(
        "models:\n"
        "  m:\n"
        "    adapters:\n"
        "      neither: {options: {}}\n"
        "      str: {rules: []}\n"
        "      both: {operation: g, rules: [{operation: h}]}\n"
        "      more:\n"
        "        options: {a: 1}\n"
        "        optional: true\n"
        "        source: x\n"
        "        rules: [{operation: g}]\n"
        "    active: both\n"
    )


NAME = (
    "expected a name that a folder can have: not empty, without '/', '\\', ':', control characters "
    "and a dot at its beginning"
)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("", "''"),
        ("a/b", "a/b"),
        ("a\\b", "a\\b"),
        (".a", "'.a'"),
        ("..", "'..'"),
        ("a:b", "a:b"),
        ("a\n", "'a\\n'"),
        ("a\x00b", "'a\\x00b'"),
    ],
)
def test_names_must_be_those_of_folders(problems, name, shown):
    """A record of each model is kept in a folder, and so may adapters be."""
    rule = {"operation": "g"}
    text = json.dumps({"models": {name: {"adapters": {name: rule}}}}, indent=0)

    lines = [line.split(":", 2)[-1] for line in problems(text, "a.json")]

    assert [f" models.{shown}: {NAME}", f" models.{shown}.adapters.{shown}: {NAME}"] == lines


def test_no_adapter_is_called_as_the_rules_are(problems):
    text = "models:\n  rules:\n    adapters:\n      rules: {operation: g}\n"

    expected = "expected another name: this one stands for the model's rules"
    assert [f"a.yaml:4: models.rules.adapters.rules: {expected}"] == problems(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[]", "expected a selector or several, as text, got []"),
        ("[a, 5]", "expected a selector or several, as text, got ['a', 5]"),
        ("5", "expected a selector or several, as text, got 5"),
        ("{a: b}", "expected a selector or several, as text, got {'a': 'b'}"),
        (
            "[a, 'class:b']",
            "Selector 'class:b' is malformed. Write 'class:package.module:ClassName'.",
        ),
    ],
)
def test_selectors_are_one_or_several(problems, value, expected):
    text = f"models: {{m: {{rules: [{{operation: g, select: {value}}}]}}}}"

    assert [f"a.yaml:1: models.m.rules[0].select: {expected}"] == problems(text)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (
            "layers.{2}",
            "Selector 'layers.{2}' is malformed: expected ranges as {a..b}, got 'layers.{2}' "
            "besides them. Write for example 'layers.{-8..}.self_attn'.",
        ),
        (
            "regex:(a",
            "Selector 'regex:(a' is malformed: missing ), unterminated subpattern at position 0.",
        ),
        (
            "regex:a{99999999999999999999}",
            "Selector 'regex:a{99999999999999999999}' is malformed: the repetition number is too "
            "large.",
        ),
        (
            "class:torch.nn.Linear",
            "Selector 'class:torch.nn.Linear' is malformed. Write "
            "'class:package.module:ClassName'.",
        ),
        (
            "class::Linear",
            "Selector 'class::Linear' is malformed. Write 'class:package.module:ClassName'.",
        ),
    ],
)
@pytest.mark.parametrize("key", ["select", "exclude"])
def test_malformed_selectors_are_refused_with_their_line(problems, key, selector, expected):
    text = f"\n        {key}: '{selector}'\n"

    assert [
        f"a.yaml:5: models.m.rules[0].{key}: {expected}",
        f"a.yaml:8: models.m.adapters.a.{key}: {expected}",
    ] == problems(
        f"models:\n  m:\n    rules:\n      - operation: g{text}"
        f"    adapters:\n      a:{text}        operation: g"
    )


def test_plain_data_is_a_recipe_or_refused_without_lines():
    assert Recipe(models={"m": recipe()}) == parse_recipe({"models": {"m": RECIPE}})
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"models": {"m": {"adapters": {"a/b": {"operation": "g"}}}}, "x": 1})
    assert [
        f"models.m.adapters.a/b: {NAME}",
        "the recipe: unknown key 'x': expected one of 'version', 'models', 'extends', 'variables'",
    ] == list(caught.value.problems)
