"""What of the repository the site shows besides `docs/`: the files that pages link to, and theirs."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FOLDER = "repository"
"""Where on the site files from outside of `docs/` are."""

FIRST = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def source_of(uri: str) -> Path:
    """Return the file that a page of the site is made of."""
    inside = uri.removeprefix(f"{FOLDER}/")
    return (DOCS / uri) if inside == uri else (ROOT / inside)


def uri_of(source: Path) -> str:
    """Return where on the site a file of the repository is."""
    if source.is_relative_to(DOCS):
        return source.relative_to(DOCS).as_posix()
    return f"{FOLDER}/{source.relative_to(ROOT).as_posix()}"


def target_of(source: Path, link: str) -> Path:
    """Return the file that a link on a page means; of a folder, its README."""
    target = Path(os.path.normpath(source.parent / link))
    return target / "README.md" if target.is_dir() else target


def linked_from(source: Path) -> set[Path]:
    """Return the files outside of `docs/` that are linked from a page, directly or through others."""
    found: set[Path] = set()
    pending = [source]
    while pending:
        page = pending.pop()
        for link in LINK.findall(page.read_text()) if page.suffix == ".md" else ():
            target = target_of(page, link)
            # What is not there is for mkdocs to report.
            if target.is_file() and not target.is_relative_to(DOCS) and target not in found:
                found.add(target)
                pending.append(target)
    return found


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what the pages link to."""
    wanted = {ROOT / name for name in FIRST}
    for source in sorted(wanted) + [
        source_of(page.src_uri) for page in files.documentation_pages()
    ]:
        wanted |= linked_from(source)
    for source in sorted(wanted):
        files.append(File.generated(config, uri_of(source), content=source.read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:  # noqa: ANN401 (mkdocs calls it)
    """Let links between `docs/` and the rest of the repository lead to where the site has them."""
    uri = page.file.src_uri
    source = source_of(uri)

    def on_the_site(link: re.Match[str]) -> str:
        target = target_of(source, link.group())
        if not target.is_file():
            return link.group()
        return os.path.relpath(uri_of(target), Path(uri).parent)

    return LINK.sub(on_the_site, markdown)
