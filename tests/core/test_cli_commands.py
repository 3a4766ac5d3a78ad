"""Plugins add commands: found without loading other plugins, named once, reported when broken."""

import subprocess
import sys

import pytest
import typer
from core.cli_toys import cells
from typer.testing import CliRunner

from surgery_core import PluginError, Plugins, SurgeryError, hookimpl
from surgery_core.cli import app, run, with_commands
from surgery_core.hookspecs import COMMANDS_GROUP, CORE_COMMANDS

SHOUTS = """
from surgery_core import SurgeryError, hookimpl

def shout(word: str, *, twice: bool = False) -> None:
    if word == "wrong":
        error = SurgeryError("Word is wrong.")
        error.add_note("a place")
        raise error
    print(word.upper() * (1 + twice))

@hookimpl
def surgery_commands():
    return {"shout": shout}
"""


def no_command() -> None:
    raise AssertionError


class Commanding:
    def __init__(self, name, answer):
        self.__name__ = name
        self.answer = answer

    @hookimpl
    def surgery_commands(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def install_command(install, tmp_path, name, source=SHOUTS, **values):
    """Make a distribution whose plugin is also in the group of commands."""
    module = install(name, source, **values)
    points = tmp_path / f"{name}-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"{points.read_text()}\n[{COMMANDS_GROUP}]\n{name} = {module}\n")
    return module


def invoke(*arguments):
    plugins = Plugins(group=COMMANDS_GROUP)
    return CliRunner().invoke(with_commands(plugins), arguments)


def test_the_core_knows_the_names_of_its_commands():
    names = {found.name or found.callback.__name__ for found in app.registered_commands}

    assert names == CORE_COMMANDS


def test_a_plugin_adds_a_command(install, tmp_path):
    install_command(install, tmp_path, "shouting")

    result = invoke("shout", "--twice", "no")

    assert (0, "NONO\n", "") == (result.exit_code, result.stdout, result.stderr)
    assert "Commands of shouting 1.0" in invoke("--help").stdout
    assert "no such command" in invoke("whisper").output.lower()


def test_commands_are_not_added_to_the_core_s_own_app(install, tmp_path):
    install_command(install, tmp_path, "shouting")
    before = list(app.registered_commands)

    assert invoke("shout", "no").exit_code == 0

    assert before == app.registered_commands


def test_errors_of_a_command_are_printed_as_those_of_the_core(install, tmp_path):
    install_command(install, tmp_path, "shouting")

    result = invoke("shout", "wrong")

    assert (1, "") == (result.exit_code, result.stdout)
    assert result.stderr == "error: Word is wrong.\n  in a place\n"


def test_plugins_without_commands_are_not_loaded(install, tmp_path):
    install("other", "raise AssertionError")
    install_command(install, tmp_path, "shouting")

    plugins = Plugins(group=COMMANDS_GROUP)

    assert [info.name for info in plugins.infos] == ["shouting"]
    assert plugins.broken == {}
    assert list(plugins.commands) == ["shout"]
    assert sorted(info.name for info in Plugins().infos) == ["other", "shouting"]


def test_a_broken_plugin_is_reported_and_the_core_s_commands_work(install, tmp_path, capsys):
    install_command(install, tmp_path, "broken", "1 / 0")

    result = invoke("plugins")

    assert result.exit_code == 0
    assert capsys.readouterr().err == (
        "warning: Plugin 'broken' (broken 1.0) could not be imported: "
        "ZeroDivisionError('division by zero').\n"
    )
    assert any(row[0] == "broken" for row in cells(result.stdout))


@pytest.mark.parametrize("name", ["verify", "plan"])
def test_a_name_of_the_core_is_an_error_that_names_both(name):
    with pytest.raises(PluginError) as caught:
        Plugins([Commanding("mine", {name: no_command})], discover=False)

    assert str(caught.value) == (
        f"Plugin 'mine' breaks the contract: command {name!r} is offered by the core and by 'mine'. "
        "Block one of them with SURGERY_BLOCK_PLUGINS."
    )


def test_a_name_of_another_plugin_is_an_error_that_names_both(install, tmp_path):
    install_command(install, tmp_path, "first")
    install_command(install, tmp_path, "second")

    plugins = Plugins(group=COMMANDS_GROUP)
    (error,) = plugins.broken.values()

    assert {"first", "second"} == {info.name for info in plugins.infos}
    assert "command 'shout' is offered by" in str(error)
    assert "'first' (first 1.0)" in str(error)
    assert "'second' (second 1.0)" in str(error)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ValueError("no"), "no"),
        ([no_command], "surgery_commands returned [<function no_command at"),
        ({"mine": 3}, "surgery_commands returned 3 for 'mine': expected a function."),
    ],
)
def test_answers_that_are_no_commands_break_the_contract(answer, message):
    with pytest.raises(PluginError, match="breaks the contract") as caught:
        Plugins([Commanding("mine", answer)], discover=False)

    assert message in str(caught.value)


def test_commands_that_the_command_line_would_not_find_are_refused(install):
    """A plugin of the other group alone would have its commands left out in silence."""
    install("shouting", SHOUTS)

    (error,) = Plugins().broken.values()

    assert str(error) == (
        "Plugin 'shouting' (shouting 1.0) breaks the contract: it has commands, and no entry point "
        "'shouting' in group 'surgery_core.commands', where the command line looks for them. Add one."
    )


def test_the_command_line_has_the_commands(install, tmp_path, monkeypatch, capsys):
    install_command(install, tmp_path, "shouting")
    monkeypatch.setattr(sys, "argv", ["surgery", "shout", "so"])
    monkeypatch.setattr(sys, "path", list(sys.path))

    with pytest.raises(SystemExit) as caught:
        run()

    assert not caught.value.code
    assert capsys.readouterr().out == "SO\n"


def test_exit_statuses_of_commands_are_kept():
    def leave() -> None:
        raise typer.Exit(2)

    def fail() -> None:
        msg = "Failed."
        raise SurgeryError(msg)

    plugins = Plugins([Commanding("mine", {"leave": leave, "fail": fail})], discover=False)
    made = with_commands(plugins)

    assert CliRunner().invoke(made, ["leave"]).exit_code == 2
    assert CliRunner().invoke(made, ["fail"]).exit_code == 1
    assert "Commands of mine" in CliRunner().invoke(made, ["--help"]).stdout


@pytest.mark.slow
def test_help_loads_neither_transformers_nor_what_has_no_commands():
    code = (
        "import sys; sys.argv = ['surgery', '--help']\n"
        "from surgery_core.cli import run\n"
        "try:\n    run()\nexcept SystemExit: pass\n"
        "print('loaded', [n for n in ('transformers', 'accelerate') if n in sys.modules])"
    )
    done = subprocess.run(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "loaded []"
    assert "verify" in done.stdout
