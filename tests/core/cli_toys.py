"""A plugin for the command line, with toy models to load and adapters that it reads and writes."""

import json
from pathlib import Path

import torch
from core.toys import Gate, Gated, Net, ToyPlugin, example
from torch import nn
from typer.testing import CliRunner

from surgery_core import Saved, hookimpl
from surgery_core.cli import app

PLUGIN = "from core.cli_toys import Plugin\n\nplugin = Plugin()\n"
"""Source of a module to install; its entry point is `plugin`."""


class Loud(Gate):
    """A gate that is open at first, so that outputs change, which operations must not do."""

    name = "loud"

    def build(self, site, _options):
        return Gated(site.module, gate=1.0)


class Savable(Gate):
    """A gate with a format of its own: a file of JSON."""

    name = "savable"

    def options_schema(self):
        return {"type": "object", "properties": {"value": {"type": "number"}}}

    def read_saved(self, source, _model, options):
        path = Path(source) / "gates.json"
        if not path.is_file():
            return None
        data = json.loads(path.read_text())
        state = {name: torch.tensor(value) for name, value in data["gates"].items()}
        return Saved(options={**data["options"], **options}, state=state)

    def write_saved(self, folder, options, modules):
        gates = {f"{fqn}.gate": module.gate.tolist() for fqn, module in modules.items()}
        Path(folder).mkdir(exist_ok=True)
        text = json.dumps({"options": dict(options), "gates": gates})
        (Path(folder) / "gates.json").write_text(text)


def make(seed=0):
    """Return the model that the source `net` gives, or another of its kind."""
    torch.manual_seed(seed)
    return Net().eval()


def unnamed():
    """Return a model that only the core knows how to find."""
    return make(seed=1)


class Plugin(ToyPlugin):
    """Knows sources that are called `net`, wherever they are, and how to call what they give."""

    def __init__(self):
        super().__init__(*ToyPlugin().offered, Loud(), Savable())

    @hookimpl
    def surgery_load_skeleton(self, source):
        if Path(source).name not in ("net", "skeleton"):
            return None
        with torch.device("meta"):
            return Net().eval()

    @hookimpl
    def surgery_load_model(self, source):
        return make() if Path(source).name == "net" else None

    @hookimpl
    def surgery_probe_inputs(self, model):
        assert isinstance(model, nn.Module)
        return {"x": example()}


def invoke(*arguments, **environment):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [*map(str, arguments)], env=environment)


def cells(text):
    """Return the cells of the rows of the tables in a text, headings included."""
    lines = [line.replace("┃", "│") for line in text.splitlines()]
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in lines if "│" in line]


RECIPE = """\
variables: {layers: "0..1", note: x}
models:
  chat:
    source: ./net
    rules:
      - {operation: shift, select: head}
    adapters:
      wide: {operation: gate, select: "layers.{${layers}}.up"}
      narrow: {operation: gate, select: layers.0.up}
    active: narrow
  code:
    source: core.cli_toys:unnamed
    adapters:
      shifted: {operation: shift, select: stem}
"""


def write(text, name="other.yaml"):
    """Write a file, and return its name."""
    Path(name).write_text(text)
    return name


def error(result):
    """Return what a command that failed says."""
    assert (1, "") == (result.exit_code, result.stdout), result.output
    return result.stderr
