"""The tables of defects are numbered through, and name tests that exist."""

import re
from pathlib import Path

import pytest

from surgery_core.testing import OperationContract

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs/reference/regressions.md"
LINES = re.findall(r"^\| (\d+) \|.*\| (`[^|]*`) \|$", PAGE.read_text(), re.MULTILINE)
NAMED = sorted({name for _, tests in LINES for name in re.findall(r"`([^`]+)`", tests)})


def test_every_line_has_tests():
    numbers = re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.MULTILINE)

    assert numbers == [number for number, _ in LINES]
    assert [str(number) for number in range(1, len(LINES) + 1)] == numbers


@pytest.mark.parametrize("name", NAMED)
def test_the_tests_named_exist(name):
    kind, _, test = name.partition(":")
    if kind == "contract":
        assert callable(getattr(OperationContract, test))
        return
    path, _, test = name.partition("::")
    source = (TESTS / path).read_text()
    if test:
        assert re.search(rf"^(def|class) {test}\b", source, re.MULTILINE)
