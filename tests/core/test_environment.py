"""Values of environment variables reach what uses them, and no message, plan, record or file."""

import json
import traceback
from pathlib import Path

import pytest
from core.cli_toys import invoke, make
from core.telling import PLUGIN, SECRET, Telling
from core.toys import Net

from surgery_core import (
    ModelRecipe,
    OptionsError,
    Plugins,
    RecipeError,
    Session,
    dump_recipe,
    load_recipe,
)
from surgery_core.environment import EnvironmentText, as_written, hidden, joined, names_in, put_in
from surgery_core.tensor_file import read_tensor_header


@pytest.fixture(autouse=True)
def _secret(install, tmp_path, monkeypatch):
    install("telling", PLUGIN, attribute="plugin")
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("FOLDER", f"/{SECRET}/net")
    Telling.seen = ()


def rule(**options):
    return {"operation": "telling", "select": "layers.0.up", "options": options}


def one(*, source="${env:FOLDER}", rules=(), **fields):
    return {"models": {"m": {"source": source, "rules": list(rules), **fields}}}


def write(data, name="recipe.json"):
    Path(name).write_text(json.dumps(data))
    return name


def parts():
    """Return what of the value would give it away, as it may be written."""
    return (SECRET[:12], repr(SECRET)[1:14], json.dumps(SECRET)[1:14], "x" * 20)


def assert_hidden(*texts):
    files = [p.read_bytes().decode("latin-1") for p in Path().rglob("*") if p.is_file()]
    for text in (*texts, *files):
        for part in parts():
            assert part not in text, text


def assert_said(error, expected=""):
    """See that an error says what went wrong, and the value nowhere, causes included."""
    text = "".join(traceback.format_exception(error))
    held = repr((error.args, vars(error)))
    # What the test itself says is in the text as well.
    assert_hidden(text, held)
    assert expected in str(error)


WORKING = {
    "rules": one(rules=[rule(word="${env:TOKEN}", deep={"a": ["x ${env:TOKEN}"]})]),
    "adapters": one(adapters={"a": rule(word="${env:TOKEN}"), "b": rule()}, active="a"),
    "several": one(adapters={"a": {"rules": [rule(word="${env:TOKEN}")]}}),
    "a variable": {
        "variables": {"t": "${env:TOKEN}", "u": "b ${t}"},
        **one(rules=[rule(word="${u}")]),
    },
    "a warning": one(rules=[rule(word=["list", "${env:TOKEN}"])]),
}


@pytest.mark.filterwarnings("default::surgery_core.SurgeryWarning")
@pytest.mark.parametrize("name", WORKING)
def test_a_recipe_is_planned_applied_recorded_and_replayed_without_saying_a_value(name):
    path = write(WORKING[name])
    results = [
        invoke("plan", path),
        invoke("plan", path, "--json"),
        invoke("apply", path, "--out", "out"),
        invoke("apply", path, "--out", "out", "--json"),
        invoke("verify", path, "--tier", "structure"),
        invoke("verify", "out/m", "--tier", "structure", "--json"),
        invoke("show", "out/m"),
        invoke("show", "out/m", "--json"),
        invoke("diff", path, "out/m"),
        invoke("diff", path, "out/m", "--json"),
    ]

    assert [2, 2, 0, 0, 0, 0, 0, 0] == [result.exit_code for result in results[:8]], [
        r.output for r in results
    ]
    assert_hidden(*(result.output for result in results))
    assert "m (${env:FOLDER})" in results[0].stdout
    file, _ = read_tensor_header("out/m/surgery.safetensors")
    recorded = json.loads(file.texts["surgery.json"])["recipe"]
    assert "${env:FOLDER}" == recorded["source"]
    assert "${env:TOKEN}" in json.dumps(recorded)
    # The operation got it each time, from the record too.
    assert len(Telling.seen) > 5
    assert all(repr(SECRET)[1:-1] in repr(seen) for seen in Telling.seen if seen)


def test_a_record_reads_the_variable_again(monkeypatch):
    path = write(WORKING["rules"])
    assert 0 == invoke("apply", path, "--out", "out").exit_code
    monkeypatch.setenv("TOKEN", "another")
    Telling.seen = ()

    model = Session().load_model(load_recipe(path))
    Session().load(model, "out/m")

    assert "another" == Telling.seen[-1]["word"]
    monkeypatch.delenv("TOKEN")
    with pytest.raises(
        RecipeError, match="Environment variable 'TOKEN' is not set, and the recipe"
    ):
        Session().load(make(), "out/m")


FAILING = {
    "no such model": (one(source="${env:TOKEN}", rules=[rule()]), "Source '${env:TOKEN}' gives no"),
    "a path": (one(source="./${env:TOKEN}/x", rules=[rule()]), "gives no model"),
    "a broken model": (one(source="${env:FOLDER}/broken", rules=[rule()]), "is broken"),
    "code": (one(source="${env:TOKEN}:make", rules=[rule()]), "which is code"),
    "an operation": (one(rules=[{"operation": "${env:TOKEN}"}]), "expected no variable of the env"),
    "a selector": (
        one(rules=[{**rule(), "select": "${env:TOKEN}"}]),
        "expected no variable of the environment here, got '${env:TOKEN}'",
    ),
    "an exclusion": (one(rules=[{**rule(), "exclude": ["a", "x${env:TOKEN}"]}]), "expected no var"),
    "the active one": (one(adapters={"a": rule()}, active="${env:TOKEN}"), "expected no variable"),
    "a flag": (one(rules=[rule()], freeze="${env:TOKEN}"), "expected true or false, got '${env:TOK"),
    "a number": (one(rules=[{**rule(), "expect": "${env:TOKEN}"}]), "expected a whole number"),
    "options": (one(rules=[{**rule(), "options": "${env:TOKEN}"}]), "expected a mapping"),
    "the version": ({"version": "${env:TOKEN}", **one(rules=[rule()])}, "expected a whole number"),
    "the models": ({"models": "${env:TOKEN}"}, "expected a mapping, got '${env:TOKEN}'"),
    "an option": (one(rules=[rule(word="${env:TOKEN}", fail="refuse")]), "word is '${env:TOKEN}"),
    "problems": (one(rules=[rule(word="${env:TOKEN}", fail="attributes")]), "word is ${env:TOKEN}"),
    "a cause": (one(rules=[rule(word="${env:TOKEN}", fail="cause")]), "Word is unknown."),
    "a file": (one(rules=[rule(word="${env:FOLDER}", fail="file")]), "No such file"),
    "building": (one(rules=[rule(word="a ${env:TOKEN}", fail="build")]), "cannot build with"),
    "a saved one": (
        one(adapters={"a": {**rule(word="${env:TOKEN}"), "source": "./${env:TOKEN}"}}),
        "There is nothing in",
    ),
    "a variable": ({"variables": {"v": ["${env:TOKEN}"]}, **one(rules=[rule()])}, "a single value"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("command", [["plan"], ["apply", "--out", "out"], ["verify"]])
def test_errors_of_commands_do_not_say_a_value(name, command):
    data, expected = FAILING[name]

    result = invoke(*command, write(data))

    if name == "building" and command == ["plan"]:
        assert 2 == result.exit_code
        return
    assert 1 == result.exit_code
    assert expected in result.stderr.replace("error: one ${env", "error: word is ${env")
    assert_hidden(result.output)


@pytest.mark.parametrize("name", [*FAILING, "pydantic"])
def test_exceptions_do_not_say_a_value_either(name):
    data, expected = FAILING.get(name) or (
        one(rules=[rule(word="${env:TOKEN}", fail="pydantic")]),
        "number: Input should be a valid integer",
    )
    path = write(data)

    def run():
        recipe = load_recipe(path)
        model = Session().load_model(recipe) if name in SOURCES else make()
        Session().plan_recipe(model, recipe).apply()

    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever an operation raises)
        run()

    assert_said(caught.value, expected)


SOURCES = ("no such model", "a path", "a broken model", "code")


def test_exporting_does_not_say_a_value():
    path = write(one(adapters={"a": rule(word="${env:TOKEN}")}))
    assert 0 == invoke("apply", path, "--out", "out").exit_code

    result = invoke("export", "out/m", "--out", "exported")

    assert 1 == result.exit_code
    assert "cannot be written: '${env:TOKEN}'" in result.stderr
    assert_hidden(result.output)


def test_a_recipe_holds_names_and_is_written_with_them():
    data = one(rules=[rule(word="$${env:TOKEN} $$$$${env:TOKEN}$$ ${env:TOKEN}")])
    recipe = load_recipe(write(data))

    text = dump_recipe(recipe)
    Path("again.yaml").write_text(text)

    assert_hidden(repr(recipe), text)
    assert recipe == load_recipe("again.yaml")
    assert text == dump_recipe(load_recipe("again.yaml"))
    found = recipe.models["m"].rules[0].rule().options["word"]
    assert f"${{env:TOKEN}} $${SECRET}$ {SECRET}" == found


def test_sources_that_begin_with_a_dot_are_those_of_the_recipe_in_its_record_too(monkeypatch):
    Path("sub").mkdir()
    monkeypatch.setenv("NAME", "../net")
    monkeypatch.setenv("DOTTED", "./net")
    here = Path.cwd().resolve()
    for source, loaded, recorded in (
        ("./${env:NAME}", f"{here}/net", f"{here}/sub/./${{env:NAME}}"),
        ("${env:DOTTED}", f"{here}/sub/net", f"{here}/sub/${{env:DOTTED}}"),
        ("~/${env:TOKEN}", str(Path.home() / SECRET), f"{Path.home()}/${{env:TOKEN}}"),
        ("./$$x", f"{here}/sub/$x", f"{here}/sub/$x"),
    ):
        recipe = load_recipe(write(one(source=source, rules=[rule()]), "sub/recipe.json"))

        assert loaded == recipe.resolved(recipe.source("m"))
        assert recorded == recipe.recorded(recipe.source("m"))
        again = ModelRecipe.model_validate({"source": recorded, "rules": [rule()]})
        put = Path(put_in(again.source)).resolve()
        assert Path(loaded).resolve() == put


@pytest.mark.parametrize(
    "pieces",
    [
        ["$", "{env:A}"], ["$$", "{env:A}"], ["{env:A}"], ["a$", "b"], ["$", None], ["$$$", None, "$"],
        [None, None], [None, "{env:A}"], ["$", None, "{env:A}$", None], ["${env:", None, "}"],
    ],
)  # fmt: skip
def test_whatever_stands_around_a_name_is_read_as_it_was(pieces, monkeypatch):
    monkeypatch.setenv("A", "wrong")
    monkeypatch.setenv("B", "$ {env:A} $")
    text = joined([EnvironmentText([("B", True)]) if p is None else p for p in pieces])

    expected = "".join("$ {env:A} $" if piece is None else piece for piece in pieces)

    assert expected == text == put_in(as_written(text))
    assert ({"B"} if None in pieces else set()) == names_in(as_written(text))


def test_what_an_error_holds_is_hidden_too():
    problem = OptionsError("Something else.")
    problem.path, problem.rows = Path(f"/{SECRET}/x"), [{"a": (SECRET, 1)}]
    problem.add_note(SECRET)

    with pytest.raises(OptionsError) as caught, hidden("${env:TOKEN}"):
        raise problem

    assert_said(caught.value)
    assert Path("/${env:TOKEN}/x") == problem.path
    assert [{"a": ("${env:TOKEN}", 1)}] == problem.rows


def raised(text, data):
    """Return what an error says that is raised where values are hidden."""
    with pytest.raises(OptionsError) as caught, hidden(data):
        raise OptionsError(text)
    return str(caught.value)


def test_short_values_are_hidden_where_they_stand_alone_and_others_everywhere(monkeypatch):
    monkeypatch.setenv("SHORT", "at")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("LONG", "gate")

    text = raised("What 'at' is at the gates.", ["${env:SHORT}", "${env:EMPTY} ${env:LONG}"])

    assert "What '${env:SHORT}' is ${env:SHORT} the ${env:LONG}s." == text


def test_errors_without_a_value_are_left_as_they_are():
    problem = OptionsError("Something else.")
    problem.__cause__ = KeyError("x")

    with pytest.raises(OptionsError) as caught, hidden("${env:TOKEN}"):
        raise problem

    assert problem is caught.value
    assert isinstance(problem.__cause__, KeyError)


def test_paths_that_only_begin_like_a_value_are_not_hidden(monkeypatch):
    monkeypatch.setenv("PLACE", "/srv/" + "a" * 60 + "/models/secret")
    near = "/srv/" + "a" * 60 + "/recipe.yaml"

    text = raised(f"{near}: '/srv/{'a' * 50}. Fix it.", "${env:PLACE}")

    assert f"{near}: '${{env:PLACE}}. Fix it." == text


def test_what_plugins_are_asked_with_is_the_value():
    recipe = load_recipe(write(one(rules=[rule()])))
    plugins = Plugins()

    assert isinstance(plugins.load_model(recipe.resolved(recipe.source("m"))), Net)
    assert isinstance(Session().load_model(recipe, "m"), Net)
