"""Version, changelog, citation and security policy say the same."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ["surgery_core", *sorted(path.name for path in (ROOT / "plugins").glob("*/surgery_*"))]
VERSION = importlib.import_module("surgery_core").__version__


@pytest.mark.parametrize("package", PACKAGES)
def test_every_distribution_has_the_same_version(package):
    assert "0.1.0" == VERSION
    assert VERSION == importlib.import_module(package).__version__


def test_the_changelog_has_the_form_it_names():
    """Headings of versions, newest first, and below them headings of kinds; all else are entries."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)

    assert "[Unreleased]" == versions[0]
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", name) for name in versions[1:])
    assert versions[1].startswith(f"[{VERSION}] - ")
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for line in text.partition("### ")[2].splitlines()[1:]:
        assert not line or line.startswith(("- ", "## ", "### ")), line


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())

    assert ("1.2.0", "software") == (citation["cff-version"], citation["type"])
    assert VERSION == citation["version"]
    assert f"## [{VERSION}] - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache-2.0" == citation["license"]
    assert citation["authors"]
    papers = [found["value"] for paper in citation["references"] for found in paper["identifiers"]]
    assert "arXiv:2303.16199" == papers[0]
    for paper in citation["references"]:
        assert {"type", "title", "authors", "year"} <= set(paper)


def test_the_security_policy_speaks_of_this_version():
    text = (ROOT / "SECURITY.md").read_text()

    assert f"| {VERSION.rpartition('.')[0]}.x | yes |" in text
    assert "private advisory" in text
