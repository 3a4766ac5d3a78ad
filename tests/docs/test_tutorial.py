"""The files that the tutorial on plugins shows are those of the example, as they are."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "tutorials/write-a-plugin.md"
EXAMPLE = DOCS / "examples/surgery-activation-probe"
SHOWN = [
    "example/recipe.yaml",
    "example/tiny.py",
    "pyproject.toml",
    "surgery_activation_probe/__init__.py",
    "surgery_activation_probe/operation.py",
    "surgery_activation_probe/plugin.py",
    "tests/test_contract.py",
]


def shown():
    """Return the text of each file on the page: blocks below a comment with its name, in order."""
    found = defaultdict(list)
    pattern = r"^<!-- (\S+) -->\n```\w+[^\n]*\n(.*?)^```"
    for name, text in re.findall(pattern, PAGE.read_text(), re.MULTILINE | re.DOTALL):
        found[name].append(text)
    # Where a file is shown in pieces, they are as far apart as top-level definitions are.
    return {name: "\n\n".join(pieces) for name, pieces in found.items()}


def test_these_files_are_shown():
    assert SHOWN == sorted(shown())


@pytest.mark.parametrize("name", SHOWN)
def test_a_file_is_shown_as_it_is(name):
    assert (EXAMPLE / name).read_text() == shown()[name]


def test_the_operation_is_as_short_as_a_page():
    """Fewer than 80 lines that are neither empty nor a comment nor part of a docstring."""
    text = (EXAMPLE / "surgery_activation_probe/operation.py").read_text()
    text = re.sub(r'^ *""".*?"""$', "", text, flags=re.MULTILINE | re.DOTALL)

    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]

    assert len(lines) < 80
