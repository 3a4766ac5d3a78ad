"""The command line: its output, its exit status, and what it says when something is wrong."""

import json
import re
import sys

import pytest
from core.toys import Net, session
from typer.testing import CliRunner

from surgery_core import PlanDocument, Rule
from surgery_core.cli import app, run

TOYS = """
from torch import nn
from core.toys import ToyPlugin
from surgery_core import hookimpl

class Plugin(ToyPlugin):
    @hookimpl
    def surgery_load_skeleton(self, source):
        return nn.Linear(2, 2, device="meta") if source == "known" else None

plugin = Plugin()
"""


def invoke(*arguments):
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def toys(install):
    install("toy", TOYS, attribute="plugin")


@pytest.mark.usefixtures("install")
def test_plugins_says_when_there_are_none():
    result = invoke("plugins")

    assert result.exit_code == 0
    assert result.stdout == "No plugins are installed.\n"


@pytest.mark.usefixtures("toys")
def test_plugins_are_listed_broken_ones_included(install, monkeypatch):
    install("broken", "1 / 0")
    monkeypatch.setenv("COLUMNS", "200")

    result = invoke("plugins")

    rows = [[cell.strip() for cell in line.split("│")] for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert [
        "broken",
        "broken 1.0",
        "-",
        "-",
        "Plugin 'broken' (broken 1.0) could not be imported: "
        "ZeroDivisionError('division by zero').",
    ] in [row[1:-1] for row in rows]
    assert [
        "toy",
        "toy 1.0",
        "fresh, gate, shift",
        "surgery_load_skeleton, surgery_operations",
        "ok",
    ] in [row[1:-1] for row in rows]


@pytest.mark.usefixtures("toys")
def test_plugins_are_listed_as_json():
    result = invoke("plugins", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout) == [
        {
            "name": "toy",
            "distribution": "toy 1.0",
            "hooks": ["surgery_load_skeleton", "surgery_operations"],
            "operations": ["fresh", "gate", "shift"],
            "error": None,
            "commands": [],
        }
    ]


@pytest.mark.usefixtures("toys")
def test_plan_prints_the_table_and_exits_with_2():
    result = invoke("plan", "core.toys:Net", "--operation", "shift", "--select", "head")

    expected = session().plan(Net(), [Rule(operation="shift", select="head")]).document
    assert result.exit_code == 2
    assert result.stdout == expected.render() + "\n"


@pytest.mark.usefixtures("toys")
def test_plan_prints_json():
    result = invoke("plan", "core.toys:Net", "--operation", "shift", "--json")

    assert result.exit_code == 2
    expected = session().plan(Net(), [Rule(operation="shift")]).document
    assert PlanDocument.from_json(result.stdout) == expected


@pytest.mark.usefixtures("toys")
def test_plan_asks_plugins_for_other_sources():
    result = invoke("plan", "known", "--operation", "gate")

    assert result.exit_code == 2
    assert "(root)  Linear  gate" in result.stdout


@pytest.mark.usefixtures("toys")
def test_options_are_json_where_they_can_be():
    result = invoke(
        *("plan", "core.toys:Net", "--operation", "gate", "--select", "layers.1"),
        *("-o", "anything=true", "--option", "value=0.5"),
    )

    assert result.exit_code == 2
    assert "layers.1  Block  gate" in result.stdout


@pytest.mark.usefixtures("toys")
def test_options_are_text_otherwise(install):
    install("wordy", WORDY)

    result = invoke("plan", "core.toys:Net", "--operation", "wordy", "-o", "word=a=b c")

    assert result.exit_code == 1
    assert result.stderr == "error: word is 'a=b c'\n"


WORDY = """
from core.toys import Gate
from surgery_core import OptionsError, hookimpl

class Wordy(Gate):
    name = "wordy"

    def parse_options(self, options):
        raise OptionsError(f"word is {options['word']!r}")

@hookimpl
def surgery_operations():
    return [Wordy()]
"""


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["core.toys:Net", "--operation", "gates"],
            "Operation 'gates' is unknown: expected one of 'fresh', 'gate', 'shift'. Install the "
            "plugin that offers it, or pass the plugin to Session.",
        ),
        (
            ["core.toys:Nett", "--operation", "gate"],
            "Source 'core.toys:Nett' cannot be imported: module 'core.toys' has no attribute "
            "'Nett'. Write package.module:factory.",
        ),
        (
            ["no_such_package:Net", "--operation", "gate"],
            "Source 'no_such_package:Net' cannot be imported: No module named 'no_such_package'. "
            "Write package.module:factory.",
        ),
        (
            ["torch:nn", "--operation", "gate"],
            "Source 'torch:nn' cannot be imported: 'module' object is not callable. Write "
            "package.module:factory.",
        ),
        (
            [":Net", "--operation", "gate"],
            "Source ':Net' cannot be imported: Empty module name. Write package.module:factory.",
        ),
        (
            ["unknown", "--operation", "gate"],
            "Source 'unknown' gives no model: expected package.module:factory, or a folder that "
            "an installed plugin can read, got None. See `surgery plugins`.",
        ),
        (
            ["builtins:dict", "--operation", "gate"],
            "Source 'builtins:dict' gives no model: expected package.module:factory, or a folder "
            "that an installed plugin can read, got {}. See `surgery plugins`.",
        ),
        (
            ["core.toys:Net", "--operation", "gate", "-o", "value"],
            "Option 'value' is malformed: expected key=value.",
        ),
        (
            ["core.toys:Net", "--operation", "gate", "-o", "valeu=1"],
            "Operation 'gate' does not know ['valeu'].",
        ),
    ],
)
def test_an_error_is_one_line_and_exits_with_1(arguments, message):
    result = invoke("plan", *arguments)

    assert result.exit_code == 1
    assert result.stderr == f"error: {message}\n"
    assert result.stdout == ""


SHOWS = """
from surgery_core import OptionsError, Shown, hookimpl

@hookimpl
def surgery_show(source):
    if source == "damaged":
        raise OptionsError("Folder 'damaged' is damaged.")
    if source == "wrong":
        return {"not": "Shown"}
    if source != "known":
        return None
    return Shown(
        title="Toys in 'known'",
        columns=("name", "base [model]"),
        rows=(("[red]one[/red]", "long/" * 40), ("two", ":pear:")),
        notes=("Toy 'two' is [bold]odd[/bold].", "Toy 'one' is not."),
        data={"toys": [{"name": "one", "size": 0.5}, {"name": "two", "size": None}]},
    )
"""


@pytest.fixture
def shows(install):
    install("shows", SHOWS)


@pytest.mark.usefixtures("shows")
def test_show_prints_title_table_and_notes_with_no_line_folded_in_a_pipe(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")

    result = invoke("show", "known")

    title, *table, first_note, second_note = result.stdout.splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split(line[0])] for line in table]
    assert result.exit_code == 0
    assert title == "Toys in 'known'"
    assert rows[1] == ["name", "base [model]"]
    assert rows[3:5] == [["[red]one[/red]", "long/" * 40], ["two", ":pear:"]]
    assert len(rows) == 6
    assert first_note == "Toy 'two' is [bold]odd[/bold]."
    assert second_note == "Toy 'one' is not."


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that makes the output a terminal of so many columns, without colours."""

    def make(columns):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))

    return make


def shown_cells():
    """Return the cells of every row that `surgery show known` prints."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", invoke("show", "known").stdout).splitlines()
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]


@pytest.mark.usefixtures("shows")
def test_a_wide_terminal_gets_a_row_for_each_thing(terminal):
    terminal(221)

    found = shown_cells()

    assert ["name", "base [model]"] in found
    assert ["two", ":pear:"] in found


@pytest.mark.usefixtures("shows")
def test_a_narrow_terminal_gets_a_line_for_each_cell(terminal):
    terminal(220)

    found = [cells for cells in shown_cells() if cells]

    assert found == [
        ["name", "[red]one[/red]"],
        ["base [model]", "long/" * 40],
        ["name", "two"],
        ["base [model]", ":pear:"],
    ]


@pytest.mark.usefixtures("shows")
def test_a_cell_that_no_terminal_holds_is_folded_not_cut(terminal):
    terminal(60)

    found = [cells for cells in shown_cells() if cells]

    assert "".join(cell for _, cell in found[1:-2]) == "long/" * 40
    assert len(found) > 5


@pytest.mark.usefixtures("shows")
def test_show_prints_the_data_as_json():
    result = invoke("show", "known", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "toys": [{"name": "one", "size": 0.5}, {"name": "two", "size": None}]
    }


@pytest.mark.usefixtures("shows")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "unknown",
            "Source 'unknown' cannot be shown: expected something that an installed plugin saved, "
            "got None from the plugins. See `surgery plugins`.",
        ),
        (
            "wrong",
            "Source 'wrong' cannot be shown: expected something that an installed plugin saved, "
            "got {'not': 'Shown'} from the plugins. See `surgery plugins`.",
        ),
        ("damaged", "Folder 'damaged' is damaged."),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_cannot_be_shown_is_an_error_and_exits_with_1(source, message, options):
    result = invoke("show", source, *options)

    assert result.exit_code == 1
    assert result.stderr == f"error: {message}\n"
    assert result.stdout == ""


def exit_status(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["surgery", *arguments])
    with pytest.raises(SystemExit) as caught:
        run()
    return caught.value.code


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "core.toys:Net", "--operation", "gate"], 2),
        (["plan", "core.toys:Net", "--operation", "gates"], 1),
        (["plugins"], 0),
        (["--help"], 0),
    ],
)
def test_the_exit_status_is_that_of_the_command(monkeypatch, arguments, expected):
    assert (exit_status(monkeypatch, *arguments) or 0) == expected


@pytest.mark.parametrize(
    "arguments",
    [["plan"], ["plan", "a:b", "--no-such-option"], ["no-such-command"], []],
)
def test_wrong_usage_exits_with_1_since_2_means_changes(monkeypatch, capsys, arguments):
    assert exit_status(monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    assert "Usage: " in captured.err + captured.out
