"""Nothing that is read is executed, and no module is imported because a file names it."""

import pathlib
import pickle
import sys

import pytest
import torch
from fuzz.bombs import Call
from fuzz.readers import READERS, adapted
from surgery_adaption_prompt.sources import load_model, load_skeleton
from typer.testing import CliRunner

from surgery_core import ModelRecipe, Session, SurgeryError, VariantError, load_recipe
from surgery_core.cli import app

PICKLES = {
    "llama_adapter": "adapter.pth",
    "litgpt": "a.pth",
    "scale_shift": "a.pth",
    "adapter.bin": "adapter_model.bin",
}


def written(name, folder):
    """Write a reader's valid files to a folder."""
    for path, data in READERS[name].files().items():
        (folder / path).write_bytes(data)
    return READERS[name], folder


def touching(form, path, sentinel):
    """Write a file that makes another when it is unpickled."""
    call = Call(pathlib.Path.touch, sentinel)
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"model": call}))
        return
    torch.save({"a": torch.zeros(1), "b": call}, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "before 1.6", "bare pickle"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_not_run(name, form, tmp_path):
    (tmp_path / "in").mkdir()
    reader, folder = written(name, tmp_path / "in")
    sentinel = tmp_path / "ran"
    touching(form, folder / PICKLES[name], sentinel)

    with pytest.raises(SurgeryError):
        reader.read(folder, None if reader.make is None else reader.make())

    assert not sentinel.exists()
    # And it would have been made.
    if form == "bare pickle":
        pickle.loads((folder / PICKLES[name]).read_bytes())
        assert sentinel.exists()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:pathlib.Path.touch ['{path}']",
        "!!python/object/new:pathlib.Path ['{path}']",
        "!!python/module:not_imported",
        "!!python/name:not_imported.x",
        "!!python/object/apply:importlib.import_module [not_imported]",
    ],
)
def test_tags_of_yaml_are_not_obeyed(value, tmp_path, not_imported):
    (tmp_path / "r.yaml").write_text(f"models: {value.format(path=not_imported)}")

    with pytest.raises(SurgeryError):
        load_recipe(tmp_path / "r.yaml")

    assert not not_imported.exists()


@pytest.fixture
def not_imported(tmp_path, monkeypatch):
    """Return a file that exists once a module, which can be imported, was."""
    sentinel = tmp_path / "imported"
    (tmp_path / "not_imported.py").write_text(
        f"import pathlib\npathlib.Path({str(sentinel)!r}).touch()\n\n\ndef make():\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield sentinel
    sys.modules.pop("not_imported", None)


RECIPE = "models: {m: {source: 'not_imported:make', rules: [{operation: low_rank, select: %s}]}}\n"


def test_selectors_and_sources_are_not_imported_when_a_recipe_is_read(tmp_path, not_imported):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % "'class:not_imported:Linear'")

    recipe = load_recipe(path)

    reader = READERS["low_rank"]
    with pytest.raises(SurgeryError, match="which is not imported"):
        Session().plan_recipe(reader.make(), recipe)
    assert not not_imported.exists()


def test_a_record_imports_nothing(tmp_path, not_imported):
    reader, folder = written("low_rank_record", tmp_path)
    path = folder / "surgery.json"
    text = path.read_text()
    assert '"layers.*.up"' in text
    path.write_text(text.replace('"layers.*.up"', '"class:not_imported:Linear"'))

    with pytest.raises(SurgeryError, match="which is not imported"):
        reader.read(folder, reader.make())

    assert not not_imported.exists()


def test_the_command_line_calls_the_source_of_a_recipe(tmp_path, not_imported):
    """That is what a source with a colon is for: such a recipe is code."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % "'**.up'")

    result = CliRunner().invoke(app, ["plan", str(path)])

    assert result.exit_code == 1
    assert "gives no model" in result.stderr
    assert not_imported.exists()


def test_a_source_of_ones_own_keeps_that_of_a_recipe_from_being_called(tmp_path, not_imported):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % "'**.up'")

    result = CliRunner().invoke(app, ["plan", str(path), "--model", "m=core.cli_toys:unnamed"])

    assert result.exit_code == 2, result.stderr
    assert not not_imported.exists()


def test_commands_that_need_no_model_call_no_source(tmp_path, not_imported):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % "'**.up'")

    assert CliRunner().invoke(app, ["diff", str(path), str(path)]).exit_code == 0
    assert not not_imported.exists()


@pytest.mark.parametrize("load", [load_skeleton, load_model])
def test_code_beside_a_model_is_not_run(load, tmp_path, not_imported):
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "architectures": ["Own"], "auto_map": {'
        '"AutoConfig": "not_imported.Config", "AutoModelForCausalLM": "not_imported.Own"}}'
    )

    with pytest.raises(SurgeryError, match="cannot be loaded"):
        load(str(tmp_path))

    assert not not_imported.exists()


def test_pickled_weights_of_a_model_are_not_run(tmp_path):
    model = READERS["llama_adapter"].make()
    model.config.save_pretrained(tmp_path)
    sentinel = tmp_path / "ran"
    touching("zip", tmp_path / "pytorch_model.bin", sentinel)

    with pytest.raises(SurgeryError, match="cannot be loaded"):
        load_model(str(tmp_path))

    assert not sentinel.exists()


def test_names_cannot_leave_their_folder():
    for name in ("../x", "/x", "a/b", "a\\b", ".x", "", "a\x00b"):
        with pytest.raises(ValueError, match="expected a name that a folder can have"):
            ModelRecipe.model_validate({"adapters": {name: {"operation": "gate"}}})
    for name in ("../x", "/x", "a/b", ".x", "..", "", "a\x00b", "a\x1b[2J"):
        with pytest.raises(VariantError, match="cannot name a folder"):
            adapted().add_adapter(name, adapted().peft_config["own"])
