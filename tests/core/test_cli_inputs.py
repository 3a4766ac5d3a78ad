"""What the command line is given: pairs, options, sources, records, and what is compared with what."""

from pathlib import Path

import pytest
from core.edits import edited
from core.toys import session

from surgery_core import OptionsError, Recipe, RecordError, read_record
from surgery_core.cli_inputs import (
    ONLY_MODEL,
    Target,
    absolute,
    aligned,
    is_recipe,
    options_of,
    pairs,
    read_target,
    record_folders,
    with_sources,
)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe_of(**sources):
    rule = {"operation": "shift", "select": "head"}
    return Recipe.model_validate(
        {"models": {name: {"source": s, "rules": [rule]} for name, s in sources.items()}}
    )


def test_pairs_are_split_at_the_first_sign():
    assert {"a": "1", "b": "c=d", "e": ""} == pairs(["a=0", "b=c=d", "e=", "a=1"], "Option")


def test_what_is_no_pair_is_refused():
    with pytest.raises(OptionsError, match=r"\AVariable 'a' is malformed: expected key=value.\Z"):
        pairs(["a"], "Variable")


def test_options_are_json_where_they_are_and_text_otherwise():
    deep = "[" * 100_000
    texts = ["a=1", "b=[1, null]", 'c="1"', "d=x y", "e=1e-3", "f=True", f"g={deep}", "h=~"]

    assert {
        "a": 1,
        "b": [1, None],
        "c": "1",
        "d": "x y",
        "e": 0.001,
        "f": "True",
        "g": deep,
        "h": "~",
    } == options_of(texts)


@pytest.mark.parametrize("name", ["a.yaml", "b/a.yml", "a.TOML", "a.json"])
def test_recipes_are_known_by_their_suffix(name):
    assert is_recipe(name)
    assert not is_recipe(f"{name}.txt")
    assert not is_recipe(Path(name).stem)


def test_paths_become_absolute_and_other_sources_stay(tmp_path):
    Path("here").mkdir()

    assert {
        "here": f"{tmp_path}/here",
        "./there": f"{tmp_path}/there",
        "../there": f"{tmp_path.parent}/there",
        "there": "there",
        "org/model": "org/model",
        "package.module:factory": "package.module:factory",
        "/there": "/there",
    } == {
        source: absolute(source)
        for source in (
            *("here", "./there", "../there", "there", "org/model", "package.module:factory"),
            "/there",
        )
    }


def test_sources_replace_those_of_the_recipe(tmp_path):
    recipe = recipe_of(a="x", b="y")

    found = with_sources(recipe, ["b=./z", "a=k=v"])

    assert ["k=v", f"{tmp_path}/z"] == [part.source for part in found.models.values()]
    assert ["x", "y"] == [part.source for part in recipe.models.values()]
    assert "z" == with_sources(recipe_of(a="x"), ["z"]).models["a"].source


@pytest.mark.parametrize("text", ["c=x", "x", "a=", "=x", ""])
def test_sources_name_a_model_of_the_recipe(text):
    with pytest.raises(OptionsError) as caught:
        with_sources(recipe_of(a="x", b="y"), [text])

    assert str(caught.value) == (
        f"Model {text!r} is malformed: expected name=source, the name being one of 'a', 'b'."
    )


def test_a_source_is_resolved_and_missing_if_nobody_said(tmp_path):
    target = Target(recipe=recipe_of(a="./x", b=None), records={})

    assert f"{tmp_path}/x" == target.source("a")
    with pytest.raises(OptionsError) as caught:
        target.source("b")
    assert str(caught.value) == (
        "Model 'b' has no source: expected one in the recipe, or --model b=source. Add it."
    )
    assert ["models.b"] == caught.value.__notes__


@pytest.fixture
def records():
    """Return a folder with two records, and things that are none."""
    for name in ("one", "two", ".hidden"):
        session().save(edited(source="./net"), Path("records") / name)
    Path("records/empty").mkdir()
    Path("records/file").touch()
    return "records"


def test_folders_with_records_are_found_by_name(records):
    assert {name: Path(records) / name for name in ("one", "two")} == record_folders(records)
    assert {} == record_folders("nowhere")
    assert {} == record_folders("records/file")


def test_a_record_is_a_recipe_with_one_model(records):
    target = read_target("records/one")

    assert [ONLY_MODEL] == list(target.recipe.models) == list(target.records)
    assert read_record("records/one").recipe == target.recipe.models[ONLY_MODEL]
    assert ["one", "two"] == list(read_target(records).recipe.models)
    assert "y" == read_target("records/one", models=["y"]).source(ONLY_MODEL)


@pytest.mark.parametrize("source", ["nowhere", "records/empty"])
@pytest.mark.usefixtures("records")
def test_a_folder_without_records_is_refused(source):
    with pytest.raises(RecordError, match=rf"\AFolder '{source}' has no record: "):
        read_target(source)


@pytest.mark.usefixtures("records")
def test_a_record_and_a_recipe_of_one_model_are_aligned(tmp_path):
    record = read_target("records/one")
    recipe = Target(recipe=recipe_of(chat="./net"), records={})

    assert ["chat"] == list(aligned(record, recipe).recipe.models)
    assert ["chat"] == list(aligned(record, recipe).records)
    assert f"{tmp_path}/net" == aligned(recipe, record).recipe.models["chat"].source
    assert (
        None
        is aligned(Target(recipe=recipe_of(a=None), records={}), record).recipe.models["a"].source
    )


def test_what_cannot_be_aligned_stays_as_it_is(records):
    record, several = read_target("records/one"), read_target(records)
    recipe = Target(recipe=recipe_of(a="x", b="y"), records={})

    assert record is aligned(record, recipe)
    assert several is aligned(several, Target(recipe=recipe_of(a="x"), records={}))
    assert record is aligned(record, several)
    assert recipe is aligned(recipe, recipe)
