"""On any recipe: written and read it is the same. On any file: a recipe, or a RecipeError."""

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from core.schemas import misfits
from hypothesis import given
from hypothesis import strategies as st

from surgery_core import Recipe, RecipeError, dump_recipe, load_recipe
from surgery_core.documents import read_document, read_scalar, write_yaml
from surgery_core.names import name_problem
from surgery_core.recipe_document import escaped
from surgery_core.recipe_schema import recipe_schema

# Texts that mean something to YAML, to recipes or to both, among any others.
odd = st.sampled_from(
    ["", "no", "1e-3", "5", "null", "<<", "=", "~", "2024-01-01", "$", "$$", "${x}", "${", "a: b"]
)
texts = st.one_of(odd, st.text(max_size=12))
scalars = st.one_of(
    texts,
    st.integers(-(2**64) + 1, 2**64 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
names = st.text(min_size=1, max_size=8).filter(
    lambda name: (
        name.isprintable()
        and name[0] != "."
        and not set(name) & set("/\\:")
        and name_problem(name) is None
    )
)


def are_no_twins(found):
    """Tell whether no disk takes two of the names for the same."""
    return all(name_problem(name, found) is None for name in found)


one_selector = st.sampled_from(
    ["", "a.b", "**.up", "layers.{-2..}", "regex:.*up$", "regex:^a$$", "class:torch.nn:Linear"]
)
selectors = st.one_of(st.none(), one_selector, st.lists(one_selector, min_size=1, max_size=2))
parts = {
    "select": selectors,
    "exclude": selectors,
    "options": st.dictionaries(texts, values, max_size=3),
    "expect": st.one_of(st.none(), st.integers(0, 9)),
    "optional": st.booleans(),
}
rules = st.fixed_dictionaries({"operation": texts}, optional=parts)
adapters = st.one_of(
    st.fixed_dictionaries({"operation": texts}, optional={**parts, "source": texts}),
    st.fixed_dictionaries({"rules": st.lists(rules, min_size=1, max_size=2)}),
)


@st.composite
def models(draw):
    """Draw a model's part of a recipe."""
    part = draw(
        st.fixed_dictionaries(
            {
                "adapters": st.dictionaries(
                    names.filter(lambda n: n != "rules"), adapters, max_size=3
                ).filter(are_no_twins)
            },
            optional={
                "source": texts,
                "freeze": st.booleans(),
                "rules": st.lists(rules, max_size=2),
            },
        )
    )
    if not part["adapters"] and not part.get("rules"):
        part["rules"] = [draw(rules)]
    known = list(part["adapters"])
    weights = st.dictionaries(
        st.sampled_from(known or [""]), st.floats(-2, 2), min_size=1, max_size=3
    )
    if len(known) > 1 or (known and draw(st.booleans())):
        part["active"] = draw(st.one_of(st.sampled_from(known), weights))
    return part


recipes = (
    st.dictionaries(names, models(), min_size=1, max_size=2)
    .filter(are_no_twins)
    .map(lambda found: Recipe.model_validate({"models": found}))
)


def load(text, suffix):
    """Return the recipe that a file says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path)


@given(recipe=recipes)
def test_what_is_written_reads_as_the_same_and_is_written_as_the_same(recipe):
    text = dump_recipe(recipe)

    again = load(text, ".yaml")

    assert recipe == again
    assert text == dump_recipe(again)


@given(recipe=recipes)
def test_json_says_the_same(recipe):
    data = escaped(recipe.model_dump(mode="json"))

    assert recipe == load(json.dumps(data), ".json")


@given(recipe=recipes)
def test_what_is_a_recipe_fits_the_schema(recipe):
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    operations = {
        rule.operation: {"type": "object"}
        for part in recipe.models.values()
        for found in [*part.rules, *(r for a in part.adapters.values() for r in a.all_rules)]
        for rule in [found]
    }

    assert [] == misfits(recipe_schema(operations), data)


@given(data=st.dictionaries(texts, values, max_size=4))
def test_plain_data_survives_yaml(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_text(write_yaml(data), encoding="utf-8")

        found = read_document(path).data

    assert data == found
    assert repr(data) == repr(found)


# Pieces of the three formats: put together at random they are often almost a recipe.
pieces = st.sampled_from(
    [
        *("models", "rules", "adapters", "active", "operation", "options", "extends", "variables"),
        *(
            ": ",
            " = ",
            "\n",
            "\n  ",
            "\n    ",
            "\n- ",
            "{",
            "}",
            "[",
            "]",
            "[[",
            "]]",
            ",",
            ".",
            " ",
        ),
        *(
            '"',
            "'",
            '"""',
            "'''",
            "&a ",
            "*a",
            "<<: ",
            "!!",
            "!!int ",
            "!!binary ",
            "? ",
            "| ",
            "> ",
        ),
        *("${", "$$", "${a}", "a", "m", "no", "5", "-1e-3", ".nan", "1979-05-27", "null", "#", "%"),
        *("\\", "\\u", "\t", "\x00", "\x85", "\u2028", "\ufeff", "regex:(", "{0..", "class:x", "/"),
    ]
)
files = st.one_of(
    st.lists(pieces, max_size=20).map("".join).map(str.encode),
    st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")),
    st.binary(max_size=40),
    values.map(lambda value: yaml.safe_dump(value).encode(errors="surrogatepass")),
    values.map(lambda value: json.dumps({"models": value}).encode()),
    st.builds(
        lambda value, rule: json.dumps({"models": {"m": {"rules": [rule], "x": value}}}).encode(),
        values,
        rules,
    ),
)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of odd regular expressions
@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
@given(text=files)
def test_any_file_is_a_recipe_or_a_recipe_error(suffix, text):
    try:
        found = load(text, suffix)
    except RecipeError:
        return

    assert found == load(dump_recipe(found), ".yaml")


@given(
    recipe=recipes,
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.one_of(pieces, texts)), max_size=3),
)
def test_a_recipe_with_something_put_into_it_is_one_or_a_recipe_error(recipe, changes):
    text = dump_recipe(recipe)
    for place, piece in changes:
        at = place % (len(text) + 1)
        text = text[:at] + piece + text[at:]

    try:
        found = load(text.encode(errors="surrogatepass"), ".yaml")
    except RecipeError:
        return

    assert found == load(dump_recipe(found), ".yaml")


@given(text=st.one_of(texts, st.lists(pieces, max_size=4).map("".join)))
def test_any_text_of_a_command_line_is_a_value_or_a_value_error(text):
    try:
        found = read_scalar(text)
    except ValueError:
        assert text[0] in "\"'"
    else:
        assert isinstance(found, str | int | float | None)


@given(value=values)
def test_escaped_data_has_no_variables(value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        data = {"operation": "g", "options": {"x": escaped(value)}}
        path.write_text(json.dumps({"models": {"m": {"rules": [data]}}}), encoding="utf-8")

        found = load_recipe(path).models["m"].rules[0].options

    assert {"x": value} == found
