"""The site is built without a warning, shows every public name, and needs nothing from elsewhere."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
API = DOCS / "reference/api"
MODULES = [
    "surgery_core",
    "surgery_core.testing",
    *sorted(path.name for path in (ROOT / "plugins").glob("*/surgery_*")),
]


def public_names():
    return [
        f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__
    ]


def build(root, folder):
    """Build a site by its strict settings; not quietly, since mkdocs counts what it logs."""
    return subprocess.run(  # noqa: S603 (our own interpreter and arguments)
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the site, built anew without a warning."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert 0 == done.returncode, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


def test_every_public_name_has_one_place_in_the_reference():
    """Named once, and nothing that is not public is named."""
    pages = "\n".join(page.read_text() for page in API.glob("*.md"))
    named = Counter(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    hooks = named.pop("surgery_core.hookspecs")

    assert 1 == hooks
    assert dict.fromkeys(public_names(), 1) == dict(named)


def test_the_sources_of_every_package_are_read():
    read = re.findall(r"^ +- (plugins/\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)

    assert sorted(f"plugins/{path.name}" for path in (ROOT / "plugins").iterdir()) == sorted(read)


def test_diagrams_are_what_the_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "assets"))
    drawings = importlib.import_module("draw").drawings()

    assert sorted(path.name for path in DOCS.glob("assets/*.svg")) == sorted(drawings)
    for name, text in drawings.items():
        assert text == (DOCS / "assets" / name).read_text()
        # Each is on a page.
        assert any(f"assets/{name})" in page.read_text() for page in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_every_public_name_is_on_the_site(site):
    pages = "\n".join(page.read_text() for page in (site / "reference/api").glob("*.html"))
    places = set(re.findall(r'id="([^"]+)"', pages))

    assert set(public_names()) <= places
    assert {"surgery_core.hookspecs.surgery_operations"} <= places


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    """Links lead elsewhere; scripts, styles, fonts and images do not come from there."""
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?((?:https?:)?//[^\" >]+)"
        r"|<link\b[^>]*\bhref=\"?((?:https?:)?//[^\" >]+)"
    )
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    found = {(page.name, match) for page in pages for match in loaded.findall(page.read_text())}
    assert set() == found
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text())


@pytest.mark.slow
def test_links_out_of_the_documentation_have_pages(site):
    """The README and what it links to are on the site, and links between them are followed."""
    readme = (site / "repository/index.html").read_text()
    for page in ("CONTRIBUTING.html", "CHANGELOG.html", "../how-to/use-recipes.html"):
        assert f'href="{page}"' in readme
        assert (site / "repository" / page).is_file()


@pytest.mark.slow
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    """So that the test above can fail."""
    for name in ("docs", "plugins", "surgery_core", "benchmarks"):
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for path in [*ROOT.glob("*.md"), ROOT / "mkdocs.yml"]:
        shutil.copy(path, tmp_path)
    with (tmp_path / "docs/index.md").open("a") as index:
        index.write("[nowhere](how-to/nowhere.md)\n")

    done = build(tmp_path, tmp_path / "site")

    assert 0 != done.returncode
    assert "how-to/nowhere.md" in done.stderr


def test_pages_are_in_the_navigation():
    """By the four kinds of pages, then decisions; mkdocs warns of a page that is left out."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    sections = [next(iter(entry)) for entry in navigation]

    assert ["Tutorials", "How-to", "Reference", "Explanation", "Decisions"] == sections[2:7]
