"""The command line on records: verified, shown, compared, made of other formats and written in them."""

import json
from pathlib import Path

import pytest
import torch
from core.cli_toys import PLUGIN, RECIPE, cells, error, invoke, make, write
from core.toys import Net, example, session

from surgery_core import ModelRecipe, read_record
from surgery_core.record import TENSORS_FILE


@pytest.fixture(autouse=True)
def _toys(install, tmp_path, monkeypatch):
    install("toy", PLUGIN, attribute="plugin")
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)


@pytest.fixture
def records():
    """Return a folder with the records of the recipe's models."""
    assert 0 == invoke("apply", "recipe.yaml", "--allow-code", "--out", "records").exit_code
    return Path("records")


def test_verify_replays_records_and_chooses_checks(records):
    one = invoke("verify", records / "chat", "--tier", "structure", "--json")
    all_of_them = invoke(
        "verify", records, "--allow-code", "--tier", "revert", "--tier", "structure", "--json"
    )

    assert (0, 0) == (one.exit_code, all_of_them.exit_code)
    found = json.loads(one.stdout)["models"]
    assert {"model": {"structure"}} == {
        name: {check["tier"] for check in part["checks"]} for name, part in found.items()
    }
    found = json.loads(all_of_them.stdout)["models"]
    assert ["chat", "code"] == list(found)
    tiers = [check["tier"] for check in found["chat"]["checks"]]
    assert ["revert", "revert", "structure", "structure", "structure"] == tiers


@pytest.mark.filterwarnings("default::surgery_core.SurgeryWarning")
def test_a_record_is_verified_on_another_base_with_a_warning(records):
    result = invoke("verify", records / "chat", "--model", "core.cli_toys:unnamed")

    assert 0 == result.exit_code, result.output
    assert result.stderr.startswith(
        "warning: Record 'records/chat' was made of a model with other values: "
    )
    assert 1 == len(result.stderr.splitlines())


def test_a_record_of_another_model_is_an_error(records):
    found = error(invoke("verify", records / "chat", "--model", "model=core.bad_toys:Other"))
    assert "cannot be imported" in found
    found = error(invoke("verify", records / "chat", "--model", "torch.nn:Identity"))
    assert found.startswith("error: Record 'records/chat' is of another model: at '' expected ")


def test_a_record_whose_model_has_no_source_needs_one(tmp_path):
    recipe = ModelRecipe.model_validate({"rules": [{"operation": "shift", "select": "head"}]})
    known = session()
    known.save(known.plan_recipe(make(), recipe).apply(), tmp_path / "record")

    found = error(invoke("verify", "record"))

    assert (
        "error: Model 'model' has no source: expected one in the recipe, or --model model=source. "
        "Add it.\n  in models.model\n"
    ) == found
    assert 0 == invoke("verify", "record", "--model", "net").exit_code


def test_a_record_has_no_variables(records):
    expected = (
        "error: Variables are for recipes: expected none for the record 'records/chat'. Leave them "
        "out.\n"
    )
    assert expected == error(invoke("verify", records / "chat", "--var", "layers=1"))


@pytest.mark.parametrize("command", ["verify", "apply", "diff"])
def test_what_is_neither_a_recipe_nor_a_record_is_an_error(command):
    write("", "a.txt")
    more = {"apply": ["--out", "out"], "diff": ["recipe.yaml"]}.get(command, [])

    file = error(invoke(command, "a.txt", *more))
    nothing = error(invoke(command, "nowhere", *more))

    assert (
        "error: Source 'a.txt' is neither a recipe nor a record: expected a folder, or a file with "
        "a suffix of '.yaml', '.yml', '.toml', '.json'.\n"
    ) == file
    assert (
        "error: Folder 'nowhere' has no record: expected 'surgery.safetensors' in it. Pass a folder that "
        "a record was saved to.\n"
    ) == nothing


def test_show_prints_a_record_or_those_of_a_folder(records):
    one, several = invoke("show", records / "code"), invoke("show", records)

    assert (0, 0) == (one.exit_code, several.exit_code)
    assert "Record in 'records/code' of core.cli_toys:unnamed" == one.stdout.splitlines()[0]
    assert ["shifted", "shift", "1", "1", "4", "16", "float32"] == cells(one.stdout)[1]
    assert "Operations: shift: toy 1.0." == one.stdout.splitlines()[-1]
    assert several.stdout.endswith(one.stdout)
    assert ["narrow", "gate", "1", "1", "1", "4", "float32"] in cells(several.stdout)


def test_show_prints_records_as_json(records):
    one = json.loads(invoke("show", records / "code", "--json").stdout)
    several = json.loads(invoke("show", records, "--json").stdout)

    assert {"shifted": {"modules": 1, "values": 4}} == one["adapters"]
    assert "core.cli_toys:unnamed" == one["recipe"]["source"]
    assert ["chat", "code"] == list(several["models"])
    assert one == several["models"]["code"]


def test_a_damaged_record_is_an_error(records):
    (records / "chat" / TENSORS_FILE).write_text("{")

    for command in (["show", records / "chat"], ["show", records], ["verify", records]):
        said = error(invoke(*command))
        assert said.startswith("error: Record 'records/chat/surgery.safetensors' is damaged")


def test_folders_that_begin_with_a_dot_are_no_records(records):
    (records / "code").rename(records / ".code")

    assert ["chat"] == list(json.loads(invoke("show", records, "--json").stdout)["models"])


def test_diff_of_equal_things_says_so_and_exits_with_0(records):
    for pair in (["recipe.yaml", "recipe.yaml"], [records, records], [records / "chat"] * 2):
        result = invoke("diff", *pair)
        assert (0, "No differences.\n") == (result.exit_code, result.stdout)
    assert (0, []) == (
        invoke("diff", *pair).exit_code,
        json.loads(invoke("diff", *pair, "--json").stdout),
    )


def test_diff_is_a_table_and_exits_with_2():
    other = write(
        RECIPE.replace("active: narrow", "active: wide").replace("    source: ./net\n", "")
    )

    result = invoke("diff", "recipe.yaml", other)
    as_json = invoke("diff", "recipe.yaml", other, "--json")

    assert (2, 2) == (result.exit_code, as_json.exit_code)
    assert "recipe.yaml -> other.yaml" == result.stdout.splitlines()[0]
    assert [
        ["", "what", "before", "after"],
        ["-", "models.chat.source", "'./net'", "-"],
        ["~", "models.chat.active", "'narrow'", "'wide'"],
    ] == cells(result.stdout)
    assert {
        "sign": "~",
        "place": "models.chat.active",
        "before": "'narrow'",
        "after": "'wide'",
    } == json.loads(as_json.stdout)[1]


def test_diff_takes_variables_for_both():
    other = write(RECIPE.replace('"0..1"', '"0..2"'))

    assert 2 == invoke("diff", "recipe.yaml", other).exit_code
    assert 0 == invoke("diff", "recipe.yaml", other, "--var", "layers=1..").exit_code


def test_diff_of_records_shows_tensors(records):
    model = make()
    known = session()
    found = known.load(model, records / "chat")
    with torch.no_grad():
        found.tensors("narrow")["layers.0.up.gate"].fill_(2.0)
    known.save(found, "later")

    result = invoke("diff", records / "chat", "later")

    assert 2 == result.exit_code
    assert [
        "~",
        "model: narrow: layers.0.up.gate",
        "norm 0",
        "norm 2, differs by at most 2.0e+00",
    ] == cells(result.stdout)[1]


def test_diff_of_a_recipe_and_a_record_takes_their_model_for_the_same(records):
    """A record's model has no name, and its source is absolute."""
    only_chat = write(RECIPE[: RECIPE.index("  code:")])

    assert 0 == invoke("diff", only_chat, records / "chat").exit_code
    assert 0 == invoke("diff", records / "chat", only_chat).exit_code
    assert 0 == invoke("diff", "recipe.yaml", records).exit_code
    assert 2 == invoke("diff", "recipe.yaml", records / "chat").exit_code


@pytest.fixture
def gates():
    """Return a folder with an adapter in the format of its operation."""
    Path("gates").mkdir()
    data = {"options": {"value": 0.25}, "gates": {"head.gate": [0.5]}}
    Path("gates/gates.json").write_text(json.dumps(data))
    return Path("gates")


IMPORT = ("--operation", "savable", "--model", "net", "--out", "record")


def imported(gates, *more):
    """Import the adapter; that it is of one module is for its operation to say."""
    return invoke("import", gates, *IMPORT, *more)


def test_import_makes_a_record_and_export_writes_it_as_it_was(gates, tmp_path):
    data = {"gates": {f"{fqn}.gate": [0.5] for fqn in linears()}, "options": {"value": 0.25}}
    (gates / "gates.json").write_text(json.dumps(data))
    Path("net").mkdir()

    result = imported(gates, "--name", "open", "-o", "value=0.75")
    record = read_record("record")

    assert (0, "Adapter 'open' is recorded in 'record'.\n") == (result.exit_code, result.stdout)
    assert {"value": 0.75} == record.recipe.adapters["open"].options
    assert {"head.gate": 0.5}.items() <= {
        key: float(tensor) for key, tensor in record.state["open"].items()
    }.items()
    # Wherever the record is read from.
    assert f"{tmp_path}/net" == record.recipe.source

    result = invoke("export", "record", "--out", "again")
    assert (0, "Adapter 'open' is written to 'again'.\n") == (result.exit_code, result.stdout)
    again = json.loads(Path("again/gates.json").read_text())
    assert {**data, "options": {"value": 0.75}} == again


def linears():
    return [fqn for fqn, module in Net().named_modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["nowhere"],
            "error: Operation 'savable' cannot read 'nowhere': expected a saved adapter in a "
            "format it knows. Fix the path.\n  in models.model.adapters.default\n",
        ),
        (
            ["gates", "--name", "a/b"],
            "error: models.model.adapters.a/b: expected a name that a folder can have: not empty, "
            "without '/', '\\', ':', control characters and a dot at its beginning\n",
        ),
        (
            ["gates", "-o", "valeu=1"],
            "error: Operation 'savable' does not know ['valeu'].\n"
            "  in models.model.adapters.default\n",
        ),
        (
            ["gates", "-o", "value"],
            "error: Option 'value' is malformed: expected key=value.\n",
        ),
    ],
)
@pytest.mark.usefixtures("gates")
def test_what_cannot_be_imported_is_an_error_and_makes_no_record(arguments, expected):
    result = invoke("import", *arguments, *IMPORT)

    assert expected == error(result)
    assert not Path("record").exists()


def test_tensors_that_do_not_fit_are_not_imported(gates):
    assert error(imported(gates)).startswith("error: Tensors do not fit 'default': missing ")
    assert not Path("record").exists()


@pytest.mark.parametrize(
    ("record", "more", "expected"),
    [
        (
            "records/chat",
            [],
            "Record 'records/chat' has the adapters 'wide', 'narrow': expected the name of one, got "
            "None. Pass --adapter.",
        ),
        (
            "records/chat",
            ["--adapter", "wdie"],
            "Record 'records/chat' has the adapters 'wide', 'narrow': expected the name of one, got "
            "'wdie'. Pass --adapter.",
        ),
        (
            "records/chat",
            ["--adapter", ""],
            "Record 'records/chat' has the adapters 'wide', 'narrow': expected the name of one, got "
            "''. Pass --adapter.",
        ),
        (
            "records/code",
            ["--allow-code"],
            "Operation 'shift' has no format of its own to write to 'exported': expected one. Keep "
            "the record.",
        ),
        (
            "records",
            [],
            "Source 'records' is no record: expected a folder with 'surgery.safetensors'.",
        ),
        (
            "recipe.yaml",
            [],
            "Source 'recipe.yaml' is no record: expected a folder with 'surgery.safetensors'.",
        ),
    ],
)
@pytest.mark.usefixtures("records")
def test_what_cannot_be_exported_is_an_error(record, more, expected):
    result = invoke("export", record, "--out", "exported", *more)

    assert f"error: {expected}\n" == error(result)
    assert not Path("exported").exists()


def test_what_was_applied_computes_what_the_record_says(records):
    """The record is of the very model that the source gives."""
    model = make()
    expected = model(example())

    found = session().load(model, records / "chat", base_check="error")

    assert torch.equal(expected, found.model(example()))
