"""Every block on a page is run or read by a test, or named here with the reason why it is not."""

import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

from surgery_core import Plugins, load_recipe
from surgery_core.cli import with_commands
from surgery_core.hookspecs import COMMANDS_GROUP

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "plugins").glob("*/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

# What happens to a block, by the word behind its fence.
KINDS = {
    "bash": "each command is looked up below",
    "console": "each command is looked up below; what it prints is compared where tests/e2e runs it",
    "python": "run by test_examples.py; with a title, it is a file that test_tutorial.py compares",
    "text": "what the page's Python printed, which test_examples.py compares; or in FIGURES",
    "toml": "read below",
    "yaml": "read below; with models, it must be a recipe",
}

# Blocks of text that nothing prints.
FIGURES = {
    "docs/explanation/design.md": "a figure",
    "docs/explanation/zero-init-attention.md": "a formula",
}

# Commands that are not run, each with what is seen of it all the same.
NOT_RUN = {
    "accelerate": "its script must exist; tests/distributed runs the same",
    "cd": "changes nothing but the folder",
    "make": "its target must exist; most are what runs these tests",
    "mkdir": "makes folders",
    "pip": "installs; tests/e2e/test_template_plugin.py and test_distributions.py install wheels",
    "pytest": "of the example: tests/e2e/test_template_plugin.py runs it",
    "python": "its script must exist; tests/e2e runs the demo, the bench and the examples",
    "torchrun": "its script must exist; tests/distributed runs the same",
    "surgery": "must be what the command line can parse; tests/e2e runs the same commands",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its fence, the words behind the fence, and the rest."""

    page: Path
    line: int
    info: str
    body: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def language(self):
        return self.info.split(" ")[0]


def blocks_of(page):
    """Read fences as Markdown does: a block ends at a fence as long as the one it began with."""
    found, fence = [], None
    for number, line in enumerate(page.read_text().splitlines(keepends=True), start=1):
        match = re.match(r" {0,3}(`{3,}|~{3,})(.*)$", line)
        if fence is None and match:
            fence, info, first, body = match[1], match[2].strip(), number, []
        elif fence is not None and match and match[1].startswith(fence) and not match[2].strip():
            found.append(Block(page, first, info, "".join(body)))
            fence = None
        elif fence is not None:
            body.append(line)
    assert fence is None, f"{page}:{first}: a block without an end"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages):
    return pytest.mark.parametrize(
        "block", [block for block in BLOCKS if block.language in languages], ids=str
    )


def commands_of(block):
    """Return the words of each command, comments left out, lines that go on put together."""
    lines = block.body.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


def parse(words):
    """Let the command line, plugins' commands included, read a command without obeying it."""
    group = typer.main.get_command(with_commands(Plugins(group=COMMANDS_GROUP)))
    context = group.make_context("surgery", words)
    name, command, rest = group.resolve_command(context, words)
    command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_something_is_done_with_every_block(block):
    assert block.language in KINDS


@of("console", "bash")
def test_every_command_is_known(block):
    """That a command is parsed means that it exists, and so do all of its options."""
    commands = commands_of(block)
    assert commands
    for words in commands:
        assert words[0] in NOT_RUN, words
        if words[0] == "surgery":
            parse(words[1:])
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            makefile = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
        elif words[0] in ("accelerate", "python", "torchrun"):
            script = next(word for word in words if word.endswith(".py"))
            # Of the page's own folder, or of the repository.
            assert any((folder / script).is_file() for folder in (block.page.parent, ROOT)), words


@pytest.mark.parametrize(
    "words", [["plan", "recipe.yaml", "--colour"], ["paln", "recipe.yaml"], ["apply"]], ids=str
)
def test_a_command_that_does_not_exist_is_noticed(words):
    with pytest.raises(Exception, match=r"No such|Missing|argument"):
        parse(words)


@of("yaml")
def test_recipes_are_recipes(block, tmp_path):
    data = yaml.safe_load(block.body)

    assert data
    if "models" in data:
        path = tmp_path / "recipe.yaml"
        path.write_text(block.body)
        assert load_recipe(path).models


@of("toml")
def test_toml_can_be_read(block):
    assert tomllib.loads(block.body)


def test_the_figures_are_there():
    """A page named above has a block of text and no Python that could have printed it."""
    for name in FIGURES:
        languages = {block.language for block in BLOCKS if block.page == ROOT / name}
        assert {"text"} == languages
