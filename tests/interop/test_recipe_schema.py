"""The schema that editors get knows the options of this plugin's operations."""

from pathlib import Path

import pytest
import yaml
from core.schemas import misfits
from surgery_adaption_prompt import plugin

from surgery_core import Session
from surgery_core.recipe_schema import recipe_schema

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "use-recipes.md"


@pytest.fixture(scope="module")
def schema():
    operations = Session([plugin], discover=False).plugins.operations
    return recipe_schema({name: found.options_schema() for name, found in operations.items()})


def adapter(**options):
    part = {"operation": "adaption_prompt", "options": options}
    return {"models": {"m": {"adapters": {"a": part}}}}


def test_the_recipe_of_the_guide_fits(schema):
    text = GUIDE.read_text().split('recipe_text = """')[1].split('"""')[0]

    assert [] == misfits(schema, yaml.safe_load(text))


def test_options_of_the_adaption_prompt_are_checked(schema):
    place = "$.models.m.adapters.a.options"

    assert [] == misfits(schema, adapter(adapter_len=10, adapter_layers="${layers}", gate="head"))
    assert [
        f"{place}.adapter_len: fits nothing",
        f"{place}.gate: fits nothing",
        f"{place}.adapter_lenght: nothing is allowed",
    ] == misfits(schema, adapter(adapter_len=0, gate="heads", adapter_lenght=1))


def test_the_other_operation_of_the_plugin_is_known_by_name(schema):
    rule = {"operation": "trainable_copy", "options": {"modules": ["lm_head"]}}

    assert [] == misfits(schema, {"models": {"m": {"rules": [rule]}}})
    assert misfits(schema, {"models": {"m": {"rules": [{**rule, "operation": "trainable"}]}}})
