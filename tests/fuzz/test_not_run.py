"""Nothing that is read is executed, and no module is imported because a file names it."""

import importlib
import json
import pathlib
import pickle
import re
import sys

import pytest
import torch
from fuzz.bombs import Call
from fuzz.readers import READERS, adapted
from support.trainable import make_tokenizer
from surgery_adaption_prompt.sources import load_model, load_skeleton
from typer.testing import CliRunner

from surgery_core import ModelRecipe, Plugins, Session, SurgeryError, VariantError, load_recipe
from surgery_core.cli import app, run, with_commands
from surgery_core.hookspecs import COMMANDS_GROUP

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


def test_the_command_line_calls_the_source_of_a_recipe_that_it_is_told_to_trust(
    tmp_path, not_imported
):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % "'**.up'")

    result = CliRunner().invoke(app, ["plan", str(path), "--allow-code"])

    assert result.exit_code == 1
    assert "gives no model" in result.stderr
    assert not_imported.exists()


def told(*arguments):
    """Run the command line with the commands of plugins."""
    commands = with_commands(Plugins(group=COMMANDS_GROUP))
    return CliRunner().invoke(commands, [*map(str, arguments)])


def recorded(folder):
    """Write a valid record whose model comes from a module."""
    folder.mkdir()
    _, folder = written("low_rank_record", folder)
    path = folder / "surgery.json"
    data = json.loads(path.read_text())
    data["recipe"]["source"] = "not_imported:make"
    path.write_text(json.dumps(data))
    return folder


RUNS = {
    "plan": ["plan", "recipe.yaml"],
    "plan as JSON": ["plan", "recipe.yaml", "--json"],
    "apply": ["apply", "recipe.yaml", "--out", "out"],
    "verify": ["verify", "recipe.yaml"],
    "verify a record": ["verify", "record"],
    "verify records": ["verify", "."],
    "export": ["export", "record", "--out", "out"],
    "train": ["train", "recipe.yaml", "training.yaml", "--out", "out"],
    "generate": ["generate", "recipe.yaml", "--prompt", "x", "--tokenizer", "tokenizer"],
    "generate with a record": ["generate", "record", "--prompt", "x", "--tokenizer", "tokenizer"],
    "eval": ["eval", "record", "--data", "data.jsonl", "--tokenizer", "tokenizer"],
}
IN_RECIPE = "recipe.yaml:4: models.m.source names 'not_imported:make', which is code: the module "
IN_RECORD = "Record 'record' names 'not_imported:make', which is code: the module "


@pytest.fixture
def files(tmp_path, monkeypatch, not_imported):
    """Write what commands work with to the working directory, and return what must not be there."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    text = "models:\n  m:\n    rules: [{operation: low_rank, select: '**.up'}]\n"
    pathlib.Path("recipe.yaml").write_text(f"{text}    source: not_imported:make\n")
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    pathlib.Path("data.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    pathlib.Path("training.yaml").write_text(
        "data: {train: data.jsonl}\nmax_steps: 1\ntokenizer: ./tokenizer\n"
    )
    make_tokenizer().save_pretrained("tokenizer")
    recorded(pathlib.Path("record"))
    return not_imported


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.slow if name == "train" else ()) for name in RUNS],
)
def test_code_that_a_file_names_is_run_only_if_it_is_allowed(command, files):
    refused = told(*RUNS[command])

    assert (1, "") == (refused.exit_code, refused.stdout)
    problem = [line for line in refused.stderr.splitlines() if "which is code" in line]
    where = IN_RECORD if "record" in RUNS[command] or "." in RUNS[command] else IN_RECIPE
    assert 1 == len(problem), refused.stderr
    assert problem[0].startswith(f"error: {where}")
    assert "pass --allow-code, or allow_code=True to Session" in problem[0]
    assert not files.exists()
    assert not pathlib.Path("out/m").exists()

    allowed = told(*RUNS[command], "--allow-code")

    assert 1 == allowed.exit_code
    assert "Source 'not_imported:make' gives no model" in allowed.stderr
    assert files.exists()


@pytest.mark.parametrize("arguments", [["show", "record"], ["diff", "recipe.yaml", "record"]])
def test_what_only_reads_runs_no_code(arguments, files):
    assert told(*arguments).exit_code in (0, 2)
    assert not files.exists()


def test_a_session_runs_code_that_a_recipe_names_only_if_it_is_allowed(files):
    recipe = load_recipe("recipe.yaml")

    for weights in (True, False):
        with pytest.raises(SurgeryError, match=re.escape(IN_RECIPE)):
            Session().load_model(recipe, weights=weights)
    assert not files.exists()
    with pytest.raises(SurgeryError, match="gives no model"):
        Session(allow_code=True).load_model(recipe)
    assert files.exists()


def test_code_that_is_imported_already_is_not_called(files):
    """Calling it is running it, too."""
    module = importlib.import_module("not_imported")
    module.make = lambda: pytest.fail("was called")

    assert 1 == told("plan", "recipe.yaml").exit_code
    assert files.exists()


def test_variables_are_no_way_around(files, monkeypatch):
    monkeypatch.setenv("FACTORY", "not_imported:make")
    text = pathlib.Path("recipe.yaml").read_text()
    pathlib.Path("recipe.yaml").write_text(text.replace("not_imported:make", "${env:FACTORY}"))

    result = told("plan", "recipe.yaml")

    assert "models.m.source names '${env:FACTORY}', which is code" in result.stderr
    assert not files.exists()


def test_the_working_directory_is_not_looked_at_unless_code_in_it_is_asked_for(monkeypatch, files):
    """Packages that are installed look for others, which are optional to them."""
    monkeypatch.setattr(sys, "argv", ["surgery", "plan", "recipe.yaml"])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(pathlib.Path.cwd())])

    with pytest.raises(SystemExit) as caught:
        run()

    assert 1 == caught.value.code
    assert str(pathlib.Path.cwd()) not in sys.path
    assert not files.exists()


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


@pytest.mark.parametrize("load", [load_skeleton, load_model])
@pytest.mark.parametrize(
    "named",
    [
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "someone/kernel@main:forward"},
        {"attn_implementation": {"": "someone/kernel"}},
        {"vision_config": {"_attn_implementation": "paged|someone/kernel"}},
        {"_experts_implementation": "someone/kernel"},
    ],
)
def test_kernels_that_a_configuration_names_are_not_fetched(load, named, tmp_path, monkeypatch):
    """Where the package `kernels` is installed, transformers would import them."""
    READERS["llama_adapter"].make().config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    fetched = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched.append)

    with pytest.raises(SurgeryError, match=r"asks for code on the hub, '.*someone/kernel"):
        load(str(tmp_path))

    assert [] == fetched


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
