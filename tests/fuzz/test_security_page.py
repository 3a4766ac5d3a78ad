"""Every claim of the page about security names tests that there are."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "explanation" / "security.md"


def test_the_tests_it_names_are_there():
    named = re.findall(r"`((?:fuzz|core|adaption_prompt)/\w+\.py)(?:::(\w+))?`", PAGE.read_text())

    assert len(named) > 15
    for path, name in named:
        assert f"def {name or 'test_'}" in (TESTS / path).read_text(), (path, name)
