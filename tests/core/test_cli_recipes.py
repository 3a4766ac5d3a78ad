"""The command line on recipes and records: what it prints, what it writes, and its exit status."""

import json
from pathlib import Path

import pytest
from core.cli_toys import PLUGIN, RECIPE, cells, error, invoke, write
from core.toys import Net, session

from surgery_core import load_recipe, read_record


@pytest.fixture(autouse=True)
def _toys(install, tmp_path, monkeypatch):
    install("toy", PLUGIN, attribute="plugin")
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)


def one_model(source="./net", operation="gate", name="m"):
    rule = f"{{operation: {operation}, select: layers.0.up}}"
    return f"models: {{{name}: {{source: {source}, adapters: {{a: {rule}}}}}}}\n"


def test_a_plan_is_a_table_for_each_model_and_exits_with_2(tmp_path):
    result = invoke("plan", "recipe.yaml", "--allow-code")

    assert 2 == result.exit_code
    recipe = load_recipe("recipe.yaml")
    tables = [session().plan_recipe(Net(), recipe, n).document.render() for n in ("chat", "code")]
    sources = [f"{tmp_path}/net", "core.cli_toys:unnamed"]
    assert (
        f"chat ({sources[0]})\n{tables[0]}\n\ncode ({sources[1]})\n{tables[1]}\n\n"
    ) == result.stdout
    assert "wide      gate       layers.{0..1}.up (2)  Linear" in result.stdout
    assert "" == result.stderr


def test_a_plan_as_json_is_the_same_as_data():
    result = invoke("plan", "recipe.yaml", "--allow-code", "--json")

    assert 2 == result.exit_code
    recipe = load_recipe("recipe.yaml")
    expected = {
        name: session().plan_recipe(Net(), recipe, name).document.to_mapping()
        for name in ("chat", "code")
    }
    assert json.loads(json.dumps({"models": expected})) == json.loads(result.stdout)


def test_a_plan_of_nothing_exits_with_0():
    rule = "{operation: gate, select: no, optional: true}".replace("no,", "'no',")
    path = write(f"models: {{m: {{source: net, rules: [{rule}]}}}}")

    result = invoke("plan", path)

    assert 0 == result.exit_code
    assert result.stdout.splitlines()[-2] == "Plan: 0 modules replaced, 0 parameters added."


def test_planning_loads_no_weights():
    """The source has none: there is a skeleton alone."""
    assert 2 == invoke("plan", write(one_model("./skeleton"))).exit_code
    assert "Source" in error(invoke("apply", "other.yaml", "--out", "out"))


def test_variables_are_given_by_name():
    result = invoke(
        "plan", "recipe.yaml", "--allow-code", "--var", "layers=2..", "--var", "note=a=b"
    )

    assert 2 == result.exit_code
    assert "wide      gate       layers.2.up  Linear" in result.stdout


def test_models_are_given_by_name_or_alone(tmp_path):
    Path("sub").mkdir()
    path = write(one_model("nowhere"), "sub/other.yaml")

    named = invoke("plan", path, "--model", "m=./net")
    alone = invoke("plan", path, "--model", "core.toys:Net")

    # As seen from the working directory, and not from the recipe.
    assert (2, f"m ({tmp_path}/net)") == (named.exit_code, named.stdout.splitlines()[0])
    assert (2, "m (core.toys:Net)") == (alone.exit_code, alone.stdout.splitlines()[0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["recipe.yaml", "--select", "head"],
            "Neither --select nor --option has a meaning without --operation. Name one.",
        ),
        (
            ["recipe.yaml", "-o", "a=1"],
            "Neither --select nor --option has a meaning without --operation. Name one.",
        ),
        (
            ["core.toys:Net", "--operation", "gate", "--var", "a=1"],
            "Neither --var nor --model has a meaning with --operation. Leave them out.",
        ),
        (
            ["core.toys:Net"],
            "Source 'core.toys:Net' is no recipe: expected one, or --operation. Pass either.",
        ),
        (
            ["recipe.yaml", "--var", "layers"],
            "Variable 'layers' is malformed: expected key=value.",
        ),
        (
            ["recipe.yaml", "--var", "layer=1"],
            "recipe.yaml: no variable 'layer': did you mean 'layers'?",
        ),
        (
            ["recipe.yaml", "--model", "net"],
            "Model 'net' is malformed: expected name=source, the name being one of 'chat', 'code'.",
        ),
        (
            ["recipe.yaml", "--model", "chat="],
            "Model 'chat=' is malformed: expected name=source, the name being one of 'chat', "
            "'code'.",
        ),
        (
            ["no.yaml"],
            "File 'no.yaml' cannot be read: [Errno 2] No such file or directory: 'no.yaml'. Pass "
            "a file of text.",
        ),
    ],
)
def test_what_is_given_in_vain_is_an_error(arguments, expected):
    assert f"error: {expected}\n" == error(invoke("plan", *arguments))


def test_every_problem_of_a_recipe_is_a_line():
    path = write("version: 2\nmodels:\n  m:\n    rules: [{operatoin: gate}]\n")

    assert (
        "error: other.yaml:1: version: expected at most 1, the latest that this surgery-core "
        "knows, got 2\n"
        "error: other.yaml:4: models.m.rules[0]: expected 'operation', got no such key\n"
        "error: other.yaml:4: models.m.rules[0]: unknown key 'operatoin': did you mean "
        "'operation'?\n"
    ) == error(invoke("plan", path))


@pytest.mark.parametrize("command", [["plan"], ["apply", "--out", "out"], ["verify"]])
def test_an_error_of_planning_says_where_in_the_recipe_it_comes_from(command):
    path = write(f"{one_model(operation='gates')}\n")

    found = error(invoke(command[0], path, *command[1:]))

    message, note = found.splitlines()
    assert message.startswith("error: Operation 'gates' is unknown: expected one of 'fresh', ")
    assert "  in other.yaml:1: models.m.adapters.a" == note


def test_a_model_without_a_source_is_an_error_with_its_line():
    path = write("models:\n  m:\n    rules: [{operation: gate}]\n")

    assert (
        "error: Model 'm' has no source: expected one in the recipe, or --model m=source. Add it.\n"
        "  in other.yaml:2: models.m\n"
    ) == error(invoke("plan", path))


def test_a_recipe_that_extends_one_that_is_not_there_says_who_wants_it():
    path = write("\nextends: no.toml\n")

    message, note = error(invoke("plan", path)).splitlines()
    assert message.startswith("error: File 'no.toml' cannot be read: [Errno 2]")
    assert "  in other.yaml:2: extends" == note


def test_apply_verifies_and_keeps_a_record_for_each_model(tmp_path):
    result = invoke("apply", "recipe.yaml", "--allow-code", "--out", "out")

    assert 0 == result.exit_code, result.output
    assert "Applied 'recipe.yaml'" == result.stdout.splitlines()[0]
    assert [
        ["model", "adapters", "modules", "trainable", "verified", "record"],
        ["chat", "wide, narrow", "4", "5", "ok", "out/chat"],
        ["code", "shifted", "1", "4", "ok", "out/code"],
    ] == cells(result.stdout)
    record = read_record("out/chat")
    assert ["rules", "wide", "narrow"] == list(record.plans)
    assert f"{tmp_path}/net" == record.recipe.source
    assert {"gate": "toy 1.0", "shift": "toy 1.0"} == record.operations


def test_apply_as_json_has_the_plan_and_what_was_verified():
    result = invoke("apply", "recipe.yaml", "--allow-code", "--out", "out", "--json")

    data = json.loads(result.stdout)["models"]
    assert 0 == result.exit_code
    assert ("out/chat", 5) == (data["chat"]["record"], data["chat"]["trainable"])
    assert data["chat"]["verification"]["is_ok"]
    planned = json.loads(invoke("plan", "recipe.yaml", "--allow-code", "--json").stdout)["models"]
    assert planned == {name: found["plan"] for name, found in data.items()}


def test_what_fails_to_be_verified_is_not_saved_and_exits_with_1():
    path = write(one_model(operation="loud"))

    result = invoke("apply", path, "--out", "out")

    assert 1 == result.exit_code
    rows = cells(result.stdout)
    assert ["m", "a", "1", "1", "failed", "-"] == rows[1]
    assert ["model", "check", "of", "outcome", "detail"] == rows[2]
    assert ["m", "identity", "a", "failed"] == rows[4][:4]
    assert rows[4][4].startswith("'output 0 differs by ")
    assert not Path("out").exists()


def test_what_fails_is_named_in_json_too():
    result = invoke("apply", write(one_model(operation="loud")), "--out", "out", "--json")

    data = json.loads(result.stdout)["models"]["m"]
    assert (1, None, False) == (result.exit_code, data["record"], data["verification"]["is_ok"])
    assert not Path("out").exists()


def test_nothing_is_verified_if_that_is_not_wanted():
    result = invoke("apply", write(one_model(operation="loud")), "--out", "out", "--no-verify")

    assert 0 == result.exit_code
    assert ["m", "a", "1", "1", "no", "out/m"] == cells(result.stdout)[1]
    assert 1.0 == float(read_record("out/m").state["a"]["layers.0.up.gate"])


def test_models_that_were_done_before_an_error_are_told():
    rule = "{operation: gate, select: layers.0.up}"
    path = write(
        f"models: {{one: {{source: net, rules: [{rule}]}}, two: {{source: no, rules: [{rule}]}}}}".replace(
            "source: no,", "source: nowhere,"
        )
    )

    result = invoke("apply", path, "--out", "out")
    as_json = invoke("apply", path, "--out", "out", "--json")

    assert (1, 1) == (result.exit_code, as_json.exit_code)
    assert result.stderr.startswith("error: Source 'nowhere' gives no model: expected ")
    assert ["one", "-", "1", "1", "ok", "out/one"] == cells(result.stdout)[1]
    assert ["one"] == list(json.loads(as_json.stdout)["models"])
    assert ["one"] == [path.name for path in Path("out").iterdir()]


def test_a_folder_that_cannot_be_written_is_an_error():
    Path("out").write_text("in the way")

    found = error(invoke("apply", write(one_model()), "--out", "out"))

    assert "error: [Errno 20] Not a directory: 'out/m'\n" == found


def test_verify_checks_what_a_recipe_promises():
    result = invoke("verify", "recipe.yaml", "--allow-code")

    assert 0 == result.exit_code, result.output
    assert "Verified 'recipe.yaml'" == result.stdout.splitlines()[0]
    columns, *rows = cells(result.stdout)
    assert ["model", "check", "of", "outcome", "detail"] == columns
    assert {"ok"} == {row[3] for row in rows}
    assert ["chat", "structure", "wide", "ok", "2 modules, 42 values added"] in rows
    assert ["code", "identity", "shifted", "ok", "6 output values are equal bit for bit"] in rows


def test_verify_exits_with_1_if_a_check_fails():
    result = invoke("verify", write(one_model(operation="loud")), "--json")

    checks = json.loads(result.stdout)["models"]["m"]["checks"]
    assert 1 == result.exit_code
    assert [("identity", "a")] == [
        (check["tier"], check["subject"]) for check in checks if check["status"] == "failed"
    ]


def test_an_unknown_check_is_an_error_before_anything_is_loaded():
    found = error(invoke("verify", "no.yaml", "--tier", "identty", "--tier", "revert"))

    assert (
        "error: Tiers 'identty' are unknown: expected some of 'structure', 'identity', 'revert', "
        "'gradients', 'compile', 'export'.\n"
    ) == found


def test_the_schema_has_the_options_of_every_operation():
    result = invoke("schema")

    data = json.loads(result.stdout)
    rule = data["$defs"]["RuleRecipe"]
    assert 0 == result.exit_code
    names = ["fresh", "gate", "loud", "savable", "shift"]
    assert names == rule["properties"]["operation"]["anyOf"][0]["enum"]
    assert names == [case["if"]["properties"]["operation"]["const"] for case in rule["allOf"]]
    value = rule["allOf"][3]["then"]["properties"]["options"]["properties"]["value"]
    assert {"type": "number"} == value["anyOf"][0]
