"""Names of adapters and models that could not be saved are refused when they are given."""

import pytest
from pydantic import ValidationError

from surgery_core import ModelRecipe, Recipe, can_name_folder, name_problem

UNSAVABLE = [
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("base_fingerprint.json", "ADAPTER_CONFIG.json", "surgery.safetensors", "README.md"),
    *("x" * 300, "\xe9" * 128, "x" * 256),
    *("fr.", "fr ", "con", "NUL", "aux.v1", "Com1", "lpt\xb9"),
]
TWINS = [
    *(("a", "A"), ("stra\xdfe", "STRASSE"), ("\xe9t\xe9", "e\u0301te\u0301")),
    ("\u212bngstr\xf6m", "\xe5ngstr\xf6m"),
]


@pytest.mark.parametrize("name", UNSAVABLE)
def test_a_name_that_no_folder_can_have_everywhere_is_refused(name):
    assert name_problem(name) is not None
    for place, data in (
        ("adapters", {"adapters": {name: {"operation": "gate"}}}),
        ("models", {"models": {name: {"rules": [{"operation": "gate"}]}}}),
    ):
        kind = ModelRecipe if place == "adapters" else Recipe
        with pytest.raises(ValidationError, match="name cannot be saved: "):
            kind.model_validate(data)


@pytest.mark.parametrize("name", ["", ".a", "a/b", "a\\b", "a:b", "a\nb", "\ud800"])
def test_a_name_that_is_more_than_one_part_of_a_path_is_refused(name):
    assert not can_name_folder(name)
    with pytest.raises(ValidationError, match="expected a name that a folder can have"):
        ModelRecipe.model_validate({"adapters": {name: {"operation": "gate"}}})


@pytest.mark.parametrize("name", ["fr", "v1.2", "a b", "console", "com10", "x" * 255, "\u540d"])
def test_other_names_are_fine(name):
    assert can_name_folder(name)
    assert name_problem(name, ["other", name]) is None


@pytest.mark.parametrize(("one", "two"), TWINS)
def test_names_that_a_disk_may_take_for_the_same_are_refused(one, two):
    assert f"on some disks it is the same folder as {one!r}" == name_problem(two, ["x", one])
    adapters = {name: {"operation": "gate"} for name in (one, two)}
    with pytest.raises(ValidationError, match="on some disks it is the same folder as"):
        ModelRecipe.model_validate({"adapters": adapters, "active": one})
    models = {name: {"rules": [{"operation": "gate"}]} for name in (one, two)}
    with pytest.raises(ValidationError, match="on some disks it is the same folder as"):
        Recipe.model_validate({"models": models})
