"""The files that the manual on several processes shows are those that the tests run, as they are."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "how-to/train-on-several-processes.md"
EXAMPLE = DOCS / "examples/distributed"


def shown():
    pattern = r"^<!-- (\S+) -->\n```\w+[^\n]*\n(.*?)^```"
    return dict(re.findall(pattern, PAGE.read_text(), re.MULTILINE | re.DOTALL))


def test_all_files_are_shown():
    assert sorted(path.name for path in EXAMPLE.iterdir() if path.is_file()) == sorted(shown())


@pytest.mark.parametrize("name", sorted(shown()))
def test_a_file_is_shown_as_it_is(name):
    assert (EXAMPLE / name).read_text() == shown()[name]
