"""What goes to a terminal and what does not: progress, colours, warnings, completions, interrupts."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from core.cli_toys import PLUGIN, RECIPE, cells, invoke
from typer.testing import CliRunner

from surgery_core import OptionsError, RecipeError, SurgeryWarning, cli
from surgery_core.cli_output import errors_reported, print_json, print_table, progress

TERMINAL = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


@pytest.fixture(autouse=True)
def _toys(install, tmp_path, monkeypatch):
    install("toy", PLUGIN, attribute="plugin")
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    Path("recipe.yaml").write_text(RECIPE)


APPLY = ("apply", "recipe.yaml", "--allow-code", "--out", "out")


def test_progress_is_shown_on_a_terminal_only():
    """A pipe gets nothing but the result, and an error if there is one."""
    piped, shown = invoke(*APPLY), invoke(*APPLY, **TERMINAL)

    assert (0, 0) == (piped.exit_code, shown.exit_code)
    assert "" == piped.stderr
    for what in ("Loading chat", "Planning chat", "Applying chat", "Verifying", "Saving code"):
        assert what in shown.stderr
        assert what not in shown.stdout
    assert "\x1b" not in piped.stdout


def test_progress_counts_the_places_that_are_written_to():
    """One of them by rules, and one by the adapter that is active."""
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", invoke(*APPLY, **TERMINAL).stderr)

    steps = [(int(done), int(total)) for done, total in re.findall(r"\b(\d+)/(\d+)\b", shown)]
    assert {(0, 2), (2, 2), (0, 1), (1, 1)} <= set(steps)
    assert all(done <= total for done, total in steps)


def test_no_colours_are_shown_where_none_are_wanted():
    coloured = invoke(*APPLY, **TERMINAL)
    plain = invoke(*APPLY, **TERMINAL, NO_COLOR="1")

    assert COLOUR.search(coloured.stderr)
    assert not COLOUR.search(plain.stderr + plain.stdout)
    assert cells(re.sub(r"\x1b\[[0-9;]*m", "", plain.stdout))[1][0] == "chat"


def test_steps_beyond_those_announced_are_no_error(monkeypatch):
    for name, value in TERMINAL.items():
        monkeypatch.setenv(name, value)

    with progress("[red]working[/red]", total=1) as advance:
        advance()
        advance()


def test_errors_are_printed_with_their_notes(capsys):
    err = OptionsError("Something is wrong.")
    err.add_note("a.yaml:1: models.a")
    err.add_note("b.yaml:2: extends")

    with pytest.raises(typer.Exit) as caught, errors_reported():
        raise err

    assert 1 == caught.value.exit_code
    expected = "error: Something is wrong.\n  in a.yaml:1: models.a\n  in b.yaml:2: extends\n"
    assert ("", expected) == capsys.readouterr()


def test_problems_of_a_recipe_are_printed_one_by_one(capsys):
    err = RecipeError("a\nb", problems=["a", "b"])

    with pytest.raises(typer.Exit), errors_reported():
        raise err

    assert "error: a\nerror: b\n" == capsys.readouterr().err


def test_files_that_cannot_be_written_are_errors(capsys):
    with pytest.raises(typer.Exit), errors_reported():
        Path("no/such/file").write_text("")

    assert "error: [Errno 2] No such file or directory: 'no/such/file'\n" == capsys.readouterr().err


def test_other_errors_are_left_as_they_are():
    """A traceback says more about them."""
    with pytest.raises(ZeroDivisionError), errors_reported():
        raise ZeroDivisionError


def warn_twice():
    with errors_reported():
        warnings.warn("of ours", SurgeryWarning, stacklevel=1)
        warnings.warn("of somebody else", UserWarning, stacklevel=1)


@pytest.mark.filterwarnings("always")
def test_warnings_of_this_package_are_printed_and_others_are_left_as_they_are(capsys):
    before = warnings.showwarning

    with pytest.warns(UserWarning, match="of somebody else") as others:
        warn_twice()

    assert "warning: of ours\n" == capsys.readouterr().err
    assert 1 == len(others)
    assert before is warnings.showwarning


def test_json_is_indented(capsys):
    print_json({"a": [1]})

    assert '{\n  "a": [\n    1\n  ]\n}\n' == capsys.readouterr().out


def test_a_table_takes_text_as_it_is(capsys):
    print_table("[b]title", ("one", "[two]"), [("[red]x", ":pear:")])

    out = capsys.readouterr().out
    assert "[b]title" == out.splitlines()[0]
    assert [["one", "[two]"], ["[red]x", ":pear:"]] == cells(out)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("surgery plan x --operation s", ["savable", "shift"]),
        ("surgery import x --operation l", ["loud"]),
        (
            "surgery verify x --tier ",
            ["structure", "identity", "revert", "gradients", "compile", "export"],
        ),
        ("surgery sch", ["schema"]),
    ],
)
def test_the_shell_completes_names(line, expected):
    environment = {
        "_SURGERY_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }

    result = CliRunner().invoke(cli.app, [], env=environment, prog_name="surgery")

    assert sorted(expected) == sorted(result.stdout.split())


@pytest.fixture
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["surgery", "plan", "recipe.yaml"])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("_argv")
def test_an_interrupt_exits_as_shells_expect_and_without_a_traceback(monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_target", interrupted)

    with pytest.raises(SystemExit) as caught:
        cli.run()

    assert 130 == caught.value.code


@pytest.mark.usefixtures("_argv")
def test_factories_in_the_working_directory_are_found(tmp_path, capsys):
    """An installed command would look beside itself only."""
    source = "from core.toys import Net as Mine\n"
    (tmp_path / "sub").mkdir()
    os.chdir(tmp_path / "sub")
    Path("models_of_mine.py").write_text(source)
    sys.argv[2:] = ["models_of_mine:Mine", "--operation", "shift", "--select", "head"]

    with pytest.raises(SystemExit) as caught:
        cli.run()

    assert 2 == caught.value.code
    assert "head    Linear  shift" in capsys.readouterr().out
    assert str(Path.cwd()) == sys.path[-1]


@pytest.mark.slow
def test_the_command_finds_factories_beside_it_in_its_own_process(tmp_path):
    Path("mine.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Linear(2, 2)\n"
    )
    command = "from surgery_core.cli import run; run()"
    arguments = ["plan", "mine:make", "--operation", "nothing"]

    found = subprocess.run(  # noqa: S603 (our own interpreter and code)
        [sys.executable, "-P", "-c", command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert 1 == found.returncode
    assert "error: Operation 'nothing' is unknown: expected one of " in found.stderr
