"""The JSON Schema of recipes accepts what is accepted, and refuses what an editor should underline."""

import json

import pytest
import yaml
from core.schemas import misfits

from surgery_core.recipe_schema import recipe_schema

OPTIONS = {
    "gate": {
        "type": "object",
        "additionalProperties": False,
        "required": ["value"],
        "properties": {
            "value": {"type": "integer", "minimum": 1, "description": "How much."},
            "kind": {"enum": ["a", "b"]},
            "flags": {"type": "array", "items": {"type": "boolean"}},
            "note": {"type": ["string", "null"]},
            "type": {"const": 5, "title": "Type", "default": 5},
            "deep": {"anyOf": [{"type": "object", "properties": {"x": {"type": "number"}}}]},
        },
    },
    "shift": {"type": "object"},
}
SCHEMA = recipe_schema(OPTIONS)


def wrong(text):
    return misfits(SCHEMA, yaml.safe_load(text))


WHOLE = """
version: 1
variables: {length: 4, name: x, none: null, flag: true}
models:
  chat:
    source: ./llama
    freeze: false
    rules:
      - {operation: shift, select: head, exclude: a, expect: 1, optional: true, options: {x: 1}}
    adapters:
      french: {operation: gate, options: {value: 4, kind: a, flags: [true], note: null, type: 5}}
      formal:
        rules:
          - {operation: gate, options: {value: 1, deep: {x: 0.5}}}
      saved: {operation: gate, source: ./saved, options: {note: x}}
    active: {french: 0.5, formal: -2}
  other: {adapters: {a: {operation: shift}}, active: a}
"""


def test_a_recipe_fits():
    assert [] == wrong(WHOLE)


def test_variables_fit_wherever_a_value_does():
    assert [] == wrong("""
version: "${version}"
variables: {length: 4}
models:
  chat:
    source: ./${name}
    freeze: "${freeze}"
    rules:
      - {operation: "${operation}", expect: "${length}", optional: "${x}"}
    adapters:
      french:
        operation: gate
        options:
          value: "${length}"
          kind: "${kind}"
          flags: ["${flag}", true]
          type: "${env:TYPE}"
          deep: {x: "${x}"}
    active: {french: "${weight}"}
""")


@pytest.mark.parametrize(
    "text",
    [
        "extends: base.yaml",
        "extends: [a.yaml, b.toml]\nvariables: {n: 1}",
        "extends: a.yaml\nmodels: {m: {adapters: {a: {options: {value: 2}}}, active: a}}",
        "extends: a.yaml\nmodels: {m: {adapters: {a: {operation: gate, options: {kind: b}}}}}",
    ],
)
def test_what_extends_a_recipe_may_leave_out_what_that_says(text):
    assert [] == wrong(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", ["$: fits nothing"]),
        ("models: {}", ["$.models: too small"]),
        ("extends: []", ["$.extends: fits nothing"]),
        ("extends: a\nmodel: {}", ["$.model: nothing is allowed"]),
        ("extends: a\nversion: 2", ["$.version: fits nothing"]),
        (
            "extends: a\nvariables: {a: [1]}",
            ["$.variables.a: no string or number or boolean or null"],
        ),
        ("extends: a\nmodels: {a/b: {}}", ["$.models.a/b: does not match"]),
        ("extends: a\nmodels: {m: {frieze: 1}}", ["$.models.m.frieze: nothing is allowed"]),
        ("extends: a\nmodels: {m: {freeze: 1}}", ["$.models.m.freeze: fits nothing"]),
        ("extends: a\nmodels: {m: {active: [a]}}", ["$.models.m.active: fits nothing"]),
        (
            "extends: a\nmodels: {m: {adapters: {.a: {}, rules: {}}}}",
            [
                "$.models.m.adapters..a: does not match",
                "$.models.m.adapters.rules: is not allowed",
            ],
        ),
        (
            "extends: a\nmodels: {m: {rules: [{}, {operation: x}]}}",
            ["$.models.m.rules[0]: no operation", "$.models.m.rules[1].operation: fits nothing"],
        ),
        (
            "extends: a\nmodels: {m: {rules: [{operation: gate, options: {kind: a}}]}}",
            ["$.models.m.rules[0].options: no value"],
        ),
        (
            "extends: a\nmodels: {m: {adapters: {a: {operation: gate, options: {value: 0, x: 1}}}}}",
            [
                "$.models.m.adapters.a.options.value: fits nothing",
                "$.models.m.adapters.a.options.x: nothing is allowed",
            ],
        ),
        (
            "extends: a\nmodels: {m: {rules: [{operation: gate, options: {value: 1, kind: c}}]}}",
            ["$.models.m.rules[0].options.kind: fits nothing"],
        ),
    ],
)
def test_what_is_wrong_does_not_fit(text, expected):
    assert expected == wrong(text)


def test_what_editors_show_stays_where_they_look_for_it():
    found = SCHEMA["$defs"]["RuleRecipe"]["allOf"][0]["then"]["properties"]["options"]

    assert "How much." == found["properties"]["value"]["description"]
    assert ("Type", 5) == tuple(found["properties"]["type"][key] for key in ("title", "default"))
    assert "https://json-schema.org/draft/2020-12/schema" == SCHEMA["$schema"]


def test_the_schemas_of_operations_are_left_as_they_are():
    before = json.dumps(OPTIONS)

    recipe_schema(OPTIONS)

    assert before == json.dumps(OPTIONS)


def test_without_operations_there_is_a_schema_all_the_same():
    found = recipe_schema({})

    assert [] == misfits(found, {"extends": "a"})
    assert misfits(found, {"models": {"m": {"rules": [{"operation": "gate"}]}}})
