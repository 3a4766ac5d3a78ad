"""Damaged files on the command line: an exit status and a message, never a traceback."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from fuzz.mutations import damaged
from fuzz.readers import READERS
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from surgery_core.cli import app

pytestmark = pytest.mark.faults

# Each of them looks for plugins anew.
fewer = settings(max_examples=max(1, settings.default.max_examples // 2))

RECIPE = b"""
variables: {rank: 2}
models:
  m:
    source: core.cli_toys:unnamed
    rules: [{operation: low_rank, select: "**.up", options: {r: '${rank}'}}]
    adapters: {a: {operation: low_rank, select: "**.down", options: {r: 1}}}
"""

COMMANDS = {
    "recipe.yaml": (
        ["plan", "{folder}/recipe.yaml", "--allow-code"],
        ["diff", "{folder}/recipe.yaml", "{valid}"],
    ),
    "record": (["show", "{folder}"], ["diff", "{folder}", "{valid}"]),
    "adapter": (["show", "{folder}"],),
    "adapter.bin": (["show", "{folder}", "--json"],),
}


def run(arguments):
    """Return the exit status, and what was said of an error."""
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), arguments
    assert result.exit_code in (0, 1, 2)
    assert "Traceback" not in result.stderr
    if result.exit_code == 1:
        assert result.stderr.startswith(("error: ", "warning: ")), result.stderr
    return result.exit_code, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_damaged_files_are_shown_or_refused(name, record_property):
    outcomes = Counter()

    @fewer
    @given(data=st.data())
    def files_are_damaged(data):
        files = {"recipe.yaml": RECIPE} if name == "recipe.yaml" else dict(READERS[name].files())
        target = data.draw(st.sampled_from(sorted(files)))
        content = damaged(target, files[target], lambda n: data.draw(st.integers(0, n - 1)))
        with tempfile.TemporaryDirectory() as folder:
            valid = Path(folder, "valid.yaml")
            valid.write_bytes(RECIPE)
            within = Path(folder, "in")
            within.mkdir()
            for path, own in {**files, target: content}.items():
                (within / path).write_bytes(own)
            for command in COMMANDS[name]:
                status, _ = run([part.format(folder=within, valid=valid) for part in command])
                outcomes["refused" if status == 1 else "done"] += 1

    files_are_damaged()
    record_property("damaged files on the command line", {name: dict(outcomes)})


def test_the_undamaged_recipe_is_planned(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(RECIPE)

    assert (2, "") == run(["plan", str(tmp_path / "recipe.yaml"), "--allow-code"])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"models: {m: 1}"])
def test_what_is_no_recipe_is_refused_with_a_message(content, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)

    status, message = run(["plan", str(path)])

    assert 1 == status
    assert str(path) in message
