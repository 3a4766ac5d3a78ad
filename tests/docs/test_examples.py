"""Every Python block of README and docs runs, and every example in a docstring is true."""

import contextlib
import doctest
import importlib
import pkgutil
import re
import sys
import types
import unittest
from pathlib import Path

import pytest
from e2e import readme

from surgery_core.testing import OperationContract

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "plugins").glob("*/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PACKAGES = ["surgery_core", *sorted(path.name for path in (ROOT / "plugins").glob("*/surgery_*"))]
MODULES = [
    name
    for package in PACKAGES
    for _, name, _ in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
]


def blocks(page, language):
    return readme.blocks(page.read_text(), language)


# PEFT, which a page compares with, uses names that transformers calls old.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    """The blocks of a page run one after the other; what they print is on the page."""
    monkeypatch.chdir(tmp_path)
    # A module, so that what a page defines can be pickled.
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    namespace = vars(module)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)  # noqa: S102 (our own pages)

    printed = capsys.readouterr().out
    # Nothing is shown but what is printed, and nothing is printed that is not shown.
    assert ([printed] if printed else []) == blocks(page, "text")
    for suite in _contract_suites(namespace):
        assert _run_contract(suite) > 10


def _run_contract(suite):
    """Run a suite's tests and return how many were not skipped."""
    done = 0
    for name in dir(suite):
        if name.startswith("test_"):
            with contextlib.suppress(unittest.SkipTest):
                getattr(suite(), name)()
                done += 1
    return done


def _contract_suites(namespace):
    return [
        value
        for value in namespace.values()
        if isinstance(value, type)
        and issubclass(value, OperationContract)
        and value is not OperationContract
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name):
    module = importlib.import_module(name)

    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)

    assert 0 == result.failed


def test_there_are_examples_to_run():
    """In every package, so that none is forgotten above."""
    finder = doctest.DocTestFinder()
    found = {
        name.partition(".")[0]
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
        if test.examples
    }

    assert set(PACKAGES) == found


def test_the_tables_about_peft_and_formats_are_of_the_tests(monkeypatch):
    """`make docs-tables` would write what is in the repository."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    tables = importlib.import_module("make_peft_tables")

    for name, make in (("peft-deviations.md", tables.deviations), ("formats.md", tables.formats)):
        assert make() == (ROOT / "docs/reference" / name).read_text()
